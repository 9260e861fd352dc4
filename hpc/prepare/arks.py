"""Kaldi archives: the lines of an scp file, the keys of an ark file, and one value at a time.

Only numbers are read: an scp entry that is a command is refused, and so is an archive entry that holds a Python
object, because either would run code that came with the data.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import kaldiio.matio
import numpy as np

from hpc.prepare.journal import stamp
from hpc.shards import DataError

# path, ":offset" in bytes, "[first:last]" rows with the last one included
ENTRY = re.compile(r"(?P<path>.+?)(?::(?P<offset>\d+))?(?:\[(?P<first>\d+):(?P<last>\d+)\])?")


def read_scp(path: Path) -> dict[str, str]:
    """An scp file as {key: entry}, in the file's order.

    Raises DataError for a repeated key, a line without an entry, or an entry that is a command (`... |`).
    """
    entries: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        key, _, entry = line.strip().partition(" ")
        entry = entry.strip()
        if not entry or "|" in entry:
            raise DataError(
                f"'{path}' line {number}: utterance '{key}' has the entry '{entry}', expected 'archive.ark:offset'; "
                "commands are not run: write an archive first, e.g. with copy-feats ... ark,scp:feats.ark,feats.scp"
            )
        if key in entries:
            raise DataError(f"'{path}' line {number}: key '{key}' appears twice; keys must be unique")
        entries[key] = entry
    return entries


def read_entry(key: str, entry: str) -> np.ndarray:
    """The matrix [T, D] or vector [T] that an scp entry points to.

    Raises DataError, naming the utterance, if there is none or it cannot be read.
    """
    found = ENTRY.fullmatch(entry)
    assert found is not None
    try:
        with open(found["path"], "rb") as file:
            file.seek(int(found["offset"] or 0))
            value = read_value(file)
    except FileNotFoundError as error:
        raise _missing(key, found["path"]) from error
    except (OSError, ValueError, AssertionError, struct.error) as error:
        raise DataError(f"utterance '{key}': '{entry}' cannot be read ({error}); write the archive again") from error
    if found["first"] is not None:
        value = value[int(found["first"]) : int(found["last"]) + 1]
    return value


def stamps(entries: Mapping[str, str]) -> list[str]:
    """A line with size and time of change for every archive that scp entries point to, in the order of first mention.

    Raises DataError, naming an utterance, for an archive that is not there.
    """
    first: dict[str, str] = {}
    for key, entry in entries.items():
        found = ENTRY.fullmatch(entry)
        assert found is not None
        first.setdefault(found["path"], key)
    lines = []
    for path, key in first.items():
        try:
            lines.append(f"{path} {stamp(path)}")
        except FileNotFoundError as error:
            raise _missing(key, path) from error
    return lines


def _missing(key: str, path: str) -> DataError:
    return DataError(
        f"utterance '{key}': no file '{path}'; as in Kaldi, a relative path in an scp file starts at the folder the "
        "command is run in"
    )


def read_value(file: BinaryIO) -> np.ndarray:
    """The numbers at the file's position. Raises ValueError if something else is there, or less than announced."""
    flag = file.read(5)
    file.seek(-len(flag), 1)
    if flag[:2] != b"\0B" and not flag.lstrip().startswith(b"["):
        raise ValueError(f"it starts with {flag!r}, neither a binary nor a text matrix")
    return np.asarray(kaldiio.matio.read_kaldi(file))


def is_binary_ark(path: Path) -> bool:
    """Whether a file starts as a binary archive does: a key, a blank, and the binary mark."""
    with open(path, "rb") as file:
        return b" \0B" in file.read(4096).split(b"\n", 1)[0]


def index_ark(path: Path) -> dict[str, str]:
    """A binary archive's keys with their entries, {key: "path:offset"} (reads the archive once).

    Raises DataError for a repeated key or an archive that is cut short.
    """
    entries: dict[str, str] = {}
    with open(path, "rb") as file:
        key = None
        try:
            while (token := kaldiio.matio.read_token(file)) is not None:
                key, offset = token, file.tell()
                if key in entries:
                    raise DataError(f"'{path}': key '{key}' appears twice; keys must be unique")
                entries[key] = f"{path}:{offset}"
                read_value(file)
        except DataError:
            raise
        except (ValueError, AssertionError, struct.error) as error:
            raise DataError(f"'{path}': utterance '{key}' cannot be read ({error}); write the archive again") from error
    return entries
