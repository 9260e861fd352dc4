"""`trireme plan`: its arithmetic by hand, its bytes by what MPI was given, the command on small data."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.distributed as dist
from material import write_recipe
from test_strategies import Problem
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

from collectives.comm import Comm
from collectives.exchange import LONG_NAP_S
from collectives.layout import Layout
from hpc.plan import seconds
from hpc.planning.model import Costs, Curve, Line, Link, Setting, Step, falls_below, optimum, step_float32, step_onebit
from hpc.planning.outlook import Outlook
from hpc.planning.powersgd import LOW_RANKS, Arithmetic, Sums, step_powersgd, sums_of
from hpc.planning.traffic import Traffic, float32_traffic, islands_of, packed_traffic
from hpc.planning.words import bound, buffering, equation, in_bytes, packing, reach, rivals, span, verdict
from kernels.onebit import Columns

MS, US = 1e-3, 1e-6

# Paper 002, section 5.1 and table 1: milliseconds of a sub-batch, of which 18.2 do not depend on its size.
SUB_BATCHES = {256: 59, 512: 89, 1024: 143, 2048: 260, 4096: 490, 8192: 955}
FIXED = 18.2 * MS
FRAME_US = {256: 156, 512: 137, 1024: 122, 2048: 118, 4096: 115, 8192: 114}


def paper_curve() -> Curve:
    return Curve([(size, ms * MS - FIXED) for size, ms in SUB_BATCHES.items()])


def costs(**changed) -> Costs:
    """Of 1000 floats: forward 1 us an item, backward 2, its second half of the parameters final halfway."""
    plain = {
        "forward": Curve([(1000, 1 * MS)]), "backward": Curve([(1000, 2 * MS)]), "final": [(0, 1.0), (500, 0.5)],
        "quantize": 3 * MS, "post": Line(8 * MS, 0.5 * MS), "post32": Line(2 * MS, 0.25 * MS), "update": 1 * MS,
    }
    return Costs(**plain | changed)


# -- arithmetic ------------------------------------------------------------------------------------------------------


def test_curves_are_straight_between_what_was_measured_and_beyond():
    curve = Curve([(30, 3.0), (10, 2.0), (20, 2.5)])
    assert [curve(x) for x in (10, 15, 20, 25, 30)] == pytest.approx([2, 2.25, 2.5, 2.75, 3])
    assert curve(0) == pytest.approx(1.5) and curve(50) == pytest.approx(4)
    assert Curve([(10, 2.0)])(5) == pytest.approx(1)
    assert Curve([(10, 0.1), (20, 1.1)])(0) == 0


def test_the_papers_table_1():
    curve = paper_curve()
    for size, us in FRAME_US.items():
        assert curve(size) / size == pytest.approx(us * US, abs=3.5 * US)
    assert curve(1024) / 1024 == pytest.approx(122 * US, abs=0.5 * US)


@pytest.mark.parametrize(("batch", "frame_us", "comm_ms", "expected"), [
    (2880, 118, 10, (1440 * 118 * US + 9.2 * MS) / MS),  # 179: a fixed cost of 9 ms and 10 ms of communication
    (16384, 114, 10, (8192 * 114 * US + 9.2 * MS) / MS),
    (2880, 118, 32 * 3, (1440 * 118 * US + 9.2 * MS) / (87 * MS)),  # float32: Z = 1
])
def test_equation_4_on_the_papers_numbers(batch, frame_us, comm_ms, expected):
    found = optimum(batch, lambda size: frame_us * US, FIXED - 9 * MS, lambda nodes: comm_ms * MS, 9 * MS)
    assert found.nodes == pytest.approx(expected)
    assert found[1:] == pytest.approx((batch, frame_us * US, 9.2 * MS, comm_ms * MS, 9 * MS))
    assert found.limit is None


def test_equation_4_breaks_down_where_communication_is_below_the_fixed_cost():
    found = optimum(2880, lambda size: 118 * US, 9.2 * MS, lambda nodes: 3 * MS, 9 * MS)
    assert found.nodes is None and found.limit == pytest.approx(18 * MS)
    assert "not positive" in equation(found) and "18 ms" in equation(found)
    assert optimum(2880, lambda size: 118 * US, 9.2 * MS, lambda nodes: 9 * MS, 9 * MS).nodes is None


def test_equation_4_takes_the_frames_cost_at_the_sub_batch_that_it_leads_to():
    curve = paper_curve()
    found = optimum(16384, lambda size: curve(size) / size, 9.2 * MS, lambda nodes: 96 * MS, 9 * MS)
    assert found.frame_s == pytest.approx(curve(8192 / found.nodes) / (8192 / found.nodes), rel=1e-3)
    assert found.nodes == pytest.approx((8192 * found.frame_s + 9.2 * MS) / (87 * MS), rel=1e-3)
    assert found.frame_s > 114 * US


def test_where_efficiency_falls_below_a_half():
    assert falls_below(lambda nodes: 1 / (1 + nodes / 8)) == 9  # at 8 it is a half
    assert falls_below(lambda nodes: 0.4) == 1
    assert falls_below(lambda nodes: 1.0) is None
    assert falls_below(lambda nodes: 1 / nodes) == 3


def test_a_1_bit_step_is_all_of_its_parts():
    link, setting = Link.of(1e6, 50 * US, message=2 * US), Setting(4, 1, 4, 4000)
    step = step_onebit(costs(), link, Traffic(3000, 1000, 6), setting)
    moving = 2 * 50 * US + 4000 / 1e6 + 4 * 2 * US
    work = 3 * MS + (8 + 4 * 0.5) / 4 * MS + 1 * MS
    assert step.link == pytest.approx(moving) and step.work == pytest.approx(work)
    assert step.compute == pytest.approx(3 * MS) and step.visible == pytest.approx(moving)
    assert step.seconds == pytest.approx(3 * MS + moving + work)


def test_ranks_that_hold_several_splits_compute_and_quantize_each():
    step = step_onebit(costs(), Link.of(1e6, 0), Traffic(0, 0, 0), Setting(2, 1, 6, 6000))
    assert step.seconds == pytest.approx(3 * (3 + 3) * MS + (8 + 6 * 0.5) / 2 * MS + 1 * MS)


@pytest.mark.parametrize(("rate", "slowest"), [(1e9, "compute"), (1e5, "exchange")])
def test_double_buffering_is_two_turns_of_the_slower_of_computing_and_exchanging(rate, slowest):
    link, setting, traffic = Link.of(rate, 0), Setting(4, 1, 4, 4000), Traffic(3000, 1000, 6)
    step = step_onebit(costs(), link, traffic, setting, 2)
    computing = 1.5 * MS + 3 * MS
    exchanging = 4000 / rate + (8 + 4 * 0.5) / 4 * MS + 3 * LONG_NAP_S
    turn = {"compute": computing, "exchange": exchanging}[slowest]
    assert turn == max(computing, exchanging)
    assert step.seconds == pytest.approx(2 * (turn + 1 * MS))


def test_double_buffering_on_a_core_that_computes_too():
    traffic, curve = Traffic(3000, 1000, 6), Curve([(1e9, 1.0)])
    step = step_onebit(costs(contended=True), Link(curve, curve, core=1e-7), traffic, Setting(4, 1, 4, 4000), 2)
    assert step.seconds == pytest.approx(2 * (1.5 * MS + 3 * MS + 2.5 * MS + 4000 * 1e-7 + 1 * MS))


def test_float32_exchanges_one_bucket_behind_the_other_while_backward_runs():
    given = costs(forward=Curve([(1000, 5 * MS)]), backward=Curve([(1000, 10 * MS)]), post32=Line(3 * MS, 0.5 * MS))
    link = Link(*[Curve([(0, 0.0), (8000, 8 * MS)])] * 2)  # 2 ms a bucket and stage
    setting = Setting(2, 1, 2, 2000)  # an owner's work: (3 + 2 x 0.5) / 2 = 2 ms, 1 ms a bucket
    step = step_float32(given, link, Traffic(4000, 4000, 4), setting, [(500, 1000), (0, 500)])
    first_there = 5 + 2 + LONG_NAP_S / MS  # the first bucket is full halfway through backward; a thread looks
    first_out = first_there + 1 + 2
    second = first_out + 2 + 1 + 2  # full at 10 ms, but the link is not free before
    assert step.seconds == pytest.approx((5 + second) * MS)
    assert step.link == pytest.approx(8 * MS) and step.work == pytest.approx(2 * MS)
    assert step.visible == pytest.approx((second - 10 - 2) * MS)


def test_float32_without_overlap_and_with_a_clipped_gradient():
    link, setting = Link(*[Curve([(0, 0.0), (8000, 8 * MS)])] * 2), Setting(2, 1, 2, 2000)
    given, buckets = costs(post32=Line(3 * MS, 0.5 * MS)), [(500, 1000), (0, 500)]
    traffic = Traffic(4000, 4000, 4)
    after = step_float32(given, link, traffic, setting, buckets, overlap=False)
    first_out = 2 + 1  # backward is over: 2 ms to the owner, 1 ms of work; the other one's sums go before its results
    second = 2 + 2 + 1
    assert after.seconds == pytest.approx((3 + max(first_out, 4) + 2 + 2) * MS) and second < 8
    clipped = step_float32(given, link, traffic, setting, buckets, overlap=False, deferred=True)
    assert clipped.seconds == pytest.approx((3 + 2 + 2 + 1 + 2 + 2) * MS)


def test_float32_is_hidden_by_a_quick_link_and_not_by_a_slow_one():
    buckets = [(low, low + 100) for low in range(900, -1, -100)]
    given = costs(final=[(low, 1 - low / 1000) for low in range(0, 1000, 100)])
    setting = Setting(2, 1, 2, 200_000)
    quick = step_float32(given, Link.of(1e9, 0), Traffic(1000, 1000, 20), setting, buckets)
    assert quick.seconds == pytest.approx(0.3 + 0.125 * 2 * MS, rel=1e-3) and quick.visible < 1 * MS
    slow = step_float32(given, Link.of(1000, 0), Traffic(1000, 1000, 20), setting, buckets)
    assert 0.1 + 2.0 < slow.seconds < 0.3 + 2.0
    busy, curve = Costs(**vars(given) | {"contended": True}), Curve([(1e9, 1.0)])
    beside = step_float32(busy, Link(curve, curve, core=1e-5), Traffic(1000, 1000, 20), setting, buckets)
    assert beside.seconds > quick.seconds + 0.9 * 2000 * 1e-5


def test_one_node_exchanges_nothing():
    step = step_float32(costs(), Link.of(1e6, 1.0), Traffic(0, 0, 0), Setting(1, 2, 2, 2000), [(0, 1000)])
    assert step.seconds == pytest.approx(3 * MS + (2 + 2 * 0.25) / 2 * MS) and step.link == 0


def test_a_gpu_is_told_by_how_many_times_as_fast_it_is():
    faster = costs().faster(10, 4)
    assert faster.compute(1000) == pytest.approx(0.3 * MS) and faster.quantize == pytest.approx(0.75 * MS)
    assert faster.post(2) == pytest.approx(9 / 4 * MS) and faster.update == pytest.approx(0.25 * MS)
    assert faster.contended


# -- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.mpi(ranks=[2, 3, 4], timeout=120)
@pytest.mark.parametrize("name", ["1-bit", "1-bit, double buffering"])
def test_packed_bytes_are_those_that_mpi_is_given(name):
    problem = Problem(name, Comm(12))
    comm, flat = problem.comm, problem.flat
    comm.sent.clear()
    problem.run(3).strategy.end()
    found = packed_traffic(Columns.of(flat.shapes), flat.size, islands_of(comm.size, 1), comm.n_splits)
    most = max(comm.gather([comm.sent["reduce"], comm.sent["share"]]), key=sum)
    assert most == [3 * found.reduce, 3 * found.share]


@pytest.mark.mpi(ranks=[2, 3, 4], timeout=120)
def test_float32_bytes_are_those_that_mpi_is_given():
    world = Comm(12)
    apart = world.with_islands(islands_of(world.size, 1))
    problem = Problem("allreduce in buckets", apart, options={"algorithm": "owners"})
    comm = problem.comm
    comm.sent.clear()
    problem.run(3)
    layout = Layout(problem.flat.size, comm.islands, 1024)
    found = float32_traffic(layout, comm.n_splits)
    most = max(comm.gather([comm.sent["reduce"], comm.sent["share"]]), key=sum)
    assert most == [3 * found.reduce, 3 * found.share]
    assert float32_traffic(layout, comm.n_splits, "bfloat16") == Traffic(
        found.reduce // 2, found.share // 2, found.messages
    )


def test_what_stays_on_a_node_does_not_cross():
    columns, size = Columns.of([(0, (512, 512))]), 512 * 512
    alone, shared = (packed_traffic(columns, size, islands_of(4 // ranks, ranks), 4) for ranks in (1, 2))
    row = 4 * (1 + 2 * 512 + 512 * 16) // 4
    assert alone.reduce == pytest.approx(3 * row, abs=50) and alone.share == pytest.approx(3 * row, abs=50)
    assert shared.reduce == pytest.approx(2 * 2 * row, abs=50) and shared.share == pytest.approx(2 * 2 * row, abs=50)
    assert packed_traffic(columns, size, [[0, 1, 2, 3]], 4).total == 0
    several = packed_traffic(columns, size, islands_of(4, 1), 12)
    assert several.reduce == 3 * several.share  # a row a split: of a sum of packed rows there is no packed form
    assert float32_traffic(Layout(size, [[0, 1], [2, 3]], 4096), 4).total == 4 * size
    assert float32_traffic(Layout(size, [[0, 1, 2, 3]], 4096), 4).total == 0


# -- PowerSGD --------------------------------------------------------------------------------------------------------

SHAPES = [(0, (40, 30)), (1200, (40,)), (1240, (5, 6)), (1270, (20, 3, 70)), (5470, ())]


def test_powersgd_sums_what_torchs_hook_sums(tmp_path):
    shapes = SHAPES[:-1]  # the hook cannot take a scalar
    model = torch.nn.ParameterList([torch.nn.Parameter(torch.randn(shape)) for _, shape in shapes])

    class Sum(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = model

        def forward(self, x):
            return x * sum((part ** 2).sum() for part in self.parts)

    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        for rank in LOW_RANKS:
            parallel = torch.nn.parallel.DistributedDataParallel(Sum(), bucket_cap_mb=1000)
            state = PowerSGDState(None, matrix_approximation_rank=rank, start_powerSGD_iter=2)
            parallel.register_comm_hook(state, powerSGD_hook)
            for _ in range(4):
                parallel(torch.ones(())).backward()
            _, before, after = state.compression_stats()
            assert after * sum(part.numel() for part in model) == before * sum(sums_of(shapes, rank)), rank
    finally:
        dist.destroy_process_group()


def test_powersgds_arithmetic_is_a_thin_product_and_what_is_left():
    for rank in LOW_RANKS:
        given = torch.randn(5471, generator=torch.Generator().manual_seed(rank))
        act = Arithmetic(SHAPES, given.clone(), rank)
        total = torch.zeros(5471)
        for turn in range(1, 4):
            act.gradient.copy_(given)
            act()
            total += act.gradient
            torch.testing.assert_close(total + act.left, turn * given, rtol=0, atol=1e-4)
            assert torch.linalg.matrix_rank(act.gradient[:1200].view(40, 30)) == rank and act.left[:1200].any()
            assert torch.equal(act.gradient[1200:1240], given[1200:1240]) and not act.left[1200:1240].any()


def test_a_powersgd_step_is_all_of_its_parts():
    link, setting = Link.of(1e6, 50 * US, message=7 * US), Setting(4, 1, 8, 4000)
    step = step_powersgd(costs(low_rank={1: 5 * MS}), link, SHAPES, 1, setting)
    sums = Sums(whole=40 + 1, first=40 + 5 + 20, second=30 + 6 + 3 * 70)
    assert sums_of(SHAPES, 1) == sums
    assert sums_of(SHAPES, 4) == Sums(40 + 5 * 6 + 1, 4 * (40 + 20), 4 * (30 + 210))
    moving = sum(2 * 50 * US + 2 * (4 * count * 3 // 4) / 1e6 + (2 * 3 - 2) * 7 * US for count in sums)
    assert step.link == pytest.approx(moving) and step.work == pytest.approx(5 * MS)
    assert step.seconds == pytest.approx(3 * MS + moving + 5 * MS)  # a rank's two splits are one batch
    assert step_powersgd(costs(low_rank={1: 5 * MS}), link, SHAPES, 1, Setting(1, 1, 8, 4000)).link == 0


@pytest.mark.parametrize(("seconds", "said"), [
    (1 * MS, "It would be faster on 4, 8; as fast on 2 nodes."), (5.0, "It would be slower on 2, 4, 8 nodes."),
    (120 * MS, "It would be faster on 8; slower on 2; as fast on 4 nodes."),
])
def test_a_plan_says_whether_powersgd_would_be_faster(seconds, said):
    (sentence,) = rivals(outlook(1.25e6, low_rank={1: seconds, 4: 2 * seconds}), [2, 4, 8], 4)
    assert sentence.endswith(said) and "of rank 1 " in sentence and "of rank 4 " in sentence
    assert rivals(outlook(1.25e6), [2, 4, 8], 4) == []


# -- words -----------------------------------------------------------------------------------------------------------


def outlook(rate, *, batch=8192, **changed) -> Outlook:
    """Of a matrix of 1000 x 1000, at 100 us an item unless told otherwise."""
    plain = {"forward": Curve([(1000, 33 * MS)]), "backward": Curve([(1000, 67 * MS)])}
    final = [(0, 1.0)] + [(250_000 * k, 1 - k / 4) for k in (1, 2, 3)]
    given = costs(**plain | {"final": final} | changed)
    return Outlook(given, Link.of(rate, 50 * US), [(0, (1000, 1000))], 1_000_448, batch=batch)


NODES = [1, 2, 4, 8, 16]


def test_1_bit_pays_on_a_slow_link():
    said = verdict(outlook(12.5e6), NODES)
    assert said[0].startswith("Beside float32, 1-bit pays from 2 nodes on: on 16 a minibatch takes ")
    assert "instead of" in said[0] and "times as fast" in said[0]
    assert said[-1].startswith("Up to 16 nodes") and "more were not asked for" in said[-1]


def test_1_bit_does_not_pay_where_it_costs_more_than_it_saves():
    said = verdict(outlook(12.5e9, quantize=50 * MS), NODES)
    assert said[0].endswith("1-bit does not pay.") and "hidden" in said[0]
    slow = outlook(1.25e8, batch=256, quantize=200 * MS)
    said = packing({k: slow.steps(k) for k in (2, 4)}, 4)
    assert "quantizing, adding up and unpacking take 20" in said and "smaller messages save" in said


def test_double_buffering_pays_where_there_is_something_to_hide():
    steps = {"onebit": Step(30 * MS, 10 * MS, 15 * MS, 5 * MS), "halves": Step(20 * MS, 10 * MS, 15 * MS, 8 * MS)}
    said = buffering(steps, 4)
    assert said == "Double buffering pays: on 4 nodes it hides 13 ms of exchange, 1.5 times as fast as without."
    steps["halves"] = Step(40 * MS, 20 * MS, 1 * MS, 20 * MS)
    steps["onebit"] = Step(21 * MS, 10 * MS, 1 * MS, 10 * MS)
    assert "does not pay: on 4 nodes it hides 1 ms of 1 ms of exchange, and a second turn" in buffering(steps, 4)
    assert "takes 20 ms more" in buffering(steps, 4)
    steps = {"onebit": Step(30 * MS, 10 * MS, 10 * MS, 10 * MS), "halves": Step(40 * MS, 11 * MS, 20 * MS, 12 * MS)}
    said = "exchanges twice as much, of which 17 ms are not hidden instead of 10 ms, and a second turn's fixed costs"
    assert f"{said} are 3 ms." in buffering(steps, 4)
    steps["onebit"] = steps["halves"]
    assert "little difference" in buffering(steps, 4)


def test_what_bounds_a_step_and_how_far_nodes_are_of_use():
    assert "by computing: 80 %" in bound({"float32": Step(10 * MS, 8 * MS, 9 * MS, 1 * MS)}, 4)
    assert "by the link: 70 %" in bound({"float32": Step(10 * MS, 2 * MS, 9 * MS, 1 * MS)}, 4)
    assert "by passes through memory" in bound({"onebit": Step(10 * MS, 2 * MS, 1 * MS, 7 * MS)}, 4)
    assert reach(2, 0.3, 8) == "Several nodes do not pay: 2 are 0.60 times as fast as one (30 % of use)."
    assert "more than half idle or busy with the exchange: 8 are 2.48 times as fast" in reach(8, 0.31, 8)
    assert reach(4, 0.7, 4).endswith("of use (70 % there); more were not asked for.")
    assert verdict(outlook(1e6), [1]) == ["One node exchanges nothing: ask for several (--nodes)."]


def test_plans_use_the_recipes_splits_where_ranks_divide_them():
    given = Outlook(costs(), Link.of(1e6, 0), [(0, (10, 100))], 1024, batch=960, splits=8, ranks=2)
    assert [given.setting(k).splits for k in (1, 2, 3, 4, 8)] == [8, 8, 6, 8, 16]
    assert given.setting(2).held == 2 and given.efficiency(1, "float32") <= 1
    assert not given.fits(500) and given.fits(60, 8)


def test_numbers_are_short():
    assert [span(s) for s in (3.21, 18.2 * MS, 115 * US, 0.0)] == ["3.21 s", "18.2 ms", "115 us", "0 us"]
    assert [in_bytes(n) for n in (184e6, 57_700, 96)] == ["184 MB", "57.7 kB", "96 B"]
    assert [seconds(text) for text in ("50us", "1.5ms", "0.001", "2s")] == pytest.approx([50 * US, 1.5 * MS, MS, 2])


# -- the command -----------------------------------------------------------------------------------------------------


def check_plan(plan, nodes):
    assert [row["nodes"] for row in plan["nodes"]] == nodes and plan["batch"] == 48
    assert plan["parameters"] == 30 * 40 + 40 + 40 * 40 + 40 + 40 * 5 + 5
    for row in plan["nodes"]:
        for way in ("float32", "onebit", "halves"):
            step = row[way]
            assert step["step_s"] > 0 and step["per_s"] == pytest.approx(48 / step["step_s"], rel=1e-3)
            share = step["per_s"] / row["nodes"] / plan["alone_per_s"]
            assert step["efficiency"] == pytest.approx(share, rel=1e-3)
            assert (step["bytes_back"] > 0) == (row["nodes"] > 1)
        for way in ("powersgd1", "powersgd4"):
            assert row[way]["step_s"] > row[way]["compute_s"] > 0
            assert (row[way]["bytes"] > 0) == (row["nodes"] > 1)
    assert all(math.isfinite(y) for _, y in plan["costs"]["forward"])
    shares = [share for _, share in plan["costs"]["final"]]
    assert len(shares) == 6 and all(0 <= share <= 1 for share in shares) and shares[0] > shares[-1]
    assert set(plan["equation_4"]) == {"float32", "onebit"} and len(plan["verdict"]) >= 3


def test_a_plan_by_a_link_that_is_told(tmp_path, trireme):
    recipe = write_recipe(tmp_path)
    said = trireme("plan", recipe, "--link", "1gbit", "--nodes", "1,2,4", "--json", "task.dropout=0.0").stdout
    plan = json.loads(said)
    check_plan(plan, [1, 2, 4])
    assert plan["link"]["both"] == [[0.0, 1e-4], [125e6, 1.0001]] and plan["busy"] == 1
    assert [row["splits"] for row in plan["nodes"]] == [4, 4, 4]
    told = trireme("plan", recipe, "--link", "1gbit", "--latency", "2ms", "--gpu-speedup", 4, "--json", "--nodes", 2)
    fast = json.loads(told.stdout)
    curves = [dict(map(tuple, fast["costs"][name])) for name in ("forward", "backward")]
    assert fast["nodes"][0]["onebit"]["compute_s"] == pytest.approx(2 * sum(c[12.0] for c in curves) / 4, rel=1e-3)
    assert fast["link"]["both"][0] == [0.0, 4e-3]


def test_a_plan_is_one_screen(tmp_path, trireme):
    blocks = "strategy={name='bmuf', block_steps=4}"
    screen = trireme("plan", write_recipe(tmp_path), "--link", "10gbit", blocks).stdout
    lines = screen.splitlines()
    assert len(lines) < 50 and max(map(len, lines)) <= 110, screen
    equation_4 = "K = (N/2 T_frm + C T_post) / (T_comm - T_upd)"
    for words in (equation_4, "T_frm", "quantize", "to owners", "halves", "1-bit "):
        assert words in screen
    assert "'bmuf', the recipe's own strategy, exchanges once a block and is not planned" in " ".join(screen.split())
    assert "link: 10gbit each way, 50 us" in screen and "Less than half of use: float32" in screen


def test_a_plan_by_what_is_between_two_ranks(tmp_path, trireme):
    recipe = write_recipe(tmp_path)
    alone = json.loads(trireme("plan", recipe, "--nodes", "1,2", "--json").stdout)
    check_plan(alone, [1, 2])
    assert alone["busy"] == 1 and alone["link"]["asked"] is None and len(alone["link"]["both"]) > 2
    screen = trireme("plan", recipe, "--nodes", "2", "--ranks-a-node", 2).stdout
    assert "measured by 2 ranks at once" in screen and "which is no network" in screen
    together = trireme("plan", recipe, "--nodes", "1,2", "--json", ranks=2)
    plan = json.loads(together.stdout)
    check_plan(plan, [1, 2])
    assert plan["busy"] == 2


@pytest.mark.parametrize(("words", "complaint"), [
    (["data.train=nowhere"], "'nowhere' is not a data set: no dataset.json in it"),
    (["--latency", "1ms"], "--latency goes with --link"),
    (["--link", "1gbit", "--nodes", "64"], "fewer items than ranks on 64 nodes"),
    (["optim.learning_rat=1"], "unknown recipe key 'optim.learning_rat'"),
    (['strategy={name="onebit", double_buffering=true}', "data.batch=52"], "learned in 2 parts"),
])
def test_what_cannot_be_planned_is_refused_before_anything_is_measured(tmp_path, trireme, words, complaint):
    done = trireme("plan", write_recipe(tmp_path), *words, code=1)
    assert complaint in done.stderr and "Traceback" not in done.stderr and not done.stdout


@pytest.mark.parametrize(("words", "complaint"), [
    (["--link", "fast"], "'fast' is not a rate such as 100mbit"),
    (["--link", "1gbit", "--latency", "soon"], "'soon' is not a time such as 50us"),
    (["--nodes", "0"], "must be above 0"),
    (["--gpu-speedup", "-2"], "is not above 0"),
    (["nonsense", "--link", "1gbit"], "override 'nonsense' is not of the form key=value"),
    (["--link", "1gbit", "nonsense"], "unrecognized arguments: nonsense"),
])
def test_words_that_are_not_understood(tmp_path, trireme, words, complaint):
    done = trireme("plan", write_recipe(tmp_path), *words, code=None)
    assert done.returncode and complaint in done.stderr and "Traceback" not in done.stderr
