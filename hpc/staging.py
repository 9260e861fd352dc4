"""Copying a data set to a node-local disk before training, once a host."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from collectives.comm import Comm
from hpc.shards import MANIFEST, DataError, read_manifest


def stage(source: Path, target: str, comm: Comm) -> Path:
    """The data set's copy below `target` on this host, made by the host's first rank if it is not there (collective).

    Each file is copied under a temporary name and renamed, the manifest last, so an interrupted copy is taken up where
    it stopped. Shards are verified afterwards like any others.

    Raises OSError if the copy fails, DataError if a file of the source is missing.
    """
    manifest_text = comm.on_root(lambda: (source / MANIFEST).read_text(encoding="utf-8"))
    digest = hashlib.sha256(manifest_text.encode()).hexdigest()[:16]
    place = Path(target) / f"trireme-{digest}"

    def copy() -> None:
        if comm.local_rank or (place / MANIFEST).exists():
            return
        place.mkdir(parents=True, exist_ok=True)
        for shard in read_manifest(source)["shards"]:
            for entry in shard["files"]:
                _copy(source / entry["name"], place / entry["name"], entry["bytes"])
        _copy(source / MANIFEST, place / MANIFEST, -1)

    comm.each(copy)
    return place


def _copy(source: Path, target: Path, size: int) -> None:
    if target.exists() and target.stat().st_size == size:
        return
    if not source.is_file():
        raise DataError(f"shard '{source}' is missing, {MANIFEST} lists it; run 'trireme prepare' again")
    temporary = target.with_name(f".{target.name}.tmp{os.getpid()}")
    try:
        shutil.copyfile(source, temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
