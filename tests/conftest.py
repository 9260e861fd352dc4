"""What all tests share: the launcher's place, small data that can be learned, and whole commands in real processes."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

gc.disable()  # until all tests are collected: of what is imported nothing is garbage, and ranks import for every test
import pytest  # noqa: E402

from hpc.hosts import Hosts, missing_rights  # noqa: E402

BIN = Path(sys.executable).parent
if (BIN / "mpiexec").exists():  # pytest-isolate-mpi looks for the launcher on PATH
    os.environ["PATH"] = f"{BIN}{os.pathsep}{os.environ['PATH']}"
os.environ["OMP_NUM_THREADS"] = "1"

LAUNCH_VARIABLES = ("PMI_", "PMIX_", "OMPI_", "MPI_", "HYDRA_", "HYDI_", "MPIR_", "SLURM_")


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def plain_environment():
    """The environment without what a launcher may have left in it."""
    return {k: v for k, v in os.environ.items() if not k.startswith(LAUNCH_VARIABLES)}


@pytest.fixture
def trireme(plain_environment):
    """Runs a `trireme` command in real processes: trireme("train", recipe, ranks=2) -> CompletedProcess."""

    def run(*words, ranks=1, timeout=120, code=0, env=None, cwd=None):
        command = [*launcher(ranks), "-m", "hpc", *map(str, words)]
        done = subprocess.run(
            command, env=plain_environment | (env or {}), cwd=cwd, capture_output=True, text=True, timeout=timeout
        )
        assert code is None or done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture
def shared_folder(comm):
    """A temporary folder that all ranks of a test see; rank 0 makes and removes it."""
    folder = comm.bcast(tempfile.mkdtemp(prefix="trireme-test-") if comm.rank == 0 else None)
    yield Path(folder)
    comm.barrier()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def start(plain_environment):
    """Starts a `trireme` command and returns the process; it is killed, with its ranks, when the test ends."""
    running = []

    def run(*words, ranks=1, env=None):
        command = [*launcher(ranks), "-m", "hpc", *map(str, words)]
        process = subprocess.Popen(
            command, env=plain_environment | (env or {}), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )
        running.append(process)
        return process

    yield run
    for process in running:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def launcher(ranks: int) -> list[str]:
    """The start of a command line with this many ranks; one rank needs no launcher."""
    python = [sys.executable, "-m", "mpi4py"]
    return python if ranks == 1 else ["mpiexec", "-n", str(ranks), *python]


@pytest.fixture
def hosts():
    """Makes pretend hosts on this machine: hosts(2, "100mbit") -> Hosts, up; gone when the test ends."""
    if reason := missing_rights():
        pytest.skip(reason)
    with ExitStack() as up:
        yield lambda count, link=None: up.enter_context(Hosts(count, link))
