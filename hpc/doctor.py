"""`trireme doctor`: what this machine offers a multi-rank job, whether it is right, and what to do where it is not.

Whatever MPI may abort, hang or crash is asked in a process of its own: a broken MPI must become a line on the screen.
Started alone, doctor starts two ranks with each launcher it finds and looks at the world MPI reports. Started by a
launcher, every rank hands what it found to a child, which joins the world in its place and gathers for all.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hpc.quantities import counted

SECONDS = 60  # no healthy start of two ranks takes longer
RANK_NAMES = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "SLURM_PROCID")
LAUNCH_NAMES = ("PMI_", "PMI2_", "PMIX_", "OMPI_COMM_", "OMPI_UNIVERSE_", "MPI_LOCAL", "MV2_COMM_")
WORLD = [sys.executable, "-m", "mpi4py", "-c", "from hpc import doctor; doctor.print_world()"]
LOADS = "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; print({})"
JOB = f"-n 2 {sys.executable} -m mpi4py -m hpc train ..."
INSTALL = "install one MPI with its launcher (pip install 'trireme[mpich]'), or set MPI4PY_LIBMPI to its libmpi.so"
EXAMPLES = """examples:
  trireme doctor                                       this machine, with a trial start of two ranks
  mpiexec -n 4 python -m mpi4py -m hpc doctor          from inside a job: hosts, ranks, cores
  srun --mpi=pmi2 python -m mpi4py -m hpc doctor       the same in a Slurm allocation (pmix for Open MPI)
  trireme doctor --json                                one JSON line: {"ok": ..., "findings": [...]}
exit status: 0 if a multi-rank job can run here, 1 if not"""


@dataclass(frozen=True)
class Finding:
    """One line of the screen; `status` is "ok", "note" (works, but know this) or "problem" (a job could not run)."""

    name: str
    status: str
    text: str
    remedy: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe `trireme doctor` to its parser, changed in place."""
    parser.description = "Say what was found on this machine, whether a multi-rank job can run, and what to do if not."
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, EXAMPLES
    parser.add_argument("--json", action="store_true", help="print the findings as one JSON line")


def run(args: argparse.Namespace) -> int:
    """Look, print once a job, and return the exit status: 1 if there is a problem, else 0."""
    findings: list[Finding] = []
    checks: dict[str, Callable[[], Finding | list[Finding]]] = {
        "trireme": check_versions, "kernels": check_kernels, "torch": check_torch, "gpu": check_gpus,
        "hdf5": check_hdf5,
        "shared memory": lambda: check_space("/dev/shm", "ranks exchange there; start containers with --shm-size=8g"),
        "disk": lambda: check_space(os.getcwd(), "run folders go there: change to a folder with room for them"),
        "mpi": lambda: check_mpi([asdict(f) for f in findings if f.status == "problem"]),
    }
    for name, check in checks.items():
        try:
            found = check()
        except Exception as error:  # whatever is broken here is what the reader wants to know
            text = " ".join(f"{type(error).__name__}: {error}".split())
            found = Finding(name, "problem", text, "install Trireme and what it needs: pip install trireme")
        findings += found if isinstance(found, list) else [found]
    if next((os.environ[n] for n in RANK_NAMES if n in os.environ), "0") != "0":
        return 0  # rank 0 speaks, and its exit status is the job's
    show(findings, args.json)
    return int(any(f.status == "problem" for f in findings))


def show(findings: Sequence[Finding], as_json: bool) -> None:
    """Print the findings: coloured on a terminal, plain elsewhere, or as one JSON line."""
    from rich.console import Console
    from rich.text import Text

    problems = sum(f.status == "problem" for f in findings)
    last = f"{problems} problem(s): a multi-rank job cannot run here" if problems else "ready for multi-rank jobs"
    if as_json:
        print(json.dumps({"ok": not problems, "findings": [asdict(f) for f in findings]}), flush=True)
        return
    screen, colours = Text(), {"ok": "green", "note": "yellow", "problem": "bold red"}
    for f in findings:
        screen.append(f"{f.status:9}", colours[f.status]).append(f"{f.name:15}{f.text}\n")
        screen.append(f"{'':24}-> {f.remedy}\n" if f.remedy else "", "bold")
    Console().print(screen.append(f"{last}\n"), soft_wrap=True, end="")


def check_versions() -> Finding:
    version, python = importlib.metadata.version("trireme"), sys.version.split()[0]
    return Finding("trireme", "ok", f"Trireme {version}, Python {python} ({sys.executable})")


def check_kernels() -> Finding:
    from kernels import native

    if native.library() is not None:
        return Finding("kernels", "ok", "their CPU library was built")
    remedy = "install a C++ compiler (g++), then install Trireme again: pip install --force-reinstall --no-deps"
    return Finding("kernels", "note", "no CPU library: the same sums, in torch, and slower waiting", remedy)


def check_torch() -> Finding:
    import torch

    flags = sorted(set(re.findall(r"\b(?:avx512_bf16|amx_bf16|bf16)\b", Path("/proc/cpuinfo").read_text())))
    threads = counted(torch.get_num_threads(), "thread")
    text = f"torch {torch.__version__}, {threads}, {torch.backends.cpu.get_cpu_capability()}"
    slow = Finding("torch", "note", f"{text}, slow bfloat16", "train in float32 on this processor")
    return Finding("torch", "ok", f"{text}, fast bfloat16 ({', '.join(flags)})") if flags else slow


def check_gpus() -> Finding:
    import torch

    if not torch.cuda.is_available():
        if not Path("/dev/nvidia0").exists():
            return Finding("gpu", "ok", "none; everything runs on the CPU")
        remedy = "install torch built for this driver's CUDA (pytorch.org/get-started)"
        return Finding("gpu", "note", f"there is a GPU that torch {torch.__version__} cannot use", remedy)
    text = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}, CUDA {torch.version.cuda}"
    cuda = f"cuda{str(torch.version.cuda).split('.')[0]}"
    fitting = f"cupy-{cuda}x"
    if {fitting, "cupy"} & {d.metadata["Name"] for d in importlib.metadata.distributions()}:
        return Finding("gpu", "ok", f"{text}, CuPy")
    remedy = f"the kernels' GPU sides need it: make setup EXTRAS={cuda}, or pip install {fitting} if there is no other"
    return Finding("gpu", "note", f"{text}, no CuPy for it", remedy)


def check_hdf5() -> Finding:
    from hpc.hdf5 import hdf5_version

    return Finding("hdf5", "ok", f"{hdf5_version()}, fletcher32 checksums")


def check_space(folder: str, remedy: str) -> Finding:
    """Whether a folder can be written to and has a GiB free."""
    name, free = "shared memory" if folder == "/dev/shm" else "disk", shutil.disk_usage(folder).free / 2**30
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"trireme")
    except OSError as error:
        return Finding(name, "problem", f"nothing can be written to {folder}: {error.strerror}", remedy)
    text = f"{folder} is writable, {free:.1f} GiB free"
    return Finding(name, "ok", text) if free >= 1 else Finding(name, "note", text, remedy)


def launch(command: Sequence[str], environment: Mapping[str, str]) -> tuple[list[dict[str, Any]], str]:
    """Run a command; the JSON objects it printed, one a line, and the telling line of what it said of errors."""
    folders = [str(Path(__file__).parents[1]), *filter(None, [environment.get("PYTHONPATH")])]
    try:
        process = subprocess.Popen(
            command, env={**environment, "PYTHONPATH": os.pathsep.join(folders)}, start_new_session=True, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            close_fds=False,  # a rank's child speaks to the launcher through an open file
        )
        output, errors = process.communicate(timeout=SECONDS)
    except OSError as error:
        return [], str(error)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)  # a launcher passes it on to its ranks
        return [], f"no answer within {SECONDS} s"
    lines = [line.strip() for line in errors.splitlines() if line.strip(" -=|")] or [f"exit code {process.returncode}"]
    telling = (line for line in lines if re.search(r"root\.|slots|PMI|No such file|cannot open|denied", line))
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")], next(telling, lines[-1])


def print_world() -> None:
    """In a rank: start MPI and print what it sees; a record given as argument is gathered over all ranks."""
    signal.alarm(SECONDS + 5)  # a rank whose launcher is gone ends by itself
    import ctypes

    import numpy as np
    from mpi4py import MPI

    from collectives.aware import cuda_aware

    total = np.zeros(1, np.int64)
    MPI.COMM_WORLD.Allreduce(np.ones(1, np.int64), total)
    cuda, why = cuda_aware(ctypes.CDLL(MPI.__file__), MPI.Get_library_version(), os.environ)
    multiple = MPI.Query_thread() == MPI.THREAD_MULTIPLE
    answer: dict[str, Any] = {"size": int(total[0]), "multiple": multiple, "cuda": cuda, "cuda_why": why}
    if Path("/dev/nvidiactl").exists():
        answer["exchange"] = exchange_here()
    if len(sys.argv) > 1:
        from collectives.comm import Comm

        answer["records"] = Comm().gather(json.loads(sys.argv[1]))
    print(f"\n{json.dumps(answer)}", flush=True)


def exchange_here() -> str:
    """What the ranks of this world would exchange through, and why (collective)."""
    try:
        from collectives.comm import Comm
        from hpc.runtime import Device
        from kernels import gpu

        comm = Comm()
        transport = comm.on(Device("auto", "float32", comm.local_rank, 1).torch).transport
        return f"{transport}; NCCL: {gpu.nccl_missing() or 'for the asking'}"
    except Exception as error:  # a GPU that cannot be used is no reason to doubt the world
        return f"unknown ({type(error).__name__}: {error})"


def check_mpi(problems: Sequence[Mapping[str, str]]) -> list[Finding]:
    """All that needs the MPI library; `problems` are what else this rank found, for rank 0 to tell."""
    loaded, error = launch([sys.executable, "-c", LOADS], os.environ)
    if not loaded:
        return [Finding("mpi", "problem", f"the MPI library cannot be loaded: {error}", INSTALL)]
    from collectives.launch import promised_size

    version, path = mpi_here()
    source = "MPI4PY_LIBMPI" if "MPI4PY_LIBMPI" in os.environ else "wheel" if path.startswith(sys.prefix) else "system"
    record = {"host": socket.gethostname(), "cores": sorted(os.sched_getaffinity(0)), "problems": problems}
    promised = promised_size(os.environ) or 1
    launcher, world = check_launchers(version, path) if promised < 2 else check_world(promised, record, version, path)
    records = world.get("records", [record])
    elsewhere = [Finding(**{**p, "text": f"on {r['host']}: {p['text']}"}) for r in records[1:] for p in r["problems"]]
    return [
        Finding("mpi", "ok", f"{version} ({source}: {path})"), *launcher, *(check_abilities(world) if world else []),
        check_cores(records, version), check_slurm(version), *dict.fromkeys(elsewhere),
    ]


def mpi_here() -> tuple[str, str]:
    """The MPI library's name and version, and its file; loaded, but not started. Raises ImportError or RuntimeError."""
    import mpi4py

    mpi4py.rc.initialize = False
    from collectives.comm import mpi_library

    files = [line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines()]
    path = next((file for file in files if re.search(r"/libmpi(ch|_cray|_abi)?\.so[.\d]*$", file)), "unknown")
    return mpi_library().split(", package")[0].replace(" Version:", ""), path


def check_world(promised: int, record: Mapping, version: str, path: str) -> tuple[list[Finding], dict[str, Any]]:
    """Inside a job: what the launcher promised against what MPI sees; and what MPI said, {} if nothing sound."""
    answers, error = launch([*WORLD, json.dumps(record)], os.environ)
    if answers and answers[0]["size"] == promised:
        return [Finding("launcher", "ok", f"{promised} ranks started, and MPI sees as many")], answers[0]
    saw = f"MPI sees a world of {answers[0]['size']}" if answers else f"MPI did not start: {error}"
    remedy = f"start the ranks with the library's own launcher: {next(iter(launchers('', path)), 'mpiexec')} {JOB}"
    if "SLURM_STEP_ID" in os.environ:
        remedy = f"start the ranks with srun --mpi={slurm_type(version)} python -m mpi4py -m hpc train ..."
    text = f"the launcher started {promised} ranks, but {saw}; it does not match {version} in {path}"
    return [Finding("launcher", "problem", text, remedy)], {}


def launchers(search: str, libmpi: str) -> dict[str, str]:
    """Every launcher once, path -> where it was found: that of the library, of this Python, of the PATH `search`."""
    near = (folder / "bin" / "mpiexec" for folder in list(Path(libmpi).parents)[1:4])
    ways = {
        "the library's own": next((str(launcher) for launcher in near if launcher.exists()), None),
        "beside this Python": shutil.which("mpiexec", path=os.path.dirname(sys.executable)),
        "first on PATH": shutil.which("mpiexec", path=search),
    }
    distinct = {os.path.realpath(path): (os.path.abspath(path), where) for where, path in ways.items() if path}
    return dict(distinct.values())


def check_launchers(version: str, libmpi: str) -> tuple[list[Finding], dict[str, Any]]:
    """Outside a job: start two ranks with every launcher found; and what MPI said in a world of two, {} if none was."""
    found = launchers(os.environ.get("PATH", ""), libmpi)
    outside = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCH_NAMES)}
    tried = {path: launch([path, "-n", "2", *WORLD], outside) for path in found}
    fits = [path for path, (answers, _) in tried.items() if [a["size"] for a in answers] == [2, 2]]
    findings = []
    for path, (answers, error) in tried.items():
        text, first = f"{path} ({found[path]})", found[path] == "first on PATH"
        if path in fits:
            status, text = "ok" if first else "note", f"{text} starts 2 ranks of one world"
            remedy = "" if first else f"it is not the mpiexec of PATH: call it by its full path: {path} {JOB}"
        else:
            saw = f"MPI saw worlds of size {[a['size'] for a in answers]}" if answers else f"none started: {error}"
            status, remedy = "problem" if first or not fits else "note", launch_remedy(fits, error)
            text = f"{text} was asked for 2 ranks of {version} in {libmpi}, but {saw}"
        findings.append(Finding("launcher", status, text, remedy))
    if not found:
        status, remedy = ("note", f"srun --mpi={slurm_type(version)}") if shutil.which("srun") else ("problem", INSTALL)
        findings = [Finding("launcher", status, "no mpiexec on PATH, beside this Python or with the library", remedy)]
    return findings, next((tried[path][0][0] for path in fits), {})


def launch_remedy(fits: Sequence[str], error: str) -> str:
    if fits:
        return f"call the library's own launcher by its full path: {fits[0]} {JOB}; or put its folder first on PATH"
    if "root." in error:
        return "as root, Open MPI wants OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"
    if "slots" in error:
        return "more ranks than slots: set PRTE_MCA_rmaps_default_mapping_policy=slot:oversubscribe"
    return f"use the mpiexec that was installed with this library; or {INSTALL}"


def check_abilities(world: Mapping[str, Any]) -> list[Finding]:
    """Threads and CUDA, as a sound world reported them."""
    remedy = "" if world["multiple"] else "use an MPI with thread support (MPICH, Open MPI 3 or newer)"
    level = "THREAD_MULTIPLE" + ("" if world["multiple"] else " is missing: no exchange in a thread of its own")
    text = "MPI reads GPU memory itself" if world["cuda"] else "no: GPU tensors are staged through host memory"
    text += f" ({world.get('cuda_why', '')}); exchange here: {world.get('exchange', 'window, for there is no GPU')}"
    return [Finding("threads", "note" if remedy else "ok", level, remedy),
            Finding("cuda-aware", "ok" if world["cuda"] else "note", text)]


def check_cores(records: Sequence[Mapping[str, Any]], version: str) -> Finding:
    """Ranks by host, their cores, and how many threads a rank fit; for one process alone, what two ranks would have."""
    texts, least, single = [], 1, len(records) == 1
    for host in dict.fromkeys(record["host"] for record in records):
        ranks = {str(rank): set(record["cores"]) for rank, record in enumerate(records) if record["host"] == host}
        cores = len(set().union(*ranks.values()))
        least = min(least, fit := min(cores // max(len(ranks), 1 + single), *map(len, ranks.values())))
        who = "2 ranks would have" if single else f"ranks {', '.join(ranks)} have"
        texts.append(f"{host}: {who} {counted(cores, 'core')}, threads that fit a rank: {max(1, fit)}")
    remedy = "start fewer ranks a host" + (", or set MPIR_CVAR_ENABLE_HEAVY_YIELD=1" if "MPICH" in version else "")
    return Finding("ranks", "ok" if least else "note", "; ".join(texts), "" if least else remedy)


def slurm_type(version: str) -> str:
    """What `srun --mpi=` must be for a library."""
    return "pmix" if "Open MPI" in version else "pmi2"


def check_slurm(version: str) -> Finding:
    tools = [tool for tool in ("sinfo", "sbatch", "srun") if shutil.which(tool)]
    if not tools:
        return Finding("slurm", "ok", "none; mpiexec starts the ranks")
    where = f"inside job {os.environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in os.environ else "outside a job"
    return Finding("slurm", "ok", f"{', '.join(tools)}; {where}; ranks start by srun --mpi={slurm_type(version)}")
