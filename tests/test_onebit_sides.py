"""The sides of the 1-bit kernels beside their reference, bit for bit: for every kind of processor, and CUDA's."""

from __future__ import annotations

import ctypes
import shutil
import subprocess

import cuda_on_cpu
import pytest
import torch
from test_onebit_kernel import (
    COLUMNS,
    FLOATS,
    SPECIAL,
    bits,
    levels_of,
    made,
    quantized,
    row_of,
    rows_of,
    split,
)

from kernels import gpu, native, onebit
from kernels.onebit import Columns, accumulate_, quantize_, reference_accumulate_, reference_quantize_

needs_library = pytest.mark.skipif(native.library() is None, reason="the CPU library was not built")

SHORT = Columns.of([(1, (3, 40)), (130, (1, 33)), (170, (2, 1)), (172, (2, 300)), (772, (2, 32)), (840, (1, 600))])


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def same(found, wanted):
    """Whether two results of `quantized` are the same, bit for bit."""
    assert found[0] == wanted[0] and torch.equal(found[1], wanted[1])
    assert (found[2] is None) == (wanted[2] is None)
    assert found[2] is None or torch.equal(bits(found[2]), bits(wanted[2]))


# -- the CPU side -----------------------------------------------------------------------------------------------------


@needs_library
def test_the_library_gives_the_bits_of_the_reference(monkeypatch):
    values, residual = made()
    wanted = [quantized(reference_quantize_, values, kept) for kept in (residual, None)]
    sums = [summed(reference_accumulate_, *case) for case in CASES]
    monkeypatch.setattr(onebit, "reference_quantize_", None)  # the library serves, or this fails
    monkeypatch.setattr(onebit, "reference_accumulate_", None)
    for shift in (0, 1, 3):  # where the memory begins
        moved = [torch.cat([torch.zeros(shift), t])[shift:] for t in (values, residual)]
        same(quantized(quantize_, *moved), wanted[0])
        same(quantized(quantize_, moved[0], None), wanted[1])
    for case, total in zip(CASES, sums, strict=True):
        assert torch.equal(bits(summed(accumulate_, *case)), bits(total)), case


# How many rows, which of them are dry, whether sums begin at 0.
CASES = [
    (number, dry, fresh)
    for number, dry in ((0, ()), (1, ()), (1, (0,)), (2, ()), (3, ()), (3, (0, 2)), (4, ()), (9, (4,)))
    for fresh in (False, True)
]


def summed(act, number, dry, fresh, columns=COLUMNS):
    out = made(columns, seed=3)[0]
    act(out, rows_of(number, columns, dry), columns, fresh=fresh)
    return out


@needs_library
def test_the_number_of_threads_changes_no_bit(monkeypatch):
    monkeypatch.setattr(onebit, "ENOUGH", 1)
    for columns in (COLUMNS, Columns.of([(9, (1, 100_000))]), Columns.of([(900, (3, 5))]), Columns([])):
        values, residual = made(columns)
        wanted = quantized(quantize_, values, residual, columns), summed(accumulate_, 5, (1,), False, columns)
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            assert onebit._threads(columns) == (threads if columns.count else 1)
            same(quantized(quantize_, values, residual, columns), wanted[0])
            assert torch.equal(bits(summed(accumulate_, 5, (1,), False, columns)), bits(wanted[1]))
        torch.set_num_threads(1)


@needs_library
def test_every_thread_tells_what_is_not_finite(monkeypatch):
    monkeypatch.setattr(onebit, "ENOUGH", 1)
    torch.set_num_threads(3)
    values, residual = made()
    for start in COLUMNS.starts:
        kept, values[start] = values[start].clone(), float("nan")
        assert not quantized(quantize_, values, residual)[0], start
        values[start] = kept
    assert quantized(quantize_, values, residual)[0]


def test_without_the_library_the_reference_serves(monkeypatch):
    values, residual = made()
    wanted, total = quantized(quantize_, values, residual), summed(accumulate_, 3, (1,), True)
    monkeypatch.setattr(onebit.native, "library", lambda: None)
    same(quantized(quantize_, values, residual), wanted)
    assert torch.equal(bits(summed(accumulate_, 3, (1,), True)), bits(total))


def test_the_reference_serves_other_types():
    values, residual = (t.double() for t in made())
    packed, out = row_of(COLUMNS), torch.zeros(FLOATS, dtype=torch.float64)
    assert quantize_(values, residual, COLUMNS, packed)
    accumulate_(out, packed[None], COLUMNS)
    for column, (below, above) in zip(split(out), levels_of(packed), strict=True):
        assert set(column.tolist()) <= {below.item(), above.item()}


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """The CPU side as it is for every kind of processor that this one can stand for."""
    if not shutil.which("g++"):
        pytest.skip("there is no g++ here")
    able = torch.backends.cpu.get_cpu_capability()
    kinds = {"AVX512": ("any", "wider", "newest"), "AVX2": ("any", "wider")}.get(able, ("any",))
    found, folder = {}, tmp_path_factory.mktemp("onebit")
    for kind in kinds:
        flags = ("-O3", "-std=c++17", "-ffp-contract=off", "-fno-trapping-math", "-fopenmp", "-fPIC", "-shared", "-w")
        built = folder / f"{kind}.so"
        command = ["g++", *flags, f"-DONLY={kind}", "-o", built, gpu.SOURCES / "onebit.cpp"]
        subprocess.run(command, check=True, timeout=120)
        found[kind] = ctypes.CDLL(str(built))
        for name in ("trireme_onebit_quantize", "trireme_onebit_accumulate"):
            getattr(found[kind], name).argtypes, getattr(found[kind], name).restype = native.FUNCTIONS[name]
    return found


def test_every_kind_of_processor_gives_the_same_bits(sides, monkeypatch):
    values, residual = made()
    wanted = [quantized(reference_quantize_, values, kept) for kept in (residual, None)]
    sums = [summed(reference_accumulate_, *case) for case in CASES]
    for kind, side in sides.items():
        monkeypatch.setattr(onebit.native, "library", lambda side=side: side)
        same(quantized(quantize_, values, residual), wanted[0])
        same(quantized(quantize_, values, None), wanted[1])
        for case, total in zip(CASES, sums, strict=True):
            assert torch.equal(bits(summed(accumulate_, *case)), bits(total)), (kind, case)
        for value in SPECIAL:
            values[-18] = value  # the last column's last
            assert not quantized(quantize_, values, residual)[0], (kind, value)
        values = made()[0]


# -- the CUDA side, on the CPU ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cuda(tmp_path_factory):
    if cuda_on_cpu.missing():
        pytest.skip(cuda_on_cpu.missing())
    return cuda_on_cpu.build("onebit.cu", tmp_path_factory.mktemp("onebit_cuda"))


@pytest.fixture
def on_cuda(cuda, monkeypatch):
    """Makes the CUDA side serve: on_cuda(threads, descending); returns the grids of what was launched."""
    grids = []

    def choose(threads, descending):
        def launch(source, function, blocks, threads, arguments, device):
            assert source == "onebit.cu"
            grids.append(blocks)
            cuda.launch(function, blocks, threads, arguments, descending)

        monkeypatch.setattr(onebit, "THREADS", threads)
        monkeypatch.setattr(onebit.gpu, "serves", lambda tensor: True)
        monkeypatch.setattr(onebit.gpu, "launch", launch)
        monkeypatch.setattr(onebit.native, "library", None)  # not asked for
        return grids

    return choose


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("threads", [32, 64, 256])
def test_the_cuda_source_gives_the_bits_of_the_reference(on_cuda, threads, descending, monkeypatch):
    values, residual = made(SHORT)
    grids = on_cuda(threads, descending)
    for kept in (residual, None):
        same(quantized(quantize_, values, kept, SHORT), quantized(reference_quantize_, values, kept, SHORT))
    assert grids == [(-(-SHORT.count * 32 // threads), 1)] * 2
    for words, shares in ((64, 1), (1, 19), (8, 3)):
        monkeypatch.setattr(onebit, "WORDS", words)
        for case in ((0, ()), (1, ()), (3, ()), (4, (0, 2))):
            for fresh in (False, True):
                found = summed(accumulate_, *case, fresh, SHORT)
                assert torch.equal(bits(found), bits(summed(reference_accumulate_, *case, fresh, SHORT)))
        assert grids[-1] == (grids[0][0], shares)
    monkeypatch.setattr(onebit, "WARPS", 2 * SHORT.count)
    monkeypatch.setattr(onebit, "WORDS", 1)
    assert torch.equal(summed(accumulate_, 2, (), True, SHORT), summed(reference_accumulate_, 2, (), True, SHORT))
    assert grids[-1][1] == 2


def test_the_cuda_source_tells_what_is_not_finite(on_cuda):
    on_cuda(64, True)
    for width in (1, 33, 300):
        columns = Columns.of([(5, (3, width))])
        for at in sorted({0, width - 1, 3 * width - 1}):
            for value in SPECIAL:
                values, residual = made(columns)
                assert quantize_(values, residual.clone(), columns, row_of(columns))
                values[5 + at] = value
                assert not quantize_(values, residual, columns, row_of(columns)), (width, at, value)


def test_the_cuda_side_of_no_columns(on_cuda):
    grids, values = on_cuda(64, False), torch.full((5,), float("nan"))
    finite, packed, _ = quantized(quantize_, values, values.clone(), Columns([]))
    assert finite and packed.tolist() == [1]
    accumulate_(values, packed[None], Columns([]), fresh=True)
    assert values.isnan().all() and not grids


def test_the_cuda_side_reads_rows_that_lie_apart_and_leaves_padding_alone(on_cuda):
    on_cuda(256, False)
    wide = torch.full((2, SHORT.packed + 5), -1, dtype=torch.int32)
    rows = wide[:, 2 : 2 + SHORT.packed]
    rows.copy_(rows_of(2, SHORT))
    out = torch.full((SHORT.end + 17,), float("nan"))
    accumulate_(out, rows, SHORT, fresh=True)
    inside = torch.zeros_like(out, dtype=torch.bool)
    for column in split(inside, SHORT):
        column.fill_(True)
    assert torch.equal(out.isnan(), ~inside)
