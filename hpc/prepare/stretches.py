"""Which lines of a text are held out: language text is not shuffled, so whole stretches of it are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hpc.prepare.texts import Lines
from hpc.shards import DataError

STRETCHES = 20  # that a set held out of a text consists of, at most


def hold_out(lengths: Sequence[int], held: Mapping[str, float]) -> dict[str, list[Lines]]:
    """Stretches of lines held out of files that are read as one text: set -> stretches; "" is what is left.

    The text is cut into even parts, 20 or as many as the smallest set has lines; the last lines of every part are held
    out, for the sets in their order.

    lengths  lines of every file
    held     set -> the fraction of all lines to hold out

    Raises ValueError for fractions that are none or take more than half, DataError for a text too short.
    """
    total = sum(lengths)
    wrong = [f"--{name} {fraction}" for name, fraction in held.items() if not 0 <= fraction < 1]
    if wrong or sum(held.values()) > 0.5:
        raise ValueError(
            f"{', '.join(wrong) or 'all that is held out together'}: expected a fraction of the lines from 0 to 0.5, "
            "e.g. 0.05, or a file"
        )
    lines = {name: max(1, round(total * fraction)) for name, fraction in held.items() if fraction}
    if 2 * sum(lines.values()) > total:
        raise DataError(
            f"the text has {total} lines, too few to hold out {' and '.join(lines)}; hold out nothing with "
            "--validation 0, give files of their own, or break lines with 'fold -s'"
        )
    parts = min([STRETCHES, *lines.values()])
    found: dict[str, list[Lines]] = {name: [] for name in ("", *lines)}
    for part in range(parts):
        at, end = total * part // parts, total * (part + 1) // parts
        sizes = {name: count * (part + 1) // parts - count * part // parts for name, count in lines.items()}
        for name, size in {"": end - at - sum(sizes.values()), **sizes}.items():
            found[name] += _in_files(lengths, at, at + size)
            at += size
    return found


def _in_files(lengths: Sequence[int], low: int, high: int) -> list[Lines]:
    """Lines [low, high) of files that are read as one text, file by file."""
    found, base = [], 0
    for file, length in enumerate(lengths):
        first, last = max(low - base, 0), min(high - base, length)
        if first < last:
            found.append((file, first, last))
        base += length
    return found
