"""Messages through host memory, chunk by chunk: with copies that are late, and poison what is used too early."""

from __future__ import annotations

import time
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from stand_in import LateCopies
from test_strategies import Problem, alone

from collectives.comm import Comm
from collectives.staged import HostCopies, Staging
from collectives.transport import Transport

CHUNK = 64
PATIENCE_S = 20.0

pair = pytest.mark.mpi(ranks=[2], timeout=60)


def staged_world(slots=2, chunk=CHUNK, copies=LateCopies, islands=None):
    """Ranks whose tensors, though in host memory, are sent as a GPU's would be."""
    world = Comm()
    islands = islands or [[rank] for rank in range(world.size)]
    staging = Staging(copies, chunk, slots)
    return Comm(None, world._world, islands, Transport("staged", "a test", islands, staged=True, staging=staging))


def wait(*messages):
    deadline = time.monotonic() + PATIENCE_S
    for message in messages:
        while not message.arrived():
            assert time.monotonic() < deadline, "a message never arrived"
            time.sleep(1e-5)


def content(size, turn, number=0):
    return torch.from_numpy(np.random.default_rng([size, turn, number]).integers(0, 256, size, np.uint8))


SIZES = [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 7 * CHUNK + 3, 40 * CHUNK]


@pair
def test_messages_of_every_size_arrive_whole_turn_after_turn():
    for slots, copies, size in product([1, 2, 3], [LateCopies, HostCopies], SIZES):
        comm = staged_world(slots, copies=copies)
        buffer = torch.zeros(size, dtype=torch.uint8)
        message = (comm.receiving if comm.rank else comm.sending)(buffer, 1 - comm.rank, 5)
        assert message.arrived(), "nothing is under way yet"
        for turn in range(4):
            empty = turn == 2
            before = content(size, 9)
            buffer.copy_(before if comm.rank else content(size, turn))
            if turn % 2 == 0 and not comm.rank:
                comm.barrier()  # here the receiver is first, there it is whoever comes
            message.start(empty=empty and not comm.rank)
            if turn % 2 == 0 and comm.rank:
                assert not message.arrived()
                comm.barrier()
            wait(message)
            assert message.arrived()
            if comm.rank:
                assert message.received == (0 if empty else size)
                assert torch.equal(buffer, before if empty else content(size, turn)), (size, turn)
            else:
                buffer.zero_()  # what was sent may be changed


@pair
def test_many_messages_at_once_both_ways_whoever_is_asked_moves_all():
    comm = staged_world(slots=2)
    sizes = [5 * CHUNK + 1, 0, CHUNK, 9 * CHUNK, 3, 2 * CHUNK]
    out = [content(size, 0, comm.rank) for size in sizes]
    into = [torch.zeros(size, dtype=torch.uint8) for size in sizes]
    sent = [comm.sending(t, 1 - comm.rank, tag) for tag, t in enumerate(out)]
    awaited = [comm.receiving(t, 1 - comm.rank, tag) for tag, t in enumerate(into)]
    for turn in range(3):
        for number, tensor in enumerate(out):
            tensor.copy_(content(sizes[number], turn, comm.rank + 2 * number))
        for message in (*awaited, *reversed(sent)):
            message.start()
        wait(*awaited)  # nobody asks for what is sent: it must go out all the same
        for number, tensor in enumerate(into):
            assert torch.equal(tensor, content(sizes[number], turn, 1 - comm.rank + 2 * number)), (turn, number)
        wait(*sent)


@pair
def test_the_pipeline_overlaps_copies_with_the_wire_and_never_waits():
    """With one chunk in host memory at a time every copy waits for the wire; with three it does not."""
    longest = {}
    for slots in (1, 3):
        comm = staged_world(slots, copies=partial(LateCopies, longest_s=0.0))
        buffer = torch.zeros(40 * CHUNK, dtype=torch.uint8)
        message = (comm.receiving if comm.rank else comm.sending)(buffer, 1 - comm.rank, 0)
        assert len({part.host.data_ptr() for part in message.chunks}) == slots
        most = 0
        message.start()
        while not message.arrived():
            most = max(most, message.awaited - message.stored if comm.rank else message.fetched - message.through)
        longest[slots] = most
    assert longest[1] <= 1 and 2 <= longest[3] <= 3
    calls = []
    slow = staged_world(copies=lambda tensor: Never(tensor, calls))
    if not slow.rank:
        message = slow.sending(torch.zeros(3 * CHUNK, dtype=torch.uint8), 1, 1)
        began = time.monotonic()
        message.start()
        assert not any(message.arrived() for _ in range(100)) and time.monotonic() - began < 5
        assert calls == [0, CHUNK], "two slots, so two chunks are fetched, and none is sent"


class Never(HostCopies):
    """Copies that are never done."""

    def __init__(self, tensor, calls):
        super().__init__(tensor)
        self.calls = calls

    def fetch(self, host, low):
        self.calls.append(low)
        return lambda: False


@pytest.mark.mpi(ranks=[3], timeout=120)
def test_whole_strategies_learn_the_same_bits_through_staged_messages():
    world = Comm()

    def learned(name, comm, options):
        problem = Problem(name, comm, options=options).run(3)
        problem.strategy.end()
        return problem.digest()

    for name, options in (
        ("allreduce", {}), ("allreduce", {"clip_norm": 0.05, "bucket_mib": 1 / 256}),
        ("allreduce", {"wire": "bfloat16"}), ("allreduce", {"overlap": "off"}),
        ("allreduce", {"algorithm": "everyone", "clip_norm": 0.05}),
        ("1-bit", {"cold_start": 100.0}), ("1-bit", {"double_buffering": True}),
    ):
        reference = learned(name, alone(), options)
        for islands, copies in (
            ([[0], [1], [2]], LateCopies), ([[0, 1], [2]], LateCopies), ([[0], [1, 2]], HostCopies)
        ):
            comm = staged_world(chunk=1024, copies=copies, islands=islands)
            assert set(world.gather(learned(name, comm, options))) == {reference}, (name, options, islands)
