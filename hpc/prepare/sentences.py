"""Labelled sentences as data sets, also for cross-validation: `trireme prepare sentences`.

A sentence is an utterance: its words' numbers are the rows of field "words", its class is the one row of field
"labels", which has rows of its own. Words are numbered by the training part; with word vectors, those of other parts
that have a vector follow; or another data set's numbers are kept. What is written is the same, byte for byte, for any
number of ranks. An interrupted preparation is continued by the same command.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from collectives.comm import Comm
from hpc.everywhere import made_everywhere
from hpc.files import sha256_of
from hpc.prepare import journal
from hpc.prepare.holdout import runs
from hpc.prepare.rounds import Advance, build_in_rounds
from hpc.prepare.sentence_lines import (
    Sentence,
    Text,
    check_labels,
    classes_of,
    deal,
    in_random_order,
    read_text,
    vocabulary,
)
from hpc.prepare.sentence_plan import Plan
from hpc.prepare.sentences_options import add_arguments as add_arguments
from hpc.prepare.sentences_options import choices_of, show
from hpc.prepare.vocabulary import Vocabulary
from hpc.shards import ShardWriter, read_manifest, shard_name, write_manifest
from models.word_vectors import read_vectors


def prepare_sentences(
    comm: Comm, file: Path, out: Path, *, overwrite: bool = False, quiet: bool = False, **choices: Any
) -> dict[str, Any]:
    """Write the data sets (collective; ranks share the shards).

    file       lines "label sentence"
    out        the folder of the data sets
    overwrite  remove what another preparation left in the sets' folders
    quiet      show no progress
    choices    what to make of the file: the other fields of `Plan`

    Returns {"state": "new", "continued" or "finished", "resumed": shards found finished, "sets": [{"set", "sentences",
    "words", "longest", "vocabulary", "unknown": share of words, "classes", "majority": [name, share]}], "notes",
    "seconds"}.
    Raises DataError, on every rank, for data that cannot be trained on or a folder that holds something else;
    ValueError; OSError; RootFailed on the ranks that did not fail themselves.
    """
    started = time.monotonic()
    plan = made_everywhere(comm, lambda: Plan(file, **choices))
    options = comm.on_root(plan.options)
    dealt = made_everywhere(comm, lambda: _dealt(plan))
    words = _numbered(comm, plan, dealt)
    most = max(len(held) for held in dealt.sets.values())
    cut = {name: runs(held, -(-plan.shards * len(held) // most)) for name, held in dealt.sets.items()}
    folders = {name: out / name for name in cut}
    mark = comm.on_root(lambda: journal.fingerprint(options, _lines(dealt.texts, cut, words)))
    state = comm.on_root(lambda: journal.claim(list(folders.values()), mark, options, overwrite))
    report: dict[str, Any] = {"state": state, "resumed": 0, "notes": _notes(dealt)}
    if state != "finished":
        class_of = {label: i for i, label in enumerate(dealt.classes)}

        def build(name: str, index: int, advance: Advance) -> dict[str, Any]:
            held = cut[name]
            return build_pair(held[index], folders[name], index, len(held), words[_fold_of(name)], class_of, advance)

        records, report["resumed"] = build_in_rounds(comm, folders, cut, mark, build, quiet, ("sentences", "words"))
        prepared = {**options, "notes": report["notes"], "fingerprint": mark}
        comm.on_root(lambda: _finish(folders, records, words, dealt.classes, prepared))
    report["sets"] = comm.on_root(lambda: [_summary(name, read_manifest(folder)) for name, folder in folders.items()])
    return {**report, "seconds": time.monotonic() - started}


class _Dealt(NamedTuple):
    """All files, the first to train on; the classes; the sets' sentences, in every fold those to train on first."""

    texts: list[Text]
    classes: list[str]
    sets: dict[str, list[Sentence]]


def _dealt(plan: Plan) -> _Dealt:
    given, lower = plan.given(), plan.case()
    texts = [read_text(path, plan.encoding, lower) for path in plan.files()]
    classes = classes_of(texts[0]) if given is None else given.classes
    check_labels(texts, classes, plan.vocabulary_from or plan.file)
    if plan.into is not None:
        return _Dealt(texts, classes, {plan.into: in_random_order(texts[0], plan.seed)})
    own = iter(texts[1:])
    judged, tested = (next(own) if isinstance(part, Path) else part for part in plan.parts)
    return _Dealt(texts, classes, deal(texts[0], judged, tested, plan.folds, plan.seed))


def _notes(dealt: _Dealt) -> list[str]:
    """What a user should know of the files."""
    notes = [text.note for text in dealt.texts if text.note]
    sentences = Counter(sentence.label for text in dealt.texts for sentence in text.sentences)
    once = sum(count == 1 for count in sentences.values())
    if once > len(sentences) / 2:
        notes.append(
            f"{once:,} of {len(sentences):,} classes have one sentence: the first word of every line is taken for its "
            "label; do the lines begin with labels?"
        )
    return notes


def _fold_of(name: str) -> str:
    """ "fold-00" for a set "fold-00/train", "" where there are no folds."""
    return name.rpartition("/")[0]


def _numbered(comm: Comm, plan: Plan, dealt: _Dealt) -> dict[str, Vocabulary]:
    """The words that each fold's sets are numbered by (collective)."""
    first: dict[str, list[Sentence]] = {}
    for name, held in dealt.sets.items():
        first.setdefault(_fold_of(name), held)
    given = plan.given()
    if given is not None:
        return dict.fromkeys(first, given.words)
    path = plan.vectors
    have: list[str] = [] if path is None else comm.on_root(lambda: _with_vectors(path, dealt.texts))
    return {
        fold: Vocabulary(tuple(vocabulary(held, plan.min_count, have)), unknown=0, sentence_end=None)
        for fold, held in first.items()
    }


def _with_vectors(path: Path, texts: Sequence[Text]) -> list[str]:
    return sorted(read_vectors(path, {word for t in texts for s in t.sentences for word in s.words})[0])


def _lines(
    texts: Sequence[Text], cut: Mapping[str, list[list[Sentence]]], words: Mapping[str, Vocabulary]
) -> list[str]:
    """What a preparation is told from another by, beside its options."""
    lines = [f"{text.encoding} {sha256_of(text.path)}" for text in texts]
    lines += [f"{name} {i} {s.key}" for name, held in cut.items() for i, piece in enumerate(held) for s in piece]
    return lines + [f"{fold} {word}" for fold, known in words.items() for word in known.words]


def build_pair(
    sentences: Sequence[Sentence], folder: Path, index: int, count: int, known: Vocabulary, class_of: dict[str, int],
    advance: Advance,
) -> dict[str, Any]:
    """Write the pair of shards `index` of `count`, and return its record.

    known     the words that have a number
    class_of  label -> class
    advance   called with the number of words after every sentence

    Returns {"files": [the words file's summary, the labels file's], "utterances", "frames": words, "longest", "words":
    occurrences of every number, "labels": sentences of every class}.
    """
    numbers = {word: number for number, word in enumerate(known.words)}
    words, labels = np.zeros(len(numbers), np.int64), np.zeros(len(class_of), np.int64)
    longest = 0
    word_file = ShardWriter(folder / shard_name("features", index, count), {"words": ((), np.int32)})
    label_file = ShardWriter(folder / shard_name("labels", index, count), {"labels": ((), np.int32)})
    with word_file, label_file:
        for sentence in sentences:
            ids = np.array([numbers.get(word, known.unknown) for word in sentence.words], np.int32)
            word_file.append(sentence.key, {"words": ids})
            label_file.append(sentence.key, {"labels": np.array([class_of[sentence.label]], np.int32)})
            np.add.at(words, ids, 1)
            labels[class_of[sentence.label]] += 1
            longest = max(longest, len(ids))
            advance(len(ids))
    return {
        "files": [word_file.summary, label_file.summary], "utterances": len(sentences), "frames": int(words.sum()),
        "longest": longest, "words": words.tolist(), "labels": labels.tolist(),
    }


def _finish(
    folders: dict[str, Path], records: dict[str, list[Any]], words: Mapping[str, Vocabulary], classes: list[str],
    prepared: dict[str, Any],
) -> None:
    """Write every set's manifest, then remove what only an unfinished preparation needs."""
    for name in reversed(folders):
        known = words[_fold_of(name)]
        counts = {what: [sum(c) for c in zip(*(r[what] for r in records[name]), strict=True)] for what in (
            "words", "labels")}
        write_manifest(folders[name], {
            "kind": "sentences",
            "fields": {
                "words": {
                    "dtype": "int32", "classes": len(known.words), "names": list(known.words),
                    "counts": counts["words"], "unknown": known.unknown,
                    "longest": max(record["longest"] for record in records[name]),
                    "description": {"lower": prepared["lower"]},
                },
                "labels": {
                    "dtype": "int32", "classes": len(classes), "names": classes, "counts": counts["labels"],
                    "rows": "sequence",
                },
            },
            "utterances": sum(record["utterances"] for record in records[name]),
            "frames": sum(record["frames"] for record in records[name]),
            "shards": [{"files": record["files"]} for record in records[name]],
            "prepared": prepared,
        })
    journal.close(list(folders.values()))


def _summary(name: str, manifest: dict[str, Any]) -> dict[str, Any]:
    words, labels = manifest["fields"]["words"], manifest["fields"]["labels"]
    most = max(range(labels["classes"]), key=lambda label: labels["counts"][label])
    return {
        "set": name, "sentences": manifest["utterances"], "words": manifest["frames"], "longest": words["longest"],
        "vocabulary": words["classes"], "unknown": words["counts"][words["unknown"]] / manifest["frames"],
        "classes": labels["classes"],
        "majority": [labels["names"][most], labels["counts"][most] / manifest["utterances"]],
    }


def run(args: argparse.Namespace, comm: Comm) -> int:
    """What `trireme prepare sentences` does (collective): 0. Raises as `prepare_sentences` does, on every rank."""
    report = prepare_sentences(comm, args.file, args.out, overwrite=args.overwrite, **choices_of(args))
    comm.on_root(lambda: show(report, args.out))
    return 0
