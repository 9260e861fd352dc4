"""A run folder is trained in by one job at a time; what a dead one left behind stops nobody."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from material import write_recipe
from test_training import wait_for_step

from collectives.errors import is_refusal
from hpc import lock
from hpc.failure import write_failure
from hpc.lock import ATTEMPT, LOCK, Lingers, Lock, Locked
from hpc.processes import started


@pytest.fixture
def quick(monkeypatch):
    """What a lock waits for, in tenths of a second."""
    monkeypatch.setattr(lock, "ENDING_S", 0.3)
    monkeypatch.setattr(lock, "STALE_S", 0.6)


def other(folder, **changes):
    """A lock as another job left it."""
    held = Lock(folder)
    held.take()
    record = json.loads((folder / LOCK).read_text()) | {"token": "other"} | changes
    (folder / LOCK).write_text(json.dumps(record))


def gone():
    """The number of a process that has ended, and when it was started."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.2)"])
    since = started(process.pid)
    process.wait()
    return [[process.pid, since]]


def test_one_holds_it_until_it_is_released(tmp_path, quick):
    mine = Lock(tmp_path)
    mine.take()
    with pytest.raises(Locked, match=f"already: on {socket.gethostname()}, since"):
        Lock(tmp_path).take()
    assert mine.beat()
    mine.release()
    assert list(tmp_path.iterdir()) == []
    Lock(tmp_path).take()


def test_the_lock_of_a_dead_process_is_taken_over_at_once(tmp_path):
    other(tmp_path, processes=gone())
    began = time.monotonic()
    mine = Lock(tmp_path)
    mine.take()
    assert time.monotonic() - began < 1 and mine.beat()


def test_a_process_of_the_same_number_is_another_one(tmp_path):
    other(tmp_path, processes=[[os.getpid(), 1]])
    Lock(tmp_path).take()


@pytest.mark.parametrize("changes", [{"boot": "another"}, {"space": "another"}, {"host": "elsewhere"}])
def test_what_cannot_be_asked_for_is_stale_once_nobody_has_touched_it_for_a_while(tmp_path, quick, changes):
    other(tmp_path, **changes)
    began = time.monotonic()
    Lock(tmp_path).take()
    assert time.monotonic() - began > 0.5


def test_who_ends_meanwhile_is_waited_for(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.5)"])
    other(tmp_path, processes=[[process.pid, started(process.pid)]])
    threading.Thread(target=process.wait).start()  # or it would stay as a zombie
    mine = Lock(tmp_path)
    mine.take()
    assert process.poll() is not None and mine.beat()


def test_a_job_elsewhere_holds_it_as_long_as_it_touches_it(tmp_path, quick):
    other(tmp_path, host="elsewhere", job="417")
    code = f"import os, time\nwhile True:\n    time.sleep(0.1)\n    os.utime({str(tmp_path / LOCK)!r})"
    touching = subprocess.Popen([sys.executable, "-c", code])
    try:
        with pytest.raises(Locked, match="on elsewhere, Slurm job 417"):
            time.sleep(0.3)
            Lock(tmp_path).take()
    finally:
        touching.kill()
        touching.wait()
    began = time.monotonic()
    Lock(tmp_path).take()
    assert 0.5 < time.monotonic() - began < 2, "an untouched lock is stale, after a while"


def test_who_lost_its_lock_knows(tmp_path):
    mine = Lock(tmp_path)
    mine.take()
    other_one = json.loads((tmp_path / LOCK).read_text()) | {"token": "other"}
    (tmp_path / LOCK).write_text(json.dumps(other_one))
    assert not mine.beat()
    mine.release()
    assert (tmp_path / LOCK).exists(), "another's is left alone"


def test_who_finds_no_lock_where_it_held_one_has_lost_it(tmp_path):
    """Another job took it over while this one was suspended, and has ended since."""
    mine, nobodys = Lock(tmp_path), Lock(tmp_path)
    mine.take()
    (tmp_path / LOCK).unlink()
    assert not mine.beat() and mine.lost() and not nobodys.lost()
    assert not write_failure(mine, "raised", 0, "here", "", "late")


@pytest.mark.parametrize("variable", ["SLURM_JOB_ID", ATTEMPT])
def test_an_earlier_attempt_at_the_same_job_is_waited_for_and_is_no_refusal(tmp_path, quick, monkeypatch, variable):
    """Of a killed job, whose ranks the kernel has not let go yet."""
    monkeypatch.setattr(lock, "OWN_S", 0.6)
    monkeypatch.setenv(variable, "17.first")
    other(tmp_path)
    monkeypatch.setenv(variable, "17.first" if variable == "SLURM_JOB_ID" else "17.second")
    began = time.monotonic()
    with pytest.raises(Lingers, match="an earlier attempt at this job") as caught:
        Lock(tmp_path).take()
    assert time.monotonic() - began > 0.6 and not is_refusal(caught.value)
    monkeypatch.setenv(variable, "18.first")
    with pytest.raises(Locked):
        Lock(tmp_path).take()


@pytest.mark.parametrize("text", [
    "", "{", "[]", '{"token": 1}', '{"token": "a", "processes": [["x"]]}', '{"token": "a", "processes": [[1e999, 1]]}',
])
def test_a_lock_that_cannot_be_read_is_stale_once_nobody_has_touched_it_for_a_while(tmp_path, quick, text):
    """A power failure may leave an empty one."""
    (tmp_path / LOCK).write_text(text)
    began = time.monotonic()
    mine = Lock(tmp_path)
    mine.take()
    assert time.monotonic() - began > 0.5 and mine.beat()


def test_on_a_file_system_without_links_it_is_held_too(tmp_path, quick, monkeypatch):
    def none(*_):
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", none)
    mine = Lock(tmp_path)
    mine.take()
    with pytest.raises(Locked):
        Lock(tmp_path).take()
    mine.hold([os.getpid()])
    assert mine.beat()


def test_who_lost_its_lock_writes_nothing_any_more(tmp_path):
    mine = Lock(tmp_path)
    mine.take()
    record = json.loads((tmp_path / LOCK).read_text()) | {"token": "other"}
    (tmp_path / LOCK).write_text(json.dumps(record))
    for act in (mine.check, lambda: mine.hold([1])):
        with pytest.raises(Locked, match="another job has taken the lock"):
            act()
    assert not write_failure(mine, "raised", 0, "here", "", "late") and not (tmp_path / "failure.json").exists()


def _contend(folder, start, results):
    start.wait()
    try:
        Lock(folder).take()
        results.put(True)
    except Locked:
        results.put(False)
    time.sleep(2)  # whoever holds it lives


def test_of_many_that_find_a_stale_lock_one_takes_it(tmp_path):
    context = multiprocessing.get_context("fork")
    lock.ENDING_S, before = 0.3, lock.ENDING_S
    try:
        for attempt in range(3):
            folder = tmp_path / str(attempt)
            folder.mkdir()
            other(folder, processes=gone())
            start, results = context.Event(), context.Queue()
            crowd = [context.Process(target=_contend, args=(folder, start, results)) for _ in range(8)]
            for process in crowd:
                process.start()
            start.set()
            taken = [results.get(timeout=20) for _ in crowd]
            for process in crowd:
                process.join()
            assert taken.count(True) == 1, taken
    finally:
        lock.ENDING_S = before


def test_a_second_job_in_the_same_folder_is_refused_and_harms_nothing(start, trireme, tmp_path):
    recipe = write_recipe(tmp_path)
    words = ("train", recipe, "schedule={name='constant', epochs=10000}")
    process = start(*words, ranks=2)
    wait_for_step(tmp_path / "run", 20, process)
    done = trireme(*words, code=1)
    assert "a job trains in" in done.stderr and "choose another folder" in done.stderr, done.stderr
    assert process.poll() is None and not (tmp_path / "run/failure.json").exists()
    reached = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])["step"]
    wait_for_step(tmp_path / "run", reached + 20, process)
    os.killpg(process.pid, signal.SIGTERM)
    process.communicate(timeout=30)
    deadline = time.monotonic() + 5
    while (tmp_path / "run" / LOCK).exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
