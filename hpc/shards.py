"""Data sets on disk: the HDF5 schema, its writer and its reader.

A data set is a folder with `dataset.json` and pairs of shards `features-00000-of-00008.h5` and
`labels-00000-of-00008.h5`. Each file holds its utterances' `keys [n]` and ragged fields, a field being a group with
`values [rows, ...]` and `starts int64 [n + 1]`: utterance `i` is `values[starts[i]:starts[i + 1]]`. Labels can be
replaced (realignment) without rewriting features. Values are chunked with fletcher32 checksums; the manifest keeps
every file's size, row counts and SHA-256. Source: design, section 4.

Legend: U utterances, R rows (frames), D values a row.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hpc.files import sha256_of, temporary_of, write_sealed
from hpc.hdf5 import WRONG, open_plain, plain_dataset
from hpc.manifest import DataManifest, read_checked

SCHEMA = 2
MANIFEST = "dataset.json"
CHUNK_BYTES = 160 * 1024  # measured: the flat top of run-wise reading speed with fletcher32 on
FLUSH_BYTES = 8 << 20
REMEDY = "restore the file or run 'trireme prepare' again"


class DataError(ValueError):
    """Data that cannot be trained on; the message says what, got, expected, and what to do."""


def shard_name(kind: str, index: int, count: int) -> str:
    """`features-00000-of-00008.h5`"""
    return f"{kind}-{index:05d}-of-{count:05d}.h5"


class ShardWriter:
    """Writes one shard file; it appears under its name only when it is complete.

    Use as a context manager: `append` utterances, then read `summary` after the block.

    path    the file to write; an existing one is replaced
    fields  field name -> (shape of one row, dtype), e.g. {"features": ((40,), np.float32)}
    """

    def __init__(self, path: Path, fields: Mapping[str, tuple[tuple[int, ...], Any]]):
        self.path = path
        self.summary: dict[str, Any] = {}
        self._temporary = temporary_of(path)
        self._fields = {name: (tuple(shape), np.dtype(dtype)) for name, (shape, dtype) in fields.items()}
        self._keys: list[str] = []
        self._seen: set[str] = set()
        self._starts: dict[str, list[int]] = {name: [0] for name in fields}
        self._waiting: dict[str, list[np.ndarray]] = {name: [] for name in fields}
        self._waiting_bytes = dict.fromkeys(fields, 0)

    def __enter__(self) -> ShardWriter:
        self._file = h5py.File(self._temporary, "w", libver="latest")
        self._file.attrs["schema"] = SCHEMA
        for name, (shape, dtype) in self._fields.items():
            row_bytes = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
            chunk = (max(1, CHUNK_BYTES // row_bytes), *shape)
            group = self._file.create_group(name)
            group.create_dataset(
                "values", (0, *shape), dtype, maxshape=(None, *shape), chunks=chunk, fletcher32=True
            )
        return self

    def append(self, key: str, values: Mapping[str, np.ndarray]) -> None:
        """Add one utterance: for every field an array [rows, ...] of the field's row shape.

        Raises DataError for a repeated key, a missing field, a wrong row shape or an empty utterance.
        """
        if key in self._seen:
            raise DataError(f"utterance '{key}' appears twice; keys must be unique")
        if set(values) != set(self._fields):
            raise DataError(f"utterance '{key}' has fields {sorted(values)}, expected {sorted(self._fields)}")
        for name, array in values.items():
            shape, dtype = self._fields[name]
            if array.shape[1:] != shape:
                raise DataError(f"utterance '{key}': field '{name}' has rows {array.shape[1:]}, expected {shape}")
            if len(array) == 0:
                raise DataError(f"utterance '{key}': field '{name}' is empty (0 rows); leave the utterance out")
            self._waiting[name].append(np.asarray(array, dtype))
            self._waiting_bytes[name] += self._waiting[name][-1].nbytes
            self._starts[name].append(self._starts[name][-1] + len(array))
            if self._waiting_bytes[name] >= FLUSH_BYTES:
                self._flush(name)
        self._seen.add(key)
        self._keys.append(key)

    def _flush(self, name: str) -> None:
        if self._waiting[name]:
            block = np.concatenate(self._waiting[name])
            values = self._file[name]["values"]
            done = values.shape[0]
            values.resize(done + len(block), axis=0)
            values[done:] = block
            self._waiting[name].clear()
            self._waiting_bytes[name] = 0

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                for name in self._fields:
                    self._flush(name)
                    starts = np.array(self._starts[name], np.int64)
                    self._file[name].create_dataset("starts", data=starts, fletcher32=True)
                keys = np.array([k.encode() for k in self._keys], "S")
                self._file.create_dataset("keys", data=keys, maxshape=(None,), fletcher32=True)
            self._file.close()
            if kind is None:
                with open(self._temporary, "rb") as file:
                    os.fsync(file.fileno())
                self.summary = {
                    "name": self.path.name,
                    "rows": {name: starts[-1] for name, starts in self._starts.items()},
                    "utterances": len(self._keys),
                    "bytes": self._temporary.stat().st_size,
                    "sha256": sha256_of(self._temporary),
                }
                os.replace(self._temporary, self.path)
        finally:
            self._temporary.unlink(missing_ok=True)


class Dataset:
    """A data set opened for reading: rows of named fields by global row number, in contiguous runs.

    Opening reads the manifest and every shard's starts, and compares sizes and counts; `verify` reads everything.
    Not safe for two threads at once: open one a thread.

    folder  the data set's folder (what `trireme prepare` wrote)
    frame_fields  the fields that must have one row a frame, in step with each other
    targets       the fields that have rows of their own for every utterance (a sentence's label, a transcript)
    remedy        what to do about a damaged file, for the error
    """

    def __init__(
        self, folder: str | Path, frame_fields: Sequence[str] = ("features", "labels"), targets: Sequence[str] = (),
        remedy: str = REMEDY,
    ):
        self.folder, self.remedy = Path(folder), remedy
        self.manifest = read_manifest(self.folder)
        self.frame_fields, self.targets = tuple(frame_fields), tuple(targets)
        missing = [f for f in (*frame_fields, *targets) if f not in self.manifest["fields"]]
        if missing:
            raise DataError(
                f"data set '{self.folder}' has no field {missing}; it has {sorted(self.manifest['fields'])}"
            )
        self._open: dict[Path, h5py.File] = {}
        shards = range(len(self.manifest["shards"]))
        starts = [self._shard_starts(i) for i in shards]
        self.shard_utterances = np.concatenate([[0], np.cumsum([len(s) - 1 for s in starts])]).astype(np.int64)
        self.shard_rows, self.starts = _joined(starts)  # [shards + 1] and [U + 1], global rows
        self.target_starts = {}  # target -> int64 [U + 1], its own global rows
        self._rows_of = dict.fromkeys(self.frame_fields, self.shard_rows)
        for name in self.targets:
            own = [self._field_starts(i, name) for i in shards]
            self._rows_of[name], self.target_starts[name] = _joined(own)
            for shard, (mine, theirs) in enumerate(zip(own, starts, strict=True)):
                if len(mine) != len(theirs):
                    raise DataError(
                        f"shard '{self.folder / self._entry(shard, name)['name']}': field '{name}' has "
                        f"{len(mine) - 1} utterances, '{self.frame_fields[0]}' has {len(theirs) - 1}; {self.remedy}"
                    )

    @property
    def rows(self) -> int:
        """Frames in all shards."""
        return int(self.shard_rows[-1])

    @property
    def utterances(self) -> int:
        return len(self.starts) - 1

    def field(self, name: str) -> dict[str, Any]:
        """What the manifest says of a field: dtype, width or classes, mean, std, counts."""
        return self.manifest["fields"][name]

    def key(self, utterance: int) -> str:
        """The key of a global utterance number."""
        shard = int(np.searchsorted(self.shard_utterances, utterance, side="right")) - 1
        return self._keys(self._entry(shard, self.frame_fields[0]))[utterance - self.shard_utterances[shard]]

    def keys(self) -> list[str]:
        """All keys in order (reads every shard's key list)."""
        first = self.frame_fields[0]
        return [k for i in range(len(self.manifest["shards"])) for k in self._keys(self._entry(i, first))]

    def utterance_at(self, row: int) -> int:
        """The global utterance number that holds a global row."""
        return int(np.searchsorted(self.starts, row, side="right")) - 1

    def read(self, field: str, low: int, high: int, out: np.ndarray) -> None:
        """Read global rows [low, high) of a field into `out` [high - low, ...], in place, shard by shard.

        Rows of a target are counted by its own starts. Raises DataError, naming the file, if a checksum fails or the
        file is cut short.
        """
        at, rows = low, self._rows_of[field]
        while at < high:
            shard = int(np.searchsorted(rows, at, side="right")) - 1
            base, end = int(rows[shard]), min(high, int(rows[shard + 1]))
            path = self.folder / self._entry(shard, field)["name"]
            try:
                values = self._h5(path)[field]["values"]  # looked at when it was opened
                values.read_direct(out, np.s_[at - base : end - base], np.s_[at - low : end - low])
            except WRONG as error:
                raise DataError(
                    f"shard '{path}': field '{field}' rows {at - base}:{end - base} cannot be read ({error}); "
                    f"{self.remedy}"
                ) from error
            at = end

    def verify(self, shard: int, fields: Sequence[str] | None = None) -> None:
        """Read a shard pair whole: SHA-256 against the manifest, keys and starts of all fields in step.

        Raises DataError naming the file and the difference.
        """
        wanted = tuple(fields or (*self.frame_fields, *self.targets))
        entries = [self._entry(shard, f) for f in wanted]
        for entry in {e["name"]: e for e in entries}.values():
            found = sha256_of(self.folder / entry["name"])
            if found != entry["sha256"]:
                raise DataError(
                    f"shard '{self.folder / entry['name']}' is damaged: its SHA-256 is {found[:12]}..., "
                    f"{MANIFEST} says {entry['sha256'][:12]}...; {self.remedy}"
                )
        first = self._keys(entries[0])
        for field, entry in zip(wanted[1:], entries[1:], strict=True):
            keys = self._keys(entry)
            if keys != first:
                pairs = enumerate(zip(first, keys, strict=False))
                at = next((i for i, (a, b) in pairs if a != b), min(len(first), len(keys)))
                raise DataError(
                    f"shard '{entry['name']}': field '{field}' has other utterances than '{entries[0]['name']}' "
                    f"(first difference at utterance {at}); {self.remedy}"
                )

    def close(self) -> None:
        for file in self._open.values():
            file.close()
        self._open.clear()

    def _entry(self, shard: int, field: str) -> dict[str, Any]:
        for entry in self.manifest["shards"][shard]["files"]:
            if field in entry["rows"]:
                return entry
        raise DataError(f"'{self.folder / MANIFEST}': no file of shard {shard} has field '{field}'; {self.remedy}")

    def _h5(self, path: Path) -> h5py.File:
        if path not in self._open:
            if len(self._open) >= 32:  # a data set may have thousands of shards, a process not as many open files
                self._open.pop(next(iter(self._open))).close()
            self._open[path] = open_plain(path)
        return self._open[path]

    def _keys(self, entry: dict[str, Any]) -> list[str]:
        path = self.folder / entry["name"]
        try:
            keys = plain_dataset(self._h5(path), "keys", path.stat().st_size)
            if keys.shape != (entry["utterances"],):
                raise ValueError(f"keys are {keys.shape}, {MANIFEST} says {entry['utterances']} utterances")
            return [key.decode() for key in keys[:].tolist()]
        except WRONG as error:
            raise DataError(f"shard '{path}': keys cannot be read ({error}); {self.remedy}") from error

    def _shard_starts(self, shard: int) -> np.ndarray:
        """A shard's row starts [u + 1], the same for all frame fields."""
        first, *others = self.frame_fields
        starts = self._field_starts(shard, first)
        for field in others:
            own = self._field_starts(shard, field)
            if len(own) != len(starts) or (own != starts).any():
                raise DataError(
                    f"shard '{self.folder / self._entry(shard, field)['name']}': field '{field}' has {own[-1]} rows "
                    f"in {len(own) - 1} utterances, field '{first}' has {starts[-1]} in {len(starts) - 1}, or they end "
                    f"elsewhere; {self.remedy}"
                )
        return starts

    def _field_starts(self, shard: int, field: str) -> np.ndarray:
        """A shard's row starts [u + 1] of a field, checked against the manifest."""
        entry = self._entry(shard, field)
        path = self.folder / entry["name"]
        if not path.is_file():
            raise DataError(f"shard '{path}' is missing, {MANIFEST} lists it; {self.remedy}")
        if path.stat().st_size != entry["bytes"]:
            raise DataError(
                f"shard '{path}' has {path.stat().st_size} bytes, {MANIFEST} says {entry['bytes']} "
                f"(cut short or replaced); {self.remedy}"
            )
        try:
            file, size = self._h5(path), path.stat().st_size
            held, values = plain_dataset(file, f"{field}/starts", size), plain_dataset(file, f"{field}/values", size)
            about, rows = self.field(field), len(values)
            if values.dtype != about["dtype"] or values.shape[1:] != ((about["width"],) if "width" in about else ()):
                raise ValueError(f"values are {values.dtype} {values.shape}, {MANIFEST} describes others")
            if held.shape != (entry["utterances"] + 1,) or held.dtype != np.int64:
                raise ValueError(f"starts are {held.dtype} {held.shape}, expected int64 ({entry['utterances'] + 1},)")
            starts = held[:]
        except WRONG as error:
            raise DataError(f"shard '{path}': field '{field}' cannot be opened ({error}); {self.remedy}") from error
        if rows != entry["rows"][field] or starts[-1] != rows or len(starts) != entry["utterances"] + 1:
            raise DataError(
                f"shard '{path}': field '{field}' has {rows} rows and {len(starts) - 1} utterances, "
                f"{MANIFEST} says {entry['rows'][field]} rows and {entry['utterances']} utterances; {self.remedy}"
            )
        if starts[0] != 0 or (np.diff(starts) <= 0).any():
            raise DataError(f"shard '{path}': field '{field}' holds an empty utterance; {self.remedy}")
        return starts


def _joined(starts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Shards' row starts [u + 1] as the shards' first rows [shards + 1] and one list of starts [U + 1]."""
    rows = np.concatenate([[0], np.cumsum([s[-1] for s in starts])]).astype(np.int64)
    body = [s[1:] + base for s, base in zip(starts, rows[:-1], strict=True)]
    return rows, np.concatenate([[0], *body]).astype(np.int64)


def read_manifest(folder: Path) -> dict[str, Any]:
    """A data set's manifest. Raises DataError if it is missing, altered, of another schema, or no manifest at all."""
    path = folder / MANIFEST
    if not path.is_file():
        hint = [p.parent.name for p in folder.glob(f"*/{MANIFEST}")] if folder.is_dir() else []
        more = f"; it holds the data sets {sorted(hint)}" if hint else ""
        raise DataError(f"'{folder}' is not a data set: no {MANIFEST} in it{more}; make one with 'trireme prepare'")
    try:
        manifest = read_checked(path, DataManifest)
    except ValueError as error:
        raise DataError(f"'{path}' is not a data set manifest ({error}); {REMEDY}") from error
    if not manifest["shards"]:
        raise DataError(f"'{path}' lists no shards; {REMEDY}")
    return manifest


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write a data set's manifest, sealed, last of its files: from then on it is one."""
    write_sealed(folder / MANIFEST, {**manifest, "schema": SCHEMA})
