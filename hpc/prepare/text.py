"""Running text for language models, from any text files, as data sets of words' numbers: `trireme prepare text`.

The order of the text is kept: language models read it as a stream. An utterance is a run of consecutive lines of about
4,096 words, named after its file and its first line. What is written is the same, byte for byte, for any number of
ranks. An interrupted preparation is continued by the same command.

Legend: V words of the vocabulary.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter as Tally
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from collectives.comm import Comm
from hpc.everywhere import made_everywhere
from hpc.prepare import journal
from hpc.prepare.holdout import runs
from hpc.prepare.rounds import Advance, build_in_rounds
from hpc.prepare.stretches import hold_out
from hpc.prepare.text_options import add_arguments as add_arguments
from hpc.prepare.text_options import checked, choice_of, files_of, show
from hpc.prepare.texts import Lines, Texts, find_texts, names_of, scan_texts
from hpc.prepare.vocabulary import Choice, Vocabulary, lower_of
from hpc.quantities import counted
from hpc.shards import DataError, ShardWriter, read_manifest, shard_name, write_manifest

Cut = dict[str, list[list[str]]]  # set -> its shards' utterances, the training set first

FEW = 100  # words of a set; fewer are no doubt a mistake


def prepare_text(
    comm: Comm, files: Mapping[str, Sequence[Path]], out: Path, *, held: Mapping[str, float] | None = None,
    vocabulary: Choice | None = None, encoding: str = "utf-8", lower: bool = False, shards: int = 8,
    overwrite: bool = False, quiet: bool = False,
) -> dict[str, Any]:
    """Write a data set OUT/SET a set (collective; ranks share the shards).

    files       set -> its text files, or folders of them; the first set is the one whose words are counted
    out         the folder of the data sets
    held        set -> the fraction of the first set's lines that is held out for it
    vocabulary  how it is chosen; None: every word of the first set
    encoding    of the files
    lower       whether to read words in lower case
    shards      files a set has at most; a smaller set has fewer in proportion
    overwrite   remove what another preparation left in the sets' folders
    quiet       show no progress

    Returns {"state": "new", "continued" or "finished", "resumed": shards found finished, "sets": [{"set", "shards",
    "sentences", "words", "vocabulary", "unknown": share}], "notes", "seconds"}.
    Raises DataError, on every rank, for text that cannot be read or a folder that holds something else (then no
    `dataset.json` is written); ValueError, OSError; RootFailed on the ranks that did not fail themselves.
    """
    started = time.monotonic()
    held, choice = held or {}, vocabulary or Choice()
    lower = comm.on_root(lambda: lower_of(lower, choice.dataset, "text"))
    found = comm.on_root(lambda: _as_text(find_texts(files)))
    texts = scan_texts(comm, names_of([Path(p) for paths in found.values() for p in paths]), encoding, lower)
    cut = made_everywhere(comm, lambda: _cut(texts, {name: len(paths) for name, paths in found.items()}, held, shards))
    options = comm.on_root(lambda: {
        "files": {name: [path.name for path in paths] for name, paths in files.items()}, "held": dict(held),
        "encoding": texts.encoding, "lower": lower, "shards": shards, **choice.options(),
    })
    folders = {name: out / name for name in cut}
    mark = journal.fingerprint(options, _lines(texts, cut))
    state = comm.on_root(lambda: journal.claim(list(folders.values()), mark, options, overwrite))
    report: dict[str, Any] = {"state": state, "resumed": 0}
    if state != "finished":
        words = _vocabulary(comm, texts, next(iter(cut.values())), choice)

        def build(name: str, index: int, advance: Advance) -> dict[str, Any]:
            return build_shard(texts, cut[name][index], folders[name], index, len(cut[name]), words, advance)

        records, report["resumed"] = build_in_rounds(comm, folders, cut, mark, build, quiet, ("pieces", "words"))
        description = {"lower": lower, "unit": "words"}
        prepared = {**options, "notes": _notes(records, words), "fingerprint": mark}
        comm.on_root(lambda: _finish(folders, records, words, description, prepared))
    texts.close()
    report["sets"] = comm.on_root(lambda: [_summary(name, read_manifest(folder)) for name, folder in folders.items()])
    report["notes"] = comm.on_root(lambda: read_manifest(next(iter(folders.values())))["prepared"]["notes"])
    return {**report, "seconds": time.monotonic() - started}


def _as_text(found: Mapping[str, Sequence[Path]]) -> dict[str, list[str]]:
    return {name: [str(path) for path in paths] for name, paths in found.items()}


def _cut(texts: Texts, counts: Mapping[str, int], held: Mapping[str, float], shards: int) -> Cut:
    """The utterances of every shard of every set.

    counts  set -> how many files, in their order, are its own

    Raises ValueError for shards that are none, DataError for a set without lines.
    """
    if shards < 1:
        raise ValueError(f"--shards {shards}: expected at least 1")
    stretches: dict[str, list[Lines]] = {}
    at = 0
    for name, count in counts.items():
        stretches[name] = [(file, 0, texts.scans[file]["lines"]) for file in range(at, at + count)]
        at += count
    for name, lines in stretches.items():
        if not any(high for _, _, high in lines):
            raise DataError(f"the files of set '{name}' are empty; there is no text to prepare")
    first = next(iter(counts))
    parts = hold_out([high for _, _, high in stretches[first]], held)
    stretches |= {(name or first): lines for name, lines in parts.items()}
    keys = {name: texts.keys(lines) for name, lines in stretches.items()}
    most = max(map(len, keys.values()))
    return {name: runs(found, -(-shards * len(found) // most)) for name, found in keys.items()}


def _lines(texts: Texts, cut: Cut) -> list[str]:
    """What a preparation is told from another by, beside its options."""
    keys = [f"{name} {i} {key}" for name, pieces in cut.items() for i, piece in enumerate(pieces) for key in piece]
    return keys + [scan["sha256"] for scan in texts.scans]


def _vocabulary(comm: Comm, texts: Texts, pieces: Sequence[Sequence[str]], choice: Choice) -> Vocabulary:
    """The vocabulary, given or counted from these shards' text (collective)."""
    if not choice.counted:
        about = comm.on_root(lambda: vars(choice.given(texts.encoding)))
        return Vocabulary(tuple(about["words"]), about["unknown"], about["sentence_end"])

    def count() -> list[Any]:
        total: Tally[str] = Tally()
        lines = 0
        for i in comm.mine(len(pieces)):
            for key in pieces[i]:
                for words in texts.load(key):
                    total.update(words)
                    lines += 1
        return [total, lines]

    everyone = comm.each(count)
    total: Tally[str] = Tally()
    for counts, _ in everyone:
        total.update(counts)
    comm.on_root(lambda: _refuse_nothing(total))
    return choice.count(total, sum(lines for _, lines in everyone))


def _refuse_nothing(counts: Mapping[str, int]) -> None:
    if not counts:
        raise DataError("the text to count words in has none, only empty lines; give text with words")


def build_shard(
    texts: Texts, keys: Sequence[str], folder: Path, index: int, count: int, vocabulary: Vocabulary, advance: Advance
) -> dict[str, Any]:
    """Write the shard `index` of `count`, and return its record.

    keys     its utterances, in order
    advance  called with the number of words after every utterance

    Returns {"files": [the file's summary], "utterances", "frames": words, "counts" [V], "sentences", "empty": lines
    without words}. Raises DataError, naming file and line, for what is no text; no file appears then.
    """
    numbers = {word: number for number, word in enumerate(vocabulary.words)}
    unknown, end = vocabulary.unknown, vocabulary.sentence_end
    counts = np.zeros(len(vocabulary.words), np.int64)
    sentences = empty = utterances = 0
    file = ShardWriter(folder / shard_name("labels", index, count), {"words": ((), np.int32)})
    with file:
        for key in keys:
            ids: list[int] = []
            for words in texts.load(key):
                ids += [numbers.get(word, unknown) for word in words]
                if end is not None:
                    ids.append(end)
                sentences += 1
                empty += not words
            if ids:  # without sentence ends, lines without words leave nothing
                row = np.array(ids, np.int32)
                file.append(key, {"words": row})
                counts += np.bincount(row, minlength=len(counts))
                utterances += 1
            advance(len(ids))
    return {
        "files": [file.summary], "utterances": utterances, "frames": int(counts.sum()), "counts": counts.tolist(),
        "sentences": sentences, "empty": empty,
    }


def _notes(records: Mapping[str, Sequence[Mapping[str, Any]]], vocabulary: Vocabulary) -> list[str]:
    """What a user should know of the text."""
    notes = []
    unseen = {}
    for name, part in records.items():
        empty = sum(record["empty"] for record in part)
        if empty:
            as_what = "left out" if vocabulary.sentence_end is None else "kept as sentence ends alone"
            notes.append(f"set '{name}': {empty:,} line{'s' * (empty != 1)} without words, {as_what}")
        words = sum(record["frames"] for record in part)
        if words < FEW:
            notes.append(f"set '{name}' has {counted(words, 'word')} only: too few to train on or to judge by")
        unseen[name] = not sum(record["counts"][vocabulary.unknown] for record in part)
    first, *others = unseen
    if unseen[first] and not all(unseen[name] for name in others):
        notes.append(
            f"set '{first}' has no unknown words, so a model cannot learn when to expect one; cut the vocabulary with "
            "--min-count 2 or --words"
        )
    return notes


def _finish(
    folders: dict[str, Path], records: Mapping[str, Sequence[Mapping[str, Any]]], vocabulary: Vocabulary,
    description: Mapping[str, Any], prepared: Mapping[str, Any],
) -> None:
    """Write every set's manifest, the training set's last, then remove what only an unfinished preparation needs."""
    made = {name: text_manifest(records[name], vocabulary, description, prepared) for name in folders}
    for name, manifest in made.items():
        if not manifest["frames"]:
            raise DataError(f"set '{name}' has no words, only empty lines; give text with words")
    for name in reversed(folders):
        write_manifest(folders[name], made[name])
    journal.close(list(folders.values()))


def text_manifest(
    records: Sequence[Mapping[str, Any]], vocabulary: Vocabulary, description: Mapping[str, Any],
    prepared: Mapping[str, Any],
) -> dict[str, Any]:
    """The manifest of one set.

    records      its shards' records, in order
    description  how words were read
    prepared     the options it was prepared with
    """
    return {
        "kind": "text",
        "fields": {
            "words": {
                "dtype": "int32", "classes": len(vocabulary.words), "names": list(vocabulary.words),
                "counts": np.sum([record["counts"] for record in records], axis=0).tolist(),
                "unknown": vocabulary.unknown, "sentence_end": vocabulary.sentence_end,
                "description": dict(description),
            },
        },
        "utterances": sum(record["utterances"] for record in records),
        "frames": sum(record["frames"] for record in records),
        "sentences": sum(record["sentences"] for record in records),
        "shards": [{"files": record["files"]} for record in records],
        "prepared": dict(prepared),
    }


def _summary(name: str, manifest: Mapping[str, Any]) -> dict[str, Any]:
    words = manifest["fields"]["words"]
    return {
        "set": name, "shards": len(manifest["shards"]), "sentences": manifest["sentences"],
        "words": manifest["frames"], "vocabulary": words["classes"],
        "unknown": words["counts"][words["unknown"]] / manifest["frames"],
    }


def run(args: argparse.Namespace, comm: Comm) -> int:
    """What `trireme prepare text` does (collective): 0. Raises as `prepare_text` does, on every rank."""
    args = argparse.Namespace(**comm.on_root(lambda: checked(args)))
    files, held = files_of(args)
    out = Path(args.out)
    report = prepare_text(
        comm, files, out, held=held, vocabulary=choice_of(args), encoding=args.encoding, lower=args.lower,
        shards=args.shards, overwrite=args.overwrite,
    )
    comm.on_root(lambda: show(report, out))
    return 0
