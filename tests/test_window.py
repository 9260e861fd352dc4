"""Sums and signals in shared memory: the native side gives the reference's bits, and both keep their promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from collectives.comm import Comm
from collectives.tree import program
from kernels import native
from kernels.window import ADD, LINE, Flags, Meeting, TreeSum

SIZES = [0, 1, 63, 4095, 4096, 4097, 20000]
needs_compiler = pytest.mark.skipif(native.library() is None, reason="the native library was not built (no compiler)")


def leaves_of(count, size, seed=1):
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=random) * 10.0 ** (k % 7) for k in range(count)]


def balanced(count):
    return program((0, count), {(k, k + 1): k for k in range(count)}, ADD)


def reference(leaves, steps):
    stack = []
    for step in steps:
        stack.append(leaves[step] if step != ADD else (lambda b, a: a + b)(stack.pop(), stack.pop()))
    return stack[0]


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_tree_sums_have_the_references_bits(size, streams):
    for count in (1, 2, 3, 4, 7, 12):
        leaves = leaves_of(count, size)
        steps = balanced(count)
        out = torch.full((size,), float("nan"))
        assert TreeSum(leaves, steps, out, streams=streams)() is out
        assert torch.equal(out, reference(leaves, steps)), count
        in_a_row = [0, *(s for k in range(1, count) for s in (k, ADD))]
        assert torch.equal(TreeSum(leaves, in_a_row, out)(), reference(leaves, in_a_row)), count


@needs_compiler
@settings(max_examples=50, deadline=None)
@given(some.integers(1, 40), some.integers(0, 9000), some.integers(0, 15), some.integers(0, 15))
def test_native_and_torch_agree_wherever_buffers_begin(count, size, begin, out_begin):
    leaves = [leaf[begin:] for leaf in leaves_of(count, size + begin, seed=count)]
    native_out, torch_out = torch.zeros(size + out_begin)[out_begin:], torch.zeros(size)
    TreeSum(leaves, balanced(count), native_out, streams=bool(begin % 2))()
    plain = TreeSum(leaves, balanced(count), torch_out)
    plain.library = None
    assert torch.equal(plain(), native_out)


def test_a_sum_may_be_taken_in_place_of_its_first_leaf():
    leaves = leaves_of(4, 10000)
    expected = reference([leaf.clone() for leaf in leaves], balanced(4))
    assert torch.equal(TreeSum(leaves, balanced(4), leaves[0])(), expected)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_rounded_sums_round_every_node_but_the_last(kind):
    a, b, c = leaves_of(3, 1000)
    out = torch.zeros(1000)
    TreeSum([a, b, c], [0, 1, ADD, 2, ADD], out, kind)()
    left = (a.to(kind).float() + b.to(kind).float()).to(kind).float()
    assert torch.equal(out, left + c.to(kind).float())
    assert torch.equal(TreeSum([a], [0], out, kind)(), a)  # nothing is added, nothing crosses


def test_programs_that_are_none_are_refused():
    a, b = leaves_of(2, 8)
    for steps in ([0, 1], [0, ADD], [0, 0, ADD], [0, 1, ADD, ADD]):
        with pytest.raises(AssertionError):
            TreeSum([a, b], steps, torch.zeros(8))
    with pytest.raises(AssertionError):
        TreeSum([a, b[:4]], [0, 1, ADD], torch.zeros(8))


def without_library(flags):
    flags.library = None
    return flags


def both_sides(comm, count):
    """Flags of the native library, and flags that Python polls."""
    return comm.memory.flags(count), without_library(comm.memory.flags(count))


@pytest.mark.mpi(ranks=[3], timeout=60)
def test_flags_tell_neighbours_and_carry_what_was_written_before():
    comm = Comm()
    for flags in both_sides(comm, 3):
        tell_and_see(comm, flags)
        comm.barrier()


def tell_and_see(comm, flags):
    window = comm.memory.window(1000)
    for turn in range(1, 200):
        window[comm.rank].fill_(turn * (comm.rank + 1))
        flags.post(comm.rank, 1, turn, learned=turn % 3 == comm.rank)
        for rank in range(comm.size):
            assert flags.wait(rank, 1, turn, 10.0)
            assert flags.learned(rank, 1, turn) == (turn % 3 == rank)
            assert window[rank].eq(turn * (rank + 1)).all(), "the flag was seen before what was written"
        flags.post(comm.rank, 2, turn)
        assert all(flags.wait(rank, 2, turn, 10.0) for rank in range(comm.size))
    assert not flags.wait(0, 0, 1, 0.0) and not flags.wait(0, 1, 200, 0.05)


@pytest.mark.mpi(ranks=[2, 4], timeout=60)
def test_a_meeting_is_a_whole_all_reduce():
    comm = Comm()
    for flags in both_sides(comm, 2):
        meet(comm, flags)


def meet(comm, flags):
    window, out = comm.memory.window(4000), comm.memory.common(4000)
    low, high = 1000 * comm.rank * 4 // comm.size, 1000 * (comm.rank + 1) * 4 // comm.size
    sums = TreeSum([part[low:high] for part in window], balanced(comm.size), out[low:high])
    meeting = Meeting(flags, comm.rank, 0, 1, sums)
    for turn in range(1, 100):
        window[comm.rank].fill_(turn + comm.rank)
        meeting(turn, lambda rank: None)
        assert out.eq(sum(turn + rank for rank in range(comm.size))).all()
        comm.barrier()


@pytest.mark.mpi(ranks=[2], timeout=60)
def test_a_meeting_tells_who_is_late_and_then_goes_on():
    comm = Comm()
    for flags in both_sides(comm, 2):
        late = []

        def told(rank, late=late):
            late.append(rank)
            if len(late) == 3:
                comm.barrier()

        if comm.rank:
            comm.barrier()
        Meeting(flags, comm.rank, 0, 1, None)(1, told, 0.02)
        assert comm.rank or late[:3] == [1, 1, 1]


def test_turns_wrap_around():
    flags = Flags(np.zeros((1, 1, LINE), np.uint32), lambda: None)
    for library in (flags.library, None):
        flags.library = library
        flags.words[:] = 0
        flags.post(0, 0, 0xFFFFFFFF)
        assert flags.wait(0, 0, 0xFFFFFFFF, 0.0) and not flags.wait(0, 0, 0x100000000, 0.0)
        flags.post(0, 0, 0x100000001)
        assert flags.wait(0, 0, 0xFFFFFFFF, 0.0) and flags.wait(0, 0, 0x100000001, 0.0)


@pytest.mark.mpi(ranks=[3], timeout=60)
def test_windows_are_shared_by_files_or_else_by_mpi(monkeypatch):
    comm = Comm()
    write_and_read(comm)
    if comm.rank == 1:  # one process that may not open the others' files: then nobody uses them
        monkeypatch.setattr("collectives.memory._opened", lambda *offer: (_ for _ in ()).throw(PermissionError("no")))
    write_and_read(comm)


def write_and_read(comm):
    window, common = comm.memory.window(5000), comm.memory.common(300)
    assert [len(part) for part in window] == [5000] * 3 and len(common) == 300
    assert all(part.eq(0).all() for part in window)
    comm.barrier()
    window[comm.rank].fill_(comm.rank + 1)
    common[100 * comm.rank : 100 * comm.rank + 100] = comm.rank
    comm.barrier()
    assert [float(part.sum()) for part in window] == [5000.0, 10000.0, 15000.0]
    assert common.tolist() == [0.0] * 100 + [1.0] * 100 + [2.0] * 100
    comm.barrier()
