"""Copying a data set to a node-local disk before training, once a host."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

from collectives.comm import Comm
from hpc.files import sha256_of
from hpc.pulse import Pulse
from hpc.shards import MANIFEST, REMEDY, DataError, read_manifest


def stage(source: Path, target: str, comm: Comm, pulse: Pulse) -> Path:
    """The data set's copy below `target` on this host, made or completed by the host's first rank (collective).

    source  the data set's folder
    target  a folder on a disk of this host; the copy's name below it depends on the manifest alone

    Raises what `copy_dataset` raises; RootFailed on the ranks that did not fail themselves.
    """
    place = Path(target) / comm.on_root(lambda: staged_name(source))
    comm.each(lambda: copy_dataset(source, place, pulse) if comm.local_rank == 0 else None)
    return place


def staged_name(source: Path) -> str:
    """What the copy of a data set is called: another manifest, another name. Raises DataError if there is none."""
    read_manifest(source)
    return f"trireme-{sha256_of(source / MANIFEST)[:16]}"


def copy_dataset(source: Path, place: Path, pulse: Pulse) -> None:
    """Copy a data set to the folder `place`, leaving out files that are there already in their full size.

    Each file is copied under a temporary name, made durable and renamed, the manifest last: an interrupted copy is
    taken up where it stopped. The content of shards is not compared here; `Dataset.verify` does it.

    Raises DataError if a file of the source is missing or has another size than its manifest says, OSError if the copy
    fails.
    """
    place.mkdir(parents=True, exist_ok=True)
    with pulse.working():
        for shard in read_manifest(source)["shards"]:
            for entry in shard["files"]:
                pulse.beat(f"copying '{source / entry['name']}'")
                _copy(source / entry["name"], place / entry["name"], entry["bytes"])
        _copy(source / MANIFEST, place / MANIFEST, (source / MANIFEST).stat().st_size)


def _copy(source: Path, target: Path, size: int) -> None:
    if target.is_file() and target.stat().st_size == size:
        return
    if not source.is_file():
        raise DataError(f"shard '{source}' is missing, {MANIFEST} lists it; {REMEDY}")
    if source.stat().st_size != size:
        raise DataError(
            f"shard '{source}' has {source.stat().st_size} bytes, {MANIFEST} says {size} (cut short or replaced); "
            f"{REMEDY}"
        )
    temporary = target.with_name(f".{target.name}.tmp-{socket.gethostname()}-{os.getpid()}")
    try:
        shutil.copyfile(source, temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
