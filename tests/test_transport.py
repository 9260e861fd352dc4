"""How buffers are seen and sent: the choice, memory as GPUs share it, NCCL's turns; without a GPU."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from mpi4py import MPI
from test_strategies import Problem, alone

from collectives import allreduce, transport
from collectives.aware import cuda_aware
from collectives.comm import Comm
from collectives.memory import Memory
from collectives.transport import CPU_WHY, Facts, Transport, choose_transport
from kernels import gpu

GPU = Facts("node0 gpu0", True, "it said 1", (0, 1))

pair = pytest.mark.mpi(ranks=[2], timeout=60)


# -- the choice -----------------------------------------------------------------------------------------------------


def on_gpus(islands, **changes):
    """Facts of ranks with a GPU each, of which those of an island map each other's memory."""
    return [
        replace(Facts(f"gpu {rank}", True, "it says so", tuple(island)), **changes)
        for island in islands for rank in island
    ]


def test_cpus_share_windows_and_send_from_host_memory():
    chosen = choose_transport([Facts()] * 3, [[0, 1], [2]])
    assert (chosen.kind, chosen.islands) == ("window + messages", [[0, 1], [2]])
    assert not chosen.staged and not chosen.mapped and chosen.why == CPU_WHY
    assert choose_transport([Facts()], [[0]]).kind == "window"


@pytest.mark.parametrize(
    ("facts", "islands", "kind", "found"),
    [
        (on_gpus([[0]]), [[0]], "alone", [[0]]),
        (on_gpus([[0, 1]]), [[0, 1]], "ipc", [[0, 1]]),
        (on_gpus([[0, 1], [2, 3]]), [[0, 1], [2, 3]], "ipc + cuda-aware", [[0, 1], [2, 3]]),
        (on_gpus([[0, 1], [2]], aware=False), [[0, 1], [2]], "ipc + staged", [[0, 1], [2]]),
        (on_gpus([[0], [1]], maps_why="MIG"), [[0, 1]], "cuda-aware", [[0], [1]]),
        (on_gpus([[0], [1]], maps_why="MIG", aware=False), [[0, 1]], "staged", [[0], [1]]),
        (on_gpus([[0, 2], [1, 3]]), [[0, 1, 2, 3]], "ipc + cuda-aware", None),
        (on_gpus([[0, 1]], aware=False), [[0], [1]], "staged", [[0], [1]]),  # no common host memory, no flags: apart
    ],
)
def test_gpus_take_what_works(facts, islands, kind, found):
    if found is None:  # ranks of one host, two by two
        facts, found = [facts[0], facts[2], facts[1], facts[3]], [[0, 2], [1, 3]]
    chosen = choose_transport(facts, islands)
    assert (chosen.kind, chosen.islands) == (kind, found), chosen
    assert chosen.staged == any(not f.aware for f in facts)
    assert chosen.mapped == ("ipc" in kind)
    if facts[0].maps_why:
        assert "rank 0 cannot map all of its host's GPU memory: MIG" in chosen.why
    if len(found) > 1:
        assert ("does not say that it reads GPU memory" in chosen.why) == chosen.staged
    assert str(chosen) == f"{chosen.kind}, because {chosen.why}"


def test_one_rank_that_cannot_be_mapped_leaves_the_others_together_and_is_named():
    facts = [replace(GPU, maps=(0, 1)), replace(GPU, maps=(0, 1)), replace(GPU, maps=(2,), maps_why="hidden")]
    chosen = choose_transport(facts, [[0, 1, 2]])
    assert chosen.islands == [[0, 1], [2]] and "rank 2 cannot map" in chosen.why and "hidden" in chosen.why


def test_mapping_counts_only_both_ways():
    facts = [replace(GPU, maps=(0, 1)), replace(GPU, maps=(1,), maps_why="one-way")]
    assert choose_transport(facts, [[0, 1]]).islands == [[0], [1]]


def test_one_rank_whose_mpi_does_not_say_so_stages_all_messages():
    facts = [GPU, replace(GPU, aware=False, aware_why="it said 0")]
    chosen = choose_transport(facts, [[0], [1]])
    assert chosen.staged and "it said 0" in chosen.why


def test_cpus_and_gpus_in_one_job_are_apart_and_staged():
    chosen = choose_transport([Facts(aware_why="unknown"), replace(GPU, maps=(1,))], [[0, 1]])
    assert (chosen.kind, chosen.islands, chosen.staged) == ("staged", [[0], [1]], True)


def test_nccl_where_it_can_be_used_and_else_why_not():
    facts = on_gpus([[0, 1]])
    assert "nccl" not in choose_transport(facts, [[0, 1]]).kind, "nobody asked"
    chosen = choose_transport(facts, [[0, 1]], nccl=True)
    assert chosen.kind == "nccl" and chosen.nccl and chosen.islands == [[0], [1]] and "order" in chosen.why
    for wrong, why in (
        ([facts[0], replace(facts[1], device="gpu 0")], "ranks 0 and 1 share a GPU"),
        ([facts[0], replace(facts[1], nccl_why="CuPy is not installed")], "rank 1: CuPy is not installed"),
        ([Facts(), facts[1]], "rank 0 computes on the CPU"),
    ):
        chosen = choose_transport(wrong, [[0, 1]], nccl=True)
        assert not chosen.nccl and f"; NCCL was asked for, but {why}" in chosen.why, "the way that is taken comes first"
        assert chosen.kind == choose_transport(wrong, [[0, 1]]).kind


@given(some.data())
def test_every_rank_is_on_one_island_of_ranks_that_all_map_each_other(data):
    ranks = data.draw(some.integers(1, 6))
    facts = [
        Facts(f"gpu {rank}", maps=tuple(data.draw(some.sets(some.integers(0, ranks - 1))) | {rank}), maps_why="?")
        for rank in range(ranks)
    ]
    edge = data.draw(some.integers(0, ranks))
    hosts = [list(host) for host in (range(edge), range(edge, ranks)) if host]
    chosen = choose_transport(facts, hosts)
    assert sorted(rank for island in chosen.islands for rank in island) == list(range(ranks))
    for island in chosen.islands:
        assert any(set(island) <= set(host) for host in hosts)
        assert all(other in facts[rank].maps for rank in island for other in island)


# -- what the MPI library says --------------------------------------------------------------------------------------


def saying(answer):
    return SimpleNamespace(MPIX_Query_cuda_support=lambda: answer)


@pytest.mark.parametrize(
    ("library", "version", "environment", "yes", "why"),
    [
        (saying(1), "Open MPI v5", {}, True, "() = 1"),
        (saying(0), "Open MPI v5", {}, False, "() = 0"),
        (saying(-1), "Open MPI v5", {}, False, "() = -1"),
        (object(), "Intel MPI", {}, False, "no MPIX_Query_cuda_support"),
        (saying(1), "MPICH 5", {"MPIR_CVAR_ENABLE_GPU": "0"}, False, "MPIR_CVAR_ENABLE_GPU = 0"),
        (saying(1), "MPICH 5", {"MPIR_CVAR_ENABLE_GPU": "1"}, True, "() = 1"),
        (saying(1), "Open MPI v4", {"OMPI_MCA_opal_cuda_support": "false"}, False, "opal_cuda_support = false"),
        (saying(1), "CRAY MPICH version 8", {}, False, "MPICH_GPU_SUPPORT_ENABLED is not 1"),
        (saying(1), "CRAY MPICH version 8", {"MPICH_GPU_SUPPORT_ENABLED": "1"}, True, "() = 1"),
        (saying(1), "MVAPICH2 2.3", {}, False, "MV2_USE_CUDA"),
    ],
)
def test_only_a_clear_yes_is_a_yes(library, version, environment, yes, why):
    found, said = cuda_aware(library, version, environment)
    assert found is yes and why in said


@pair
def test_looking_around_on_cpus():
    world = Comm()
    for islands in (world.islands, [[0], [1]]):
        comm = world.with_islands(islands).on(torch.device("cpu"))
        assert comm.islands == islands and comm.transport.why == CPU_WHY
        asked = comm.on(torch.device("cpu"), nccl=True)
        assert not asked.transport.nccl
        assert asked.transport.why == f"{CPU_WHY}; NCCL, which was asked for, is for GPUs alone"


class Files:
    """Stands in for `kernels.gpu`: buffers that other processes can map, in files."""

    def __init__(self, folder, rank):
        self.folder, self.rank, self.fault = folder, rank, ""

    def zeros(self, count, device):
        if self.fault == "no memory":
            raise MemoryError("out of memory")
        self.buffer = np.memmap(self.folder / str(self.rank), np.float32, "w+", shape=(count,))
        return torch.from_numpy(self.buffer)

    def handle(self, tensor):
        return str(self.folder / str(self.rank))

    def mapped(self, handle, count, device):
        if self.fault == "hidden":
            raise OSError("invalid device context")
        return torch.from_numpy(np.memmap(handle, np.float32, "r+", shape=(count,))) + (self.fault == "other")

    def bus(self, device):
        return str(device)

    def nccl_missing(self):
        return "none here"


@pair
def test_memory_is_tried_once_and_all_ranks_decide_alike(shared_folder, monkeypatch):
    world = Comm()
    device = torch.device("cuda:0")
    if not torch.cuda.is_available():  # the real thing, without what it needs
        found = world.on(device, nccl=True)
        assert found.islands == [[0], [1]] and found.transport.kind == "staged" and "cupy" in found.transport.why
    gpus = Files(shared_folder, world.rank)
    monkeypatch.setattr(transport, "gpu", gpus)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    for at, fault, kind, why in (
        (0, "", "ipc", "map each other's GPU memory"),
        (1, "hidden", "staged", "rank 1 cannot map all of its host's GPU memory: OSError: invalid device context"),
        (0, "no memory", "staged", "rank 0 cannot map all of its host's GPU memory: MemoryError: out of memory"),
        (0, "other", "staged", "rank 1's buffer reads 3 where 2 was written"),
    ):
        gpus.fault = fault if world.rank == at else ""
        chosen = world.on(device).transport
        assert chosen.kind == kind and chosen.mapped == (kind == "ipc"), chosen
        assert chosen.islands == ([[0, 1]] if kind == "ipc" else [[0], [1]])
        assert why in chosen.why, chosen
        assert len(set(world.gather(str(chosen)))) == 1
        world.barrier()


def test_without_a_gpu_cupy_is_no_error_but_a_reason():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert gpu.missing() and gpu.nccl_missing()


# -- islands whose ranks keep weights of their own, as GPUs do --------------------------------------------------------


class OwnMemory(Memory):
    """Buffers that neighbours see, none in common: what GPUs that map each other's buffers have."""

    def zeros(self, count, device, dtype=torch.float32):
        buffers = self.window(count)
        mine = buffers[self.neighbours.index(self.rank)]
        self.seen = {**getattr(self, "seen", {}), mine.data_ptr(): buffers}
        return mine

    def results(self, weights):
        return self.seen[weights.data_ptr()]


class Apart(Comm):
    """A Comm of ranks that see each other's memory, but share none."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        memory = self.memory
        self.memory = OwnMemory(memory.neighbours, memory.rank, memory._gather, memory._fallback, memory.mapped)

    def with_splits(self, n_splits):
        return Apart(n_splits, self._world, self.islands, self.transport)


@pytest.mark.mpi(ranks=[4], timeout=120)
def test_weights_of_each_ranks_own_are_pulled_from_neighbours():
    world = Comm()
    for options in ({}, {"clip_norm": 0.05, "bucket_mib": 1 / 256}, {"wire": "bfloat16", "bucket_mib": 1 / 256}):
        reference = Problem("allreduce", alone(), options=options).run(3).digest()
        for islands in ([[0, 1, 2, 3]], [[0, 1], [2, 3]], [[0, 2, 3], [1]]):
            problem = Problem("allreduce", Apart(None, world._world, islands), options=options)
            assert any(world.gather(sum(len(work.pulls) for work in problem.strategy.exchange.plan.work)))
            assert set(world.gather(problem.run(3).digest())) == {reference}, (options, islands)


# -- NCCL's way, with MPI in its place --------------------------------------------------------------------------------


class MpiLink:
    """What `kernels.gpu.NcclLink` does, by MPI, on tensors in host memory; it notes the calls."""

    def __init__(self, size, rank, name, device):
        self.world, self.calls = MPI.COMM_WORLD.Dup(), []
        assert (size, rank, name) == (self.world.size, self.world.rank, [1, 2, 3])

    def sum_up(self, pieces, flag):
        self.calls.append(("sum", [(owner, len(piece)) for owner, piece in pieces]))
        for owner, piece in pieces:
            mine = owner == self.world.rank
            self.world.Reduce(MPI.IN_PLACE if mine else piece.numpy(), piece.numpy() if mine else None, root=owner)
        self.world.Allreduce(MPI.IN_PLACE, flag.numpy(), MPI.MAX)

    def spread(self, pieces):
        self.calls.append(("spread", [(owner, len(piece)) for owner, piece in pieces]))
        for owner, piece in pieces:
            self.world.Bcast(piece.numpy(), owner)

    def check(self):
        pass


@pytest.fixture
def linked(monkeypatch):
    monkeypatch.setattr(allreduce.gpu, "nccl_name", lambda: [1, 2, 3])
    monkeypatch.setattr(allreduce.gpu, "NcclLink", MpiLink)


@pytest.mark.mpi(ranks=[1, 3], timeout=120)
def test_ncclexchange_learns_the_same_to_rounding(linked):
    world = Comm()
    islands = [[rank] for rank in range(world.size)]
    comm = Comm(None, world._world, islands, Transport("nccl", "a test", islands, nccl=True))
    for options in ({"bucket_mib": 1 / 256}, {"clip_norm": 0.05, "bucket_mib": 1 / 256}, {}, {"overlap": "off"}):
        for dry in ((), (11,), (0, 1, 2, 3)):
            reference = Problem("allreduce", alone(), options=options, dry=dry).run(3)
            problem = Problem("allreduce", comm, options=options | {"algorithm": "nccl"}, dry=dry).run(3)
            assert problem.strategy.exchange.link.calls, "NCCL's way was not taken"
            torch.testing.assert_close(problem.flat.weights, reference.flat.weights, rtol=0, atol=1e-5)
            assert len(set(world.gather(problem.digest()))) == 1, "ranks differ"
            assert len(set(map(str, world.gather(problem.strategy.exchange.link.calls)))) == 1, "another order of calls"
            assert problem.strategy.updates == reference.strategy.updates == 3
            sent = sum(world.gather(sum(problem.strategy.sent().values())))
            assert sent == 3 * 2 * (world.size - 1) * 4 * problem.flat.size, "as owners would exchange it"


@pair
def test_nccl_asked_for_where_it_cannot_be_used_is_the_usual_exchange():
    world = Comm()
    reference = Problem("allreduce", alone()).run(2).digest()
    problem = Problem("allreduce", world.on(torch.device("cpu"), nccl=True), options={"algorithm": "nccl"}).run(2)
    assert set(world.gather(problem.digest())) == {reference}
    with pytest.raises(ValueError, match=r"float32 only; got strategy\.wire = 'bfloat16'"):
        Problem("allreduce", world, options={"algorithm": "nccl", "wire": "bfloat16"})
