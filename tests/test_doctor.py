"""`trireme doctor` in real processes: alone, under real and foreign launchers, and with parts missing."""

import json
import os
import pty
import shlex
import shutil
import subprocess
import sys
import time
from importlib.metadata import distributions
from pathlib import Path

import pytest

from hpc import doctor

BIN = Path(sys.executable).parent
MPIEXEC = str(BIN / "mpiexec")
DOCTOR = [sys.executable, "-m", "mpi4py", "-m", "hpc", "doctor"]
INSTALLED = {d.metadata["Name"] for d in distributions()}
MPICH_WHEEL = pytest.mark.skipif("mpich" not in INSTALLED, reason="this environment's MPI is not MPICH's wheel")

pytestmark = pytest.mark.skipif(not Path(MPIEXEC).exists(), reason="no mpiexec beside this Python")


def environment(path=None, **changes):
    """The environment without launcher and Slurm variables and without the mpiexec of this venv on PATH."""
    plain = {n: v for n, v in os.environ.items() if not n.startswith((*doctor.LAUNCH_NAMES, "SLURM_", "MPI4PY_"))}
    folders = [f for f in plain["PATH"].split(os.pathsep) if not (Path(f) / "mpiexec").exists()]
    return {**plain, "PATH": os.pathsep.join([*([str(path)] if path else []), *folders]), **changes}


def run(command, env, folder=None):
    """The exit status, the findings (name -> list), and standard error of one doctor that answers in JSON."""
    done = subprocess.run([*command, "--json"], env=env, cwd=folder, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 1, (done.stdout, done.stderr)  # printed once, on one line
    answer = json.loads(lines[0])
    found = {}
    for finding in answer["findings"]:
        found.setdefault(finding["name"], []).append(finding)
        assert finding["status"] in ("ok", "note", "problem")
        assert finding["remedy"] or finding["status"] != "problem", finding
    assert answer["ok"] == (done.returncode == 0), answer
    return done.returncode, found


def script(folder, body):
    """An executable shell script called mpiexec."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "mpiexec"
    file.write_text(f"#!/bin/sh\n{body}\n")
    file.chmod(0o755)
    return file


def other_python(folder):
    """A Python with no mpiexec beside it that finds this one's packages: its path, and the environment it needs."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    packages = next(p for p in sys.path if p.endswith("site-packages"))
    root = str(Path(doctor.__file__).parents[1])
    return str(folder / "bin" / "python"), environment(PYTHONPATH=os.pathsep.join([root, packages]))


# What a foreign launcher does: it starts the processes, and tells them nothing their MPI understands.
FOREIGN = 'unset PMI_SIZE PMI_RANK PMI_FD PMI_PORT; shift 2; "$@" & one=$!; "$@"; code=$?; wait $one && exit $code'


def test_alone_with_the_launcher_first_on_path():
    code, found = run(DOCTOR, environment(BIN))
    assert code == 0
    assert [f["status"] for f in found["launcher"]] == ["ok"]
    assert MPIEXEC in found["launcher"][0]["text"]
    assert found["threads"][0]["status"] == "ok"
    assert "2 ranks would have" in found["ranks"][0]["text"]
    assert set(found) == {"trireme", "kernels", "torch", "gpu", "hdf5", "shared memory", "disk", "mpi", "launcher",
                          "threads", "cuda-aware", "ranks", "slurm"}  # fmt: skip


@MPICH_WHEEL
def test_names_the_library_and_where_it_lies():
    code, found = run(DOCTOR, environment(BIN))
    assert code == 0
    text = found["mpi"][0]["text"]
    assert text.startswith("MPICH ") and "wheel" in text and str(Path(sys.prefix) / "lib" / "libmpi.so") in text
    assert "HDF5 " in found["hdf5"][0]["text"] and "fletcher32" in found["hdf5"][0]["text"]


def test_no_mpiexec_on_path_is_a_note_with_the_full_path():
    code, found = run(DOCTOR, environment())
    assert code == 0
    assert [f["status"] for f in found["launcher"]] == ["note"]
    assert f"{MPIEXEC} -n 2 {sys.executable} -m mpi4py -m hpc train" in found["launcher"][0]["remedy"]


def test_under_its_own_launcher_it_speaks_once_and_lists_ranks():
    code, found = run([MPIEXEC, "-n", "2", *DOCTOR], environment())
    assert code == 0
    assert found["launcher"] == [{"name": "launcher", "status": "ok", "remedy": "",
                                  "text": "2 ranks started, and MPI sees as many"}]  # fmt: skip
    assert "ranks 0, 1 have" in found["ranks"][0]["text"]


def test_a_problem_of_another_rank_is_told_by_rank_0(tmp_path):
    command = [MPIEXEC, "-wdir", str(tmp_path), "-n", "1", *DOCTOR, "--json", ":", "-wdir", "/proc", "-n", "1", *DOCTOR]
    code, found = run(command, environment())
    assert code == 1
    assert [f["status"] for f in found["disk"]] == ["ok", "problem"]
    assert "nothing can be written to /proc" in found["disk"][1]["text"]


def test_a_foreign_launcher_first_on_path_is_caught(tmp_path):
    script(tmp_path, FOREIGN)
    code, found = run(DOCTOR, environment(tmp_path))
    assert code == 1
    foreign = next(f for f in found["launcher"] if str(tmp_path) in f["text"])
    assert foreign["status"] == "problem" and "worlds of size [1, 1]" in foreign["text"]
    assert f"{MPIEXEC} -n 2" in foreign["remedy"] and "full path" in foreign["remedy"]
    own = next(f for f in found["launcher"] if MPIEXEC in f["text"])
    assert own["status"] == "note"
    assert found["threads"][0]["status"] == "ok"  # read from the world that the right launcher made


@MPICH_WHEEL
def test_a_foreign_launcher_that_is_not_on_path_is_only_a_note(tmp_path):
    """Only what PATH finds would start the job; here PATH's own launcher is right and another lies beside Python."""
    python, env = other_python(tmp_path)
    script(tmp_path / "bin", FOREIGN)
    library = next((Path(sys.prefix) / "lib").glob("libmpi.so.*"))
    env |= {"PATH": environment(BIN)["PATH"], "MPI4PY_LIBMPI": str(library)}
    code, found = run([python, "-m", "hpc", "doctor"], env)
    assert code == 0
    assert sorted(f["status"] for f in found["launcher"]) == ["note", "ok"]
    assert next(f for f in found["launcher"] if f["status"] == "note")["text"].startswith(str(tmp_path))


def test_a_promise_that_mpi_does_not_keep_is_a_problem():
    code, found = run(DOCTOR, environment(PMI_SIZE="4"))
    assert code == 1
    text = found["launcher"][0]["text"]
    assert "started 4 ranks" in text and "a world of 1" in text
    assert MPIEXEC in found["launcher"][0]["remedy"]


def test_in_a_slurm_step_the_remedy_is_srun():
    code, found = run(DOCTOR, environment(SLURM_STEP_NUM_TASKS="2", SLURM_STEP_ID="0", SLURM_JOB_ID="7"))
    assert code == 1
    assert "srun --mpi=pm" in found["launcher"][0]["remedy"]


def test_two_worlds_of_one_rank_print_once(tmp_path):
    one = f"OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_RANK=$rank {shlex.join(DOCTOR)} --json"
    body = f"for rank in 1 0; do {one} || exit 1; done"
    done = subprocess.run([script(tmp_path, body)], env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert len(done.stdout.splitlines()) == 1
    assert "started 2 ranks" in done.stdout


def test_a_library_that_cannot_be_loaded_is_a_problem_with_a_remedy():
    code, found = run(DOCTOR, environment(BIN, MPI4PY_LIBMPI="/nonexistent"))
    assert code == 1
    assert found["mpi"][0]["status"] == "problem" and "/nonexistent" in found["mpi"][0]["text"]
    assert "MPI4PY_LIBMPI" in found["mpi"][0]["remedy"]
    assert found["torch"][0]["status"] != "problem"  # the rest is still told


@MPICH_WHEEL
def test_no_launcher_anywhere(tmp_path):
    """A library in a folder of its own and a Python without an mpiexec beside it."""
    library = next((Path(sys.prefix) / "lib").glob("libmpi.so.*"))
    home = tmp_path / "a" / "b" / "c" / "lib"
    home.mkdir(parents=True)
    shutil.copy(library, home)
    (home / "mpich").symlink_to(library.parent / "mpich")
    python, env = other_python(tmp_path / "venv")
    code, found = run([python, "-m", "hpc", "doctor"], {**env, "MPI4PY_LIBMPI": str(home / library.name)})
    assert str(home) in found["mpi"][0]["text"] and "MPI4PY_LIBMPI" in found["mpi"][0]["text"]
    expected = "note" if shutil.which("srun") else "problem"
    assert [f["status"] for f in found["launcher"]] == [expected]
    assert "no mpiexec" in found["launcher"][0]["text"]
    assert code == (expected == "problem")


def test_a_check_that_raises_is_a_finding(tmp_path):
    (tmp_path / "h5py").mkdir()
    (tmp_path / "h5py" / "__init__.py").write_text("raise ImportError('libhdf5.so.310: cannot open')\n")
    code, found = run(DOCTOR, environment(BIN, PYTHONPATH=str(tmp_path)))
    assert code == 1
    assert found["hdf5"][0]["status"] == "problem" and "libhdf5.so.310" in found["hdf5"][0]["text"]
    assert found["launcher"][0]["status"] == "ok"


def test_plain_lines_in_a_pipe_and_colours_on_a_terminal():
    plain = subprocess.run(DOCTOR, env=environment(BIN), capture_output=True, text=True, timeout=120)
    assert plain.returncode == 0 and "\x1b[" not in plain.stdout
    assert plain.stdout.splitlines()[0].startswith("ok       trireme        Trireme ")
    assert plain.stdout.endswith("\nready for multi-rank jobs\n")
    reader, writer = pty.openpty()
    try:
        env = environment(BIN, TERM="xterm-256color")
        env.pop("NO_COLOR", None)
        subprocess.run(DOCTOR, env=env, stdout=writer, stderr=subprocess.DEVNULL, timeout=120, check=True)
        assert b"\x1b[32mok" in os.read(reader, 65536)
    finally:
        os.close(reader)
        os.close(writer)


def test_help_shows_examples():
    done = subprocess.run([*DOCTOR, "--help"], env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "mpiexec -n 4 python -m mpi4py -m hpc doctor" in done.stdout and "--json" in done.stdout


def test_a_launcher_that_hangs_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "SECONDS", 0.5)
    launcher, started = script(tmp_path, f"echo $$ > {tmp_path}/pid; exec sleep 300"), time.monotonic()
    answers, error = doctor.launch([str(launcher), "-n", "2"], environment())
    assert answers == [] and "no answer within 0.5 s" in error
    assert time.monotonic() - started < 60
    pid, state = (tmp_path / "pid").read_text().strip(), ""
    for _ in range(100):  # ended, or a zombie that only waits for this process to look
        state = Path(f"/proc/{pid}/stat").read_text().split()[2] if Path(f"/proc/{pid}").exists() else "Z"
        if state == "Z":
            break
        time.sleep(0.1)
    assert state == "Z"


def test_a_launcher_that_cannot_be_run_is_an_answer(tmp_path):
    answers, error = doctor.launch([str(tmp_path / "absent")], environment())
    assert answers == [] and "No such file" in error


@pytest.mark.parametrize(
    ("hosts", "cores", "status", "text"),
    [
        ("aab", [[0, 1], [2, 3], [0]], "ok", "a: ranks 0, 1 have 4 cores, threads that fit a rank: 2; "
                                             "b: ranks 2 have 1 core, threads that fit a rank: 1"),
        ("aa", [[0], [1]], "ok", "a: ranks 0, 1 have 2 cores, threads that fit a rank: 1"),  # bound to one core each
        ("aab", [[0, 1], [0, 1], [0, 1]], "ok", "a: ranks 0, 1 have 2 cores, threads that fit a rank: 1; "
                                                "b: ranks 2 have 2 cores, threads that fit a rank: 2"),
        ("aaa", [[0, 1]] * 3, "note", "a: ranks 0, 1, 2 have 2 cores, threads that fit a rank: 1"),
        ("a", [[0]], "note", "a: 2 ranks would have 1 core, threads that fit a rank: 1"),
    ],
)  # fmt: skip
def test_ranks_and_cores_by_host(hosts, cores, status, text):
    records = [{"host": host, "cores": own} for host, own in zip(hosts, cores, strict=True)]
    found = doctor.check_cores(records, "MPICH 5.0.2")
    assert (found.status, found.text) == (status, text)
    assert ("HEAVY_YIELD" in found.remedy) == (status == "note")


def test_missing_thread_support_is_noted():
    threads, cuda = doctor.check_abilities({"multiple": False, "cuda": True})
    assert threads.status == "note" and threads.remedy
    assert cuda.status == "ok"


def test_remedies_of_open_mpi_as_root_and_without_slots():
    assert "OMPI_ALLOW_RUN_AS_ROOT=1" in doctor.launch_remedy([], "prterun has detected an attempt to run as root.")
    assert "oversubscribe" in doctor.launch_remedy([], "There are not enough slots available in the system")


def test_slurm_starts_each_library_its_own_way():
    assert doctor.slurm_type("MPICH 5.0.2") == "pmi2"
    assert doctor.slurm_type("Open MPI v5.0.11") == "pmix"
