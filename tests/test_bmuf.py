"""Block training and BMUF: the paper's equations, what ships, who counts how much. The laws of all strategies are in
test_strategies.py, the kernels' in test_block_kernel.py."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from material import write_recipe
from test_strategies import alone
from test_training import kill, train, wait_for_step

from collectives.bmuf import BMUF, block_momentum_of
from collectives.comm import Comm
from collectives.strategy import Rate, TrainingFailed
from hpc import optim
from hpc.config import read_toml
from hpc.flat import Flat

CPU = torch.device("cpu")
SIZE = 3000  # floats, of which several ranks own some
several = pytest.mark.mpi(ranks=[1, 2, 4], timeout=120)


class Splits:
    """A vector that splits learn, by gradients that are told: of (split, minibatch, weights), and what they count."""

    def __init__(self, comm, gradient, *, size=SIZE, count=lambda split, t: 1, rule=None, **options):
        torch.set_num_threads(1)
        self.comm, self.gradient, self.count = comm, gradient, count
        self.model = torch.nn.ParameterList([torch.zeros(size)])
        self.flat = Flat(self.model, partial(comm.memory.zeros, device=CPU))
        self.strategy = BMUF(comm, self.flat, rule or optim.SGD(learning_rate=0.1), comm.n_splits, **options)
        self.strategy.prepare()
        self.strategy.begin()
        self.at = 0

    @property
    def weights(self):
        return self.model[0].detach()

    def run(self, steps, rate=0.1):
        """So many minibatches of every split; the end of them ends a block."""
        until = self.at + steps
        while self.at < until:
            self.strategy.rate = Rate(rate, 0)
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
    comm = alone().with_splits(4)
    with pytest.raises(ValueError, match=r"strategy\.block_momentum = 0\.5 goes with"):
        Splits(comm, None, block_steps=1, scheme="averaging", block_momentum=0.5)


# -- whole runs -------------------------------------------------------------------------------------------------------

WHOLE = ('optim={name="momentum", learning_rate=0.05, momentum=0.5}', "schedule.epochs=3", "checkpoint.every=500")


@pytest.mark.parametrize("options", [
    'block_steps=7, turn_steps=3, local_state="kept"',
    'block_steps=5, turn_steps=2, local_state="averaged", scheme="classical"',
])
def test_a_whole_run_keeps_the_law_killed_and_resumed_amid_a_block(trireme, start, tmp_path, options):
    recipe = write_recipe(tmp_path)
    changes = (f'strategy={{name="bmuf", {options}}}', *WHOLE)
    digests = {k: train(trireme, recipe, k, tmp_path / f"run{k}", *changes) for k in (1, 2)}
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
    digests = {train(trireme, recipe, k, tmp_path / f"run{k}", *changes) for k in (1, 2)}
    assert '"roll back"' in (tmp_path / "run1/metrics.jsonl").read_text() and len(digests) == 1


def test_what_is_shipped_is_what_was_validated(trireme, tmp_path):
    recipe = write_recipe(tmp_path)
    run = tmp_path / "run"
    train(trireme, recipe, 2, run, 'strategy={name="bmuf", block_steps=4, block_momentum=0.9}', *WHOLE)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    best = min(r["loss"] for r in records if r["event"] == "validate")
    shown = json.loads(trireme("evaluate", run, read_toml(recipe)["data"]["validation"], "--json").stdout)
    assert shown["loss"] == pytest.approx(best, rel=1e-6)


def test_mistakes_are_explained(trireme, tmp_path):
    recipe = write_recipe(tmp_path)
    for options, said in (
        ("", "block_steps"), ("block_steps=0", "block_steps"), ('block_steps=4, scheme="newton"', "nesterov"),
        ('block_steps=4, scheme="averaging", block_momentum=0.5', "model averaging has none"),
    ):
        done = trireme("train", recipe, f'strategy={{name="bmuf"{", " if options else ""}{options}}}', code=None)
        assert done.returncode and said in done.stderr and "Traceback" not in done.stderr, (options, done.stderr)
