"""A peer that dies, a host that vanishes, a link that goes down, in the middle of real training: who is left ends.

With MPICH's launcher a killed rank is the end of all others within milliseconds, by SIGKILL: they cannot say a word,
and the guard does. Other launchers leave them some time (MPICH's own mpiexec.gforker and Open MPI's do).
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

WATCHDOG = 30.0  # what is lost is noticed before
SOON = 10.0
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


def ended(process, seconds, lingers=False):
    """What a job said, once it has ended, in so many seconds at most.

    lingers  whether its launcher may still be there then
    """
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        if lingers:
            return "".join(process.communicate())
        raise AssertionError(f"still running after {seconds} s: {process.communicate()}") from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.stdout.read() + process.stderr.read()


def named(folder, said, rank, kind="gone"):
    """What failure.json says once the guards are done: of that rank, and that it is this kind of failure."""
    path = folder / "run/failure.json"
    for _ in range(50):
        if path.exists():
            break
        time.sleep(0.1)
    failure = json.loads(path.read_text())
    assert (failure["kind"], failure["rank"]) == (kind, rank), (failure, said)
    return failure


@pytest.mark.skipif(not shutil.which("mpiexec.gforker"), reason="needs a launcher that leaves survivors some time")
def test_a_killed_peer_is_named_where_the_launcher_kills_nobody(tmp_path, plain_environment):
    words = long_run(tmp_path, 3)
    process = start(["mpiexec.gforker", "-n", "3", *words], plain_environment)
    under_way(tmp_path, process)
    os.kill(pid_of(1, words[6]), signal.SIGKILL)
    said = ended(process, SOON)  # this launcher's exit code says nothing
    assert "no progress" not in said, "there was no need to be patient"
    named(tmp_path, said, 1)


@pytest.mark.skipif(not shutil.which("mpiexec.gforker"), reason="needs a launcher that leaves survivors some time")
@pytest.mark.parametrize("beside", ["false", "true"])
def test_a_killed_peer_in_1_bit_sgd_is_named(tmp_path, plain_environment, beside):
    words = [word for word in long_run(tmp_path, 4) if "bucket_mib" not in word]
    words += [f'strategy={{name="onebit", double_buffering={beside}}}', "data.batch=48"]
    process = start(["mpiexec.gforker", "-n", "2", *words], plain_environment)
    under_way(tmp_path, process)
    os.kill(pid_of(1, words[6]), signal.SIGKILL)
    named(tmp_path, ended(process, SOON), 1)
    assert not (tmp_path / "run/success").exists()


def test_a_killed_peer_ends_the_job_at_once(tmp_path, plain_environment):
    words = long_run(tmp_path, 2)
    process = start(["mpiexec", "-n", "2", *words], plain_environment)
    under_way(tmp_path, process)
    os.kill(pid_of(1, words[6]), signal.SIGKILL)
    said = ended(process, SOON)
    assert process.returncode
    named(tmp_path, said, 1)


def on_three_hosts(folder, environment, hosts):
    """A long run, under way, with a rank on each of three hosts; the hosts, the launcher's process, the words."""
    world = hosts(3)
    words = long_run(folder, 3)
    command, variables = world.mpiexec([1, 1, 1], words)
    process = start(command, environment | variables)
    under_way(folder, process)
    return world, process, words


@pytest.mark.parametrize("what", ["the link goes down", "the power fails"])
def test_who_is_left_names_the_lost_host_and_the_bucket(tmp_path, plain_environment, hosts, what):
    world, process, words = on_three_hosts(tmp_path, plain_environment, hosts)
    world.cut(2)
    if what == "the power fails":
        world.kill(2)
    for _ in range(round(SOON / 0.1)):
        if not [rank for rank in (0, 1) if pid_of(rank, words[6])]:
            break
        time.sleep(0.1)
    else:
        raise AssertionError("ranks on hosts that are left still run")
    failure = named(tmp_path, "", 2, "silent")
    said = ended(process, 2, lingers=True)  # this launcher may wait for the lost host; `trireme launch` would not
    assert failure["host"] == "vh2" and "vh2 has been silent" in said
    (own,) = failure["ranks"]
    bucket = r"(bucket \d of 4 waits for .* of rank [12] on vh[12]|waiting for (all ranks|the answer of all ranks))"
    assert own["rank"] == 0 and re.match(bucket, own["waits"]), failure
    assert not (tmp_path / "run/success").exists()
    if what == "the link goes down":  # the rank that nobody hears any more ends too
        for _ in range(100):
            if pid_of(2, words[6]) is None:
                break
            time.sleep(0.1)
        else:
            raise AssertionError("the rank on the host that was cut off still runs")


def test_a_host_that_shuts_down_ends_the_job_at_once(tmp_path, plain_environment, hosts):
    world, process, _ = on_three_hosts(tmp_path, plain_environment, hosts)
    world.kill(1)
    said = ended(process, SOON)
    assert process.returncode
    assert named(tmp_path, said, 1, "silent")["host"] == "vh1"


def test_on_several_hosts_the_rank_that_was_killed_is_named(tmp_path, plain_environment, hosts):
    """Not one of those that the launcher then kills."""
    _, process, words = on_three_hosts(tmp_path, plain_environment, hosts)
    os.kill(pid_of(2, words[6]), signal.SIGKILL)
    said = ended(process, SOON)
    assert named(tmp_path, said, 2)["host"] == "vh2"
