"""Frames with labels, from sound files, Kaldi or Sphinx, as data sets: `trireme prepare frames`.

Utterances are written in a seeded shuffle of their sorted keys, and dealt to shards in contiguous runs of that order:
any contiguous run of a data set is a fair sample of it. Features are stored as they are; their mean and standard
deviation, of the training set alone, are in every set's `dataset.json`. What is written is the same, byte for byte, for
any number of ranks. An interrupted preparation is continued by the same command.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter as Tally
from pathlib import Path
from typing import Any

from collectives.comm import Comm
from hpc.prepare import journal, manifests
from hpc.prepare.frames_options import add_arguments as add_arguments
from hpc.prepare.frames_options import checked, holdout_of, show, source_of
from hpc.prepare.holdout import Holdout, runs, shuffled
from hpc.prepare.options import check_set
from hpc.prepare.pairs import Form, Source, build_pair
from hpc.prepare.rounds import Advance, build_in_rounds
from hpc.shards import DataError, read_manifest, write_manifest


def prepare_frames(
    comm: Comm, source: Source, out: Path, *, shards: int = 8, deltas: int = 0, validation: Holdout | None = None,
    seed: int = 0, into: str | None = None, stats_from: Path | None = None, overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Write the data sets OUT/train and OUT/validation, or OUT/`into` alone (collective; ranks share the shards).

    source      where utterances come from
    out         the folder of the data sets
    shards      pairs of shards a set has at most; a smaller set has fewer in proportion
    deltas      orders of deltas to add to the features: 0, 1 or 2
    validation  what to hold out; None: a tenth of the utterances
    seed        decides the order of utterances and, with the keys, what is held out
    into        write everything into this one set, and hold nothing out
    stats_from  a data set to take mean, standard deviation and class names from
    overwrite   remove what another preparation left in the sets' folders
    quiet       show no progress

    Returns {"state": "new", "continued" or "finished", "resumed": shards found finished, "sets": [{"set", "shards",
    "utterances", "frames", "hours", "classes", "present", "majority": [name, share]}], "notes", "seconds"}.
    Raises DataError, on every rank, for data that cannot be trained on or a folder that holds something else (then no
    `dataset.json` is written); OSError; RootFailed on the ranks that did not fail themselves.
    """
    started = time.monotonic()
    cut = comm.on_root(lambda: _cut(source, shards, validation or Holdout(fraction=0.1), seed, into))
    given = None if stats_from is None else comm.on_root(lambda: manifests.given_statistics(stats_from))
    names = comm.on_root(lambda: _names(source, given, stats_from))
    description = {**source.description, "deltas": deltas}
    if given is not None:
        comm.on_root(lambda: manifests.check_description(given["description"], description, Path(str(stats_from))))
    options = {
        "source": source.options, "shards": shards, "deltas": deltas, "seed": seed, "set": into,
        "validation": None if into else (validation or Holdout(fraction=0.1)).options(),
        "stats_from": None if given is None else {"folder": str(stats_from), "sha256": given["sha256"]},
    }
    folders = {name: out / name for name in cut}
    mark = comm.on_root(lambda: journal.fingerprint(options, _lines(source, cut)))
    state = comm.on_root(lambda: journal.claim(list(folders.values()), mark, options, overwrite))
    report: dict[str, Any] = {"state": state, "resumed": 0, "notes": list(source.notes)}
    if state != "finished":
        first = next(iter(cut.values()))[0][0]
        width = comm.on_root(lambda: _width(source, first, deltas, given))
        form = Form(width, first, None if names is None else len(names), deltas)
        records, report["resumed"] = _build(comm, source, folders, cut, form, mark, quiet)
        report["notes"] += _tallied(records)
        prepared = {**options, "notes": report["notes"], "fingerprint": mark}
        comm.on_root(lambda: _finish(folders, records, names, given, description, prepared))
    else:
        report["notes"] = comm.on_root(lambda: read_manifest(next(iter(folders.values())))["prepared"]["notes"])
    report["sets"] = comm.on_root(lambda: [_summary(name, read_manifest(folder)) for name, folder in folders.items()])
    return {**report, "seconds": time.monotonic() - started}


Cut = dict[str, list[list[str]]]  # set name -> its shards' keys, the set that statistics are computed from first


def _cut(source: Source, shards: int, validation: Holdout, seed: int, into: str | None) -> Cut:
    """The keys of every shard of every set. Raises DataError for no utterances or a key that appears twice."""
    if shards < 1:
        raise ValueError(f"--shards {shards}: expected at least 1")
    keys = source.keys()
    if not keys:
        raise DataError("there are no utterances to prepare" + "".join(f"; {note}" for note in source.notes))
    if len(set(keys)) < len(keys):
        twice = next(key for key, count in Tally(keys).items() if count > 1)
        raise DataError(f"key '{twice}' appears twice; keys must be unique")
    order = shuffled(keys, seed)
    if into is not None:
        check_set(into)
        return {into: runs(order, shards)}
    held = validation.choose(keys, seed)
    train = [key for key in order if key not in held]
    cut = {"train": runs(train, shards)}
    if held:
        in_proportion = max(1, -(-shards * len(held) // len(keys)))
        cut["validation"] = runs([key for key in order if key in held], in_proportion)
    return cut


def _lines(source: Source, cut: Cut) -> list[str]:
    keys = [f"{name} {i} {key}" for name, pieces in cut.items() for i, piece in enumerate(pieces) for key in piece]
    return keys + source.digest()


def _names(source: Source, given: dict[str, Any] | None, folder: Path | None) -> list[str] | None:
    """Class names as far as they are known beforehand. Raises DataError if two places disagree."""
    if given is None:
        return source.names
    if source.names is not None and source.names != given["names"]:
        raise DataError(
            f"the classes given ({len(source.names)}, first '{source.names[0]}') are not those of '{folder}' "
            f"({len(given['names'])}, first '{given['names'][0]}'); leave out --names and --classes to use the latter"
        )
    return list(given["names"])


def _width(source: Source, first: str, deltas: int, given: dict[str, Any] | None) -> int:
    """Values a frame before deltas, in the utterance `first`. Raises DataError if given statistics have another."""
    width = int(source.load(first)[0].shape[1])
    if given is not None and len(given["mean"]) != width * (1 + deltas):
        raise DataError(
            f"--stats-from has {len(given['mean'])} values a frame, these features have {width * (1 + deltas)} with "
            f"deltas = {deltas}; prepare both the same way"
        )
    return width


def _build(
    comm: Comm, source: Source, folders: dict[str, Path], cut: Cut, form: Form, mark: str, quiet: bool
) -> tuple[dict[str, list[Any]], int]:
    """Records of all shards, a list a set, and how many were found finished (collective)."""

    def build(name: str, index: int, advance: Advance) -> dict[str, Any]:
        return build_pair(source, cut[name][index], folders[name], index, len(cut[name]), form, advance)

    return build_in_rounds(comm, folders, cut, mark, build, quiet)


def _tallied(records: dict[str, list[Any]]) -> list[str]:
    total: Tally[str] = Tally()
    for record in (r for part in records.values() for r in part):
        total.update(record["tally"])
    return [f"{what}: {count}" for what, count in sorted(total.items())]


def _finish(
    folders: dict[str, Path], records: dict[str, list[Any]], names: list[str] | None, given: dict[str, Any] | None,
    description: dict[str, Any], prepared: dict[str, Any],
) -> None:
    """Write every set's manifest, the training set's last, then remove what only an unfinished preparation needs."""
    first = next(iter(folders))
    mean, std = (given["mean"], given["std"]) if given else manifests.mean_and_std(records[first])
    if names is None:
        names = [str(i) for i in range(len(manifests.class_counts([r for part in records.values() for r in part])))]
    for name in reversed(folders):
        manifest = manifests.frames_manifest(records[name], mean, std, names, description, prepared)
        write_manifest(folders[name], manifest)
    journal.close(list(folders.values()))


def _summary(name: str, manifest: dict[str, Any]) -> dict[str, Any]:
    labels, features = manifest["fields"]["labels"], manifest["fields"]["features"]
    most = max(range(labels["classes"]), key=lambda label: labels["counts"][label])
    return {
        "set": name, "shards": len(manifest["shards"]), "utterances": manifest["utterances"],
        "frames": manifest["frames"],
        "hours": manifest["frames"] / features["description"]["frames_per_second"] / 3600, "width": features["width"],
        "classes": labels["classes"], "present": sum(count > 0 for count in labels["counts"]),
        "majority": [labels["names"][most], labels["counts"][most] / manifest["frames"]],
    }


def run(args: argparse.Namespace, comm: Comm) -> int:
    """What `trireme prepare frames` does (collective): 0. Raises as `prepare_frames` does, on every rank."""
    stats_from = None if args.stats_from is None else Path(args.stats_from)
    given = None if stats_from is None else comm.on_root(lambda: manifests.given_statistics(stats_from)["names"])
    args = argparse.Namespace(**comm.on_root(lambda: checked(args)))
    holdout, out = holdout_of(args), Path(args.out)
    report = prepare_frames(
        comm, source_of(args, comm, given), out, shards=args.shards, deltas=args.deltas, validation=holdout,
        seed=args.seed, into=args.set, stats_from=stats_from, overwrite=args.overwrite,
    )
    comm.on_root(lambda: show(report, out))
    return 0
