"""Frame labels by utterance, from text lines or Kaldi archives; names of classes; lists of keys."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from hpc.files import sha256_of
from hpc.prepare.arks import index_ark, is_binary_ark, read_entry, read_scp, stamps
from hpc.shards import DataError


class LabelFiles:
    """Labels of every utterance in one or several files, looked up by key; memory holds the keys alone.

    paths  each a Kaldi scp file (by its name), a binary archive of int vectors (by its content), or text with a line
           `key 3 3 4 ...` an utterance

    Raises DataError for a key that appears twice, OSError if a file cannot be read.
    """

    def __init__(self, paths: Sequence[Path]):
        self.paths = list(paths)
        self._entries: dict[str, str] = {}
        self._listed: dict[str, str] = {}  # those entries that an scp file lists: the archives are files of their own
        self._lines: dict[str, tuple[Path, int]] = {}  # text: the file and the byte its line starts at
        for path in self.paths:
            if path.suffix == ".scp":
                listed = read_scp(path)
                self._add_entries(path, listed)
                self._listed |= listed
            elif is_binary_ark(path):
                self._add_entries(path, index_ark(path))
            else:
                self._add_lines(path)

    def __iter__(self) -> Iterator[str]:
        yield from self._entries
        yield from self._lines

    def __contains__(self, key: str) -> bool:
        return key in self._entries or key in self._lines

    def digest(self, keys: Iterable[str]) -> list[str]:
        """Lines that change when a file of labels, or an archive that these keys' labels are read from, changes.

        Raises DataError, naming an utterance, for an archive that is not there.
        """
        listed = {key: self._listed[key] for key in keys if key in self._listed}
        return [*(sha256_of(path) for path in self.paths), *stamps(listed)]

    def load(self, key: str) -> np.ndarray:
        """The labels of one utterance, int64 [T]. Raises DataError, naming it, if they are not whole numbers."""
        if key in self._entries:
            labels = read_entry(key, self._entries[key])
            if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
                raise DataError(
                    f"utterance '{key}': its labels are {labels.dtype} of shape {labels.shape}, expected a vector of "
                    "whole numbers; give an alignment archive, e.g. one written by ali-to-pdf"
                )
            return labels.astype(np.int64)
        path, offset = self._lines[key]
        with open(path, "rb") as file:
            file.seek(offset)
            tokens = file.readline().split()[1:]
        try:
            return np.array([int(token) for token in tokens], np.int64)
        except (ValueError, OverflowError) as error:
            raise DataError(f"utterance '{key}' in '{path}': labels must be whole numbers ({error})") from error

    def _add_entries(self, path: Path, entries: dict[str, str]) -> None:
        for key, entry in entries.items():
            self._refuse_repeated(path, key)
            self._entries[key] = entry

    def _add_lines(self, path: Path) -> None:
        offset = 0
        with open(path, "rb") as file:
            if file.read(2) == b"\x1f\x8b":
                raise DataError(f"'{path}' is compressed, labels must be plain; run gunzip on it first")
            file.seek(0)
            for line in file:
                words = line.split(maxsplit=1)
                if words:
                    try:
                        key = words[0].decode()
                    except UnicodeDecodeError as error:
                        raise DataError(f"'{path}' is neither a text file in utf-8 nor a binary archive") from error
                    self._refuse_repeated(path, key)
                    self._lines[key] = (path, offset)
                offset += len(line)

    def _refuse_repeated(self, path: Path, key: str) -> None:
        if key in self:
            raise DataError(f"'{path}': key '{key}' appears twice; give every utterance's labels once")


def check_lengths(key: str, frames: int, labels: int, advice: str) -> None:
    """Raise DataError, naming the utterance and both counts, unless there is one label a frame."""
    if frames != labels:
        raise DataError(
            f"utterance '{key}' has {frames} feature frames and {labels} labels, expected one label a frame; {advice}"
        )


def read_names(path: Path) -> list[str]:
    """Names of classes, one a line, line i naming class i; an index column beside the names is taken off.

    Raises DataError for a name that appears twice or a file without names.
    """
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    rows = [line.split() for line in lines]
    for column in (0, 1):
        if rows and all(len(row) == 2 for row in rows):
            by_index = {row[column]: row[1 - column] for row in rows}
            if set(by_index) == {str(i) for i in range(len(rows))}:
                lines = [by_index[str(i)] for i in range(len(rows))]
                break
    repeated = sorted({name for name in lines if lines.count(name) > 1}) if len(set(lines)) < len(lines) else []
    if repeated or not lines:
        raise DataError(f"'{path}' has {len(lines)} names, repeated are {repeated[:3]}; give one a line, each once")
    return lines


def read_keys(path: Path) -> list[str]:
    """Keys of utterances, the first word of every line. Raises DataError for one that appears twice."""
    keys = [line.split()[0] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(set(keys)) < len(keys):
        seen: set[str] = set()
        first = next(key for key in keys if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise DataError(f"'{path}': key '{first}' appears twice; keys must be unique")
    return keys


def some(keys: Sequence[str], count: int = 3) -> str:
    """The first few of a list, for a message: `'a', 'b', 'c' and 12 more`."""
    shown = ", ".join(f"'{key}'" for key in keys[:count])
    return shown + (f" and {len(keys) - count} more" if len(keys) > count else "")
