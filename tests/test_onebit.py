"""1-bit SGD: nothing is lost, bytes are few, cold start and double buffering do what the paper says. The laws of all
strategies are in test_strategies.py, the kernels' in test_onebit_kernel.py."""

from __future__ import annotations

import json
from functools import partial
from itertools import pairwise

import pytest
import torch
from material import write_recipe
from mpi4py import MPI
from test_strategies import BATCH, CPU, SPLITS, Problem, alone
from test_training import kill, train, train_on, wait_for_step

from collectives.allreduce import AllReduce
from collectives.comm import Comm
from collectives.onebit import RESIDUAL, OneBitSGD
from collectives.packed import Float32, OneBit, cut_parts
from collectives.strategy import Rate, TrainingFailed
from hpc import optim
from hpc.files import sha256_of
from hpc.flat import Flat
from kernels.onebit import Columns

several = pytest.mark.mpi(ranks=[1, 2, 4], timeout=120)


class Gradients:
    """A model of chosen shapes, whose splits' gradients are drawn from (split, turn), under 1-bit SGD."""

    def __init__(self, comm, shapes, rule=None, **options):
        torch.set_num_threads(1)
        self.comm = comm
        self.model = torch.nn.ParameterList([torch.zeros(shape) for shape in shapes])
        self.flat = Flat(self.model, partial(comm.memory.zeros, device=CPU))
        self.rule = rule or optim.SGD(learning_rate=0.1)
        self.strategy = OneBitSGD(comm, self.flat, self.rule, comm.n_splits, **options)
        self.strategy.begin()
        self.given = torch.zeros(self.flat.size, dtype=torch.float64)
        self.turns = 0

    def turn(self, scale=1.0, rate=0.1):
        strategy = self.strategy
        strategy.rate = Rate(rate, 0)
        n = strategy.span(1)
        for split in range(self.comm.n_splits):  # every rank draws all of them, to know what was given
            random = torch.Generator().manual_seed(1000 * self.turns + split)
            parts = [torch.randn(p.shape, generator=random) * scale for p in self.model]
            for view, part in zip(self.flat.views(self.given), parts, strict=True):
                view += part
            if split in self.comm.splits:
                strategy.enter(split)
                for parameter, part in zip(self.model, parts, strict=True):
                    parameter.grad += part
                strategy.step(split, 1)
                strategy.leave(split)
        strategy.advance(n)
        self.turns += 1
        return self


SHAPES = [(50, 70), (50,), (3, 5, 7), (), (1, 300)]


@several
def test_what_was_applied_and_what_is_left_are_what_was_given():
    comm = Comm(4)
    for options in ({}, {"double_buffering": True}, {"cold_start": 8.0}):
        at_work = Gradients(comm, SHAPES, **options)
        for number in range(1, 31):
            at_work.turn(scale=3.0 if number % 7 else 100.0)  # now and then a gradient that stands out
        at_work.strategy.end()
        strategy = at_work.strategy
        left = [strategy.residuals[split].double() for split in comm.splits]
        owned = torch.zeros(at_work.flat.size, dtype=torch.float64)
        owned[strategy.low : strategy.high] = strategy.slices[RESIDUAL].double()
        local = torch.from_numpy(comm.all_values((0.1 / 4 * sum(left)).numpy())).view(comm.size, -1).sum(0)
        owners = torch.from_numpy(comm.all_values(owned.numpy())).view(comm.size, -1).sum(0)
        applied = at_work.flat.weights.double()
        torch.testing.assert_close(applied + owners - local, -0.1 / 4 * at_work.given, rtol=0, atol=2e-5)
        assert applied.abs().max() > 1 and owners.abs().max() > 1e-3 and local.abs().max() > 1e-3


@pytest.mark.mpi(ranks=[2, 4], timeout=120)
def test_at_least_28_times_fewer_bytes_than_float32_at_the_mpi_calls():
    comm = Comm()
    at_work = Gradients(comm, [(2048, 2048), (2048,), (2048, 2048), (2048,)]).turn()
    sent, plain = at_work.strategy.sent(), sum(comm.gather(at_work.strategy.float32_bytes))
    assert sent == {"reduce": comm.sent["reduce"], "share": comm.sent["share"], "float32": sent["float32"]}
    everyone = sum(comm.gather(sum(comm.sent.values())))
    # What float32 sends by the same scheme: of every rank's values those that others own, there and back.
    assert plain == 2 * (comm.size - 1) * 4 * at_work.flat.size
    assert plain / everyone >= 28, plain / everyone
    assert plain / everyone <= 32
    turn = dict(comm.sent)
    at_work.turn()
    assert comm.sent == {name: 2 * size for name, size in turn.items()}, "every turn sends as much"


@pytest.mark.mpi(ranks=[2], timeout=120)
def test_several_splits_a_rank_send_a_bit_each_and_the_report_says_so():
    comm = Comm(6)
    at_work = Gradients(comm, [(512, 512)]).turn()
    assert comm.sent["reduce"] == 3 * comm.sent["share"]
    first, again = at_work.strategy.traffic()
    assert again == pytest.approx(sum(comm.gather(2 * 512 * 512)) / sum(comm.gather(comm.sent["share"])), rel=1e-6)
    assert first == pytest.approx(again / 3)
    assert f"to owners {first:.1f}, back {again:.1f} times fewer" in at_work.strategy.prepare()["said"]


@several
def test_the_cold_start_is_float32_and_nothing_else_then():
    cold = Problem("1-bit after a cold start", Comm(), "sgd", options={"cold_start": 5.0 * BATCH}).run(5)
    plain = Problem("allreduce", alone(), "sgd").run(5)
    torch.testing.assert_close(cold.flat.weights, plain.flat.weights, rtol=1e-5, atol=1e-6)
    assert not any(left.any() for left in cold.strategy.residuals.values())
    cold.run(1)
    assert all(left.any() for left in cold.strategy.residuals.values())
    assert cold.strategy.cold is None, "what is of no more use is let go"


@several
def test_half_batches_learn_on_a_model_that_lacks_the_one_before():
    problem = Problem("1-bit, double buffering", Comm(), "sgd")
    first = problem.flat.weights.clone()
    problem.run(1)
    assert torch.equal(problem.flat.weights, first), "on its way"
    problem.run(2).strategy.end()
    problem.strategy.end()  # nothing is left: nothing happens
    # The same without delay, but every gradient taken where the model was before the update before it.
    hand = Problem("1-bit", alone(), "sgd")
    weights = [first, first]
    for t in range(3):
        hand.flat.weights.copy_(weights[t])
        hand.strategy.rate = Rate(0.1, 0)
        hand.strategy.span(1)
        for split in hand.comm.splits:
            hand.strategy.enter(split)
            hand.strategy.step(split, hand.learn(split, t))
            hand.strategy.leave(split)
        hand.flat.weights.copy_(weights[-1])
        hand.strategy.advance(1)
        weights.append(hand.flat.weights.clone())
    assert problem.strategy.updates == hand.strategy.updates == 3
    assert torch.equal(problem.flat.weights, weights[-1])
    assert not torch.equal(weights[-1], weights[-2]) and not torch.equal(weights[-2], first)


def test_a_turn_takes_whole_batches_until_halves_are_exchanged_beside():
    problem = Problem("1-bit, double buffering", alone(), options={"cold_start": 2.0 * BATCH})
    strategy = problem.strategy
    strategy.rate = Rate(0.1, 0)
    taken = []
    for _ in range(4):
        n = strategy.span(10)
        taken.append((n, strategy.beside))
        for split in problem.comm.splits:
            strategy.enter(split)
            strategy.step(split, problem.learn(split, problem.at))
            strategy.leave(split)
        strategy.advance(n)
    assert taken == [(2, False), (2, False), (1, True), (1, True)]
    strategy.end()
    strategy.undelayed, strategy.batches = True, 3
    assert strategy.span(10) == 6 and not strategy.beside and strategy.span(4) == 4


@several
def test_local_adagrad_is_the_mean_of_normalised_gradients():
    problem = Problem(
        "1-bit, local AdaGrad", Comm(), "sgd", options={"cold_start": 9.0 * BATCH, "adagrad_epsilon": 1e-3}
    )
    before = problem.flat.weights.clone()
    problem.run(1)
    other = Problem("allreduce", alone(), "sgd")
    total = torch.zeros_like(before)
    for split in range(SPLITS):
        grads = torch.zeros_like(before)
        other.flat.bind_grads(grads)
        other.learn(split, 0)
        mean = grads * SPLITS / BATCH
        total += mean / (mean.abs() + 1e-3)
    torch.testing.assert_close(before - problem.flat.weights, 0.1 * total / SPLITS, rtol=1e-4, atol=1e-6)


def test_a_gradient_above_the_norm_is_scaled_down_before_it_is_quantized():
    at_work = Gradients(Comm(2, world=MPI.COMM_SELF), [(40, 40)], clip_norm=0.5)
    at_work.turn(scale=100.0)
    strategy = at_work.strategy
    for split in range(2):
        cut = slice(0, 1600)
        part = next(p for p in strategy.exchanges[0].parts)
        given = torch.zeros(1600)
        block, row = strategy.exchanges[0].rows(split)[0]
        strategy.exchanges[0].codec.add_(given, row[None], block.columns, fresh=True)
        mean = given + strategy.residuals[split][cut]  # of a split alone: its sum over one item, and one item's share
        assert float(mean.norm()) == pytest.approx(0.5, rel=1e-4) and part.low == 0


def test_the_norm_is_the_mean_gradients_however_many_batches_a_turn_takes():
    """A split that meets the same gradient n times has the mean gradient of one."""
    left = []
    for batches in (1, 3):
        at_work = Gradients(Comm(2, world=MPI.COMM_SELF), [(40, 40)], clip_norm=0.5)
        strategy, gradient = at_work.strategy, torch.randn(40, 40, generator=torch.Generator().manual_seed(1))
        strategy.batches = batches
        strategy.rate = Rate(0.1, 0)
        assert strategy.span(10) == batches
        for split in range(2):
            strategy.enter(split)
            for _ in range(batches):
                at_work.model[0].grad += gradient
                strategy.step(split, 1)
            strategy.leave(split)
        left.append(strategy.residuals[0])
    assert float(left[1].norm()) == pytest.approx(3 * float(left[0].norm()), rel=1e-4)


def test_without_error_feedback_nothing_is_kept():
    at_work = Gradients(Comm(2, world=MPI.COMM_SELF), [(40, 40)], error_feedback=False).turn().turn()
    assert not at_work.strategy.residuals and RESIDUAL not in at_work.strategy.state().slices
    assert at_work.flat.weights.any()


@pytest.mark.mpi(ranks=[4], timeout=60)
def test_more_ranks_than_columns():
    digests = [Gradients(comm, [(1, 900)]).turn().turn().flat.weights for comm in (Comm(4), alone().with_splits(4))]
    assert torch.equal(*digests) and digests[0].any()


@pytest.mark.parametrize("options", [{}, {"double_buffering": True}, {"cold_start": 9.0}], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_stop_the_run_and_name_the_split(options, value):
    problem = Problem("1-bit", alone(), options=options)
    strategy = problem.strategy
    strategy.rate = Rate(0.1, 0)
    strategy.span(1)
    for split in problem.comm.splits:
        strategy.enter(split)
        if split == 5:
            problem.model[2].weight.grad[3, 4] = value
            strategy.step(split, 1)
            with pytest.raises(TrainingFailed, match=r"split 5, parameter 2\.weight, .*clip_norm"):
                strategy.leave(split)
            break
        strategy.step(split, 1)
        strategy.leave(split)


@pytest.mark.parametrize("options", [{}, {"double_buffering": True}], ids=str)
def test_an_update_that_is_not_finite_stops_the_run_from_the_thread_too(options):
    at_work = Gradients(Comm(2, world=MPI.COMM_SELF), SHAPES, **options)
    with pytest.raises(TrainingFailed, match="the sum of all splits, parameter 0"):
        for _ in range(3):
            at_work.turn(scale=1e20, rate=1e25)


def test_where_it_is_wanted_a_failure_is_noted_instead():
    at_work = Gradients(Comm(2, world=MPI.COMM_SELF), SHAPES)
    at_work.strategy.lenient = True
    at_work.turn(scale=1e20, rate=1e25)
    assert at_work.strategy.failed


@pytest.mark.parametrize(("options", "rule", "what"), [
    ({"local_adagrad": True}, optim.SGD, r"the sum of its squares is not finite at update 0 .*split 0, parameter 0"),
    ({}, optim.AdaGrad, r"the update rule's squares is not finite at update 0 .*the sum of all splits, parameter 0"),
    ({"error_feedback": False}, optim.SGD, "the sum over a column of a block that begins here overflows"),
    ({}, optim.SGD, "the gradient's sum over a column is not finite"),
])
def test_finite_gradients_whose_squares_or_sums_are_not_stop_the_run(options, rule, what):
    scale = 5e37 if "over a column" in what else 1e25
    at_work = Gradients(Comm(2, world=MPI.COMM_SELF), SHAPES, rule=rule(learning_rate=0.1), **options)
    with pytest.raises(TrainingFailed, match=what):
        at_work.turn(scale=scale)


def test_parts_cover_everything_in_whole_columns_and_evenly():
    columns = Columns.of([(0, (300, 440)), (132096, (300,)), (132416, (132, 300)), (172032, (132,))])
    size = 169 * 1024
    for ranks in (1, 2, 3, 5, 8, 700):
        sent = [part.packed - len(part.blocks) for part in cut_parts(columns, size, ranks, OneBit())]
        assert sum(sent) == columns.packed - 1 and max(sent) <= sum(sent) / ranks + 2 * 16  # int32 of a column at most
        edges = set()
        for codec in (OneBit(), Float32()):
            parts = cut_parts(columns, size, ranks, codec, block=20000)
            assert len(parts) == ranks and parts[0].low == 0 and parts[-1].high == size
            assert all(a.high == b.low for a, b in pairwise(parts))
            blocks = [block for part in parts for block in part.blocks]
            assert sum(block.columns.count for block in blocks) == columns.count
            starts = [block.low + start for block in blocks for start in block.columns.starts]
            assert starts == columns.starts
            assert all(part.packed == sum(b.last - b.first for b in part.blocks) for part in parts)
            assert ranks > 5 or max(b.high - b.low for b in blocks) < 45000
            edges.add(tuple(part.low for part in parts))
        assert len(edges) == 1, "owners stay when a cold start ends"


# -- whole runs -------------------------------------------------------------------------------------------------------

WHOLE = (
    'strategy={name="onebit", cold_start=600, double_buffering=true, clip_norm=1.0}',
    'optim={name="adagrad", learning_rate=0.02, momentum=0.5}', "schedule.epochs=3",
)


def test_a_whole_run_keeps_the_law_killed_and_resumed_too(trireme, start, tmp_path):
    recipe = write_recipe(tmp_path)
    changes = (*WHOLE, "minibatch.every=1200", "minibatch.stretch=400", "minibatch.sizes=[1, 2]")
    digests = train_on(trireme, recipe, (1, 2, 4), tmp_path, *changes)
    assert len(set(digests.values())) == 1, digests
    records = [json.loads(line) for line in (tmp_path / "run2/metrics.jsonl").read_text().splitlines()]
    assert [r["tried"].keys() for r in records if r["event"] == "minibatch"] == [{"48", "96"}] * 2
    stopped = tmp_path / "stopped"
    process = start("train", recipe, f"run={stopped}", *changes, ranks=4)
    wait_for_step(stopped, 30, process)
    kill(process)
    assert train(trireme, recipe, 2, stopped, *changes) == digests[1]
    one_thread = trireme("train", recipe, f"run={tmp_path / 'one'}", *changes, ranks=2,
                         env={"MPI4PY_RC_THREAD_LEVEL": "serialized"})
    assert "lets one thread call it only" in one_thread.stderr
    assert sha256_of(tmp_path / "one/model.safetensors") == digests[1]
    end = [r for r in records if r["event"] == "end"][-1]["sent"]  # cold start included
    assert end["bytes"] == end["reduce"] + end["share"] > 0 and end["float32"] > 2.5 * end["bytes"]
    summary = json.loads(trireme("report", tmp_path / "run2", "--json").stdout)
    assert summary["sent"] == end
    assert "times fewer than float32" in (tmp_path / "run2/report.html").read_text()


def test_a_roll_back_takes_back_what_is_left_and_keeps_the_law(trireme, tmp_path):
    recipe = write_recipe(tmp_path)
    changes = (*WHOLE, "optim.learning_rate=1.0", "strategy.clip_norm=0.0")
    digests = set(train_on(trireme, recipe, (1, 2), tmp_path, *changes).values())
    log = (tmp_path / "run1/metrics.jsonl").read_text()
    assert '"roll back"' in log and len(digests) == 1


def test_a_batch_that_has_no_halves_and_a_part_of_an_epoch_are_refused(trireme, tmp_path):
    recipe = write_recipe(tmp_path, splits=4, batch=44)
    done = trireme("train", recipe, 'strategy={name="onebit", cold_start=0.3}', code=None)
    assert done.returncode and "strategy.cold_start = 0.3 is no part of an epoch" in done.stderr
    done = trireme("train", recipe, 'strategy={name="onebit", double_buffering=true}', code=None)
    assert done.returncode and "data.batch" in done.stderr and "multiple of 2 * splits = 8" in done.stderr


def test_all_reduce_takes_several_batches_a_turn_as_one_sum():
    problem = Problem("allreduce", alone(), "sgd")
    before = problem.flat.weights.clone()
    problem.strategy.batches = 2
    strategy = problem.strategy
    strategy.rate = Rate(0.1, 0)
    assert strategy.span(10) == 2 and strategy.span(1) == 1 and strategy.span(2) == 2
    for split in problem.comm.splits:
        strategy.enter(split)
        for t in range(2):
            strategy.step(split, problem.learn(split, t))
        strategy.leave(split)
    strategy.advance(2)
    assert isinstance(strategy, AllReduce) and strategy.updates == 1
    other = Problem("allreduce", alone(), "sgd")
    grads = torch.zeros_like(before)
    other.flat.bind_grads(grads)
    for split in range(SPLITS):
        for t in range(2):
            other.learn(split, t)
    torch.testing.assert_close(before - problem.flat.weights, 0.1 * grads / BATCH, rtol=1e-4, atol=1e-7)
