"""HDF5 files from anybody, opened so that nothing in them can run, lead elsewhere, or take memory they do not fill.

This and `shards.py` are the only places that import h5py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np

CHUNK_AT_MOST = 64 << 20  # bytes that HDF5 holds at a time
# What h5py raises for a damaged file.
WRONG = (OSError, LookupError, ValueError, TypeError, RuntimeError, AttributeError, OverflowError)


def open_plain(path: Path) -> h5py.File:
    """An HDF5 file opened for reading. Raises OSError if it is none with checksums in its metadata."""
    with open(path, "rb") as file:
        head = file.read(9)
    if head[:8] != b"\x89HDF\r\n\x1a\n" or head[8] not in (2, 3):
        raise OSError("it is no HDF5 file as Trireme writes them (libver \"latest\")")
    return h5py.File(path, "r", locking=False)


def plain_dataset(file: h5py.File, name: str, size: int) -> h5py.Dataset:
    """A data set in this file, by its path there: nothing that lies elsewhere, nothing that needs a plugin to be read.

    size  bytes of the file, which what is in it cannot exceed

    Raises ValueError for links to other places or files, external or virtual storage, filters but fletcher32, and for
    shapes that the file cannot hold; KeyError if there is none.
    """
    at = file
    for part in name.split("/"):
        link = at.get(part, getlink=True)
        if link is None:
            raise KeyError(f"no '{name}' in it")
        if not isinstance(link, h5py.HardLink):
            raise ValueError(f"'{name}' is a {type(link).__name__}, which may lead anywhere")
        at = at[part]
        if not isinstance(at, h5py.Group | h5py.Dataset):
            raise ValueError(f"'{name}' is a {type(at).__name__}")
    if not isinstance(at, h5py.Dataset):
        raise ValueError(f"'{name}' is a group")
    made = at.id.get_create_plist()
    if made.get_external_count() or made.get_layout() == h5py.h5d.VIRTUAL:
        raise ValueError(f"'{name}' lies in other files")
    filters = {made.get_filter(index)[0] for index in range(made.get_nfilters())}
    if filters - {h5py.h5z.FILTER_FLETCHER32}:
        raise ValueError(f"'{name}' has filters {sorted(filters)}; only fletcher32 is read")
    row = at.dtype.itemsize * int(np.prod(at.shape[1:], dtype=object))
    holds = at.shape and row and at.shape[0] * row <= size and at.id.get_storage_size() <= size
    if not holds or at.dtype.kind not in "iufS":
        raise ValueError(f"'{name}' is {at.dtype} {at.shape}, which a file of {size:,} bytes does not hold")
    if at.chunks is not None and at.dtype.itemsize * int(np.prod(at.chunks, dtype=object)) > CHUNK_AT_MOST:
        raise ValueError(f"'{name}' is stored in chunks {at.chunks}, more than {CHUNK_AT_MOST:,} bytes each")
    return at


def hdf5_version() -> str:
    """HDF5's and h5py's versions, one line. Raises OSError if this HDF5 was built without fletcher32 checksums."""
    text = f"HDF5 {h5py.version.hdf5_version}, h5py {h5py.version.version}"
    if not h5py.h5z.filter_avail(h5py.h5z.FILTER_FLETCHER32):
        raise OSError(f"{text} has no fletcher32 filter, which every shard needs; install h5py from PyPI")
    return text


def plain_reader(path: Path, field: str) -> Callable[[int, int], np.ndarray]:
    """h5py's own `values[low:high]` of one shard file, nothing around it: the limit that benchmarks set beside ours."""
    values = h5py.File(path, "r", locking=False)[field]["values"]
    return lambda low, high: values[low:high]
