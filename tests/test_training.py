"""The law, end to end through the command: what is learned depends on the recipe and the seed, never on the ranks."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
from material import RECIPE, shared_data, write_recipe
from safetensors import safe_open

from hpc.files import sha256_of
from hpc.records import read_records


def wait_for_step(run, step, process, seconds=60.0):
    """Until the run's log has reached a step."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            return
        if (run / "metrics.jsonl").exists():
            try:
                reached = [r["step"] for r in read_records(run) if r["event"] == "train"]
            except ValueError:
                reached = []
            if reached and reached[-1] >= step:
                return
        time.sleep(0.02)
    raise AssertionError(f"step {step} not reached: {process.communicate()}")


def train(trireme, recipe, ranks, run, *overrides):
    trireme("train", recipe, f"run={run}", *overrides, ranks=ranks)
    assert (run / "success").exists()
    return sha256_of(run / "model.safetensors")


def train_on(trireme, recipe, ranks, folder, *overrides, name="run"):
    """A run by each of so many ranks, in folder/run1 and so on: number of ranks -> SHA-256."""
    return {k: train(trireme, recipe, k, folder / f"{name}{k}", *overrides) for k in ranks}


@pytest.mark.parametrize(("splits", "ranks", "changes"), [
    (4, (1, 2, 4), ()), (12, (1, 2, 3, 6), ()),
    (4, (1, 2), ("optim={name='adagrad', learning_rate=0.01, momentum=0.9, momentum_first_epoch=0.5, epsilon=1e-3}",)),
    (4, (1, 4), ("task.init=he", "task.width=600")),  # drawn in place, in steps that read what was drawn
])
def test_the_same_bytes_for_every_number_of_ranks(trireme, tmp_path, splits, ranks, changes):
    recipe = write_recipe(tmp_path, splits=splits)
    digests = train_on(trireme, recipe, ranks, tmp_path, *changes)
    assert len(set(digests.values())) == 1, digests
    logs = [[(r["step"], r["loss"]) for r in read_records(tmp_path / f"run{k}") if "loss" in r] for k in ranks]
    assert all(log == logs[0] for log in logs) and len(logs[0]) > 10, "the recorded losses are part of the law"


def test_two_threads_a_rank_and_bfloat16_and_adam_keep_the_law(trireme, tmp_path):
    recipe = write_recipe(tmp_path)
    changes = ("threads=2", "precision=bfloat16", 'optim={name="adam", learning_rate=0.003}', "task.width=200",
               "schedule.epochs=2")
    digests = train_on(trireme, recipe, (1, 2), tmp_path, *changes)
    assert digests[1] == digests[2] != train(trireme, recipe, 2, tmp_path / "other", *changes, "seed=4")


def test_recurrent_acoustic_models_keep_the_law(trireme, tmp_path):
    recipe = write_recipe(tmp_path)
    network = (
        'task={name="frames", network="sru", bidirectional=true, layers=2, width=16, dropout=0.1, variational=0.1}'
    )
    changes = (network, "data.batch=8", "optim.learning_rate=0.1", "schedule.epochs=2")
    assert len(set(train_on(trireme, recipe, (1, 2, 4), tmp_path, *changes).values())) == 1
    shown = [json.loads(trireme("evaluate", tmp_path / f"run{k}", tmp_path / "validation", "--json", ranks=r).stdout)
             for k, r in ((1, 3), (4, 1))]
    assert shown[0]["loss"] == shown[1]["loss"] and shown[0]["frame_error"] < 0.6
    trireme("predict", tmp_path / "run1", tmp_path / "validation", "--to", "ark", ranks=2)


def test_factored_matrices_keep_the_law_and_start_from_whole_ones(trireme, start, tmp_path):
    recipe, whole = write_recipe(tmp_path), tmp_path / "whole"
    train(trireme, recipe, 2, whole)
    fresh = ("task.factored=4", "schedule={name='constant', epochs=2}")
    drawn = set(train_on(trireme, recipe, (1, 2), tmp_path, *fresh, name="drawn").values())
    assert len(drawn) == 1
    changes = (*fresh, f"init_from={whole}", "checkpoint.every=192")
    runs = {k: tmp_path / f"run{k}" for k in (1, 2)}
    one, two = train_on(trireme, recipe, (1, 2), tmp_path, *changes).values()
    assert one == two and one not in drawn
    first, later = (
        next(r["loss"] for r in read_records(run) if r["event"] == "train") for run in (tmp_path / "drawn1", runs[1])
    )
    assert later < 0.8 * first, "it begins with what was learned"
    with safe_open(runs[1] / "model.safetensors", "pt") as file:
        assert {"hidden.0.down.weight", "hidden.3.up.bias", "output.up.weight"} <= set(file.keys())
    shown = json.loads(trireme("evaluate", runs[2], tmp_path / "validation", "--json", ranks=2).stdout)
    assert shown["frame_error"] < 0.6
    trireme("predict", runs[1], tmp_path / "validation", "--to", "ark")

    stopped = tmp_path / "stopped"
    process = start("train", recipe, f"run={stopped}", *changes, ranks=2)
    wait_for_step(stopped, 20, process)
    kill(process)
    assert train(trireme, recipe, 1, stopped, *changes) == one

    for wrong, words in (
        (("task.factored=4", f"init_from={whole}", "task.width=32"), "use the recipe (layers, width, context)"),
        (("task.factored=3", f"init_from={runs[1]}"), "use the recipe (layers, width, context)"),
        ((f"init_from={runs[1]}",), "has other parameters than the recipe's model"),
    ):
        done = trireme("train", recipe, f"run={tmp_path / 'wrong'}", *wrong, code=1)
        assert words in done.stderr


def ranks_below(pid):
    children = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat") as file:
                    children.setdefault(int(file.read().rsplit(")", 1)[1].split()[1]), []).append(int(entry))
            except FileNotFoundError:
                continue
    found, waiting = [], [pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return [pid for pid in found if not is_guard(pid)]


def is_guard(pid):
    try:
        return b"hpc.guard" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False


def kill(process):
    """SIGKILL to the launcher and to every rank."""
    for pid in (*ranks_below(process.pid), process.pid):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def test_killed_anywhere_and_resumed_with_other_ranks(trireme, start, tmp_path):
    recipe = write_recipe(tmp_path)
    more = ("schedule.epochs=12", "checkpoint.every=192")
    reference = train(trireme, recipe, 1, tmp_path / "whole", *more)
    run, step = tmp_path / "killed", random.randrange(5, 300)
    for ranks in (2, 4):
        process = start("train", recipe, f"run={run}", *more, ranks=ranks)
        wait_for_step(run, step, process)
        kill(process)
        step += 40
    assert train(trireme, recipe, 1, run, *more) == reference
    records = read_records(run)
    assert [r["step"] for r in records if r["event"] == "validate"] == [
        r["step"] for r in read_records(tmp_path / "whole") if r["event"] == "validate"
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_checkpoints_and_leaves_with_75(trireme, start, tmp_path, number):
    recipe = write_recipe(tmp_path)
    more = ("schedule.epochs=16", "checkpoint.every=0", "validate.every=0")
    run = tmp_path / "stopped"
    process = start("train", recipe, f"run={run}", *more, ranks=2)
    wait_for_step(run, 20, process)
    os.kill(max(ranks_below(process.pid)), number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "asked to stop" in errors and not (run / "success").exists()
    end = read_records(run)[-1]
    assert end["event"] == "end" and end["stopped"] == "preempted"
    assert train(trireme, recipe, 4, run, *more) == train(trireme, recipe, 1, tmp_path / "whole", *more)


def test_taking_checkpoints_and_validating_elsewhere_changes_nothing_learned(trireme, tmp_path):
    recipe = write_recipe(tmp_path)
    fixed = ("schedule={name='constant', epochs=3}", "validate.every=0")
    often = train(trireme, recipe, 2, tmp_path / "often", *fixed, "checkpoint.every=48", "checkpoint.keep=50")
    assert often == train(trireme, recipe, 2, tmp_path / "seldom", *fixed, "checkpoint.every=0")


def test_a_finished_run_is_left_alone_and_can_be_started_from(trireme, tmp_path):
    recipe = write_recipe(tmp_path)
    digest = train(trireme, recipe, 2, tmp_path / "first")
    assert "nothing to do" in trireme("train", recipe, f"run={tmp_path / 'first'}").stdout
    second = tmp_path / "second"
    train(trireme, recipe, 1, second, f"init_from={tmp_path / 'first'}", "schedule={name='constant', epochs=1}")
    first = json.loads((tmp_path / "first/success").read_text())
    losses = [r["loss"] for r in read_records(second) if r["event"] == "train"]
    fresh = [r["loss"] for r in read_records(tmp_path / "first") if r["event"] == "train"]
    assert losses[0] < 0.8 * fresh[0] and first["sha256"] == digest


def test_another_runs_rates_can_be_replayed(trireme, tmp_path):
    recipe = write_recipe(tmp_path)
    train(trireme, recipe, 1, tmp_path / "first")
    replay = f"schedule={{name='replay', of='{tmp_path / 'first'}', epochs=4}}"
    train(trireme, recipe, 1, tmp_path / "second", replay)
    first, second = (
        [r["learning_rate"] for r in read_records(tmp_path / name) if r["event"] == "validate"]
        for name in ("first", "second")
    )
    assert second[: len(first)] == first and len(set(first)) > 1


def test_without_validation_the_last_model_ships(trireme, tmp_path):
    recipe = write_recipe(tmp_path)
    run = tmp_path / "plain"
    train(trireme, recipe, 2, run, "data.validation=", "schedule={name='constant', epochs=2}")
    last = sorted((run / "checkpoints").glob("step-*"))[-1]
    assert sha256_of(last / "model.safetensors") == sha256_of(run / "model.safetensors")


def test_staged_data_is_the_same_data(trireme, tmp_path):
    recipe = write_recipe(tmp_path)
    staged = train(trireme, recipe, 2, tmp_path / "staged", f"data.stage={tmp_path / 'local'}")
    assert staged == train(trireme, recipe, 1, tmp_path / "direct")
    assert len(list((tmp_path / "local").glob("trireme-*/features-*.h5"))) == 6


REAL = RECIPE.replace("batch = {batch}", "batch = 240").replace("split_frames = 96", "split_frames = 4000").replace(
    "every = 600", "every = 0").replace("epochs = 4", "epochs = 2").replace("width = 40", "width = 128")


def test_the_law_on_real_features(trireme, start, tmp_path):
    an4 = shared_data("an4_mfc")
    if an4 is None:
        pytest.skip("no an4_mfc beside this checkout (set TRIREME_DATA)")
    few = tmp_path / "few.fileids"
    few.write_text("\n".join((an4 / "etc/an4_train.fileids").read_text().splitlines()[:60]) + "\n")
    trireme(
        "prepare", "frames", "--from", "sphinx", "--mfc", an4 / "feat", "--labels", an4 / "align/train.ali",
        "--fileids", few, "--deltas", "2", tmp_path, ranks=2,
    )
    for splits, ranks in ((4, (1, 2, 4)), (12, (1, 2, 3, 4, 6))):
        recipe = write_recipe(tmp_path, splits=splits, text=REAL)
        digests = {k: train(trireme, recipe, k, tmp_path / f"real{splits}-{k}") for k in ranks}
        assert len(set(digests.values())) == 1, digests
    run = tmp_path / "resumed"
    process = start("train", recipe, f"run={run}", "checkpoint.every=2400", ranks=3)
    wait_for_step(run, random.randrange(15, 60), process)
    kill(process)
    assert train(trireme, recipe, 4, run, "checkpoint.every=2400") == digests[1]
