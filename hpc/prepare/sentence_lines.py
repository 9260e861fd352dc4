"""Labelled sentences from text, "label sentence" a line: read, dealt to sets, and their words numbered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from hpc.prepare.holdout import Holdout, runs, shuffled
from hpc.prepare.labels import some
from hpc.shards import DataError

UNKNOWN = "<unk>"


class Sentence(NamedTuple):
    """key: "FILE:LINE"."""

    key: str
    label: str
    words: list[str]


@dataclass
class Text:
    """A file's sentences, in order, and the encoding it was read in; `note` says why it was not UTF-8, or nothing."""

    path: Path
    encoding: str
    sentences: list[Sentence]
    note: str


def read_text(path: Path, encoding: str = "auto", lower: bool = False) -> Text:
    """Read a file of lines "label sentence"; words are what white space (Unicode's) separates.

    encoding  "auto": UTF-8, or latin-1 if it is not; else a name that Python knows
    lower     put words into lower case

    Raises DataError, naming file and line, for what cannot be decoded, a line without a label or without words, or
    first words that can be no labels; ValueError for an encoding that is not known; OSError.
    """
    content, encoding, why = _decoded(path, encoding)
    lines = content.removeprefix("\ufeff").split("\n")  # not splitlines: latin-1's 0x85 stands within sentences
    while lines and not lines[-1].strip():
        lines.pop()
    sentences = []
    for number, line in enumerate(lines, 1):
        label, *words = line.split() or [""]
        if not words:
            what = f"has label '{label}' and no words" if label else "is blank: it has no label"
            raise DataError(f"'{path}', line {number} {what}; expected 'label sentence', or leave the line out")
        sentences.append(Sentence(f"{path.name}:{number}", label, [w.lower() for w in words] if lower else words))
    if not sentences:
        raise DataError(f"'{path}' is empty; expected 'label sentence' a line")
    labels = {sentence.label for sentence in sentences}
    if len(labels) > 10 and 2 * len(labels) > len(sentences):
        raise DataError(
            f"'{path}': the first words of its {len(sentences)} lines are {len(labels)} different ones "
            f"({some(sorted(labels))}), so they can be no labels; expected 'label sentence' a line"
        )
    return Text(path, encoding, sentences, f"'{path}' was read as {encoding}: {why}" if why else "")


def _decoded(path: Path, encoding: str) -> tuple[str, str, str]:
    """A file's text, the encoding taken, and why that is not UTF-8 where it was to be found out."""
    raw = path.read_bytes()
    first = "utf-8" if encoding == "auto" else encoding
    try:
        return raw.decode(first), first, ""
    except LookupError as error:
        raise ValueError(f"--encoding {encoding}: not known; expected auto, utf-8, latin-1, cp1252, ...") from error
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        if encoding == "auto":
            return raw.decode("latin-1"), "latin-1", f"line {line} is not UTF-8"
        raise DataError(
            f"'{path}', line {line} cannot be decoded as {encoding} (byte 0x{raw[error.start]:02x}: {error.reason}); "
            "give another --encoding, or auto"
        ) from error


def classes_of(text: Text) -> list[str]:
    """The classes of sentences to train on, sorted: by value if all are whole numbers, else as words.

    Raises DataError for fewer than two.
    """
    found = {sentence.label for sentence in text.sentences}
    if len(found) < 2:
        raise DataError(f"'{text.path}': all sentences have label '{found.pop()}'; there is nothing to tell apart")
    whole = all(label.removeprefix("-").isdecimal() for label in found)
    return sorted(found, key=lambda label: (int(label) if whole else 0, label))


def check_labels(texts: Iterable[Text], classes: Sequence[str], whose: Path) -> None:
    """Raise DataError, naming file and line, for a label that is not among the classes of a file or data set."""
    for text in texts:
        for sentence in text.sentences:
            if sentence.label not in classes:
                raise DataError(
                    f"'{text.path}', line {sentence.key.rpartition(':')[2]} has label '{sentence.label}', which "
                    f"'{whose}' has not; it has {some(classes, 5)}"
                )


def deal(
    text: Text, validation: float | Text, test: float | Text, folds: int, seed: int
) -> dict[str, list[Sentence]]:
    """The sets by name, each in a random order that the seed decides: any contiguous run of it is a fair sample.

    text              the sentences to deal out
    validation, test  a fraction of them to take (of what is not test), or a file's
    folds             0, or into how many parts to cut a random order (not stratified) for cross-validation: each is the
                      test set of one fold, whose sets are called "fold-00/train" ..., and `validation` is a fraction of
                      the others, drawn anew for every fold

    Raises DataError if a set would be empty.
    """
    keys = [sentence.key for sentence in text.sentences]
    if folds > len(keys) // 2:
        raise DataError(f"--folds {folds}: '{text.path}' has {len(keys)} sentences only")
    by_key = {sentence.key: sentence for sentence in text.sentences}
    order = shuffled(keys, seed)
    named: dict[str, list[str]] = {}
    for fold, held in enumerate(runs(order, folds) if folds else [[]]):
        before = f"fold-{fold:0{max(2, len(str(folds - 1)))}d}/" if folds else ""
        taken = set(held) if folds else _choose(keys, test, seed)
        rest = [key for key in order if key not in taken]
        judged = _choose(rest, validation, seed * max(1, folds) + fold)
        named[f"{before}train"] = [key for key in rest if key not in judged]
        named[f"{before}validation"] = [key for key in rest if key in judged]
        named[f"{before}test"] = [key for key in order if key in taken]
    sets = {name: [by_key[key] for key in held] for name, held in named.items() if held}
    for name, given in (("validation", validation), ("test", test)):
        if isinstance(given, Text):
            sets[name] = in_random_order(given, seed)
    return sets


def in_random_order(text: Text, seed: int) -> list[Sentence]:
    """A file's sentences in a random order that the seed decides."""
    own = {sentence.key: sentence for sentence in text.sentences}
    return [own[key] for key in shuffled(list(own), seed)]


def _choose(keys: Sequence[str], part: float | Text, seed: int) -> set[str]:
    return Holdout(fraction=part).choose(keys, seed) if isinstance(part, float) else set()


def vocabulary(sentences: Iterable[Sentence], least: int, vectors: Collection[str] = ()) -> list[str]:
    """Words by number: the unknown word, those of these sentences from the most frequent, others that have a vector.

    sentences  what is trained on
    least      words that occur less often here, and have no vector, are unknown
    vectors    words to take in any case: their vectors need no training

    Words of the same frequency are in the order of their characters' numbers.
    """
    counts = Counter(word for sentence in sentences for word in sentence.words)
    counts.pop(UNKNOWN, None)
    have = set(vectors) - {UNKNOWN}
    known = [word for word, count in counts.items() if count >= least or word in have]
    return [UNKNOWN, *sorted(known, key=lambda w: (-counts[w], w)), *sorted(have - counts.keys())]
