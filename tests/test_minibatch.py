"""Minibatch-size selection: the largest size that does not hurt is kept, trials leave nothing behind, failures lose."""

from __future__ import annotations

import json
import math
import os
import signal
import time

import pytest
import test_lm
from material import write_recipe
from test_training import ranks_below, train, train_on

from hpc.minibatch import Selection
from hpc.schedule import Constant, Schedule
from hpc.trace_records import EXCHANGE, read_traces

EVERY = ("minibatch.every=1200", "minibatch.stretch=800", "minibatch.sizes=[1, 2, 4]", "schedule.epochs=4")
STRATEGIES = {"allreduce": 'strategy={name="allreduce"}', "1-bit": 'strategy={name="onebit", double_buffering=true}'}
BMUF = {"bmuf": 'strategy={name="bmuf", block_steps=4, local_state="kept"}'}
SLAVES = {"slaves": 'strategy={name="master_slave", block_steps=4, tolerance=1.5}'}


def selection(**changes):
    return Selection(
        **{"every": 10, "stretch": 4, "sizes": [4, 1, 2, 2], "metric": "frame_error", "tolerance": 0.01, "batch": 48}
        | changes
    )


def records_of(run, event):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["event"] == event]


@pytest.mark.parametrize(("found", "chosen"), [
    ({1: 0.30, 2: 0.305, 4: 0.4}, 2),
    ({1: 0.30, 2: 0.5, 4: 0.309}, 4),  # whatever lies between
    ({1: 0.40, 2: 0.39, 4: 0.395}, 4),
    ({1: 0.30, 2: 0.3101, 4: 0.32}, 1),
    ({1: math.inf, 2: 0.5, 4: math.inf}, 2),  # one that failed loses, however bad the others are
    ({1: 0.3, 2: math.nan, 4: math.nan}, 1),
    ({1: math.inf, 2: math.inf, 4: math.nan}, 1),  # none is any good: what was before
])
def test_the_largest_that_does_not_hurt(found, chosen):
    assert selection().pick(found) == chosen


def test_it_is_due_once_after_a_validation_far_enough_from_the_last():
    schedule = Schedule(Constant(0.1, epochs=2), per_epoch=25, every=4)  # validations at 4, 8, ... 48, 50
    chosen = selection()
    assert chosen.sizes == [1, 2, 4]
    assert [at for at in range(51) if chosen.due(at, schedule)] == [*range(12, 48, 4)], "a stretch must be left"
    chosen.chosen_at = 20
    assert [at for at in range(51) if chosen.due(at, schedule)] == [32, 36, 40, 44]
    assert not any(selection(every=0).due(at, schedule) for at in range(51))


@pytest.mark.parametrize("strategy", (STRATEGIES | BMUF).values(), ids=STRATEGIES | BMUF)
def test_trials_that_change_nothing_leave_nothing_behind(trireme, tmp_path, strategy):
    """With one size to try, the model is that of a run without trials, but for what is drained before them."""
    recipe = write_recipe(tmp_path)
    changes = (strategy, *EVERY, "minibatch.sizes=[1]", "validate.every=1200")  # drained at the same steps anyway
    tried = train(trireme, recipe, 2, tmp_path / "tried", *changes)
    assert len(records_of(tmp_path / "tried", "minibatch")) > 2
    assert tried == train(trireme, recipe, 1, tmp_path / "plain", *changes, "minibatch.every=0")
    own, plain = (
        [(r["step"], r["loss"]) for r in records_of(tmp_path / name, "train")] for name in ("tried", "plain")
    )
    assert own == plain, "the losses of trials are not those of training"
    spent = records_of(tmp_path / "tried", "train")[-1]["by_rank"][0]
    for rank in read_traces(tmp_path / "tried")[0].ranks.values():
        trials = [span for span in rank.spans if span.name == "select"]
        exchanges = [span for span in rank.spans if span.lane.startswith(EXCHANGE)]
        assert trials and exchanges
        assert not any(t.begin <= e.begin and e.end <= t.end for t in trials for e in exchanges), "apart"
    assert "select" in spent and sum(r["seconds"] for r in records_of(tmp_path / "tried", "minibatch")) > 0


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_the_same_choices_and_bytes_for_every_number_of_ranks(trireme, tmp_path, strategy):
    recipe = write_recipe(tmp_path)
    changes = (strategy, *EVERY, "minibatch.stretch=1100", "minibatch.tolerance=0.03", "optim.learning_rate=0.1")
    assert len(set(train_on(trireme, recipe, (1, 2, 4), tmp_path, *changes).values())) == 1
    told = [[{k: v for k, v in r.items() if k not in ("time", "seconds")} for r in records_of(tmp_path / f"run{k}",
             "minibatch")] for k in (1, 2, 4)]
    assert told[0] == told[1] == told[2] and max(r["chosen"] for r in told[0]) > 48



@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_stopped_amid_a_trial_it_goes_on_as_if_it_had_not_been(trireme, start, tmp_path, strategy):
    recipe = write_recipe(tmp_path)
    many = f"minibatch.sizes={list(range(1, 13))}"  # so long do trials take that the signal comes in the middle
    changes = (strategy, *EVERY, many, "minibatch.stretch=2400", "optim.learning_rate=0.1")
    reference = train(trireme, recipe, 1, tmp_path / "whole", *changes)
    first = records_of(tmp_path / "whole", "minibatch")[0]["step"]
    stopped = tmp_path / "stopped"
    process = start("train", recipe, f"run={stopped}", *changes, ranks=2)
    while not (log := stopped / "metrics.jsonl").exists() or not records_of(stopped, "validate")[-1:] or (
        records_of(stopped, "validate")[-1]["step"] < first
    ):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    for pid in ranks_below(process.pid):
        os.kill(pid, signal.SIGUSR1)
    process.communicate()
    assert process.returncode == 75 and '"minibatch"' not in log.read_text(), "stopped before anything was chosen"
    assert sorted(p.name for p in (stopped / "checkpoints").glob("step-*"))[-1] == f"step-{first:09d}"
    assert train(trireme, recipe, 4, stopped, *changes) == reference


def test_hidden_state_goes_through_trials_too(trireme, tmp_path):
    test_lm.write_text(tmp_path)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(test_lm.RECIPE.format(data=tmp_path, kind="sru"))
    changes = ("minibatch.every=1", "minibatch.stretch=560", "minibatch.sizes=[1, 2]", "minibatch.metric=loss",
               "minibatch.tolerance=0.05")
    digests = set(train_on(trireme, recipe, (1, 2), tmp_path, *changes).values())
    assert len(digests) == 1 and records_of(tmp_path / "run1", "minibatch")
    tried = [train(trireme, recipe, 2, tmp_path / str(every), *changes[1:], "minibatch.sizes=[1]",
                   f"minibatch.every={every}") for every in (0, 1)]
    assert tried[0] == tried[1], "what was carried is carried on from before the trials"


def test_a_size_whose_numbers_run_away_loses_and_the_run_goes_on(trireme, tmp_path):
    recipe = write_recipe(tmp_path)
    changes = (
        'strategy={name="allreduce"}', 'task={name="frames", activation="relu", context=2, layers=3, width=40}',
        'optim={name="sgd", learning_rate=0.8}', "minibatch.every=600", "minibatch.stretch=2400",
        "minibatch.sizes=[1, 12]", 'schedule={name="constant", epochs=4}',
    )
    train(trireme, recipe, 2, tmp_path / "run", *changes)
    told = records_of(tmp_path / "run", "minibatch")
    assert told and {r["chosen"] for r in told} == {48}, told
    assert any(r["tried"][str(48 * 12)] > 0.5 for r in told), told


@pytest.mark.parametrize("strategy", (STRATEGIES | SLAVES).values(), ids=STRATEGIES | SLAVES)
def test_trials_whose_numbers_are_not_finite_lose_on_all_ranks_and_so_does_training_itself(
    trireme, tmp_path, strategy
):
    """From the first epoch's end on the rate is absurd: every trial runs away, and so does what comes after them."""
    recipe = write_recipe(tmp_path)
    changes = (
        strategy, 'task={name="frames", activation="relu", context=2, layers=2, width=40}', *EVERY, "validate.every=0",
        'schedule={name="steps", at=[1.0], rates=[1e30], epochs=4}',
    )
    done = trireme("train", recipe, f"run={tmp_path / 'run'}", *changes, ranks=2, code=None)
    if strategy in SLAVES.values():  # all of them are turned away, and the master waits for a smaller rate
        assert not done.returncode and records_of(tmp_path / "run", "validate")[-1]["told"]["stayed"]
    else:
        assert done.returncode and ("not finite" in done.stderr or "loss is" in done.stderr), done.stderr
    told = records_of(tmp_path / "run", "minibatch")[0]
    assert told["chosen"] == 48 and told["tried"] == {"48": None, "96": None, "192": None}
    assert "48 failed, 96 failed, 192 failed  -> 48" in done.stderr


def test_a_metric_that_the_task_does_not_have_is_refused(trireme, tmp_path):
    recipe = write_recipe(tmp_path)
    enough = ("minibatch.every=1200", "minibatch.stretch=2000")
    done = trireme("train", recipe, *enough, "minibatch.metric=accuracy", code=None)
    assert done.returncode and "minibatch.metric" in done.stderr and "frame_error" in done.stderr
    done = trireme("train", recipe, "minibatch.every=1200", "minibatch.stretch=400", code=None)  # of 8 times 48 frames
    assert done.returncode and "minibatch.stretch" in done.stderr and "expected 1536 or more" in done.stderr
    for never in ("minibatch.every=1000000", "minibatch.stretch=100000"):
        done = trireme("train", recipe, *enough, never, code=None)
        assert done.returncode and "late enough for it" in done.stderr
    done = trireme("train", recipe, "minibatch.every=1200", "minibatch.sizes=[0, 1]", code=None)
    assert done.returncode and "minibatch.sizes" in done.stderr


def test_the_report_shows_the_sizes(trireme, tmp_path):
    recipe = write_recipe(tmp_path)
    train(trireme, recipe, 1, tmp_path / "run", *EVERY)
    before = trireme("report", tmp_path / "run", "--json")
    assert json.loads(before.stdout)["status"] == "finished"
    from hpc.report_picture import picture
    from hpc.summary import read_run

    titles = [axes.get_title(loc="left") for axes in picture(read_run(tmp_path / "run")).axes]
    assert "Minibatch size" in titles
    other = tmp_path / "plain"
    train(trireme, recipe, 1, other, "schedule.epochs=1")
    assert "Minibatch size" not in [axes.get_title(loc="left") for axes in picture(read_run(other)).axes]
