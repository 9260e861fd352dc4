"""What an unfinished preparation remembers in its folders, so that it can be continued, and be told from another one.

A set's folder holds `preparing.json` (the options, with their fingerprint) from the start to the end, and
`done-00000-of-00008.json` beside each finished pair of shards. `dataset.json` is written last; then these go.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hpc.files import sha256_of, write_json
from hpc.shards import MANIFEST, DataError, Dataset, read_manifest

PLAN = "preparing.json"
OURS = re.compile(r"dataset\.json|preparing\.json|done-\d+-of-\d+\.json|(features|labels)-\d+-of-\d+\.h5|\..+\.tmp\d+")


def fingerprint(options: Mapping[str, Any], lines: Iterable[str]) -> str:
    """SHA-256 of options (JSON) and any number of lines: keys in their order, digests of what is read."""
    digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode())
    for line in lines:
        digest.update(b"\n" + line.encode())
    return digest.hexdigest()


def stamp(path: str | Path) -> str:
    """A file's size in bytes and its time of change in nanoseconds: cheap, and enough to tell that it was replaced."""
    about = os.stat(path)
    return f"{about.st_size} {about.st_mtime_ns}"


def claim(folders: Sequence[Path], mark: str, options: Mapping[str, Any], overwrite: bool) -> str:
    """Make the folders ours: "finished" (this very preparation is done), "continued" or "new". Call on rank 0.

    folders    a folder a set
    mark       this preparation's fingerprint
    options    its options, to say what differs from another's
    overwrite  remove what other (or the same) preparations wrote

    Raises DataError if a folder holds anything else.
    """
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        _refuse_strangers(folder)
    if overwrite:
        for folder in folders:
            (folder / MANIFEST).unlink(missing_ok=True)  # first: what is being removed is no data set any more
            _remove(folder, OURS)
    found = [_other(folder, mark, options) for folder in folders]
    if all((folder / MANIFEST).exists() for folder in folders):
        for folder in folders:
            try:
                _open(folder).close()
            except DataError as error:
                raise DataError(f"{error}, with --overwrite") from error
        close(folders)
        return "finished"
    for folder in folders:
        _remove(folder, re.compile(r"\..+\.tmp\d+"))
        write_json(folder / PLAN, {"fingerprint": mark, "options": options})
    return "continued" if any(found) else "new"


def _open(folder: Path) -> Dataset:
    """A data set with all its fields, whatever they are."""
    fields = read_manifest(folder)["fields"]
    targets = [name for name, about in fields.items() if about.get("rows") == "sequence"]
    return Dataset(folder, [name for name in fields if name not in targets], targets)


def close(folders: Sequence[Path]) -> None:
    """Remove what only an unfinished preparation needs."""
    for folder in folders:
        _remove(folder, re.compile(r"done-\d+-of-\d+\.json|\..+\.tmp\d+"))
        (folder / PLAN).unlink(missing_ok=True)


def remember(folder: Path, index: int, count: int, mark: str, record: Mapping[str, Any]) -> None:
    """Keep the record of a finished pair of shards."""
    write_json(folder / _name(index, count), {"fingerprint": mark, **record})


def remembered(folder: Path, index: int, count: int, mark: str) -> dict[str, Any] | None:
    """The record of a pair of shards that was finished before and is still whole, or None."""
    try:
        record = json.loads((folder / _name(index, count)).read_text(encoding="utf-8"))
        if record.pop("fingerprint") != mark:
            return None
        whole = all(sha256_of(folder / file["name"]) == file["sha256"] for file in record["files"])
    except (OSError, ValueError, KeyError):
        return None
    return record if whole else None


def _name(index: int, count: int) -> str:
    return f"done-{index:05d}-of-{count:05d}.json"


def _remove(folder: Path, names: re.Pattern[str]) -> None:
    for path in folder.iterdir():
        if names.fullmatch(path.name):
            path.unlink(missing_ok=True)


def _refuse_strangers(folder: Path) -> None:
    strangers = sorted(p.name for p in folder.iterdir() if p.name[0] != "." and not OURS.fullmatch(p.name))
    if strangers:
        raise DataError(f"'{folder}' holds files that are no part of a data set: {strangers[:3]}; choose another OUT")


def _other(folder: Path, mark: str, options: Mapping[str, Any]) -> bool:
    """Whether the folder holds a part of this preparation. Raises DataError if it holds one of another."""
    shards = any(path.suffix == ".h5" and path.name[0] != "." for path in folder.iterdir())
    if (folder / PLAN).exists():
        if not shards and not (folder / MANIFEST).exists():
            return False  # it stopped before anything was written
        try:
            plan = json.loads((folder / PLAN).read_text(encoding="utf-8"))
            theirs, state = {**plan["options"], "fingerprint": plan["fingerprint"]}, "an unfinished preparation"
        except (ValueError, KeyError, TypeError):
            theirs, state = {}, "an unreadable preparation"
    elif (folder / MANIFEST).exists():
        theirs, state = read_manifest(folder).get("prepared", {}), "a finished data set"
    elif shards:
        theirs, state = {}, f"shards without {MANIFEST}"
    else:
        return False
    if theirs.get("fingerprint") != mark:
        raise DataError(
            f"'{folder}' holds {state}{_difference(theirs, options)}; choose another OUT, give the same options, or "
            "add --overwrite to remove it"
        )
    return True


def _difference(theirs: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    """Which options differ, in words."""
    if not theirs:
        return ""
    flat_theirs, flat_ours = _flat(theirs), _flat(options)
    names = [n for n in flat_ours if flat_theirs.get(n) != flat_ours[n]]
    if not names:
        return (
            " made with the same options from other data: since then utterances came or went, or a file that is read "
            "was changed (its content, its size or its time of change)"
        )
    said = [f"{n} was {flat_theirs.get(n)!r}, is {flat_ours[n]!r}" for n in names[:3]]
    return " made with other options: " + ", ".join(said)


def _flat(options: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in options.items():
        flat |= _flat(value, f"{before}{name}.") if isinstance(value, Mapping) else {f"{before}{name}": value}
    return flat
