"""Text files as numbered lines: found, scanned once, read again in runs of lines from anywhere in them."""

from __future__ import annotations

import codecs
import gzip
import hashlib
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from collectives.comm import Comm
from hpc.shards import DataError

RUN_BYTES = 24 << 10  # of an utterance: about 4,096 words
CHUNK_BYTES = 1 << 20
Lines = tuple[int, int, int]  # a stretch: the file's number, its first line (from 0), the line after its last


@dataclass(frozen=True)
class Run:
    """Consecutive lines of a file: so many, after `skip` lines from byte `offset` on; `first` is counted from 1."""

    file: int
    offset: int
    skip: int
    first: int
    lines: int


class Texts:
    """Text files that were scanned.

    files     where they are, and what they are called in keys
    scans     of every file: "lines", "runs" (byte and line, from 0, that they begin at), "sha256"
    encoding  of all files
    lower     whether words are read in lower case
    """

    def __init__(self, files: Mapping[str, Path], scans: Sequence[Mapping[str, Any]], encoding: str, lower: bool):
        self.names, self.paths, self.scans = list(files), list(files.values()), scans
        self.encoding, self.lower = encoding, lower
        self._runs: dict[str, Run] = {}
        self._open: tuple[int, IO[bytes]] | None = None

    def keys(self, stretches: Iterable[Lines]) -> list[str]:
        """Keys of the utterances that stretches of lines are cut into: "file.txt:12", 12 being the first line."""
        found = []
        for file, low, high in stretches:
            begins = self.scans[file]["runs"]
            edges = [line for _, line in begins] + [self.scans[file]["lines"]]
            at = int(np.searchsorted(edges, low, side="right")) - 1
            while low < high:
                end = min(edges[at + 1], high)
                key = f"{self.names[file]}:{low + 1}"
                self._runs[key] = Run(file, begins[at][0], low - edges[at], low + 1, end - low)
                found.append(key)
                low, at = end, at + 1
        return found

    def load(self, key: str) -> Iterator[list[str]]:
        """The words of every line of an utterance. Raises DataError, naming file and line, for what is no text."""
        run = self._runs[key]
        lines = self._read(run)
        try:
            text = b"".join(lines).decode(self.encoding)
        except UnicodeDecodeError:
            raise self._complaint(run, lines) from None
        if run.first == 1:
            text = text.removeprefix("\ufeff")
        if self.lower:
            text = text.lower()
        return map(str.split, text.split("\n")[: run.lines])

    def close(self) -> None:
        if self._open:
            self._open[1].close()
            self._open = None

    def _read(self, run: Run) -> list[bytes]:
        if self._open is None or self._open[0] != run.file:
            self.close()
            self._open = (run.file, _opened(self.paths[run.file]))
        file = self._open[1]
        file.seek(run.offset)
        for _ in range(run.skip):
            file.readline()
        return [file.readline() for _ in range(run.lines)]

    def _complaint(self, run: Run, lines: Sequence[bytes]) -> DataError:
        for number, line in enumerate(lines, run.first):
            try:
                line.decode(self.encoding)
            except UnicodeDecodeError as error:
                near = line[max(0, error.start - 20) : error.end + 10].decode("ascii", "backslashreplace")
                return DataError(
                    f"'{self.paths[run.file]}', line {number}, is not {self.encoding}: byte {error.start} of it is "
                    f"0x{line[error.start]:02x} (in '{near.strip()}'); give the files' own --encoding, e.g. latin-1"
                )
        return DataError(f"'{self.paths[run.file]}', from line {run.first} on, is not {self.encoding}")


def scan_texts(comm: Comm, files: Mapping[str, Path], encoding: str, lower: bool) -> Texts:
    """Scan files, shared out over the ranks (collective).

    Raises ValueError for an encoding that is not known or does not end lines with the byte 10, DataError for a broken
    file, OSError for one that cannot be read.
    """
    codec = comm.on_root(lambda: checked_encoding(encoding))
    paths = list(files.values())
    answers = comm.each(lambda: [scan(paths[i]) for i in comm.mine(len(paths))])
    scans: list[dict[str, Any]] = [{} for _ in paths]
    for rank, part in enumerate(answers):
        scans[rank :: comm.size] = part
    return Texts(files, scans, codec, lower)


def scan(path: Path) -> dict[str, Any]:
    """A file's number of lines, where its runs of lines begin, and its SHA-256 (of what it holds, if compressed)."""
    digest = hashlib.sha256()
    runs: list[tuple[int, int]] = []
    lines, at, begin, last = 0, 0, 0, 10  # `begin`: where the line begins that is being read
    with _opened(path) as file:
        while chunk := _chunk(file, path):
            digest.update(chunk)
            ends = np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10) + at + 1
            # The lines that begin in this chunk: after every end but perhaps the chunk's last byte.
            for number, start in _run_starts(np.concatenate([[begin], ends]), runs[-1][0] if runs else -RUN_BYTES):
                if start < at + len(chunk):
                    runs.append((start, lines + number))
            if len(ends):
                begin = int(ends[-1])
            lines, at, last = lines + len(ends), at + len(chunk), chunk[-1]
    return {"lines": lines + (last != 10), "runs": runs, "sha256": digest.hexdigest()}


def _run_starts(starts: np.ndarray, previous: int) -> Iterator[tuple[int, int]]:
    """Which lines begin a run, RUN_BYTES or more after the one before: (index, byte)."""
    at = int(np.searchsorted(starts, previous + RUN_BYTES))
    while at < len(starts):
        yield at, int(starts[at])
        at = int(np.searchsorted(starts, int(starts[at]) + RUN_BYTES))


def _chunk(file: IO[bytes], path: Path) -> bytes:
    try:
        return file.read(CHUNK_BYTES)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"'{path}' is broken ({error}); fetch or compress it again") from error


def _opened(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")  # type: ignore[return-value]


def checked_encoding(encoding: str) -> str:
    """The encoding's own name. Raises ValueError if it is not known, or ends lines otherwise than with the byte 10."""
    try:
        name = codecs.lookup(encoding).name
        name = "utf-8" if name == "utf-8-sig" else name
        plain = "\n".encode(name) == b"\n"
    except LookupError as error:
        raise ValueError(f"--encoding {encoding}: not known; e.g. utf-8, latin-1, gb18030") from error
    if not plain:
        raise ValueError(f"--encoding {encoding}: its lines do not end with the byte 10; convert the files with iconv")
    return name


def find_texts(given: Mapping[str, Sequence[Path]]) -> dict[str, list[Path]]:
    """The files of every set, those of folders (and their folders) included, hidden ones left out.

    Raises DataError for one that is not there or given twice.
    """
    found: dict[str, list[Path]] = {}
    for name, paths in given.items():
        found[name] = []
        for path in paths:
            if path.is_dir():
                inside = sorted(p for p in path.rglob("*") if p.is_file())
                files = [p for p in inside if not any(part[0] == "." for part in p.relative_to(path).parts)]
            else:
                files = [path]
            if not all(file.is_file() for file in files):
                raise DataError(f"there is no file '{path}' to read text from")
            if not files:
                raise DataError(f"folder '{path}' holds no files to read text from")
            found[name] += files
    refuse_repeated([file for files in found.values() for file in files])
    return found


def refuse_repeated(files: Iterable[Path]) -> None:
    """Raise DataError for a file that is given twice, be it under two names."""
    seen: set[Path] = set()
    for file in files:
        if file.resolve() in seen:
            raise DataError(f"'{file}' is given twice; a text is for one set, once")
        seen.add(file.resolve())


def names_of(paths: Sequence[Path]) -> dict[str, Path]:
    """What files are called in keys: their names, with folders where names alone would not tell them apart."""
    short = {path.name: path for path in paths}
    return short if len(short) == len(paths) else {path.as_posix(): path for path in paths}
