"""`trireme bench onebit`: 1-bit quantization and sums of it, beside a copy that moves as many bytes, numpy and torch.

All sides take turns in one process. The copy reads and writes together as many bytes as the kernel must: of `quantize`
values, residual, the residual again, and a packed row; of `accumulate` what is added to, twice, and one split's row; of
`accumulate fresh`, where sums begin at 0, the sums once and all splits' rows. numpy's side is `packbits` and
`unpackbits` with plain array operations around them; torch's is the kernels' reference, which serves where nothing was
compiled.

Every call takes the next of several sets of arrays, which together are larger than the last cache: so all of it comes
from memory, and goes there. With `--mib 0` there is one set, which stays in the caches if it is small enough.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from hpc.bench import quotient, say, spread, timed
from hpc.bench_options import UNITS
from hpc.quantities import counted
from kernels.onebit import Columns, accumulate_, quantize_, reference_accumulate_, reference_quantize_

TURN_S = 0.001  # a timing repeats what is quick until it takes about so long: others fall between timings
CACHE = 32 * UNITS["M"]  # bytes, where the system does not say
TIMES_CACHE = 4  # the default working set, in last caches
KERNELS = ("quantize", "accumulate", "accumulate fresh")

Packed = tuple[np.ndarray, np.ndarray, np.ndarray]  # numpy's: below, above [rows], bits [rows, bytes]


class Size(NamedTuple):
    """`rows` columns of `width` floats."""

    rows: int
    width: int

    @property
    def columns(self) -> Columns:
        return Columns.of([(0, (self.rows, self.width))])


class Arrays(NamedTuple):
    """What a call works on; all sides have the same."""

    values: torch.Tensor  # [rows * width]
    other: torch.Tensor  # [rows * width]: the residual, or the sums
    packed: torch.Tensor  # int32 [splits, packed]


def measure(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A record of every kernel, side, size and number of threads, and how many times as fast ours is.

    Raises ValueError if our side does not give the reference's bits.
    """
    sizes = [Size(*size) for size in arguments.sizes]
    asked = list(product(sizes, arguments.threads))
    enough = TIMES_CACHE * last_cache() if arguments.mib is None else arguments.mib * UNITS["M"]
    for number, (size, threads) in enumerate(asked):
        say(f"{number + 1} of {len(asked)}: {size.rows} x {size.width}, {counted(threads, 'thread')}")
        torch.set_num_threads(threads)
        sets = make_sets(size, arguments.splits, enough)
        check(size, sets[0])
        for kernel in KERNELS:
            moved = bytes_of(kernel, size, arguments.splits)
            seconds = timed(make_sides(kernel, size, sets, moved, enough), arguments.rounds, TURN_S)
            common = {
                "kernel": kernel, "rows": size.rows, "width": size.width, "threads": threads,
                "splits": _splits(kernel, arguments.splits), "bytes": moved, "sets": len(sets),
            }  # fmt: skip
            copy = spread(seconds["copy"])["median_s"]
            for impl, taken in seconds.items():
                times = spread(taken)
                rates = {"gbps": moved / times["median_s"] / 1e9, "copy_gbps": moved / copy / 1e9}
                yield {"what": "1-bit", "impl": impl, **common, **times, **rates}
            yield _summary(seconds, common)


def last_cache() -> int:
    """Bytes of the largest cache that the first core has."""
    found = [CACHE]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        digits = path.read_text(encoding="ascii").strip()
        found.append(int(digits[:-1]) * UNITS[digits[-1]] if digits[-1:] in UNITS else int(digits or 0))
    return max(found[1:], default=CACHE)


def make_sets(size: Size, splits: int, enough: int) -> list[Arrays]:
    """Arrays, and as many more of them as `enough` bytes take; at least one set."""
    random, columns = torch.Generator().manual_seed(1), size.columns
    sets: list[Arrays] = []
    while not sets or len(sets) * 8 * size.rows * size.width < enough:
        values, other = (torch.randn(size.rows * size.width, generator=random) for _ in range(2))
        sets.append(Arrays(values, other, torch.zeros((splits, columns.packed), dtype=torch.int32)))
        for row in sets[-1].packed:
            quantize_(values, other, columns, row)
    return sets


def check(size: Size, arrays: Arrays) -> None:
    """Whether our side and the reference give the same bits. Raises ValueError if not."""
    both = []
    for quantize, accumulate in ((quantize_, accumulate_), (reference_quantize_, reference_accumulate_)):
        left, packed, out = arrays.other.clone(), torch.zeros_like(arrays.packed[0]), arrays.values.clone()
        quantize(arrays.values, left, size.columns, packed)
        accumulate(out, arrays.packed, size.columns)
        both.append((left, packed, out))
    for name, ours, wanted in zip(("residual", "packed row", "sum"), *both, strict=True):
        if wrong := int((ours != wanted).sum()):
            raise ValueError(f"{size.rows} x {size.width}: {wrong:,} of {ours.numel():,} of the {name} differ")


def bytes_of(kernel: str, size: Size, splits: int) -> int:
    """What a kernel must read and write, together."""
    floats = {"quantize": 3, "accumulate": 2, "accumulate fresh": 1}[kernel] * size.rows * size.width
    return 4 * (floats + max(1, _splits(kernel, splits)) * size.columns.packed)


def _splits(kernel: str, splits: int) -> int:
    """How many splits' rows it adds up."""
    return {"quantize": 0, "accumulate": 1, "accumulate fresh": splits}[kernel]


def make_sides(kernel: str, size: Size, sets: list[Arrays], moved: int, enough: int) -> dict[str, Callable[[], object]]:
    """Every side as a call; ours is "trireme"."""
    columns, fresh, splits = size.columns, kernel == "accumulate fresh", _splits(kernel, len(sets[0].packed))
    turns = cycle(sets)
    copies = cycle([(torch.zeros(moved // 8), torch.ones(moved // 8)) for _ in range(max(1, -(-enough // moved)))])
    rows = [numpy_quantize(*(t.view(size).numpy().copy() for t in sets[0][:2]))] * splits

    def copy() -> None:
        source, target = next(copies)
        target.copy_(source)

    def quantize(act: Callable[..., object]) -> None:
        a = next(turns)
        act(a.values, a.other, columns, a.packed[0])

    def accumulate(act: Callable[..., object]) -> None:
        a = next(turns)
        act(a.other, a.packed[:splits], columns, fresh=fresh)

    def plain() -> None:
        a = next(turns)
        out = a.other.view(size).numpy()
        if kernel == "quantize":
            numpy_quantize(a.values.view(size).numpy(), out)
        else:
            numpy_accumulate(out, rows, fresh)

    if kernel == "quantize":
        ours, reference = partial(quantize, quantize_), partial(quantize, reference_quantize_)
    else:
        ours, reference = partial(accumulate, accumulate_), partial(accumulate, reference_accumulate_)
    return {"trireme": ours, "copy": copy, "numpy": plain, "torch": reference}


def numpy_quantize(values: np.ndarray, residual: np.ndarray) -> Packed:
    """The same with numpy, on [rows, width]; the residual in place."""
    v = values + residual
    high = v >= 0
    count = high.sum(1)
    above = np.where(high, v, 0).sum(1) / np.maximum(count, 1).astype(np.float32)
    below = np.where(high, 0, v).sum(1) / np.maximum(v.shape[1] - count, 1).astype(np.float32)
    np.subtract(v, np.where(high, above[:, None], below[:, None]), out=residual)
    return below, above, np.packbits(high, axis=1, bitorder="little")


def numpy_accumulate(out: np.ndarray, rows: list[Packed], fresh: bool) -> None:
    """The same with numpy, on [rows, width], in place."""
    if fresh:
        out.fill(0)
    for below, above, bits in rows:
        high = np.unpackbits(bits, axis=1, count=out.shape[1], bitorder="little").view(bool)
        out += np.where(high, above[:, None], below[:, None])


def _summary(seconds: dict[str, list[float]], common: dict[str, Any]) -> dict[str, Any]:
    """How near to the copy's speed ours is, and how many times as fast as numpy and torch."""
    record = {"what": "1-bit against others", **common, "pairs": len(seconds["trireme"])}
    record |= quotient(seconds["copy"], seconds["trireme"], "of_copy_bandwidth")
    for peer in ("numpy", "torch"):
        record |= quotient(seconds[peer], seconds["trireme"], f"times_{peer}")
    return record
