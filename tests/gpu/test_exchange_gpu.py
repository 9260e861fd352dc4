"""The exchange on GPUs: `python -m pytest tests/gpu` on a machine that has one. Sums against the CPU's, bit for bit.

Several ranks may share one device; only NCCL wants one for each.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from test_strategies import BATCH, alone

from collectives.allreduce import AllReduce
from collectives.comm import Comm
from collectives.exchange import Exchange
from collectives.layout import GRAIN, Layout
from collectives.leaves import Leaves
from collectives.plan import Plan
from collectives.staged import Staging
from collectives.strategy import Rate
from collectives.transport import Transport
from hpc import optim
from hpc.flat import Flat

if not torch.cuda.is_available():
    pytest.skip("torch sees no CUDA GPU here", allow_module_level=True)

FLOATS = 9 * GRAIN
SPLITS = 12
CPU = torch.device("cpu")


def device(comm):
    return torch.device(f"cuda:{comm.rank % torch.cuda.device_count()}")


def ways(world):
    """Comms over the same ranks by everything that this machine can do; what it cannot is skipped if it is all."""
    torch.cuda.set_device(device(world))
    found = world.on(device(world))
    alone = [[rank] for rank in range(world.size)]
    yield "as chosen", found
    if world.size == 1:
        return
    staging = Staging(chunk=4 * GRAIN)
    apart = Transport("staged", "a test", alone, staged=True, staging=staging)
    yield "staged", Comm(SPLITS, world._world, alone, apart)
    if found.transport.mapped and world.size == 4:
        halves = [[0, 1], [2, 3]]
        both = Transport("ipc + staged", "a test", halves, staged=True, mapped=True, staging=staging)
        yield "ipc + staged", Comm(SPLITS, world._world, halves, both)


def values(split, turn):
    return torch.randn(FLOATS, generator=torch.Generator().manual_seed(100 * turn + split))


def sums(comm, where, wire="float32"):
    """What the exchange makes of three turns' gradients, in host memory."""
    common = comm.memory.zeros(FLOATS, where)
    layout = Layout(FLOATS, comm.islands, 2 * GRAIN)
    plan = Plan(Leaves(comm, FLOATS, wire, where), comm.memory.results(common), common, layout, totals="result")
    exchange = Exchange(comm, common, plan, threaded=len(comm.islands) > 1)
    found = []
    for turn in range(3):
        for split in comm.splits:
            exchange.enter(split).copy_(values(split, turn).to(where))
            exchange.stepped(split, 1)
        assert exchange.finish()
        found.append(common.cpu())
        comm.barrier()  # nobody begins the next sum before all have seen this one
    exchange.close()
    return found


@pytest.mark.mpi(ranks=[1, 2, 4], timeout=300)
@pytest.mark.parametrize("wire", ["float32", "bfloat16"])
def test_sums_are_the_cpus_bit_for_bit(wire):
    world = Comm(SPLITS)
    expected = sums(alone().with_splits(SPLITS), CPU, wire)
    for name, comm in ways(world):
        for turn, found in enumerate(sums(comm, device(world), wire)):
            assert torch.equal(found, expected[turn]), (name, str(comm.transport), turn)


@pytest.mark.mpi(ranks=[2], timeout=120)
def test_ranks_on_this_machine_map_each_others_memory():
    world = Comm(SPLITS)
    transport = world.on(device(world)).transport
    if not transport.mapped:
        pytest.skip(f"CUDA IPC does not work here: {transport}")
    assert transport.kind == "ipc" and transport.islands == [[0, 1]]


@pytest.mark.mpi(ranks=[2], timeout=120)
def test_staged_messages_of_every_size():
    world = Comm()
    torch.cuda.set_device(device(world))
    chunk = 4096
    staging = Staging(chunk=chunk)
    comm = Comm(None, world._world, [[0], [1]], Transport("staged", "a test", [[0], [1]], staged=True, staging=staging))
    for size in (0, 1, chunk - 1, chunk, chunk + 1, 7 * chunk + 3, 1000 * chunk):
        buffer = torch.zeros(size, dtype=torch.uint8, device=device(world))
        message = (comm.receiving if comm.rank else comm.sending)(buffer, 1 - comm.rank, 5)
        for turn in range(4):
            content = torch.randint(0, 256, (size,), generator=torch.Generator().manual_seed(turn), dtype=torch.uint8)
            buffer.copy_(torch.zeros_like(content) if comm.rank else content)
            torch.cuda.synchronize()
            message.start(empty=turn == 2 and not comm.rank)
            while not message.arrived():
                pass
            if comm.rank:
                assert message.received == (0 if turn == 2 else size)
                assert torch.equal(buffer.cpu(), torch.zeros_like(content) if turn == 2 else content), (size, turn)


def train(comm, where, **options):
    """Three turns of AllReduce, with a model's own backward; the weights in host memory."""
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(37, 101), torch.nn.Sigmoid(), torch.nn.Linear(101, 13)).to(where)
    comm = comm.with_splits(SPLITS)
    flat = Flat(model, partial(comm.memory.zeros, device=where))
    strategy = AllReduce(comm, flat, optim.Momentum(learning_rate=0.1), BATCH, bucket_mib=1 / 256, **options)
    strategy.prepare()
    strategy.begin()
    for turn in range(3):
        strategy.rate = Rate(0.1, 0)
        for split in comm.splits:
            strategy.enter(split)
            inputs = torch.randn(8, 37, generator=torch.Generator().manual_seed(100 * turn + split)).to(where)
            ((model(inputs) - inputs[:, :13]) ** 2).sum().backward()
            strategy.step(split, 8)
            strategy.leave(split)
        strategy.advance(1)
    return flat.weights.cpu()


@pytest.mark.mpi(ranks=[1, 2, 4], timeout=300)
def test_a_model_learns_the_same_bits_on_any_number_of_ranks_and_nearly_the_cpus():
    world = Comm(SPLITS)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cuda.matmul.allow_tf32 = False
    for options in ({}, {"clip_norm": 0.05}, {"overlap": "off"}):
        reference = train(alone().with_splits(SPLITS).on(device(world)), device(world), **options)
        torch.testing.assert_close(reference, train(alone(), CPU, **options), rtol=0, atol=1e-4)
        for name, comm in ways(world):
            assert torch.equal(train(comm, device(world), **options), reference), (name, options)


@pytest.mark.mpi(ranks=[2], timeout=300)
def test_nccl_sums_to_rounding():
    if torch.cuda.device_count() < 2:
        pytest.skip("NCCL wants a GPU for every rank, and there is one here")
    world = Comm(SPLITS)
    torch.cuda.set_device(device(world))
    comm = world.on(device(world), nccl=True)
    if not comm.transport.nccl:
        pytest.skip(str(comm.transport))
    for options in ({}, {"clip_norm": 0.05}):
        found = train(comm, device(world), algorithm="nccl", **options)
        reference = train(alone(), CPU, **options)
        torch.testing.assert_close(found, reference, rtol=0, atol=1e-4)
