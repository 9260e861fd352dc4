"""What nobody in a rank can say any more is said by its guard: who, where, at which step, and why."""

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

from hpc.pulse import Pulse, pulses_of
from hpc.records import read_records

FAULTS = Path(__file__).parent / "faults"
sys.path.insert(0, str(FAULTS))
from inject import no_memory_cgroup  # noqa: E402

WATCHDOG = 4.0


def struck(folder, environment, what, rank, phase, *, ranks=3, step=12, launcher="mpiexec", **changes):
    """A job struck by a fault: what it said, its failure.json, and the seconds from the fault to its end."""
    recipe, mark, plan = write_recipe(folder, splits=6), folder / "mark", folder / "plan.json"
    fault = {"what": what, "rank": rank, "step": step, "phase": phase, "mark": str(mark)} | changes
    plan.write_text(json.dumps([fault]))
    words = [sys.executable, "-m", "mpi4py", str(FAULTS / "inject.py"), str(plan), "train", str(recipe)]
    words += [f"log.watchdog={WATCHDOG}", "schedule.epochs=2000", "log.every=5"]
    done = subprocess.run(
        [launcher, "-n", str(ranks), *words], env=environment, capture_output=True, text=True, timeout=90
    )
    ended = time.time()
    path = folder / "run/failure.json"
    for _ in range(50):  # a launcher may end before the guard has written it
        if path.exists():
            break
        time.sleep(0.1)
    assert path.exists(), done.stdout + done.stderr
    assert not (folder / "run/success").exists()
    return done.stderr, json.loads(path.read_text()), ended - mark.stat().st_mtime


@pytest.mark.parametrize(("rank", "phase"), [(0, "forward"), (2, "exchange"), (1, "validate"), (1, "checkpoint")])
def test_a_killed_rank_is_named(tmp_path, plain_environment, rank, phase):
    said, failure, seconds = struck(tmp_path, plain_environment, "kill", rank, phase)
    assert (failure["kind"], failure["rank"]) == ("gone", rank), failure
    assert failure["step"] >= 12 and f"in phase '{phase}'" in failure["where"]
    assert f"rank {rank} on {failure['host']}: its process" in said and "killed from outside" in said
    assert [r["rank"] for r in failure["ranks"]] == [0, 1, 2] and not failure["final"]
    assert seconds < 10


@pytest.mark.parametrize(("what", "words"), [
    ("stop", "is stopped (SIGSTOP"), ("hang", "no progress for 4 s"),
    ("locked", "none of its threads comes to run Python"),
])
def test_a_rank_that_hangs_is_named_with_every_ranks_stacks(tmp_path, plain_environment, what, words):
    said, failure, seconds = struck(tmp_path, plain_environment, what, 1, "backward")
    assert (failure["kind"], failure["rank"]) == ("hang", 1) and words in failure["error"], failure
    assert "in phase 'backward'" in failure["where"]
    for rank in range(3):
        stacks = (tmp_path / f"run/ranks/rank-{rank:05d}.stacks").read_text()
        assert "hpc/train.py" in stacks and stacks in said
    assert "inject.py" in (tmp_path / "run/ranks/rank-00001.stacks").read_text()
    assert seconds < WATCHDOG + 10


def test_a_rank_that_hangs_before_training_is_named_and_not_those_that_wait_for_it(tmp_path, plain_environment):
    _, failure, seconds = struck(tmp_path, plain_environment, "hang", 1, "verify", step=0)
    assert (failure["kind"], failure["rank"]) == ("hang", 1) and "checking shard 1 of" in failure["where"], failure
    assert seconds < WATCHDOG + 10


@pytest.mark.skipif(bool(no_memory_cgroup()), reason=no_memory_cgroup())
def test_a_rank_without_memory_is_named_and_why(tmp_path, plain_environment):
    _, failure, seconds = struck(tmp_path, plain_environment, "memory", 2, "forward")
    assert (failure["kind"], failure["rank"]) == ("gone", 2) and "out of memory" in failure["error"], failure
    assert seconds < 10


@pytest.mark.parametrize("what", ["raise", "exchange"])
def test_an_exception_says_itself_where_it_came_from(tmp_path, plain_environment, what):
    said, failure, seconds = struck(tmp_path, plain_environment, what, 1, "forward")
    assert (failure["kind"], failure["rank"]) == ("raised", 1) and "injected" in failure["error"], failure
    assert "inject.py" in failure["call"] and "Traceback" in failure["traceback"]
    assert "guard" not in said and f"[rank 1 on {failure['host']}]" in said
    assert seconds < 10


@pytest.mark.skipif(not shutil.which("mpiexec.gforker"), reason="needs a launcher that kills nobody by itself")
def test_a_launcher_that_kills_nobody_is_no_way_out(tmp_path, plain_environment):
    _, failure, seconds = struck(tmp_path, plain_environment, "kill", 1, "forward", launcher="mpiexec.gforker")
    assert (failure["kind"], failure["rank"]) == ("gone", 1) and seconds < 10


def test_a_pulse_is_never_read_by_halves(tmp_path):
    """By whoever reads while it beats: half of one once looked as if a rank had hung since the host was started."""
    pulse = Pulse(0)
    token = f"test-{os.getpid()}"
    pulse.keep(token, tmp_path / "stacks", 0)
    place = pulses_of(token) / "rank-00000.pulse"
    code = (
        "import sys, time; from pathlib import Path; from hpc.pulse import Watched\n"
        f"watched, end = Watched(Path({str(place)!r})), time.monotonic() + 2\n"
        "while time.monotonic() < end:\n"
        "    seen = watched.seen()\n"
        "    assert time.monotonic() - seen.beaten < 5 and time.monotonic() - seen.asked < 9, seen\n"
    )
    reader = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[1])
    while reader.poll() is None:
        for step in range(1000):
            pulse.beat("in phase 'x'", step)
    shutil.rmtree(place.parent)
    assert reader.returncode == 0


def guards():
    return {int(pid) for pid in filter(str.isdigit, os.listdir("/proc")) if is_guard(pid)}


def test_a_killed_job_leaves_nothing_in_the_hosts_memory(tmp_path, plain_environment):
    before = set(os.listdir("/dev/shm"))
    struck(tmp_path, plain_environment, "kill", 1, "forward")
    time.sleep(1)
    assert set(os.listdir("/dev/shm")) <= before


def test_guards_leave_with_their_ranks(trireme, tmp_path):
    before = guards()
    trireme("train", write_recipe(tmp_path), "schedule.epochs=1", "schedule.min_epochs=1", ranks=2)
    deadline = time.monotonic() + 5
    while guards() - before or (tmp_path / "run/job.lock").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def under_way(start, tmp_path):
    """A job of two ranks that trains, and its guard."""
    recipe, before = write_recipe(tmp_path), guards()
    long = "schedule={name='constant', epochs=100000}"
    process = start("train", recipe, long, f"log.watchdog={WATCHDOG}", ranks=2)
    wait_for_step(tmp_path / "run", 20, process)
    (guard,) = guards() - before
    return process, guard


def test_without_its_guard_a_job_ends(start, tmp_path):
    process, guard = under_way(start, tmp_path)
    os.kill(guard, signal.SIGKILL)
    _, said = process.communicate(timeout=20)
    assert process.returncode not in (0, 1) and "the guard of this host is gone" in said


def test_a_job_suspended_as_a_whole_goes_on(start, tmp_path):
    process, guard = under_way(start, tmp_path)
    everybody = [guard, *ranks_below(process.pid)]
    for pid in everybody:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(WATCHDOG + 2)
    for pid in everybody:
        os.kill(pid, signal.SIGCONT)
    reached = read_records(tmp_path / "run")[-1]["step"]
    time.sleep(WATCHDOG + 1)
    assert process.poll() is None and not (tmp_path / "run/failure.json").exists()
    assert read_records(tmp_path / "run")[-1]["step"] > reached


def test_a_job_that_lost_its_folder_ends_and_leaves_no_word_in_it(start, tmp_path):
    process, _ = under_way(start, tmp_path)
    path = tmp_path / "run/job.lock"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"token": "another's"}))
    _, said = process.communicate(timeout=20)
    assert process.returncode and "another job has taken the lock" in said
    assert not (tmp_path / "run/failure.json").exists() and "another's" in path.read_text()


def test_on_two_hosts_with_two_ranks_each_the_killed_one_is_named(tmp_path, plain_environment, hosts):
    """Not its neighbour, which sees at once that its peer is gone."""
    world = hosts(2)
    recipe, mark, plan = write_recipe(tmp_path, splits=4), tmp_path / "mark", tmp_path / "plan.json"
    plan.write_text(json.dumps([{"what": "kill", "rank": 3, "step": 12, "phase": "forward", "mark": str(mark)}]))
    words = [sys.executable, "-m", "mpi4py", str(FAULTS / "inject.py"), str(plan), "train", str(recipe)]
    command, variables = world.mpiexec([2, 2], [*words, "schedule.epochs=2000", "log.every=5"])
    subprocess.run(command, env=plain_environment | variables, capture_output=True, text=True, timeout=60)
    time.sleep(3)
    failure = json.loads((tmp_path / "run/failure.json").read_text())
    assert (failure["kind"], failure["rank"], failure["host"]) == ("gone", 3, "vh1"), failure
