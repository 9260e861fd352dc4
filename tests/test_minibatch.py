"""Minibatch-size selection: the largest size that does not hurt is kept, trials leave nothing behind, failures lose."""

from __future__ import annotations

import json
import math
import os
import signal

import pytest
from material import write_recipe
from test_training import ranks_below, train, wait_for_step

from hpc.minibatch import Selection

EVERY = ("minibatch.every=1200", "minibatch.stretch=400", "minibatch.sizes=[1, 2, 4]", "schedule.epochs=4")
STRATEGIES = {"allreduce": 'strategy={name="allreduce"}', "1-bit": 'strategy={name="onebit", double_buffering=true}'}


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


def test_it_is_due_once_at_every_multiple():
    chosen = selection()
    assert chosen.sizes == [1, 2, 4]
    assert [at for at in range(35) if chosen.due(at)] == [10, 20, 30]
    chosen.chosen_at = 20
    assert not chosen.due(20) and chosen.due(30)
    assert chosen.limit(7, 100) == 3 and chosen.limit(10, 100) == 10 and chosen.limit(17, 19) == 2
    never = selection(every=0)
    assert not any(never.due(at) for at in range(100)) and never.limit(7, 100) == 93


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
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
    assert "select" in spent and sum(r["seconds"] for r in records_of(tmp_path / "tried", "minibatch")) > 0


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_the_same_choices_and_bytes_for_every_number_of_ranks_and_when_stopped_amid_a_trial(
    trireme, start, tmp_path, strategy
):
    recipe = write_recipe(tmp_path)
    changes = (strategy, *EVERY, "minibatch.stretch=1100", "minibatch.tolerance=0.03", "optim.learning_rate=0.1")
    digests = [train(trireme, recipe, k, tmp_path / f"run{k}", *changes) for k in (1, 2, 4)]
    assert len(set(digests)) == 1
    told = [[{k: v for k, v in r.items() if k not in ("time", "seconds")} for r in records_of(tmp_path / f"run{k}",
             "minibatch")] for k in (1, 2, 4)]
    assert told[0] == told[1] == told[2] and max(r["chosen"] for r in told[0]) > 48

    stopped = tmp_path / "stopped"
    process = start("train", recipe, f"run={stopped}", *changes, ranks=2)
    wait_for_step(stopped, told[0][0]["step"], process)  # trials take most of the time: most likely it is in one
    for pid in ranks_below(process.pid):
        os.kill(pid, signal.SIGUSR1)
    process.communicate()
    assert train(trireme, recipe, 4, stopped, *changes) == digests[0]


def test_a_size_whose_numbers_run_away_loses_and_the_run_goes_on(trireme, tmp_path):
    recipe = write_recipe(tmp_path)
    changes = (
        'strategy={name="allreduce"}', 'task={name="frames", activation="relu", context=2, layers=3, width=40}',
        'optim={name="sgd", learning_rate=1.0}', "minibatch.every=600", "minibatch.stretch=2400",
        "minibatch.sizes=[1, 4000]", 'schedule={name="constant", epochs=2}',
    )
    train(trireme, recipe, 2, tmp_path / "run", *changes)
    told = records_of(tmp_path / "run", "minibatch")
    assert told and {r["chosen"] for r in told} == {48}, told
    assert any(r["tried"][str(48 * 4000)] is None or r["tried"][str(48 * 4000)] > 0.5 for r in told), told


def test_a_metric_that_the_task_does_not_have_is_refused(trireme, tmp_path):
    recipe = write_recipe(tmp_path)
    done = trireme("train", recipe, "minibatch.every=1200", "minibatch.metric=accuracy", code=None)
    assert done.returncode and "minibatch.metric" in done.stderr and "frame_error" in done.stderr
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
