"""Labelled sentences as data sets, also for cross-validation: `trireme prepare sentences`.

A sentence is an utterance: its words' numbers are the rows of field "words", its class is the one row of field
"labels", which has rows of its own. Words are numbered by the training part alone. What is written is the same, byte
for byte, for any number of ranks. An interrupted preparation is continued by the same command.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from collectives.comm import Comm
from hpc.prepare import journal
from hpc.prepare.holdout import runs
from hpc.prepare.rounds import Advance, build_in_rounds
from hpc.prepare.sentence_lines import UNKNOWN, Part, Sentence, Text, classes_of, deal, read_text, vocabulary
from hpc.prepare.sentences_options import add_arguments as add_arguments
from hpc.prepare.sentences_options import part_of, plain, show
from hpc.shards import MANIFEST, SCHEMA, ShardWriter, read_manifest, sha256_of, shard_name, write_json
from models.word_vectors import read_vectors


def prepare_sentences(
    comm: Comm, file: Path, out: Path, *, folds: int = 0, validation: Part = 0.1, test: Part = 0.0,
    encoding: str = "auto", min_count: int = 1, lower: bool = False, vectors: Path | None = None, seed: int = 0,
    shards: int = 1, overwrite: bool = False, quiet: bool = False,
) -> dict[str, Any]:
    """Write the data sets (collective; ranks share the shards).

    file              lines "label sentence"
    out               the folder of the data sets
    folds             parts to cut FILE into for cross-validation; 0: none
    validation, test  a fraction of FILE (0: none) or a file of its own; with folds, `validation` is a fraction of each
                      fold's training part and `test` is not given
    encoding          of all files; "auto": UTF-8, or latin-1 for a file that is not
    min_count         words that the training part has less often are unknown
    lower             put words into lower case
    vectors           a file of word vectors: words that have one are known
    seed              decides the order and what is held out
    shards            pairs of shards that the largest set has
    overwrite         remove what another preparation left in the sets' folders
    quiet             show no progress

    Returns {"state": "new", "continued" or "finished", "resumed": shards found finished, "sets": [{"set", "sentences",
    "words", "longest", "vocabulary", "unknown": share of words, "classes", "majority": [name, share]}], "notes",
    "seconds"}.
    Raises DataError, on every rank, for data that cannot be trained on or a folder that holds something else;
    ValueError; OSError; RootFailed on the ranks that did not fail themselves.
    """
    started = time.monotonic()
    _check(folds, validation, test, min_count, shards)
    texts, classes, sets = _dealt(comm, file, validation, test, folds, encoding, lower, seed)
    have: list[str] = [] if vectors is None else comm.on_root(lambda: _with_vectors(vectors, texts))
    names = {name: vocabulary(held, min_count, have) for name, held in sets.items() if name == _train_of(name)}
    most = max(len(held) for held in sets.values())
    cut = {name: runs(held, -(-shards * len(held) // most)) for name, held in sets.items()}
    folders = {name: out / name for name in cut}
    options = {
        "file": str(file), "folds": folds, "validation": plain(validation), "test": plain(test), "encoding": encoding,
        "min_count": min_count, "lower": lower, "seed": seed, "shards": shards,
        "vectors": None if vectors is None else str(vectors),
    }
    mark = comm.on_root(lambda: journal.fingerprint(options, _lines(texts, cut, names)))
    state = comm.on_root(lambda: journal.claim(list(folders.values()), mark, options, overwrite))
    report: dict[str, Any] = {"state": state, "resumed": 0, "notes": [text.note for text in texts]}
    if state != "finished":
        numbers = {name: {word: i for i, word in enumerate(words)} for name, words in names.items()}
        class_of = {label: i for i, label in enumerate(classes)}

        def build(name: str, index: int, advance: Advance) -> dict[str, Any]:
            known = numbers[_train_of(name)]
            return build_pair(cut[name][index], folders[name], index, len(cut[name]), known, class_of, advance)

        records, report["resumed"] = build_in_rounds(comm, folders, cut, mark, build, quiet, ("sentences", "words"))
        prepared = {**options, "notes": report["notes"], "fingerprint": mark}
        comm.on_root(lambda: _finish(folders, records, names, classes, {"lower": lower}, prepared))
    report["sets"] = comm.on_root(lambda: [_summary(name, read_manifest(folder)) for name, folder in folders.items()])
    return {**report, "seconds": time.monotonic() - started}


def _dealt(
    comm: Comm, file: Path, validation: Part, test: Part, folds: int, encoding: str, lower: bool, seed: int
) -> tuple[list[Text], list[str], dict[str, list[Sentence]]]:
    """All files, FILE first; the classes; the sets' sentences (collective). What is wrong is said once."""
    paths = [file, *(part for part in (validation, test) if isinstance(part, Path))]
    texts = _read_everywhere(comm, paths, encoding, lower)
    classes = comm.on_root(lambda: classes_of(texts[0], texts[1:]))
    given = iter(texts[1:])
    judged, tested = (next(given) if isinstance(part, Path) else part for part in (validation, test))
    made: list[dict[str, list[Sentence]]] = []

    def act() -> None:
        if not made:
            made.append(deal(texts[0], judged, tested, folds, seed))

    comm.on_root(act)
    comm.each(act)
    return texts, classes, made[0]


def _read_everywhere(comm: Comm, paths: Sequence[Path], encoding: str, lower: bool) -> list[Text]:
    """The files, read by every rank; what is wrong with them is said once (collective)."""
    texts: list[Text] = []

    def read() -> None:
        if not texts:
            texts.extend([read_text(path, encoding, lower) for path in paths])

    comm.on_root(read)
    comm.each(read)
    return texts


def _check(folds: int, validation: Part, test: Part, min_count: int, shards: int) -> None:
    for name, part in (("validation", validation), ("test", test)):
        if isinstance(part, float) and not 0 <= part < 1:
            raise ValueError(f"--{name} {part:g}: expected a fraction from 0 to below 1, or a file that exists")
    if folds and (folds < 2 or isinstance(validation, Path) or test):
        raise ValueError(
            f"--folds {folds}: expected at least 2, no --test, and a fraction for --validation: every fold's test set "
            "is a part of FILE"
        )
    for option, value in (("--min-count", min_count), ("--shards", shards)):
        if value < 1:
            raise ValueError(f"{option} {value}: expected at least 1")


def _train_of(name: str) -> str:
    return name[: name.rfind("/") + 1] + "train"


def _with_vectors(path: Path, texts: Sequence[Text]) -> list[str]:
    return sorted(read_vectors(path, {word for t in texts for s in t.sentences for word in s.words})[0])


def _lines(texts: Sequence[Text], cut: dict[str, list[list[Sentence]]], names: dict[str, list[str]]) -> list[str]:
    lines = [f"{text.encoding} {sha256_of(text.path)}" for text in texts]
    lines += [f"{name} {i} {s.key}" for name, held in cut.items() for i, piece in enumerate(held) for s in piece]
    return lines + [f"{name} {word}" for name, words in names.items() for word in words]


def build_pair(
    sentences: Sequence[Sentence], folder: Path, index: int, count: int, numbers: dict[str, int],
    class_of: dict[str, int], advance: Advance,
) -> dict[str, Any]:
    """Write the pair of shards `index` of `count`, and return its record.

    numbers   word -> number, the unknown word's among them
    class_of  label -> class
    advance   called with the number of words after every sentence

    Returns {"files": [the words file's summary, the labels file's], "utterances", "frames": words, "longest", "words":
    occurrences of every number, "labels": sentences of every class}.
    """
    words, labels = np.zeros(len(numbers), np.int64), np.zeros(len(class_of), np.int64)
    longest = 0
    word_file = ShardWriter(folder / shard_name("features", index, count), {"words": ((), np.int32)})
    label_file = ShardWriter(folder / shard_name("labels", index, count), {"labels": ((), np.int32)})
    with word_file, label_file:
        for sentence in sentences:
            ids = np.array([numbers.get(word, numbers[UNKNOWN]) for word in sentence.words], np.int32)
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
    folders: dict[str, Path], records: dict[str, list[Any]], names: dict[str, list[str]], classes: list[str],
    description: dict[str, Any], prepared: dict[str, Any],
) -> None:
    """Write every set's manifest, then remove what only an unfinished preparation needs."""
    for name in reversed(folders):
        words = names[_train_of(name)]
        counts = {what: [sum(c) for c in zip(*(r[what] for r in records[name]), strict=True)] for what in (
            "words", "labels")}
        write_json(folders[name] / MANIFEST, {
            "schema": SCHEMA,
            "kind": "sentences",
            "fields": {
                "words": {
                    "dtype": "int32", "classes": len(words), "names": words, "counts": counts["words"],
                    "unknown": words.index(UNKNOWN), "longest": max(r["longest"] for r in records[name]),
                    "description": description,
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
    comm.on_root(lambda: [plain(part_of(part)) for part in (args.validation, args.test)])
    report = prepare_sentences(
        comm, args.file, args.out, folds=args.folds, validation=part_of(args.validation), test=part_of(args.test),
        encoding=args.encoding, min_count=args.min_count, lower=args.lower, vectors=args.vectors, seed=args.seed,
        shards=args.shards, overwrite=args.overwrite,
    )
    comm.on_root(partial(show, report, args.out))
    return 0
