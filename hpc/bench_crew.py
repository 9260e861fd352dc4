"""Worker processes of a benchmark that live long and take turns.

The machine a benchmark runs on is rarely quiet. So everything that is compared is started once, warmed up, and then let
go for a few steps at a time: A B, B A, A B ... A crew that is not at work waits in a read from a socket and costs
nothing. The driver holds a Crew for each; every rank of a crew holds a Gate.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc.doctor import LAUNCH_NAMES
from hpc.quantities import counted

if TYPE_CHECKING:
    from hpc.hosts import Hosts  # which asks here for the launcher

START_S = 300.0  # importing torch on a busy file system can take minutes
CLOSE_S = 30.0


class Gate:
    """A worker's line to its driver; when the driver is gone, the worker is told to end.

    address  the driver's Unix socket
    hello    JSON values to introduce this worker with; holds "rank"
    """

    def __init__(self, address: str, hello: dict[str, Any]):
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(address)
        self._lines = self._socket.makefile("rw", encoding="utf-8")
        self.report(hello)

    def wait(self) -> int:
        """Block until the driver says what to do, mostly how many steps to take; 0: end."""
        return int(self._lines.readline() or 0)

    def report(self, record: Any) -> None:
        """Send a JSON value to the driver."""
        self._lines.write(json.dumps(record) + "\n")
        self._lines.flush()


class Crew:
    """The processes of one side of a comparison, ready when this returns. A context manager.

    label    who this is, in error messages
    ranks    how many processes to start
    module   what they run: `python -m mpi4py -m module SPEC`, SPEC being JSON with "address" in it (mpi4py's runner
             ends all of them if one raises; a module without MPI is none the wiser)
    spec     JSON values for the workers
    bind     whether to bind every rank to a core of its own
    folder   an existing folder for the socket and the log; its path must be short (a Unix socket's is limited)
    hosts    pretend hosts, up, to spread the ranks over evenly, in runs; None: all of them here

    Raises ValueError if the ranks cannot be spread evenly; OSError, with the end of what the workers said, if they end
    before they are told to.
    """

    def __init__(
        self, label: str, ranks: int, module: str, spec: dict[str, Any], *, folder: Path, bind: bool = False,
        hosts: Hosts | None = None,
    ):
        self.label, self.ranks = label, ranks
        self._log = folder / f"{label.replace(' ', '-')}.log"
        address = str(folder / f"{label.replace(' ', '-')}.sock")
        worker = [sys.executable, "-m", "mpi4py", "-m", module, json.dumps(spec | {"address": address})]
        command, variables = _launching(worker, ranks, bind, hosts)
        self._lines: list[Any] = []
        with socket.socket(socket.AF_UNIX) as listener, open(self._log, "w", encoding="utf-8") as log:
            listener.bind(address)
            listener.listen(ranks)
            listener.settimeout(0.5)
            self._process = subprocess.Popen(
                command, env=outside_a_job() | variables, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )
            try:
                lines = [self._accept(listener, time.monotonic() + START_S) for _ in range(ranks)]
                self.hello = sorted((self._read(line) for line in lines), key=lambda hello: hello["rank"])
                self._lines = lines
            except BaseException:
                self._process.kill()
                raise

    def take(self, number: int) -> list[Any]:
        """Let every worker take so many steps, or whatever its module makes of a number; what each reports."""
        try:
            for line in self._lines:
                line.write(f"{number}\n")
                line.flush()
            return [self._read(line) for line in self._lines]
        except ConnectionError as error:
            raise self._lost() from error

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: Any) -> None:
        for line in self._lines:
            try:
                line.write("0\n")
                line.close()
            except OSError:
                pass  # that worker is gone already
        try:
            self._process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _accept(self, listener: socket.socket, deadline: float) -> Any:
        while True:
            try:
                connection, _ = listener.accept()
                connection.settimeout(None)
                return connection.makefile("rw", encoding="utf-8")
            except TimeoutError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise self._lost() from None

    def _read(self, line: Any) -> Any:
        text = line.readline()
        if not text:
            raise self._lost()
        return json.loads(text)

    def _lost(self) -> OSError:
        said = self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:]
        code = self._process.poll()
        state = "do not answer" if code is None else f"ended with exit code {code}"
        return OSError(f"the workers of '{self.label}' {state}; what they said last:\n" + "\n".join(said))


def _launching(
    worker: list[str], ranks: int, bind: bool, hosts: Hosts | None
) -> tuple[list[str], dict[str, str]]:
    """The command line that starts workers, and additions to the environment."""
    if hosts is None:
        return [mpiexec(), *(["-bind-to", "core"] if bind else []), "-n", str(ranks), *worker], {}
    each, rest = divmod(ranks, len(hosts.names))
    if rest or not each:
        asked = f"{counted(ranks, 'rank')} cannot be spread evenly over {counted(len(hosts.names), 'host')}"
        raise ValueError(f"{asked}; use a multiple")
    return hosts.mpiexec([each] * len(hosts.names), worker)


def mpiexec() -> str:
    """The launcher beside this Python, or else the first on PATH. Raises OSError if there is none."""
    found = shutil.which("mpiexec", path=os.path.dirname(sys.executable)) or shutil.which("mpiexec")
    if not found:
        raise FileNotFoundError("no mpiexec beside this Python or on PATH; see 'trireme doctor'")
    return found


def outside_a_job() -> dict[str, str]:
    """This process's environment without what a launcher put there, and with this package on the path."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCH_NAMES)}
    folders: Sequence[str] = [str(Path(__file__).parents[1]), *filter(None, [kept.get("PYTHONPATH")])]
    return kept | {"PYTHONPATH": os.pathsep.join(folders)}
