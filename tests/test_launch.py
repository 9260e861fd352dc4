"""`trireme launch`, `submit` without Slurm, `jobs` and `logs`: real jobs of real ranks on this machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from material import write_recipe
from test_training import is_guard, ranks_below, wait_for_step

from hpc.config import RecipeError
from hpc.files import sha256_of, write_json
from hpc.lock import Lock
from hpc.records import read_attempts
from jobs.attempt import Attempt
from jobs.launch import keep_going
from jobs.sbatch import minutes
from jobs.submit import grid

LONG = "schedule={name='constant', epochs=100000}"
SHORT = ("schedule.epochs=2", "schedule.min_epochs=2")


def ranks_of(run):
    """The processes of a job's ranks, rank 0's first."""
    held = json.loads((run / "job.lock").read_text())["processes"]
    return [pid for pid, _ in held if not is_guard(pid)]


def killed_at(run, step, process, number=signal.SIGKILL):
    wait_for_step(run, step, process)
    os.kill(ranks_of(run)[-1], number)


def test_it_goes_on_after_failures_and_ends_with_the_same_bytes(trireme, start, tmp_path):
    recipe = write_recipe(tmp_path)
    longer = ("schedule.epochs=40", "optim.learning_rate=0.1")
    trireme("train", recipe, f"run={tmp_path / 'whole'}", *longer)
    process = start("launch", recipe, "-n", "2", "--restarts", "2", *longer)
    for step in (40, 120):
        killed_at(tmp_path / "run", step, process)
        time.sleep(3)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert sha256_of(tmp_path / "run/model.safetensors") == sha256_of(tmp_path / "whole/model.safetensors")
    assert len(read_attempts(tmp_path / "run")) == 3 and "going on, 1 restart left" in said, said
    assert "nothing to do" in trireme("launch", recipe, *longer).stdout


def test_when_no_restart_is_left_it_says_why_it_failed(start, tmp_path):
    recipe = write_recipe(tmp_path)
    process = start("launch", recipe, "-n", "2", "--restarts", "0", LONG)
    killed_at(tmp_path / "run", 20, process)
    _, said = process.communicate(timeout=30)
    assert process.returncode not in (0, 75) and "no restart is left" in said
    assert "rank 1 on" in said and "gone without a word" in said


def test_what_would_fail_again_is_not_tried_again(trireme, tmp_path):
    recipe = write_recipe(tmp_path)
    done = trireme("launch", recipe, "-n", "2", "optim.learning_rate=1e30", "task.activation=relu",
                   "strategy.clip_norm=0.0", code=None)
    assert done.returncode not in (0, 75) and "it would fail again" in done.stderr, done.stderr
    assert len(read_attempts(tmp_path / "run")) == 1


@pytest.mark.parametrize("words", [("task.widht=3",), ("-n", "3"), ("-n", "0"), ("data.train=nowhere",)])
def test_what_cannot_begin_is_said_once(trireme, tmp_path, words):
    done = trireme("launch", write_recipe(tmp_path), *words, code=1)
    assert done.stderr.count("trireme") <= 2 and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR2])
def test_asked_to_stop_it_checkpoints_and_can_go_on(start, trireme, tmp_path, number):
    recipe = write_recipe(tmp_path)
    process = start("launch", recipe, "-n", "2", LONG)
    wait_for_step(tmp_path / "run", 20, process)
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 75, said
    assert (tmp_path / "run/stopped").exists() and not (tmp_path / "run/failure.json").exists()
    (line,) = trireme("jobs", tmp_path, "--json").stdout.splitlines()
    assert json.loads(line)["state"] == "stopped"


def test_asked_before_it_has_begun_it_does_not_begin_again(start, tmp_path):
    process = start("launch", write_recipe(tmp_path), "-n", "2", LONG)
    while len(ranks_below(process.pid)) < 3:  # a launcher and ranks; importing starts something for a moment, too
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75 and "restart" not in said, said


def test_a_second_ctrl_c_ends_it_at_once(start, tmp_path):
    process = start("launch", write_recipe(tmp_path), "-n", "2", LONG)
    wait_for_step(tmp_path / "run", 5, process)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=10)
    assert process.returncode in (75, 130) and "restart" not in said, said


def test_nobody_is_signalled_who_is_not_of_the_job(tmp_path, plain_environment):
    """A run folder whose lock is another job's, or names a process elsewhere, or one that has the number of a rank."""
    bystander = subprocess.Popen(["sleep", "60"])
    run = tmp_path / "run"
    run.mkdir()
    lock = Lock(run)
    lock.take()
    lock.hold([bystander.pid])
    held = json.loads(lock.path.read_text())
    for own, changes in ((False, {}), (True, {"host": "elsewhere"}), (True, {"processes": [[bystander.pid, 1]]})):
        touch = "import time, os; [(os.utime('job.lock'), time.sleep(0.1)) for _ in range(10)]"
        attempt = Attempt([sys.executable, "-c", f"import os; os.chdir({str(run)!r}); {touch}"], plain_environment, run)
        lock.path.write_text(json.dumps(held | changes | ({"attempt": attempt.id} if own else {})))
        attempt.make(lambda: 2)
        assert bystander.poll() is None
        assert own or not (run / "failure.json").exists()
        (run / "failure.json").unlink(missing_ok=True)
    bystander.kill()
    bystander.wait()


def test_a_second_launch_in_the_same_folder_is_refused_and_harms_nothing(start, trireme, tmp_path):
    recipe = write_recipe(tmp_path)
    process = start("launch", recipe, "-n", "2", LONG)
    wait_for_step(tmp_path / "run", 20, process)
    second = trireme("launch", recipe, "-n", "2", LONG, code=1)
    assert "trains in" in second.stderr and not (tmp_path / "run/failure.json").exists(), second.stderr
    wait_for_step(tmp_path / "run", 100, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 75


def test_a_finished_run_of_another_recipe_is_no_success(trireme, tmp_path):
    recipe = write_recipe(tmp_path)
    trireme("launch", recipe, "-n", "2", *SHORT)
    done = trireme("launch", recipe, "-n", "2", *SHORT, "optim.learning_rate=0.01", code=1)
    assert "another recipe" in done.stderr, done.stderr


def test_a_job_that_dies_as_a_whole_is_explained_from_outside(tmp_path, plain_environment):
    """The launcher, all ranks and the guard are killed at once: what is left is what the launcher's launcher saw."""
    run = tmp_path / "run"
    program = (
        "import sys, time; sys.path.insert(0, '.')\n"
        "from pathlib import Path\n"
        "from hpc.lock import Lock\n"
        f"run = Path({str(run)!r}); run.mkdir(); Lock(run).take()\n"
        "print('its last words', file=sys.stderr); sys.exit(9)"
    )
    outcome = keep_going([sys.executable, "-c", program], plain_environment, run, 0)
    failure = json.loads((run / "failure.json").read_text())
    assert (outcome.state, outcome.code, failure["kind"]) == ("failed", 9, "unknown")
    assert "exit code 9" in failure["error"] and failure["last"] == ["its last words"]


def test_a_launcher_that_does_not_end_after_its_job_is_ended(tmp_path, plain_environment):
    """As one that waits for a host which is lost."""
    run = tmp_path / "run"
    program = (
        "import sys, time; sys.path.insert(0, '.')\n"
        "from pathlib import Path\n"
        "from hpc.failure import write_failure\n"
        "from hpc.lock import Lock\n"
        f"run = Path({str(run)!r}); run.mkdir(); lock = Lock(run); lock.take()\n"
        "write_failure(lock, 'silent', 1, 'a', '', 'a is lost')\n"
        "time.sleep(1000)"
    )
    outcome = keep_going([sys.executable, "-c", program], plain_environment, run, 0)
    assert outcome.state == "failed" and "a is lost" in outcome.said, outcome


def test_the_command_is_shown_and_not_run(trireme, tmp_path):
    shown = trireme("launch", write_recipe(tmp_path), "-n", "4", "--show", "seed=2").stdout
    assert "-n 4" in shown and "OMP_NUM_THREADS=1" in shown and "seed=2" in shown and "mpiexec" in shown
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("place", ["debug", "local"])
def test_submit_without_slurm(trireme, tmp_path, place):
    recipe = write_recipe(tmp_path)
    done = trireme("submit", recipe, "--place", place, "--ranks-per-node", "2", *SHORT)
    assert f"{place} job" in done.stdout
    deadline = time.monotonic() + 60
    while not (tmp_path / "run/success").exists():
        assert time.monotonic() < deadline, [p.read_text() for p in (tmp_path / ".submitit").rglob("*.err")]
        time.sleep(0.2)
    assert read_attempts(tmp_path / "run")[0][0]["ranks"] == 2
    assert (tmp_path / ".submitit").stat().st_mode & 0o777 == 0o700
    (line,) = trireme("jobs", tmp_path, "--json").stdout.splitlines()
    assert json.loads(line)["state"] == "finished" and place in json.loads(line)["about"]


def test_a_folder_of_pickles_that_others_could_write_is_not_used(trireme, tmp_path):
    recipe, elsewhere = write_recipe(tmp_path), tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / ".submitit").symlink_to(elsewhere)
    done = trireme("submit", recipe, "--place", "debug", code=1)
    assert "not this user's own folder" in done.stderr


def test_a_grid_has_a_run_folder_for_every_point(tmp_path):
    recipe = write_recipe(tmp_path)
    found = grid(str(recipe), ["seed=4"], ["optim.learning_rate=0.1,0.2", "splits=2,4"])
    assert [words[-1] for words in found] == [
        f"run={tmp_path / 'run'}.grid/learning_rate={rate},splits={n}" for rate in (0.1, 0.2) for n in (2, 4)
    ]
    assert all(words[:1] == ["seed=4"] for words in found)
    for wrong in ("optim.learning_rate", "seed=", "seed=1,,2"):
        with pytest.raises(RecipeError, match="key=value,value"):
            grid(str(recipe), [], [wrong])
    with pytest.raises(RecipeError, match="separated by commas"):
        grid(str(recipe), [], ['optim={name="sgd", learning_rate=0.1}'])


def test_a_script_is_bash_and_says_what_it_will_miss(trireme, tmp_path):
    recipe, run = write_recipe(tmp_path), tmp_path / "a run's $HOME"
    for more in ((), ("--launcher", "mpirun")):
        done = trireme("sbatch", recipe, "--ranks-per-node", "2", "data.train=nowhere", f"run={run}", *more)
        assert "'nowhere' is not a data set here" in done.stderr
        script = tmp_path / "job.sh"
        script.write_text(done.stdout)
        subprocess.run(["bash", "-n", script], check=True)
        assert f"# Written by: trireme sbatch {recipe}" in done.stdout
    (run / "logs/slurm-1.log").write_text("cancelled\n")
    assert trireme("logs", run).stdout == "cancelled\n"
    refused = trireme("sbatch", recipe, "--ranks-per-node", "3", code=1).stderr
    assert "--nodes 1 x --ranks-per-node 3: splits = 4 cannot be dealt evenly to 3 ranks" in refused


def test_times_as_slurm_writes_them():
    times = {"90": 90, "1:30": 2, "12:00:00": 720, "2-00:00:00": 2880, "1-6": 1800, "0:0:1": 1}
    assert {text: minutes(text) for text in times} == times
    for wrong in ("", "soon", "1:2:3:4", "1-"):
        with pytest.raises(ValueError, match="expected minutes"):
            minutes(wrong)


def test_jobs_says_how_each_run_is_doing(trireme, start, tmp_path):
    recipe = write_recipe(tmp_path)
    runs = tmp_path / "runs"
    trireme("train", recipe, f"run={runs / 'done'}", *SHORT)
    going = start("train", recipe, f"run={runs / 'deep/going'}", LONG, ranks=2)
    wait_for_step(runs / "deep/going", 20, going)
    broken = start("train", recipe, f"run={runs / 'broken'}", LONG, ranks=2)
    killed_at(runs / "broken", 20, broken)
    broken.communicate(timeout=30)
    shutil.copytree(runs / "broken", runs / "lost", ignore=shutil.ignore_patterns("failure.json"))
    (runs / "sent").mkdir()
    write_json(runs / "sent/submitted.json", {"place": "slurm", "job": "12345", "time": 0, "command": "", "log": ""})
    lines = [json.loads(line) for line in trireme("jobs", runs, "--json").stdout.splitlines()]
    states = {Path(line["run"]).name: line for line in lines}
    assert {name: line["state"] for name, line in states.items()} == {
        "done": "finished", "going": "running", "broken": "failed", "lost": "lost", "sent": "made",
    }
    assert "gone without a word" in states["broken"]["about"] and states["sent"]["about"].startswith("slurm job 12345;")
    assert states["done"]["epoch"] == 2 and states["done"]["metric"].startswith("loss ")
    shown = trireme("jobs", runs).stdout
    assert all(name in shown for name in states) and "failed" in shown
    assert "no runs below" in trireme("jobs", tmp_path / "train").stdout
    assert "no folder" in trireme("jobs", tmp_path / "nowhere", code=1).stderr


def test_logs_are_merged_by_time_and_followed(trireme, start, tmp_path):
    recipe, run = write_recipe(tmp_path), tmp_path / "run"
    trireme("train", recipe, *SHORT, ranks=2)
    lines = trireme("logs", run).stdout.splitlines()
    times = [line[:23] for line in lines]
    assert times == sorted(times) and {line.split("[rank ")[1][0] for line in lines} == {"0", "1"}
    assert trireme("logs", run, "--last", "1").stdout.splitlines() == lines[-1:]
    lock = Lock(run)
    lock.take()
    lock.hold([os.getpid()])
    following = start("logs", run, "--follow")
    time.sleep(2)
    late = "2999-01-01 00:00:00,000 [rank 1 on here] something new"
    with open(run / "logs/rank-00001.log", "a") as file:
        file.write(f"{late}\n2999-01-01 00:00:01,000 half a li")
    time.sleep(1.5)
    lock.release()
    said, _ = following.communicate(timeout=20)
    assert late in said and "half a li" not in said and following.returncode == 0
    assert "not a run folder" in trireme("logs", tmp_path, code=1).stderr
