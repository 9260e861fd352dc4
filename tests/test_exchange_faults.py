"""A peer that dies, a host that vanishes, a link that goes down, in the middle of real training: who is left ends.

With MPICH's launcher a killed rank is the end of all others within milliseconds, by SIGKILL: they cannot say a word.
Other launchers leave them some time (MPICH's own mpiexec.gforker and Open MPI's do). A launcher that hears that a whole
host is gone ends everybody too. Where nothing is heard any more (a cable pulled, power lost), the watchdog speaks.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from material import write_recipe

WATCHDOG = 4.0
WORDS = [sys.executable, "-m", "mpi4py", "-m", "hpc", "train"]


def long_run(folder, splits):
    """A recipe whose run would take minutes, in small buckets, and the words that start it."""
    recipe = write_recipe(folder, splits=splits)
    changes = [
        f"log.watchdog={WATCHDOG}", "schedule.name=constant", "schedule.epochs=2000", "validate.every=100000",
        "checkpoint.every=100000", "strategy.bucket_mib=0.004",
    ]
    text = recipe.read_text().replace("min_epochs = 99\n", "")
    recipe.write_text(text)
    return [*WORDS, str(recipe), *changes]


def under_way(folder, process):
    """Wait until the run has learned something."""
    log = folder / "run/metrics.jsonl"
    for _ in range(600):
        if log.exists() and '"train"' in log.read_text():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise AssertionError("no training in 60 s")


def pid_of(rank, recipe):
    """The process of a rank: the one whose environment says so; None if there is none."""
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                words = Path(f"/proc/{entry}/cmdline").read_bytes().split(b"\0")
                environment = Path(f"/proc/{entry}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            mine = {f"PMI_RANK={rank}".encode(), f"OMPI_COMM_WORLD_RANK={rank}".encode()} & set(environment)
            if recipe.encode() in words and mine and words[0].endswith(b"python"):
                return int(entry)
    return None


def start(command, environment):
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def ended(process, seconds):
    """What a job said, once it has ended, in so many seconds at most."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"still running after {seconds} s: {process.communicate()}") from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.stdout.read() + process.stderr.read()


@pytest.mark.skipif(not shutil.which("mpiexec.gforker"), reason="needs a launcher that leaves survivors some time")
def test_survivors_name_a_killed_peer_and_the_bucket(tmp_path, plain_environment):
    words = long_run(tmp_path, 3)
    process = start(["mpiexec.gforker", "-n", "3", *words], plain_environment)
    under_way(tmp_path, process)
    os.kill(pid_of(1, words[6]), signal.SIGKILL)
    said = ended(process, WATCHDOG + 6)  # this launcher's exit code says nothing
    in_bucket = re.search(r"rank [02] on .*rank 1 on \S+ is gone; bucket \d of 4 waited for its", said)
    between = re.search(r"rank [02] on .*rank 1 on \S+ is gone; this rank waits for", said)  # in a call of all ranks
    assert in_bucket or between, said
    assert "no progress" not in said, "there was no need to be patient"
    if in_bucket:
        failure = json.loads((tmp_path / "run/failure.json").read_text())
        assert failure["rank"] in (0, 2) and "PeerLost: rank 1 on" in failure["error"]


@pytest.mark.skipif(not shutil.which("mpiexec.gforker"), reason="needs a launcher that leaves survivors some time")
@pytest.mark.parametrize("beside", ["false", "true"])
def test_survivors_of_1_bit_sgd_name_a_killed_peer(tmp_path, plain_environment, beside):
    words = [word for word in long_run(tmp_path, 4) if "bucket_mib" not in word]
    words += [f'strategy={{name="onebit", double_buffering={beside}}}', "data.batch=48"]
    process = start(["mpiexec.gforker", "-n", "2", *words], plain_environment)
    under_way(tmp_path, process)
    os.kill(pid_of(1, words[6]), signal.SIGKILL)
    said = ended(process, WATCHDOG + 6)
    assert re.search(r"rank 1 on \S+ is gone; this rank wait(ed|s) for", said), said
    assert "no progress" not in said, "there was no need to be patient"
    assert not (tmp_path / "run/success").exists()


def test_a_killed_peer_ends_the_job_at_once(tmp_path, plain_environment):
    words = long_run(tmp_path, 2)
    process = start(["mpiexec", "-n", "2", *words], plain_environment)
    under_way(tmp_path, process)
    os.kill(pid_of(1, words[6]), signal.SIGKILL)
    ended(process, WATCHDOG)
    assert process.returncode


@pytest.mark.parametrize("what", ["the link goes down", "the power fails"])
def test_who_is_left_names_the_lost_host_and_the_bucket(tmp_path, plain_environment, hosts, what):
    world = hosts(3)
    words = long_run(tmp_path, 3)
    command, variables = world.mpiexec([1, 1, 1], words)
    process = start(command, plain_environment | variables)
    under_way(tmp_path, process)
    world.cut(2)
    if what == "the power fails":
        world.kill(2)
    said = ended(process, WATCHDOG + 12)
    assert process.returncode
    # A rank that stands between two exchanges cannot know which of all ranks it is that does not answer.
    named = r"(bucket \d of 4 waits for .* of rank 2 on vh2|waiting for (all ranks|the answer of all ranks))"
    for rank in (0, 1):
        assert re.search(rf"\[rank {rank} on vh{rank}\] no progress for 4 s", said), said
    assert re.search(rf"\[rank [01] on vh[01]\] no progress for 4 s .*{named}", said), said
    assert not (tmp_path / "run/success").exists()
    if what == "the link goes down":  # the rank that nobody hears any more ends too
        for _ in range(100):
            if pid_of(2, words[6]) is None:
                break
            time.sleep(0.1)
        else:
            raise AssertionError("the rank on the host that was cut off still runs")


def test_a_host_that_shuts_down_ends_the_job_at_once(tmp_path, plain_environment, hosts):
    world = hosts(3)
    words = long_run(tmp_path, 3)
    command, variables = world.mpiexec([1, 1, 1], words)
    process = start(command, plain_environment | variables)
    under_way(tmp_path, process)
    world.kill(1)
    ended(process, WATCHDOG)
    assert process.returncode
