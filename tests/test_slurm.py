"""Jobs on a real Slurm: preempted, out of time, killed, they go on by themselves and end with the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from material import write_recipe
from private_slurm import PrivateSlurm, missing
from test_training import is_guard

from hpc.doctor import mpi_here
from hpc.files import sha256_of
from hpc.hosts import Hosts, missing_rights
from hpc.records import read_attempts

ROOT = Path(__file__).parents[1]
LONG = ("optim.learning_rate=0.05", "schedule={name='constant', epochs=80}", "log.every=20", "checkpoint.every=2000",
        "data.validation=")  # without it the last model ships, which no fault comes after
WAYS = {"srun": ("sbatch", ()), "mpirun": ("sbatch", ("--launcher", "mpirun")), "submitit": ("submit", ())}

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())


@pytest.fixture(scope="module")
def slurm():
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    ours = ("SLURM_", "PMI", "OMPI_COMM", "HYDRA_", "MPI_")
    plain = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    try:
        with PrivateSlurm(folder, plain, cpus=6) as up:
            yield up
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A recipe whose run takes some 10 s, and the model that comes of it undisturbed."""
    recipe = write_recipe(tmp_path_factory.mktemp("jobs"))
    return recipe, undisturbed(recipe)[0]


def undisturbed(recipe, *changes):
    """The model of a run that nothing happens to, on one rank, and how many seconds it learned."""
    run = recipe.with_name("undisturbed")
    words = [sys.executable, "-m", "mpi4py", "-m", "hpc", "train", str(recipe), *LONG, f"run={run}", *changes]
    subprocess.run(words, cwd=ROOT, check=True, capture_output=True)
    digest, (records,) = sha256_of(run / "model.safetensors"), read_attempts(run)
    shutil.rmtree(run)
    return digest, records[-1]["time"] - records[0]["time"]


def sent(slurm, recipe, run, *options, how="sbatch"):
    """A job's number."""
    ranks = () if "--ranks-per-node" in options else ("--ranks-per-node", "2")
    words = [sys.executable, "-m", "hpc", how, recipe, *LONG, f"run={run}", *ranks, *options]
    if how == "submit":
        said = slurm.run(*words, "--place", "slurm", cwd=ROOT)
        return said.split("slurm job ")[1].split(",")[0]
    script = run.with_suffix(".sh")
    script.write_text(slurm.run(*words, cwd=ROOT))
    return slurm.run("sbatch", script).split()[-1]


def under_way(run, attempts=1, seconds=60):
    deadline = time.monotonic() + seconds
    while True:
        assert time.monotonic() < deadline, [p.read_text() for p in (run / "logs").glob("slurm*.log")]
        if (run / "metrics.jsonl").exists():
            found = read_attempts(run)
            if len(found) >= attempts and any(r["event"] == "train" for r in found[-1]):
                return
        time.sleep(0.1)


def check(slurm, job, run, digest, attempts=2, failures=0):
    """The job is done, with the undisturbed run's model, in so many attempts (None: some), so many after a failure."""
    assert slurm.wait(job, seconds=600) == "COMPLETED", [p.read_text() for p in (run / "logs").glob("*.log")]
    assert sha256_of(run / "model.safetensors") == digest
    starts = [attempt[0] for attempt in read_attempts(run)]
    assert len(starts) == attempts if attempts else len(starts) > 1, starts
    assert sum(start["last_failure"] is not None for start in starts) == failures, starts
    assert starts[-1]["ranks"] == 2


def preempt(slurm):
    """A job of higher priority takes the whole node for a moment."""
    job = slurm.run("sbatch", "--partition=high", "--ntasks=6", "--output=/dev/null", "--wrap=sleep 1").split()[-1]
    slurm.wait(job)


def all_ways(slurm, recipe, folder, *options):
    """A job each way to start ranks: its name -> its run folder and number."""
    return {name: (folder / name, sent(slurm, recipe, folder / name, *options, *more, how=how))
            for name, (how, more) in WAYS.items()}


def test_preempted_jobs_go_on_and_end_with_the_same_bytes(slurm, material, tmp_path):
    recipe, digest = material
    jobs = all_ways(slurm, recipe, tmp_path)
    for run, _ in jobs.values():
        under_way(run)
    preempt(slurm)
    for name, (run, job) in jobs.items():
        # Slurm tells steps, and ranks on the node of Open MPI's mpirun are in none: they end without a word.
        untold = name == "mpirun" and "Open MPI" in mpi_here()[0]
        check(slurm, job, run, digest, failures=int(untold))


def test_jobs_out_of_time_go_on(slurm, material, tmp_path):
    """They are told after 15 s, or half a minute later: Slurm looks that often. All at once take more than a minute."""
    recipe, _ = material
    _, seconds = undisturbed(recipe, "schedule.epochs=10")
    long = f"schedule.epochs={round(35 / seconds * 10)}"  # 35 s of one core, three times
    jobs = all_ways(slurm, recipe, tmp_path, "--time", "1", "--grace", "15", long)
    digest, _ = undisturbed(recipe, long)
    for run, job in jobs.values():
        check(slurm, job, run, digest, attempts=None)


def test_a_job_whose_rank_or_everything_is_killed_goes_on(slurm, material, tmp_path):
    """Also where srun does not end with its ranks, as where a node is lost."""
    recipe, digest = material
    run = tmp_path / "run"
    waits = tmp_path / "srun"
    real, waited = shutil.which("srun"), tmp_path / "waited"
    waits.write_text(f"#!/bin/sh\n{real} \"$@\" || [ -e {waited} ] || {{ touch {waited}; sleep 1000; }}\n")
    waits.chmod(0o755)
    job = sent(slurm, recipe, run, "--setup", f"PATH={tmp_path}:$PATH")
    under_way(run)
    held = json.loads((run / "job.lock").read_text())["processes"]
    victim = next(pid for pid, _ in held[1:] if not is_guard(pid))
    os.kill(victim, signal.SIGKILL)
    under_way(run, attempts=2)
    for pid, _ in json.loads((run / "job.lock").read_text())["processes"]:  # the guard, too
        os.kill(pid, signal.SIGKILL)
    check(slurm, job, run, digest, attempts=3, failures=2)
    assert waited.exists()
    assert [attempt[0]["last_failure"]["kind"] for attempt in read_attempts(run)[1:]] == ["gone", "unknown"]


def test_a_cancelled_job_stays_cancelled(slurm, material, tmp_path):
    """Though its ranks have checkpointed, as they do when told to stop."""
    recipe, _ = material
    run = tmp_path / "run"
    job = sent(slurm, recipe, run)
    under_way(run)
    slurm.run("scancel", job)
    assert slurm.wait(job) == "CANCELLED"
    time.sleep(10)  # a job that was requeued would be on its way again
    assert slurm.state(job) == "CANCELLED" and not (run / "success").exists() and len(read_attempts(run)) == 1


def test_of_an_array_only_what_was_preempted_goes_on(slurm, material, tmp_path):
    recipe, digest = material
    run = tmp_path / "run"
    job = sent(slurm, recipe, run, "--grid", "schedule.epochs=1,80", how="submit").partition("_")[0]
    short, long = (Path(f"{run}.grid/epochs={n}") for n in (1, 80))
    assert slurm.wait(f"{job}_0") == "COMPLETED"
    under_way(long)
    preempt(slurm)
    check(slurm, f"{job}_1", long, digest)
    assert slurm.state(f"{job}_0") == "COMPLETED" and len(read_attempts(short)) == 1


def test_an_array_of_four(slurm, material, tmp_path):
    recipe, _ = material
    run = tmp_path / "run"
    words = ["schedule.epochs=5", "--grid", "seed=1,2", "--grid", "task.width=20,40"]
    job = sent(slurm, recipe, run, *words, how="submit").partition("_")[0]
    runs = sorted(Path(f"{run}.grid").glob("seed=*"))
    assert [r.name for r in runs] == [f"seed={s},width={w}" for s in (1, 2) for w in (20, 40)]
    for index in range(4):
        assert slurm.wait(f"{job}_{index}", seconds=180) == "COMPLETED"
    assert len({sha256_of(r / "model.safetensors") for r in runs}) == 4
    assert Path(f"{run}.grid/.submitit").stat().st_mode & 0o777 == 0o700


def test_two_arrays_in_the_same_folders_do_not_mix(slurm, material, tmp_path):
    recipe, _ = material
    run = tmp_path / "run"
    jobs = [sent(slurm, recipe, run, "--ranks-per-node", "1", "--grid", "seed=1,2", how="submit").partition("_")[0]
            for _ in range(2)]
    ends = sorted(slurm.wait(f"{job}_{index}", seconds=180) for job in jobs for index in range(2))
    assert ends == ["COMPLETED"] * 2 + ["FAILED"] * 2, ends
    for index in (1, 2):
        folder = Path(f"{run}.grid/seed={index}")
        assert (folder / "success").exists() and len(read_attempts(folder)) == 1


@pytest.mark.skipif(bool(missing_rights()), reason=missing_rights())
def test_two_nodes_and_then_one_with_more_ranks(material, tmp_path, plain_environment):
    """Preempted on two nodes it goes on there; cancelled, it is sent again with other ranks; the bytes are the same."""
    recipe, digest = material
    run = tmp_path / "run"
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    try:
        with Hosts(2) as hosts, PrivateSlurm(folder, plain_environment, cpus=4, hosts=hosts) as slurm:
            job = sent(slurm, recipe, run, "--nodes", "2", "--ranks-per-node", "1")
            under_way(run)
            high = slurm.run("sbatch", "--partition=high", "--nodes=2", "--ntasks=8", "--output=/dev/null",
                             "--wrap=sleep 1").split()[-1]
            slurm.wait(high)
            under_way(run, attempts=2)
            assert [attempt[0]["hosts"] for attempt in read_attempts(run)] == [["vh0", "vh1"]] * 2
            slurm.run("scancel", job)
            assert slurm.wait(job) == "CANCELLED" and not (run / "success").exists()
            again = sent(slurm, recipe, run, "--ranks-per-node", "4")
            assert slurm.wait(again) == "COMPLETED"
            assert read_attempts(run)[-1][0]["ranks"] == 4
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    assert sha256_of(run / "model.safetensors") == digest
