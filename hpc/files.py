"""Files that appear whole or not at all, their digests, and JSON from strangers. Only Python's own library."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import Any

SEAL, NO_SEAL = "seal", "0" * 64
SMALL = 1 << 20  # bytes


def temporary_of(path: Path) -> Path:
    """A name beside a file that nobody else takes, on whichever host, to write it under."""
    return path.with_name(f".{path.name}.tmp{os.getpid()}{secrets.randbelow(10**9)}")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file as 64 hexadecimal digits. Raises OSError if it cannot be read."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any, first: bool = False) -> bool:
    """Write JSON so that the file appears whole or not at all (temporary file, fsync, rename).

    first  only if there is no such file yet, whoever else tries at the same time

    Returns whether it was written.
    """
    return _write(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n", first)


def write_sealed(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object that says in "seal" what its own SHA-256 is (with 0s there), so that no byte can change."""
    text = json.dumps({**value, SEAL: NO_SEAL}, indent=1, ensure_ascii=False) + "\n"
    _write(path, text.replace(NO_SEAL, hashlib.sha256(text.encode()).hexdigest()))


def read_object(path: Path, at_most: int) -> dict[str, Any]:
    """A JSON object from a file that anybody may have written; a "seal" in it is checked.

    at_most  bytes that such a file may have

    Raises ValueError, saying what is wrong; OSError if it cannot be read.
    """
    try:
        text = read_start(path, at_most).decode()
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"a JSON {type(value).__name__}, expected an object")
    seal = value.pop(SEAL, None)
    if seal is not None:
        plain = text.replace(seal, NO_SEAL) if isinstance(seal, str) and len(seal) == len(NO_SEAL) else ""
        if hashlib.sha256(plain.encode()).hexdigest() != seal:
            raise ValueError(f"it was altered since it was written: its \"{SEAL}\" does not fit")
        value[SEAL] = seal
    return value


def read_start(path: Path, at_most: int) -> bytes:
    """A file whole, whatever it is (a pipe that nobody fills blocks nobody). Raises ValueError if it has more bytes."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        raw = file.read(at_most + 1) or b""
    if len(raw) > at_most:
        raise ValueError(f"it has more than {at_most:,} bytes")
    return raw


def _write(path: Path, text: str, first: bool = False) -> bool:
    temporary = temporary_of(path)
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if not first:
            os.replace(temporary, path)
            return True
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            if path.exists():
                return False
            os.replace(temporary, path)
        return True
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any] | None:
    """A small JSON file's object; None if there is none that can be read."""
    try:
        return read_object(path, SMALL)
    except (OSError, ValueError):
        return None
