"""Block training: the papers' equations, what ships, who counts how much, who is turned away. The laws of all
strategies are in test_strategies.py, the kernels' in test_block_kernel.py."""

from __future__ import annotations

import json
import math
import os
import signal
from functools import partial

import pytest
import torch
from material import write_recipe
from safetensors import safe_open
from test_strategies import alone
from test_training import kill, ranks_below, train, train_on, wait_for_step

from collectives.averaging import MasterSlave
from collectives.bmuf import BMUF, block_momentum_of
from collectives.comm import Comm
from collectives.elastic import Elastic
from collectives.strategy import Rate, TrainingFailed
from hpc import optim
from hpc.config import read_toml
from hpc.flat import Flat

CPU = torch.device("cpu")
SIZE = 3000  # floats, of which several ranks own some
ALL_REJECTED = {
    "slaves": 4, "rejected": dict.fromkeys("0123", 1), "stayed": True,
    "said": "4 of 4 slaves rejected: the master stays",
}
several = pytest.mark.mpi(ranks=[1, 2, 4], timeout=120)


class Splits:
    """A vector that splits learn, by gradients that are told: of (split, minibatch, weights), and what they count."""

    def __init__(
        self, comm, gradient, *, kind=BMUF, size=SIZE, count=lambda split, t: 1, rule=None, loss=None, **options
    ):
        torch.set_num_threads(1)
        self.comm, self.gradient, self.count = comm, gradient, count
        self.model = torch.nn.ParameterList([torch.zeros(size)])
        self.flat = Flat(self.model, partial(comm.memory.zeros, device=CPU))
        self.strategy = kind(comm, self.flat, rule or optim.SGD(learning_rate=0.1), comm.n_splits, **options)
        if loss is not None:
            self.strategy.evaluate = lambda alone: {"loss": loss(self.weights)}
        self.strategy.prepare()
        self.strategy.begin()
        self.at = 0

    @property
    def weights(self):
        return self.model[0].detach()

    def told(self):
        return self.strategy.told({"loss": loss_of(self.weights)})

    def run(self, steps, rate=0.1):
        """So many minibatches of every split; the end of them ends a block. A rate may be one of the minibatch."""
        until = self.at + steps
        while self.at < until:
            self.strategy.rate = Rate(rate(self.at) if callable(rate) else rate, 0)
            n = self.strategy.span(until - self.at)
            for split in self.comm.splits:
                self.strategy.enter(split)
                for t in range(self.at, self.at + n):
                    count = self.count(split, t)
                    if count:
                        self.model[0].grad += self.gradient(split, t, self.weights) * count
                    self.strategy.step(split, count)
                self.strategy.leave(split)
            self.strategy.advance(n)
            self.at += n
        self.strategy.end()
        return self


def test_the_block_momentum_of_equation_10():
    assert [round(block_momentum_of(n), 3) for n in (8, 16, 32, 64)] == [0.886, 0.943, 0.972, 0.986]
    assert block_momentum_of(8, 0.5) == pytest.approx(1 - 0.5 / 8.8) and block_momentum_of(1, 2.0) == 0.0


@pytest.mark.parametrize("scheme", ["nesterov", "classical"])
def test_what_ships_is_the_global_model_and_moves_as_far_as_the_paper_says(scheme):
    """Every block departs by 1; a look-ahead kept for the model would come to 1,395 after 100 of them."""
    comm = alone().with_splits(2)
    constant = Splits(
        comm, lambda split, t, weights: torch.full((SIZE,), -1.0), block_steps=4, scheme=scheme, block_momentum=0.875
    ).run(400, rate=0.25)
    torch.testing.assert_close(constant.weights, torch.full((SIZE,), 744.0), rtol=1e-5, atol=0)
    ahead = 0.875 * 8 if scheme == "nesterov" else 0.0
    torch.testing.assert_close(constant.strategy.start[:SIZE], constant.weights + ahead, rtol=1e-5, atol=0)


@several
def test_the_equations_of_the_paper():
    for scheme in ("nesterov", "classical", "averaging"):
        check_equations(scheme)


def check_equations(scheme):
    """Equations (2) to (6), in float64, with splits one after another."""
    splits, tau, blocks, rate, zeta = 8, 3, 9, 0.05, 0.9
    eta = 0.0 if scheme == "averaging" else 0.8
    random = torch.Generator().manual_seed(3)
    centres = torch.randn(splits, SIZE, generator=random)
    noise = torch.randn(splits, tau * blocks, SIZE, generator=random)

    def gradient(split, t, weights):
        return weights - centres[split].to(weights.dtype) + noise[split, t].to(weights.dtype)

    options = {"block_momentum": eta} if eta else {}
    found = Splits(
        Comm(splits), gradient, block_steps=tau, scheme=scheme, block_learning_rate=zeta,
        rule=optim.Momentum(learning_rate=rate, momentum=0.5), **options,
    ).run(tau * blocks, rate)
    model, start, change = (torch.zeros(SIZE, dtype=torch.float64) for _ in range(3))
    for block in range(blocks):
        local = []
        for split in range(splits):
            weights, momentum = start.clone(), torch.zeros(SIZE, dtype=torch.float64)
            for t in range(block * tau, (block + 1) * tau):
                momentum = 0.5 * momentum + gradient(split, t, weights)
                weights = weights - rate * momentum
            local.append(weights)
        departed = torch.stack(local).mean(0) - start  # (2)
        change = eta * change + zeta * departed  # (3)
        model = model + change  # (4)
        start = model + eta * change if scheme == "nesterov" else model.clone()  # (6), (5)
    torch.testing.assert_close(found.weights.double(), model, rtol=1e-5, atol=1e-6)


@several
def test_splits_count_as_much_as_they_had_and_dry_ones_not_at_all():
    counts = {0: 3, 1: 1, 2: 0, 3: 4}
    found = Splits(
        Comm(4), lambda split, t, weights: torch.full((SIZE,), -float(split + 1)) / counts[split],
        count=lambda split, t: counts[split], block_steps=1, scheme="averaging",
    ).run(1, rate=1.0)
    expected = (3 * 1 + 1 * 2 + 4 * 4) / 8  # each departs by its own number, split + 1
    torch.testing.assert_close(found.weights, torch.full((SIZE,), expected))
    before = found.weights.clone()
    found.count = lambda split, t: 0
    found.run(3)
    assert torch.equal(found.weights, before) and found.strategy.updates == 1, "a block without data changes nothing"


@several
def test_what_nobody_learns_stays_as_it_is_bit_for_bit():
    one = Splits(Comm(4), lambda split, t, weights: torch.cat([torch.ones(5), torch.zeros(SIZE - 5)]), block_steps=2)
    with torch.no_grad():
        one.model[0].copy_(torch.randn(SIZE, generator=torch.Generator().manual_seed(1)))
    one.strategy.begin()
    before = one.weights.clone()
    one.run(12)
    assert torch.equal(one.weights[5:], before[5:]) and not torch.equal(one.weights[:5], before[:5])


@several
def test_the_state_of_the_splits_rules_at_a_blocks_start():
    """One block of a constant gradient by momentum, then one without any gradient: only momentum moves the splits. What
    a split kept of its own moves it by itself: the first split, whose gradient was 0, stays where the block began."""
    for state in ("reset", "kept", "averaged"):
        rule = optim.Momentum(learning_rate=1.0, momentum=0.5)
        found = Splits(
            Comm(4), lambda split, t, weights: torch.full((SIZE,), float(split) if t == 0 else 0.0), rule=rule,
            block_steps=1, scheme="averaging", local_state=state,
        ).run(1, rate=1.0)
        first = found.weights.clone()
        torch.testing.assert_close(first, torch.full((SIZE,), -1.5))
        found.count = lambda split, t: int(split == 0)
        moved = found.run(1, rate=1.0).weights - first
        torch.testing.assert_close(moved, torch.full((SIZE,), -0.75 if state == "averaged" else 0.0))
        found.count = lambda split, t: int(split == 3)
        moved = found.run(1, rate=1.0).weights - first - moved
        expected = {"reset": 0.0, "kept": -1.5, "averaged": -0.75 / 2}[state]
        torch.testing.assert_close(moved, torch.full((SIZE,), expected))


@several
def test_averaged_state_weighs_what_splits_counted_and_has_had_as_many_updates():
    counts = {0: 3, 1: 1, 2: 0, 3: 4}

    def learned(rule):
        return Splits(
            Comm(4), lambda split, t, weights: torch.full((SIZE,), float(split + 1)) / counts[split], rule=rule,
            block_steps=1, count=lambda split, t: counts[split], scheme="averaging", local_state="averaged",
        ).run(1)

    averaged = learned(optim.Momentum(learning_rate=1.0, momentum=0.5)).strategy.averages
    (joining,) = averaged.values()
    expected = (3 * 1 + 1 * 2 + 4 * 4) / 8  # a split's momentum is its gradient, split + 1
    torch.testing.assert_close(joining.common[:SIZE], torch.full((SIZE,), expected))
    found = learned(optim.Adam(learning_rate=0.01))
    assert found.strategy.made == dict.fromkeys(found.comm.splits, 1), "the dry one's, too"


def test_where_turns_end_changes_nothing():
    """Not with updates of several batches, of which some are empty, nor with a rate that changes amid a block."""
    random = torch.Generator().manual_seed(2)
    noise = torch.randn(2, 32, SIZE, generator=random)

    def learned(turn_steps):
        found = Splits(
            alone().with_splits(2), lambda split, t, weights: weights - noise[split, t], block_steps=16,
            turn_steps=turn_steps, count=lambda split, t: int(split == 0 or t % 5 > 0),
        )
        found.strategy.batches = 2
        return found.run(32, rate=lambda at: 0.1 / (1 + at)).weights

    assert torch.equal(learned(2), learned(4)) and torch.equal(learned(2), learned(0))


@several
def test_64_splits_learn_the_same_on_few_ranks():
    noise = torch.randn(64, SIZE, generator=torch.Generator().manual_seed(3))

    def learned(comm):
        options = {"block_steps": 2, "rule": optim.Momentum(learning_rate=0.1, momentum=0.5)}
        return Splits(comm, lambda split, t, weights: weights - noise[split] / (t + 1), **options).run(6).weights

    assert torch.equal(learned(Comm(64)), learned(alone().with_splits(64)))


@pytest.mark.mpi(ranks=[4], timeout=120)
def test_the_same_bits_on_any_islands():
    random = torch.Generator().manual_seed(4)
    noise = torch.randn(8, 12, SIZE, generator=random)

    def run(comm):
        options = {"block_steps": 3, "rule": optim.Momentum(learning_rate=0.1, momentum=0.5)}
        return Splits(comm, lambda split, t, weights: weights - noise[split, t], **options).run(12).weights

    wanted = run(alone().with_splits(8))
    for islands in ([[0, 1, 2, 3]], [[0, 1], [2, 3]], [[0, 2, 3], [1]], [[0], [1], [2], [3]]):
        assert torch.equal(run(Comm(8).with_islands(islands)), wanted), islands


def test_numbers_that_are_not_finite_stop_the_run_and_name_the_split():
    comm = alone().with_splits(4)
    wrong = torch.zeros(SIZE)
    wrong[3] = float("nan")
    at_work = Splits(comm, lambda split, t, weights: wrong if split == 2 else torch.ones(SIZE), block_steps=5)
    with pytest.raises(TrainingFailed, match=r"gradient is not .*split 2, parameter 0, 1 values\); lower optim\.\w+$"):
        at_work.run(5)


def test_averaging_has_no_block_momentum():
    with pytest.raises(ValueError, match=r"strategy\.block_momentum = 0\.5 goes with"):
        BMUF.check(block_steps=1, scheme="averaging", block_momentum=0.5)
    with pytest.raises(ValueError, match="or -1, from the number"):
        BMUF.check(block_steps=1, scheme="nesterov", block_momentum=-0.5)


def test_a_run_of_too_few_blocks_for_its_momentum_is_told_so():
    def doubt(steps, **options):
        return Splits(alone().with_splits(8), None, block_steps=4, **options).strategy.doubt(steps)

    assert "26 blocks in all, and block momentum 0.886 wants 3 / (1 - 0.886) = 27" in doubt(107)
    assert doubt(108) == "" and doubt(20, block_momentum=0.4) == "" and doubt(4, scheme="averaging") == ""


@several
def test_elastic_averaging_pulls_splits_and_centre_together():
    """In float64. The first split has no data in every second block: it stays as it is and pulls nobody."""
    splits, tau, blocks, rate, beta = 4, 2, 6, 0.1, 0.8
    centres = torch.randn(splits, SIZE, generator=torch.Generator().manual_seed(3))

    def count(split, t):
        return 0 if split == 0 and t // tau % 2 else 1

    found = Splits(
        Comm(splits), lambda split, t, weights: weights - centres[split].to(weights.dtype), kind=Elastic, count=count,
        block_steps=tau, moving_rate=beta, rule=optim.Momentum(learning_rate=rate, momentum=0.5),
    ).run(tau * blocks, rate)
    centre = torch.zeros(SIZE, dtype=torch.float64)
    models, momenta = torch.zeros(2, splits, SIZE, dtype=torch.float64)
    for block in range(blocks):
        with_data = torch.tensor([count(split, block * tau) for split in range(splits)], dtype=torch.bool)
        for _ in range(tau):
            momenta[with_data] = 0.5 * momenta[with_data] + models[with_data] - centres[with_data]
            models[with_data] -= rate * momenta[with_data]
        apart = models[with_data] - centre
        models[with_data] -= beta / splits * apart
        centre = centre + beta * apart.mean(0)
    torch.testing.assert_close(found.weights.double(), centre, rtol=1e-5, atol=1e-6)
    for split in found.comm.splits:
        own = found.strategy.held[split]["weights"][:SIZE].double()
        torch.testing.assert_close(own, models[split], rtol=1e-5, atol=1e-6)


def loss_of(weights):
    return float((weights - 1).square().mean())


def slaves(comm, gradient, *, loss=loss_of, **options):
    """Slaves that learn a vector of ones, from zeros."""
    return Splits(comm, gradient, kind=MasterSlave, loss=loss, **options)


@several
def test_the_masters_update_of_equation_19():
    alpha, beta, rate = 0.3, 0.01, 0.2
    found = slaves(
        Comm(4), lambda split, t, weights: weights - 1 - 0.1 * split, block_steps=3, master_learning_rate=alpha,
        master_regularization=beta,
    ).run(9, rate)
    master = 0.0
    for _ in range(3):
        own = [master] * 4
        for _ in range(3):
            own = [w - rate * (w - 1 - 0.1 * split) for split, w in enumerate(own)]
        master = (1 - beta) * master + alpha * (sum(own) / 4 - master)
    torch.testing.assert_close(found.weights, torch.full((SIZE,), master), rtol=1e-5, atol=0)
    assert found.told() == {
        "slaves": 12, "rejected": {}, "stayed": False, "said": "0 of 12 slaves rejected",
    }
    assert found.told()["slaves"] == 0, "told once"


@several
def test_slaves_that_got_worse_or_exploded_are_turned_away():
    """Split 1 runs off, split 2 explodes: the master learns from the others alone, and counts right."""
    def gradient(split, t, weights):
        wrong = {1: 5.0, 2: math.inf if t else 1.0}.get(split)
        return weights - 1 if wrong is None else torch.full((SIZE,), wrong)

    found = slaves(
        Comm(4), gradient, block_steps=2, master_learning_rate=1.0, master_regularization=0.0
    ).run(2, 0.5)
    torch.testing.assert_close(found.weights, torch.full((SIZE,), 0.75))
    assert found.told() == {
        "slaves": 4, "rejected": {"1": 1, "2": 1}, "stayed": False, "said": "2 of 4 slaves rejected",
    }


def test_without_rejection_both_spoil_the_master():
    def gradient(split, t, weights):
        return torch.full((SIZE,), 50.0) if split == 1 else weights - 1

    options = {"block_steps": 2, "master_learning_rate": 1.0, "rejection": False, "loss": None}
    found = slaves(alone().with_splits(4), gradient, **options).run(2, 0.5)
    assert found.weights.mean() < -10 and found.told() == {}
    with pytest.raises(TrainingFailed, match="split 1"):
        bad = torch.full((SIZE,), math.nan)
        slaves(alone().with_splits(4), lambda s, t, w: bad if s == 1 else torch.ones(SIZE), **options).run(2)


@several
def test_when_all_slaves_are_rejected_the_master_stays():
    found = slaves(
        Comm(4), lambda split, t, weights: weights - 1 if t < 2 else torch.full((SIZE,), 9.0), block_steps=2,
        master_learning_rate=1.0, master_regularization=0.5,
    ).run(2, 0.5)
    before = found.weights.clone()
    assert not found.told()["stayed"]
    found.run(2, 0.5)
    assert torch.equal(found.weights, before), "not even regularized"
    assert found.told() == ALL_REJECTED


# -- whole runs -------------------------------------------------------------------------------------------------------

WHOLE = ('optim={name="momentum", learning_rate=0.05, momentum=0.5}', "schedule.epochs=3", "checkpoint.every=500")


@pytest.mark.parametrize("options", [
    'name="bmuf", block_steps=7, turn_steps=3, local_state="kept"',
    'name="bmuf", block_steps=5, turn_steps=2, local_state="averaged", scheme="classical"',
    'name="elastic", block_steps=7, turn_steps=3',
    'name="master_slave", turn_steps=3, tolerance=1.01, master_learning_rate=0.5',
])
def test_a_whole_run_keeps_the_law_killed_and_resumed_amid_a_block(trireme, start, tmp_path, options):
    recipe = write_recipe(tmp_path)
    changes = (f"strategy={{{options}}}", *WHOLE)
    digests = train_on(trireme, recipe, (1, 2), tmp_path, *changes)
    assert len(set(digests.values())) == 1, digests
    states = [json.loads(path.read_text()) for path in (tmp_path / "run2/checkpoints").glob("step-*/state.json")]
    assert states and all("done" in state["common"] for state in states)
    stopped = tmp_path / "stopped"
    process = start("train", recipe, f"run={stopped}", *changes, ranks=4)
    wait_for_step(stopped, 30, process)
    kill(process)
    amid = [json.loads(path.read_text())["common"]["done"] for path in stopped.glob("checkpoints/step-*/state.json")]
    assert any(amid), "no checkpoint amid a block"
    assert train(trireme, recipe, 2, stopped, *changes) == digests[1]


def test_a_roll_back_goes_back_to_the_global_model_of_then(trireme, tmp_path):
    recipe = write_recipe(tmp_path)
    changes = ('strategy={name="bmuf", block_steps=4}', *WHOLE, "optim.learning_rate=3.0")
    changes += ("checkpoint.keep=99",)
    digests = set(train_on(trireme, recipe, (1, 2), tmp_path, *changes).values())
    assert len(digests) == 1
    records = [json.loads(line) for line in (tmp_path / "run1/metrics.jsonl").read_text().splitlines()]
    judged = [r for r in records if r["event"] == "validate"]
    back = next(i for i, r in enumerate(judged) if r["verdict"] == "roll back")
    best = max(r["step"] for r in judged[:back] if r["best"])

    def held(step, name):
        with safe_open(tmp_path / f"run1/checkpoints/step-{step:09d}" / name, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys() if not key.startswith(("split.", "carry."))}  # noqa: SIM118

    for name in ("model.safetensors", "rank-00000.safetensors"):
        before, after = held(best, name), held(judged[back]["step"], name)
        assert before.keys() == after.keys() and before
        assert all(torch.equal(after[key], values) for key, values in before.items())


def test_what_is_shipped_is_what_was_validated(trireme, tmp_path):
    recipe = write_recipe(tmp_path)
    run = tmp_path / "run"
    train(trireme, recipe, 2, run, 'strategy={name="bmuf", block_steps=4, block_momentum=0.9}', *WHOLE)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    best = min(r["loss"] for r in records if r["event"] == "validate")
    shown = json.loads(trireme("evaluate", run, read_toml(recipe)["data"]["validation"], "--json").stdout)
    assert shown["loss"] == pytest.approx(best, rel=1e-6)


def test_master_and_slaves_on_overlapping_draws(trireme, tmp_path):
    """A rate at which every slave of the first epochs is lost: the master stays until it has been halved enough."""
    recipe = write_recipe(tmp_path)
    changes = (
        'strategy={name="master_slave", master_learning_rate=1.0}', 'optim={name="sgd", learning_rate=200.0}',
        "data.draw=0.6", "schedule={name='halving', epochs=12}", "validate.every=0",
    )
    digests = set(train_on(trireme, recipe, (1, 2), tmp_path, *changes).values())
    assert len(digests) == 1
    lines = [json.loads(line) for line in (tmp_path / "run1/metrics.jsonl").read_text().splitlines()]
    judged = [line for line in lines if line["event"] == "validate"]
    assert judged[0]["told"] == ALL_REJECTED
    assert judged[0]["verdict"] == "halve"
    rates = [line["learning_rate"] for line in judged]
    stayed = [line["told"]["stayed"] for line in judged]
    assert all(after == before / 2 for before, after, same in zip(rates, rates[1:], stayed, strict=False) if same)
    assert not all(stayed) and min(line["loss"] for line in judged) < judged[0]["loss"]
    trireme("report", tmp_path / "run1")
    assert "4 of 4 (split 0, 1, 2, 3)" in (tmp_path / "run1/report.html").read_text()


def test_mistakes_are_explained(trireme, tmp_path):
    recipe = write_recipe(tmp_path)
    for options, said in (
        ("", "block_steps"), ("block_steps=0", "block_steps"), ('block_steps=4, scheme="newton"', "nesterov"),
        ('block_steps=4, scheme="averaging", block_momentum=0.5', "model averaging has none"),
    ):
        done = trireme("train", recipe, f'strategy={{name="bmuf"{", " if options else ""}{options}}}', code=None)
        assert done.returncode and said in done.stderr and "Traceback" not in done.stderr, (options, done.stderr)
        assert not (tmp_path / "run").exists(), "found before anything was made"
    fixed = ("data.validation=", "schedule={name='constant'}", 'strategy={name="master_slave"}')
    done = trireme("train", recipe, *fixed, code=None)
    assert "judges slaves by their loss on data.validation, which is empty" in done.stderr
    assert done.returncode and not (tmp_path / "run/recipe.toml").exists()


def test_a_run_of_slaves_can_be_stopped_amid_an_epoch_and_goes_on(trireme, start, tmp_path):
    recipe = write_recipe(tmp_path)
    changes = ('strategy={name="master_slave", turn_steps=4}', *WHOLE, "validate.every=0", "log.every=1")
    whole = train(trireme, recipe, 2, tmp_path / "whole", *changes)
    process = start("train", recipe, f"run={tmp_path / 'run'}", *changes, ranks=2)
    wait_for_step(tmp_path / "run", 4, process)
    for pid in ranks_below(process.pid):
        os.kill(pid, signal.SIGTERM)
    assert process.wait(60) == 75
    per_epoch = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])["steps_per_epoch"]
    steps = [int(path.name.removeprefix("step-")) for path in (tmp_path / "run/checkpoints").glob("step-*")]
    assert max(steps) % per_epoch and max(steps) < 2 * per_epoch, (steps, per_epoch)
    assert train(trireme, recipe, 1, tmp_path / "run", *changes) == whole
