"""The kernels of a block's update: near to the reference in float64, the same bits on all sides."""

from __future__ import annotations

import cuda_on_cpu
import numpy as np
import pytest
import torch

from kernels import block, native
from kernels.block import BlockConstants, block_, depart_, reference_block_, reference_depart_

CONSTANTS = BlockConstants(scale=1 / 96, momentum=0.9, rate=1.1, keep=0.999, ahead=0.7)
SIZES = (0, 1, 7, 64, 1000, 100_001)


def made(size, dtype=torch.float32):
    """A total, weights, a change, room for a start."""
    random = torch.Generator().manual_seed(size)
    total, weights, change, start = (torch.randn(size, generator=random).to(dtype) for _ in range(4))
    return total * 50, weights, change / 10, start


def after(act, tensors, constants=CONSTANTS):
    total, *rest = (t.clone() for t in tensors)
    assert act(total, *rest, constants)
    assert torch.equal(total, tensors[0])
    return rest


def test_near_to_the_reference_in_float64_and_the_same_bits_as_in_float32():
    for size in SIZES:
        tensors = made(size)
        exact = after(reference_block_, [t.double() for t in tensors])
        found, wanted = after(block_, tensors), after(reference_block_, tensors)
        assert all(map(torch.equal, found, wanted)), size
        for one, two in zip(found, exact, strict=True):
            torch.testing.assert_close(one.double(), two, rtol=1e-5, atol=1e-6)
        out, other = (torch.empty(size) for _ in range(2))
        depart_(tensors[1], tensors[3], 37.0, out)
        reference_depart_(tensors[1], tensors[3], 37.0, other)
        assert torch.equal(out, other)


def test_slices_give_the_same_bits_as_the_whole():
    tensors = made(5000)
    whole = after(block_, tensors)
    for low, high in ((0, 1024), (1024, 4999), (4999, 5000)):
        parts = after(block_, [t[low:high] for t in tensors])
        assert all(torch.equal(part, t[low:high]) for part, t in zip(parts, whole, strict=True))


def test_every_argument_counts():
    tensors = made(1000)
    before = after(block_, tensors)
    for name in BlockConstants._fields:
        changed = CONSTANTS._replace(**{name: getattr(CONSTANTS, name) / 2})
        assert not all(map(torch.equal, after(block_, tensors, changed), before)), name
    for number in range(3):
        other = [t + (k == number) for k, t in enumerate(tensors)]
        assert not all(map(torch.equal, after(block_, other), before)), number
    assert all(map(torch.equal, after(block_, [*tensors[:3], tensors[3] + 1]), before)), "what was in start is gone"


@pytest.mark.parametrize("act", [block_, reference_block_])
def test_what_is_not_finite_is_told(act):
    for value in (float("inf"), float("-inf"), float("nan")):
        for place in (0, 2):
            for at in (0, 3, 999):
                tensors = made(1000)
                tensors[place][at] = value
                assert not act(*tensors, CONSTANTS), (value, place, at)


def test_without_a_compiler_the_reference_serves(monkeypatch):
    wanted = after(block_, made(1000))
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(block, "native", native)
    assert all(map(torch.equal, after(block_, made(1000)), wanted))


@pytest.mark.skipif(bool(cuda_on_cpu.missing()), reason=cuda_on_cpu.missing())
def test_the_cuda_source_gives_the_same_bits_in_any_order_of_threads(tmp_path):
    library = cuda_on_cpu.build("block.cu", tmp_path)
    assert set(library.functions) == {"trireme_block", "trireme_departure"}
    for size in (0, 1, 1000):
        tensors = made(size)
        wanted, other = after(reference_block_, tensors), torch.empty(size)
        reference_depart_(tensors[1], tensors[3], 37.0, other)
        for blocks, threads in ((1, 1), (3, 128), (8, 128)):
            for descending in (False, True):
                found, bad, out = [t.clone() for t in tensors], torch.zeros(1, dtype=torch.int32), torch.empty(size)
                pointers = [t.data_ptr() for t in found]
                arguments = (*pointers, np.int64(size), block._packed(CONSTANTS)[0], bad.data_ptr())
                library.launch("trireme_block", blocks, threads, arguments, descending)
                assert all(map(torch.equal, found[1:], wanted)) and not bad.item(), (size, blocks, threads)
                told = (tensors[1].data_ptr(), tensors[3].data_ptr(), out.data_ptr(), np.int64(size), np.float32(37.0))
                library.launch("trireme_departure", blocks, threads, told, descending)
                assert torch.equal(out, other), (size, blocks, threads)
    for place in (0, 2):
        tensors, bad = made(1000), torch.zeros(1, dtype=torch.int32)
        tensors[place][999] = float("nan")
        after_them = (np.int64(1000), block._packed(CONSTANTS)[0], bad.data_ptr())
        library.launch("trireme_block", 2, 128, (*(t.data_ptr() for t in tensors), *after_them))
        assert bad.item() == 1


def test_what_does_not_fit_is_refused():
    total, weights, change, start = made(100)
    with pytest.raises(AssertionError):
        block_(total[:50], weights, change, start, CONSTANTS)
    with pytest.raises(AssertionError):
        block_(total, weights, torch.randn(200)[::2], start, CONSTANTS)
    with pytest.raises(AssertionError):
        depart_(weights, start.double(), 1.0, change)
