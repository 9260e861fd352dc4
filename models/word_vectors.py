"""Word vectors from a text file: "word v1 ... vD" a line, as GloVe and word2vec's text form have them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np


def read_vectors(path: str | Path, words: Iterable[str]) -> tuple[dict[str, np.ndarray], int]:
    """The vectors, float32 [D], of those words that have one, and D; the file's other words are skipped over.

    path   UTF-8 text; a first line "count D" (word2vec) is taken as such. A word that is there twice has its first
           vector
    words  the words that are wanted; none of them holds white space

    Raises ValueError, naming file and line, for a line of another width or what is not a finite number; OSError if the
    file cannot be read.
    """
    wanted = {word.encode(): word for word in words}
    found: dict[str, np.ndarray] = {}
    width = 0
    for number, line in _lines(Path(path)):
        if not width:
            parts = line.split()
            if number == 1 and len(parts) == 2 and all(part.isdigit() for part in parts):
                width = int(parts[1])
                continue
            width = len(parts) - 1
        word = wanted.get(line.split(maxsplit=1)[0])
        if word is None or word in found:
            continue
        parts = line.split()
        if len(parts) > width + 1:  # some files have words with spaces in them: this is another word
            continue
        found[word] = _vector(parts[1:], width, f"'{path}', line {number}: word '{word}'")
    if width < 1:
        raise ValueError(f"'{path}' holds no word vectors; expected 'word v1 ... vD' a line")
    return found, width


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line


def _vector(parts: list[bytes], width: int, where: str) -> np.ndarray:
    if len(parts) != width:
        raise ValueError(f"{where} has {len(parts)} values, expected {width} as in the file's first line")
    try:
        vector = np.array([float(part) for part in parts], np.float32)
    except ValueError as error:
        raise ValueError(f"{where}: {error}; expected {width} numbers after the word") from error
    if not np.isfinite(vector).all():
        raise ValueError(f"{where} holds NaN or infinity; remove the line")
    return vector
