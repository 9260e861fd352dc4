"""Bad input and bad luck, through the command: a clear error, an exit code that is not 0, nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
from material import edited_manifest, write_frames, write_recipe
from test_training import ranks_below, wait_for_step

from hpc.checkpoint import CheckpointError, best_of, check, newest
from hpc.records import read_records
from hpc.shards import ShardWriter


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_recipe(folder)
    return folder


def fails(trireme, folder, recipe, *words, ranks=1, overrides=(), code=1):
    """Run a training that must fail with these words, and leave no model and no claim of success behind."""
    done = trireme("train", recipe, *overrides, ranks=ranks, code=code)
    for word in words:
        assert word in done.stderr, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert not (folder / "run/success").exists() and not (folder / "run/model.safetensors").exists()
    return done


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_damaged_shard_is_named_before_training(trireme, data, tmp_path, ranks):
    shutil.copytree(data / "train", tmp_path / "train")
    recipe = write_recipe(tmp_path)
    shard = tmp_path / "train/features-00001-of-00003.h5"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    fails(trireme, tmp_path, recipe, "features-00001-of-00003.h5", "damaged", "prepare", ranks=ranks)


def test_without_the_first_check_the_rank_that_meets_the_damage_ends_the_job(trireme, data, tmp_path):
    """A rank that raises alone, while the others train: all end, and the rank and the cause are named."""
    shutil.copytree(data / "train", tmp_path / "train")
    recipe = write_recipe(tmp_path)
    for shard in (tmp_path / "train").glob("labels-*.h5"):
        content = bytearray(shard.read_bytes())
        content[len(content) // 3] ^= 0xFF
        shard.write_bytes(content)
    overrides = ("data.verify=false", "data.validation=", "schedule={name='constant'}")
    done = trireme("train", recipe, *overrides, ranks=2, code=None, timeout=60)
    assert done.returncode != 0 and "[rank" in done.stderr, done.stderr
    assert "labels-0000" in done.stderr and "cannot be read" in done.stderr, done.stderr


def test_labels_out_of_range_name_the_utterance(trireme, tmp_path):
    recipe = write_recipe(tmp_path)
    for name in ("train", "validation"):
        with edited_manifest(tmp_path / name) as manifest:
            manifest["fields"]["labels"] |= {"classes": 4, "names": ["a", "b", "c", "d"]}
    began = time.monotonic()
    done = fails(trireme, tmp_path, recipe, "has label 4", "classes 0 to 3", "utterance 'utterance-0", "[rank", ranks=2)
    assert time.monotonic() - began < 60
    failure = json.loads((tmp_path / "run/failure.json").read_text())
    assert failure["rank"] in (0, 1) and "has label 4" in failure["error"] and "traceback" in failure, done.stderr


def test_splits_that_the_ranks_do_not_divide(trireme, tmp_path):
    recipe = write_recipe(tmp_path, splits=4)
    done = trireme("train", recipe, ranks=3, code=None)
    assert done.returncode != 0 and "splits = 4" in done.stderr and "one of [1, 2, 4] ranks" in done.stderr
    assert "Abort" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_an_unknown_key_is_said_once_by_all_ranks(trireme, tmp_path):
    recipe = write_recipe(tmp_path)
    done = fails(trireme, tmp_path, recipe, overrides=("optim.learning_rat=1",), ranks=2)
    assert done.stderr.count("did you mean 'learning_rate'") == 1, done.stderr
    assert "Abort" not in done.stderr


def test_a_run_folder_of_another_recipe(trireme, tmp_path):
    recipe = write_recipe(tmp_path)
    trireme("train", recipe)
    before = (tmp_path / "run/recipe.toml").read_bytes()
    done = trireme("train", recipe, "task.width=41", "seed=9", code=1)
    assert "another recipe" in done.stderr and "task.width: 40 -> 41" in done.stderr and "seed: 3 -> 9" in done.stderr
    assert (tmp_path / "run/recipe.toml").read_bytes() == before
    write_frames(tmp_path / "train", seed=5, utterances=60)
    assert "another data set" in trireme("train", recipe, code=1).stderr


def test_a_folder_that_is_no_run_is_left_alone(trireme, tmp_path):
    recipe = write_recipe(tmp_path)
    done = trireme("train", recipe, f"run={tmp_path / 'train'}", code=1)
    assert "not empty and not a run folder" in done.stderr


def test_a_schedule_that_needs_a_validation_set(trireme, tmp_path):
    fails(trireme, tmp_path, write_recipe(tmp_path), "data.validation is empty", overrides=("data.validation=",))


def test_validation_data_of_another_kind(trireme, tmp_path):
    write_frames(tmp_path / "validation", width=9)
    fails(trireme, tmp_path, write_recipe(tmp_path), "other width", "prepare")


def test_a_loss_that_is_not_finite_names_step_rank_split_and_utterances(trireme, tmp_path):
    recipe = write_recipe(tmp_path)
    overrides = ("optim.learning_rate=1e30", "task.activation=relu", "strategy.clip_norm=0.0")
    done = trireme("train", recipe, *overrides, ranks=2, code=None)
    assert done.returncode != 0 and "learning_rate" in done.stderr, done.stderr
    assert ("utterances utterance-" in done.stderr and "split" in done.stderr) or "parameter" in done.stderr
    assert not (tmp_path / "run/model.safetensors").exists()


def test_a_torn_checkpoint_is_noticed_and_the_one_before_it_used(trireme, tmp_path):
    recipe = write_recipe(tmp_path)
    run = tmp_path / "run"
    reference = trireme("train", recipe, f"run={tmp_path / 'whole'}").stdout.split()[-1]
    trireme("train", recipe)
    (run / "success").unlink()
    last = sorted((run / "checkpoints").glob("step-*"))[-1]
    for name in ("model.safetensors", "state.json", "rank-00000.safetensors"):
        content = bytearray((last / name).read_bytes())
        content[len(content) // 2] ^= 4
        (last / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=name):
            check(last)
        content[len(content) // 2] ^= 4
        (last / name).write_bytes(content)
    (last / "manifest.json").unlink()
    done = trireme("train", recipe)
    assert last.name in done.stderr and "going on from another one" in done.stderr
    assert done.stdout.split()[-1] == reference


def test_a_damaged_best_checkpoint_is_noticed_when_a_job_goes_on(trireme, tmp_path):
    """Not when training is done, and its model cannot ship."""
    recipe, run = write_recipe(tmp_path), tmp_path / "run"
    often = ("checkpoint.every=480", "checkpoint.keep=50")
    reference = trireme("train", recipe, *often).stdout.split()[-1]
    checkpoints = run / "checkpoints"
    bests = sorted({best_of(path) for path in checkpoints.glob("step-*")} - {None})
    assert len(bests) > 2
    for path in checkpoints.glob("step-*"):  # amid an epoch, the best is that of the epoch before
        if path.name > bests[-1] or best_of(path) == bests[-1]:
            shutil.rmtree(path)
    (run / "success").unlink()
    assert newest(checkpoints).path.name > newest(checkpoints).best == bests[-2]
    damage(checkpoints / bests[-2] / "model.safetensors")
    found = newest(checkpoints)
    assert found.path.name < bests[-2] and found.best == bests[-3] and not found.lost
    kept = shutil.copytree(run, tmp_path / "kept")
    done = trireme("train", recipe, *often)
    assert "the best model so far of checkpoint 'step" in done.stderr and done.stdout.split()[-1] == reference
    shutil.rmtree(run)
    kept.rename(run)
    for name in bests[:-2]:
        damage(checkpoints / name / "model.safetensors")
    for path in checkpoints.glob("step-*"):  # before the first validation there is no best one, and nothing is lost
        if best_of(path) is None:
            shutil.rmtree(path)
    assert newest(checkpoints).lost
    done = trireme("train", recipe, *often)
    assert "the best model so far is lost" in done.stderr and (run / "success").exists()


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MiB of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no right to mount a small disk: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_keeps_the_checkpoint_before(trireme, small_disk, tmp_path):
    recipe = write_recipe(tmp_path)
    run = small_disk / "run"
    wide = ("task.width=200", "checkpoint.every=480", "checkpoint.keep=9")
    reference = trireme("train", recipe, f"run={tmp_path / 'whole'}", *wide).stdout.split()[-1]
    done = trireme("train", recipe, f"run={run}", *wide, ranks=2, code=None)
    assert done.returncode != 0, done.stderr
    assert "could not be written" in done.stderr and "No space left" in done.stderr, done.stderr
    assert not (run / "success").exists() and not list((run / "checkpoints").glob(".step*"))
    found, complaints, *_ = newest(run / "checkpoints")
    assert found is not None and not complaints
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert trireme("train", recipe, f"run={run}", *wide, ranks=4).stdout.split()[-1] == reference


def test_a_rank_that_hangs_is_broken_by_the_watchdog_with_stacks(start, tmp_path):
    recipe = write_recipe(tmp_path)
    process = start("train", recipe, "schedule.epochs=10000", "log.watchdog=4", ranks=2)
    wait_for_step(tmp_path / "run", 20, process)
    os.kill(max(ranks_below(process.pid)), signal.SIGSTOP)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "no progress for 4 s" in errors and "is stopped" in errors, errors
    assert all(f"[rank {rank} on" in errors for rank in (0, 1)) and errors.count("hpc/train.py") >= 2, errors
    failure = json.loads((tmp_path / "run/failure.json").read_text())
    assert (failure["kind"], failure["rank"]) == ("hang", 1) and "while in phase" in failure["where"]


def test_a_killed_rank_ends_the_job_and_the_next_one_keeps_why(start, tmp_path):
    recipe = write_recipe(tmp_path)
    process = start("train", recipe, "schedule.epochs=10000", ranks=2)
    wait_for_step(tmp_path / "run", 20, process)
    os.kill(max(ranks_below(process.pid)), signal.SIGKILL)
    _, errors = process.communicate(timeout=30)
    assert process.returncode != 0 and not (tmp_path / "run/success").exists()
    failure = json.loads((tmp_path / "run/failure.json").read_text())
    assert (failure["kind"], failure["rank"]) == ("gone", 1) and "gone without a word" in errors
    reached = read_records(tmp_path / "run")[-1].get("step", 0)
    process = start("train", recipe, "schedule.epochs=10000", ranks=2)
    wait_for_step(tmp_path / "run", reached + 20, process)
    told = [record["last_failure"] for record in read_records(tmp_path / "run") if record["event"] == "start"]
    assert told[0] is None and (told[1]["rank"], told[1]["kind"]) == (1, "gone")
    assert not (tmp_path / "run/failure.json").exists()


def test_a_launcher_that_does_not_fit_the_library_is_caught(trireme, tmp_path):
    done = trireme("train", write_recipe(tmp_path), env={"OMPI_COMM_WORLD_SIZE": "4"}, code=1)
    assert "the launcher started 4 ranks, but MPI sees a world of 1" in done.stderr


def test_an_unfinished_run_cannot_be_used_as_a_model(trireme, tmp_path):
    recipe = write_recipe(tmp_path)
    done = trireme("evaluate", tmp_path / "run", tmp_path / "validation", code=1)
    assert "not a run folder" in done.stderr
    trireme("train", recipe, "task.layers=1")
    done = trireme("train", recipe, f"run={tmp_path / 'next'}", f"init_from={tmp_path / 'run'}", code=1)
    assert "has other parameters" in done.stderr or "has shape" in done.stderr


def test_an_empty_utterance_cannot_be_written(tmp_path):
    with pytest.raises(ValueError, match="empty"), ShardWriter(tmp_path / "x.h5", {"labels": ((), np.int32)}) as writer:
        writer.append("nothing", {"labels": np.zeros(0, np.int32)})
