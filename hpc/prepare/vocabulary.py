"""Vocabularies: which words have a number of their own, counted from text or given."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc.files import sha256_of
from hpc.prepare.texts import checked_encoding
from hpc.shards import MANIFEST, DataError, read_manifest

LEAST = 3  # words of a vocabulary: an unknown one, a sentence's end, and one to tell them from


@dataclass(frozen=True)
class Vocabulary:
    """Words by number, the unknown word and the sentence's end among them.

    words         all different
    unknown       the number of the word that stands for all others
    sentence_end  the number of what stands after every line; None: lines are not told apart
    """

    words: tuple[str, ...]
    unknown: int
    sentence_end: int | None


@dataclass(frozen=True)
class Choice:
    """How a vocabulary is found; at most one of the first four.

    words         at most so many, the most frequent of the training text
    least         words that the training text has so many times or more
    file          a file with a word a line
    dataset       another data set of text, whose numbers are kept
    unknown       what the unknown word is called
    sentence_end  what stands after every line; None: nothing

    Raises ValueError for what contradicts itself.
    """

    words: int | None = None
    least: int | None = None
    file: Path | None = None
    dataset: Path | None = None
    unknown: str = "<unk>"
    sentence_end: str | None = "<eos>"

    def __post_init__(self) -> None:
        options = {
            "--words": self.words, "--min-count": self.least, "--vocabulary": self.file,
            "--vocabulary-from": self.dataset,
        }
        given = [name for name, value in options.items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} contradict each other; give one of them")
        if self.words is not None and self.words < LEAST:
            raise ValueError(f"--words {self.words}: expected {LEAST} or more")
        if self.least is not None and self.least < 1:
            raise ValueError(f"--min-count {self.least}: expected 1 or more")
        for option, word in (("--unknown", self.unknown), ("--sentence-end", self.sentence_end)):
            if word is not None and word.split() != [word]:
                raise ValueError(f"{option} '{word}': expected one word without spaces")
        if self.unknown == self.sentence_end:
            raise ValueError(f"--unknown and --sentence-end are both '{self.unknown}'; they must differ")

    @property
    def counted(self) -> bool:
        """Whether the training text's words must be counted first."""
        return self.file is None and self.dataset is None

    def options(self) -> dict[str, Any]:
        """What is chosen, in JSON; a file by what it holds. Raises OSError, DataError if it cannot be read."""
        made: dict[str, Any] = {"unknown": self.unknown, "sentence_end": self.sentence_end}
        if self.words is not None:
            made["words"] = self.words
        if self.least is not None:
            made["min_count"] = self.least
        if self.file is not None:
            made["vocabulary"] = {"file": self.file.name, "sha256": _digest(self.file)}
        if self.dataset is not None:
            made["vocabulary_from"] = named(self.dataset)
        return made

    def given(self, encoding: str) -> Vocabulary:
        """The vocabulary of the file or the data set. Raises DataError for one that cannot be used."""
        if self.dataset is not None:
            about = fields_of(self.dataset, "text")["words"]
            return Vocabulary(tuple(about["names"]), about["unknown"], about["sentence_end"])
        assert self.file is not None
        words = list(read_words(self.file, encoding))
        for word in (self.unknown, self.sentence_end):
            if word is not None and word not in words:
                words.append(word)
        end = None if self.sentence_end is None else words.index(self.sentence_end)
        return Vocabulary(tuple(words), words.index(self.unknown), end)

    def count(self, counts: Mapping[str, int], sentences: int) -> Vocabulary:
        """The vocabulary of a text: words by falling count, then by their letters.

        counts     word -> how often the text has it
        sentences  its lines, after which the sentence's end stands
        """
        total = Counter(counts)
        special = {self.unknown: total.pop(self.unknown, 0)}
        if self.sentence_end is not None:
            special[self.sentence_end] = total.pop(self.sentence_end, 0) + sentences
        kept = sorted((-count, word) for word, count in total.items() if count >= (self.least or 1))
        if self.words is not None:
            kept = kept[: self.words - len(special)]
        special[self.unknown] += total.total() + sum(count for count, _ in kept)  # counts of the kept are negative
        ranked = sorted([*kept, *((-count, word) for word, count in special.items())])
        words = tuple(word for _, word in ranked)
        end = None if self.sentence_end is None else words.index(self.sentence_end)
        return Vocabulary(words, words.index(self.unknown), end)


def fields_of(dataset: Path, kind: str) -> dict[str, Any]:
    """What a data set to take words from says of its fields. Raises DataError if it is of another kind."""
    manifest = read_manifest(dataset)
    if manifest.get("kind") != kind:
        raise DataError(
            f"'{dataset}' is a data set of kind '{manifest.get('kind')}', not of {kind}; give one that "
            f"'trireme prepare {kind}' wrote for --vocabulary-from"
        )
    return manifest["fields"]


def lower_of(lower: bool, dataset: Path | None, kind: str) -> bool:
    """Whether words are read in lower case: as in the data set of this kind that words are taken from, if there is one.

    Raises ValueError if that has capitals and `lower` is asked for, DataError as `fields_of`.
    """
    if dataset is None:
        return lower
    theirs = fields_of(dataset, kind)["words"]["description"]["lower"]
    if lower and not theirs:
        raise ValueError(f"--lower: the words of '{dataset}' are not in lower case; leave out --lower")
    return theirs


def named(dataset: Path) -> dict[str, str]:
    """A data set as it is kept among a preparation's options. Raises DataError if there is none."""
    read_manifest(dataset)
    return {"folder": dataset.name, "sha256": sha256_of(dataset / MANIFEST)}


def read_words(path: Path, encoding: str) -> dict[str, int]:
    """The first word of every line that has one, and its line. Raises DataError for one that appears twice."""
    codec = checked_encoding(encoding)
    found: dict[str, int] = {}
    try:
        lines = path.read_bytes().decode(codec).removeprefix("\ufeff").split("\n")
    except FileNotFoundError as error:
        raise DataError(f"there is no file '{path}' to read a vocabulary from") from error
    except UnicodeDecodeError as error:
        raise DataError(f"vocabulary '{path}' is not {codec} ({error}); give the files' own --encoding") from error
    for number, line in enumerate(lines, 1):
        word = next(iter(line.split()), None)
        if word is None:
            continue
        if word in found:
            raise DataError(f"vocabulary '{path}': '{word}' is in line {found[word]} and in line {number}; remove one")
        found[word] = number
    if not found:
        raise DataError(f"vocabulary '{path}' holds no words; give a word a line")
    return found


def _digest(path: Path) -> str:
    if not path.is_file():
        raise DataError(f"there is no file '{path}' to read a vocabulary from")
    return sha256_of(path)
