"""One attempt at a job: start it, pass signals on to its ranks, and say by its run folder what came of it.

A launcher's exit code says too little (Open MPI's is 0 when a host is lost) and too late (a launcher may wait for ever
for a host that is gone). What counts is what the job wrote: `success`, `stopped` or `failure.json`.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from hpc.failure import FAILURE, read_failure, write_failure
from hpc.lock import ATTEMPT, LOCK, Lock, processes_here, read_holder
from hpc.records import STOPPED, SUCCESS
from hpc.runtime import PREEMPTED
from hpc.summary import cause_of

ENDED = 130  # exit code: a second Ctrl-C
LINES = 20  # that a launcher said last, for a failure that nobody explained
LINGER_S = {SUCCESS: 8.0, STOPPED: 8.0, FAILURE: 2.0}  # that a launcher may take to end after a job came to its end
GUARDS_S = 3.0  # that guards may take to write what they found after a launcher has ended
LOOK_S = 0.1


class Outcome(NamedTuple):
    """What came of an attempt.

    state  "finished", "stopped" (asked to; start it again to go on), "failed", or "refused" (it never began to train)
    code   the exit code for whoever asked for the job
    said   why it failed, one line
    again  whether starting it again may help
    """

    state: str
    code: int
    said: str = ""
    again: bool = False


class Attempt:
    """A job's processes, from their start to their end; what they print goes where this process prints.

    command      the launcher's command line
    environment  of the launcher
    run          the run's folder
    job          what all attempts at a job have in common
    """

    prints: int | None = None  # another place for it

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], run: Path, job: str = ""):
        self.id = f"{job or secrets.token_hex(8)}.{secrets.token_hex(4)}"  # by which its ranks' lock is known
        self.command, self.environment, self.run = list(command), {**environment, ATTEMPT: self.id}, run
        self.lock = Lock(run)
        self.held: dict[str, Any] = {}  # what is in the lock, or was last, of this job's own
        self._last: deque[str] = deque(maxlen=LINES)
        self.process: subprocess.Popen[str] | None = None
        self.before: dict[str, float] = {}

    def make(self, asked: Callable[[], int] = lambda: 0) -> Outcome:
        """Start the job, show what it says, wait for its end, and look what came of it.

        asked  how often it was asked to stop so far: once, and the ranks are told to checkpoint; twice, and it ends now
        """
        self.before = self._marks()
        self.process = subprocess.Popen(
            self.command, env=self.environment, stdout=self.prints, stderr=subprocess.PIPE, text=True, errors="replace",
            start_new_session=True,  # Ctrl-C comes to the ranks as they can take it: from here
        )
        shown = threading.Thread(target=self._show, daemon=True)
        shown.start()
        try:
            code = self._wait(asked)
        finally:
            self._end()
        shown.join(1.0)
        return self._outcome(code, asked)

    def _marks(self) -> dict[str, float]:
        """When what a job leaves behind was written; what is not there is left out."""
        found = {}
        for name in (SUCCESS, STOPPED, FAILURE):
            with suppress(OSError):
                found[name] = (self.run / name).stat().st_mtime
        return found

    def _new(self, name: str) -> bool:
        """Whether this job wrote it, which must have had the run folder for that."""
        return self._began() and self._marks().get(name, 0.0) > self.before.get(name, 0.0)

    def _began(self) -> bool:
        """Whether this job has, or had, the run folder's lock."""
        held = read_holder(self.run / LOCK) or {}
        if held.get("attempt") == self.id:
            self.held, self.lock.token = held, held["token"]
        return bool(self.held)

    def _show(self) -> None:
        assert self.process is not None and self.process.stderr is not None
        for line in self.process.stderr:
            self._last.append(line.rstrip())
            sys.stderr.write(line)
            sys.stderr.flush()

    def _wait(self, asked: Callable[[], int]) -> int:
        """Until the launcher ends, which it must soon after the job has come to an end, good or bad; its exit code."""
        assert self.process is not None
        deadline, told = float("inf"), 0
        while True:
            with suppress(subprocess.TimeoutExpired):
                return self.process.wait(LOOK_S)
            if asked() > told:
                told = asked() if self._tell(asked()) else told
            lingers = [time.monotonic() + seconds for name, seconds in LINGER_S.items() if self._new(name)]
            deadline = min([deadline, *lingers])
            if time.monotonic() > deadline:  # it may wait for ever for a host that is lost
                self._end()

    def _tell(self, times: int) -> bool:
        """Ask the ranks to stop; again, and all of it ends. Whether there was somebody to ask."""
        assert self.process is not None
        ranks = processes_here(self.held) if self._began() else []
        if times > 1:
            self._end()
        for pid in ranks:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL if times > 1 else signal.SIGTERM)
        return bool(ranks) or times > 1

    def _end(self) -> None:
        assert self.process is not None
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def _outcome(self, code: int, asked: Callable[[], int]) -> Outcome:
        if self._new(SUCCESS):
            return Outcome("finished", 0)
        if self._new(STOPPED):
            return Outcome("stopped", PREEMPTED)
        if asked() > 1:
            return Outcome("stopped", ENDED, "it was ended before it could checkpoint")
        if code == 0 and (self.run / SUCCESS).exists():  # and is of the same recipe: it was asked
            return Outcome("finished", 0)
        began = self._began()
        if code == 1 and not self._new(FAILURE) and len(self.held.get("processes", ())) < 2:  # never under guard
            return Outcome("refused", code)  # and it has said why
        if not began:
            said = f"the job ended with exit code {code} before it began to train"
            return Outcome("failed", code or 1, said, not asked())
        deadline = time.monotonic() + GUARDS_S
        while not self._new(FAILURE) and processes_here(self.held) and time.monotonic() < deadline:
            time.sleep(LOOK_S)
        if self.lock.lost():
            return Outcome("failed", code or 1, f"another job has taken the lock of '{self.run}'")
        if not self._new(FAILURE):
            error = f"the launcher ended with exit code {code}, and no rank and no guard said why"
            write_failure(self.lock, "unknown", None, "", "", error, last=list(self._last))
        failure = read_failure(self.run) or {}
        return Outcome("failed", code or 1, cause_of(failure), not (failure.get("final") or asked()))
