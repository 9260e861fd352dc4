"""The exchange by itself: every algorithm, wire and division into islands, against sums taken in one process."""

from __future__ import annotations

import os
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from test_strategies import Problem, alone

from collectives.choice import MIB, Candidate, candidates, choose, where_of
from collectives.comm import Comm
from collectives.exchange import Exchange
from collectives.layout import GRAIN, Layout, cut_buckets
from collectives.leaves import Leaves
from collectives.plain import PlainSum
from collectives.plan import Plan

FLOATS = 9 * GRAIN + 64
ISLANDS = {
    1: [[[0]]],
    2: [[[0, 1]], [[0], [1]]],
    3: [[[0, 1, 2]], [[0, 1], [2]], [[0], [1], [2]]],
    4: [[[0, 1, 2, 3]], [[0, 1], [2, 3]], [[0, 1], [2], [3]], [[0, 2], [1, 3]], [[0], [1], [2], [3]]],
}
every_number = pytest.mark.mpi(ranks=[1, 2, 3, 4], timeout=120)


def values(split, turn, size=FLOATS):
    return torch.randn(size, generator=torch.Generator().manual_seed(100 * turn + split))


def make(comm, algorithm, *, wire="float32", bucket=2 * GRAIN, size=FLOATS, **options):
    leaves = Leaves(comm, size, wire)
    layout = Layout(size, comm.islands, bucket, algorithm == "everyone")
    common = comm.memory.common(size)
    route = "ring" if algorithm == "ring" else "owners"
    plan = Plan(leaves, comm.memory.results(common), common, layout, algorithm=route, totals="result")
    return Exchange(comm, common, plan, **options)


def add_up(exchange, turn):
    for split in exchange.comm.splits:
        exchange.enter(split).copy_(values(split, turn, exchange.plan.layout.size))
        exchange.stepped(split, 1)
    assert exchange.finish()
    return exchange.common.clone()


@every_number
def test_owners_and_everyone_give_the_same_bits_on_any_islands():
    world = Comm(12)
    exact = sum(values(split, 0).double() for split in range(12))
    for wire, near in (("float32", 1e-5), ("bfloat16", 0.3), ("float16", 0.03)):
        reference = make(alone().with_splits(12), "owners", wire=wire)
        sums = [add_up(reference, turn) for turn in range(2)]
        assert (sums[0] - exact).abs().max() < near
        for islands in ISLANDS[world.size]:
            for algorithm, threaded in (("owners", False), ("owners", True), ("everyone", True)):
                exchange = make(world.with_islands(islands), algorithm, wire=wire, threaded=threaded)
                for turn in range(2):
                    found = add_up(exchange, turn)
                    assert torch.equal(found, sums[turn]), (wire, islands, algorithm, threaded, turn)
                    world.barrier()  # nobody begins the next sum before all have seen this one
                exchange.close()


@every_number
def test_the_ring_gives_the_sum_to_rounding_and_the_same_on_every_rank():
    world = Comm(12)
    exact = sum(values(split, 0).double() for split in range(12))
    for islands in ISLANDS[world.size]:
        exchange = make(world.with_islands(islands), "ring")
        found = add_up(exchange, 0)
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-5)
        assert len(set(world.gather(found.numpy().tobytes().hex()))) == 1
        world.barrier()
        torch.testing.assert_close(add_up(exchange, 1).double(), sum(values(s, 1).double() for s in range(12)),
                                   rtol=0, atol=1e-5)


@pytest.mark.mpi(ranks=[2, 4], timeout=120)
def test_bytes_between_islands_are_those_of_the_papers_count():
    world = Comm()
    size = 48 * GRAIN
    for islands in ISLANDS[world.size][1:]:
        if len({len(i) for i in islands}) > 1 or islands == [[0, 2], [1, 3]]:
            continue  # there a host has to send more than one partial sum
        comm = world.with_islands(islands)
        for algorithm in ("owners", "ring"):
            exchange = make(comm, algorithm, size=size, bucket=size)
            sent = [sum(world.gather(exchange.plan.bytes_sent)[rank] for rank in ranks) for ranks in islands]
            hosts = len(islands)
            assert sent == [2 * (hosts - 1) * size * 4 // hosts] * hosts, (islands, algorithm)
        narrow = make(comm, "owners", size=size, bucket=size, wire="bfloat16")
        assert sum(world.gather(narrow.plan.bytes_sent)) * 2 == sum(sent)


@pytest.mark.mpi(ranks=[2, 3, 4], timeout=120)
def test_whole_strategies_learn_the_same_on_any_islands():
    world = Comm()
    dry = {(s, 1) for s in range(7)} | {(s, 2) for s in range(12)} | {(11, 3)}  # a dry island; in turn 2 all are
    for options in ({}, {"algorithm": "owners", "bucket_mib": 1 / 256}, {"algorithm": "everyone"}, {"clip_norm": 0.05},
                    {"wire": "bfloat16", "bucket_mib": 1 / 256}, {"overlap": "off"}):
        reference = Problem("allreduce", alone(), dry=dry, options=options).run(4).digest()
        for number, islands in enumerate(ISLANDS[world.size]):
            storage = ("own", "common")[number % 2]
            comm = world.with_islands(islands)
            problem = Problem("allreduce", comm, dry=dry, options=options, storage=storage).run(4)
            sent = problem.strategy.sent()
            assert sent["float32"] == ("wire" in options) * 2 * (sent["reduce"] + sent["share"]), options
            assert set(world.gather(problem.digest())) == {reference}, (options, islands)


@pytest.mark.mpi(ranks=[2], timeout=60)
def test_frozen_and_unused_parameters_are_no_trouble():
    def digest(comm):
        names = ("0.weight", "2.bias")
        problem = Problem("allreduce", comm, options={"bucket_mib": 1 / 256}, frozen=names)  # Adam, with decay
        frozen = [problem.model[0].weight, problem.model[2].bias]
        before = [parameter.clone() for parameter in frozen]
        others = [problem.model[0].bias.clone(), problem.model[2].weight.clone()]
        assert problem.flat.names == ["0.bias", "2.weight"] and set(problem.flat.fixed) == set(names)
        problem.run(3)
        assert all(torch.equal(now, then) for now, then in zip(frozen, before, strict=True))
        assert not torch.equal(problem.model[0].bias, others[0])
        assert not torch.equal(problem.model[2].weight, others[1])
        return problem.digest()

    world = Comm()
    assert set(world.gather(digest(world.with_islands([[0], [1]])))) == {digest(alone())}


@pytest.mark.mpi(ranks=[2], timeout=60)
def test_weights_may_also_be_each_ranks_own():
    world = Comm()
    reference = Problem("allreduce", alone()).run(3).digest()
    for storage in ("common", "own"):
        assert set(world.gather(Problem("allreduce", world, storage=storage).run(3).digest())) == {reference}


@pytest.mark.mpi(ranks=[2], timeout=60)
def test_a_second_gradient_of_a_parameter_is_an_error_and_not_a_wrong_sum():
    problem = Problem("allreduce", Comm(2).with_islands([[0], [1]]), splits=2)
    problem.strategy.enter(problem.comm.rank)
    problem.learn(problem.comm.rank, 0)
    with pytest.raises(RuntimeError, match="second gradient"):
        problem.learn(problem.comm.rank, 0)
    problem.comm.barrier()


@every_number
def test_a_sum_of_what_lies_there_already():
    world = Comm()
    for turn in range(2):
        exact = sum(values(split, turn).double() for split in range(world.size))
        for islands in ISLANDS[world.size]:
            for algorithm, bucket in (("owners", 2 * GRAIN), ("owners", FLOATS), ("everyone", FLOATS)):
                exchange = make(world.with_islands(islands), algorithm, bucket=bucket)
                plain = PlainSum(exchange.comm, exchange.common, exchange.plan)
                for _ in range(3):
                    exchange.plan.leaves.mine[0].copy_(values(world.rank, turn))
                    exchange.common.zero_()
                    world.barrier()
                    plain()
                    torch.testing.assert_close(exchange.common.double(), exact, rtol=0, atol=1e-5)
                    world.barrier()


@pytest.mark.mpi(ranks=[2], timeout=60)
def test_who_waits_can_say_for_whom():
    world = Comm(2).with_islands([[0], [1]])
    exchange = make(world, "owners")
    exchange.enter(world.rank)
    world.barrier()
    if world.rank == 0:
        exchange.stepped(0, 1)
        exchange.poll()
        said = exchange.waiting_for()
        assert "bucket 0 of 5 waits for partial sum of rank 1 on" in said, said
    world.barrier()
    if world.rank == 1:
        exchange.stepped(1, 1)
    exchange.finish()
    assert exchange.waiting_for() == ""


@given(some.integers(1, 40 * GRAIN), some.integers(1, 9 * GRAIN), some.integers(1, 4), some.data())
def test_every_float_has_one_owner_an_algorithm(size, bucket, hosts, data):
    ranks = iter(range(100))
    islands = [[next(ranks) for _ in range(data.draw(some.integers(1, 3)))] for _ in range(hosts)]
    buckets = cut_buckets(size, bucket)
    assert [low for low, _ in buckets] == [high for _, high in buckets[1:]] + [0] and buckets[0][1] == size
    assert all(low % GRAIN == 0 for low, _ in buckets)
    owners = Layout(size, islands, bucket)
    found = sorted(run for island in islands for rank in island for run in owners.owned(rank))
    assert [0, *(high for _, high in found)] == [*(low for low, _ in found), size]
    everyone = Layout(size, islands, bucket, everyone=True)
    for island in islands:
        found = sorted(run for rank in island for run in everyone.owned(rank))
        assert [0, *(high for _, high in found)] == [*(low for low, _ in found), size]


def test_what_may_be_chosen_from():
    names = lambda *asked: {c.algorithm for c in candidates(*asked)}  # noqa: E731
    assert names("auto", 0, 100 * MIB, 1, 2) == {"owners"}
    assert names("auto", 0, 100 * MIB, 4, 8) == {"owners"}
    assert names("auto", 0, MIB // 2, 4, 8) == {"owners", "everyone"}
    assert names("fastest", 0, 100 * MIB, 4, 8) == {"owners", "ring"}
    assert candidates("ring", 3 * MIB, 100 * MIB, 2, 2) == [Candidate("ring", 3 * MIB)]
    assert {c.bucket // MIB for c in candidates("owners", 0, 100 * MIB, 2, 2)} == {1, 4, 16}
    assert len(candidates("auto", 0, 100 * MIB, 1, 1)) == 1  # nothing to exchange


@pytest.mark.mpi(ranks=[2], timeout=60)
def test_a_choice_is_measured_remembered_and_measured_again_where_it_does_not_hold():
    world = Comm(2).with_islands([[0], [1]])
    size = 4 * 16 * GRAIN
    where = where_of(world, size, "float32", torch.device("cpu"))
    found = [Candidate("owners", MIB), Candidate("everyone", MIB)]
    build = lambda c: make(world, c.algorithm, size=size // 4, bucket=c.bucket // 4)  # noqa: E731
    choice, exchange = choose(world, build, found, where, None)
    assert set(choice.seconds) == {"owners 1 MiB", "everyone 1 MiB"} and "measured" in choice.why
    assert len(set(world.gather(str(choice)))) == 1, "ranks chose differently"
    world.barrier()
    assert add_up(exchange, 0).shape == (size // 4,)
    again, _ = choose(world, build, found, where, choice.to_dict())
    assert (again.algorithm, again.why) == (choice.algorithm, "as measured before")
    other, _ = choose(world, build, found, where | {"islands": [2]}, choice.to_dict())
    assert "measured owners" in other.why or "measured everyone" in other.why


@pytest.mark.mpi(ranks=[2], timeout=60)
def test_a_slow_rank_is_waited_for_asleep():
    world = Comm(2)
    exchange = make(world, "owners")
    exchange.enter(world.rank)
    late = threading.Event()
    if world.rank:
        threading.Timer(0.5, late.set).start()
        late.wait()
    exchange.stepped(world.rank, 1)
    before = sum(os.times()[:2])
    exchange.finish()
    assert sum(os.times()[:2]) - before < 0.25

