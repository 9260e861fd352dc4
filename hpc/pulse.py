"""A rank's pulse: what it does now, in memory that outlives its process, for the guard of its host (`guard.py`).

A beat is a store into a small file in the host's own memory: it costs a microsecond, and no slow or full disk stops it.
"""

from __future__ import annotations

import faulthandler
import mmap
import os
import signal
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from hpc.failure import FAILED

SIZE = 1024
# Numbers, each stored at once, so that nobody reads half of one: a mark, time.monotonic() of the last beat, steps done,
# the state, when last `asked`.
MARK, BEATEN, STEP, STATE, ASKED = range(5)
TRUE = 7_217_473.0
RUNNING, RESTING, LEFT = 0, 1, 2  # LEFT: it ends in good order, or has said itself what went wrong
WHERE_AT, WAITS_AT = 64, 384  # texts, each with a byte of 0 behind it
UNGUARDED_S = 120.0  # that a rank may take at least to come under guard
LOCKED_S = 10.0  # after which it ends itself though none of its threads comes to run Python
WAITS_S = 0.5  # between looks at what is waited for
STACKS = signal.SIGQUIT  # on it a rank writes the stacks of all its threads, whatever it is doing


def pulse_name(rank: int) -> str:
    return f"rank-{rank:05d}.pulse"


def stacks_name(rank: int) -> str:
    return f"rank-{rank:05d}.stacks"


@dataclass(frozen=True)
class Seen:
    """A pulse as others read it; times by the host's monotonic clock.

    beaten, step, where  the last progress: when, after how many steps, at what
    asked, waits         when the rank's own thread last looked, and what was waited for then
    """

    beaten: float
    step: int
    state: int
    asked: float
    where: str
    waits: str

    def said(self) -> str:
        """What the rank was doing, for a message."""
        return f"while {self.where}{f' ({self.waits})' if self.waits else ''}"


def pulses_of(token: str) -> Path:
    """Where a job's ranks keep their pulses on this host."""
    memory = Path("/dev/shm")
    return (memory if os.access(memory, os.W_OK) else Path(tempfile.gettempdir())) / f"trireme-{token}"


class Pulse:
    """This rank's pulse. Until it is `kept`, nobody but this process sees it.

    patience  seconds without a beat after which a rank hangs; 0: never. A process that is not guarded that long ends
    """

    def __init__(self, patience: float):
        self.patience = patience
        self.about: Callable[[], str] = lambda: ""  # what is waited for, in words; asked from a thread
        self.where = "starting"
        self._map = mmap.mmap(-1, SIZE)
        self._numbers = memoryview(self._map).cast("d")
        self._numbers[MARK] = TRUE
        self.step, self._state, self._asked = 0, RUNNING, time.monotonic()
        self._closed = threading.Event()
        self._unguarded = threading.Timer(max(patience, UNGUARDED_S), self._late)
        self._unguarded.daemon = True
        if patience:
            self._unguarded.start()
            faulthandler.dump_traceback_later(max(patience, UNGUARDED_S) + LOCKED_S, exit=True, file=2)
        self.beat(self.where)

    def keep(self, token: str, stacks: Path, rank: int) -> None:
        """From now on the guard may read the pulse, and SIGQUIT has this process's stacks written to a file.

        Raises PermissionError if others may write where pulses are kept.
        """
        folder = pulses_of(token)
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise PermissionError(f"'{folder}' is not this user's own folder; remove it")
        descriptor = os.open(folder / pulse_name(rank), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w+b") as file:
            file.write(self._map[:])
            file.flush()
            self._map = mmap.mmap(file.fileno(), SIZE)
        self._numbers = memoryview(self._map).cast("d")
        stacks.parent.mkdir(parents=True, exist_ok=True)
        self._stacks = open(stacks, "w", encoding="utf-8")  # noqa: SIM115 (a signal may come as long as this lives)
        faulthandler.register(STACKS, self._stacks, all_threads=True)

    def guarded(self, lives: Callable[[], bool]) -> None:
        """From now on a guard looks after this rank, as long as `lives()`; this process ends with it."""
        self._attended()
        threading.Thread(target=self._ask, args=(lives,), name="pulse", daemon=True).start()

    def beat(self, where: str, step: int | None = None) -> None:
        """Progress: `where` is what the rank does now, `step` how many it has done."""
        self.where = where
        if step is not None:
            self.step = step
        self._put(WHERE_AT, where, WAITS_AT)
        self._now()

    def resting(self) -> AbstractContextManager[None]:
        """A stretch in which no progress is expected to be shown."""
        return self._being(RESTING)

    def working(self) -> AbstractContextManager[None]:
        """A stretch amid a rest in which this rank shows progress, whatever others do."""
        return self._being(RUNNING)

    @contextmanager
    def _being(self, state: int) -> Iterator[None]:
        before, self._state = self._state, state
        self._now()
        try:
            yield
        finally:
            self._state = before
            self._now()

    def close(self) -> None:
        """The rank ends, and nobody need wonder why."""
        self._closed.set()
        self._attended()
        self._state = LEFT
        self._now()

    def _now(self) -> None:
        self._beaten = time.monotonic()
        self._stamp()

    def _stamp(self) -> None:
        for at, number in ((BEATEN, self._beaten), (STEP, self.step), (STATE, self._state), (ASKED, self._asked)):
            self._numbers[at] = number

    def _put(self, at: int, text: str, end: int) -> None:
        raw = text.encode()[: end - at - 1] + b"\0"
        self._map[at : at + len(raw)] = raw

    def _attended(self) -> None:
        self._unguarded.cancel()
        faulthandler.cancel_dump_traceback_later()

    def _late(self) -> None:
        faulthandler.dump_traceback(file=2)
        os._exit(FAILED)

    def _ask(self, lives: Callable[[], bool]) -> None:
        while not self._closed.wait(WAITS_S):
            if not lives():
                said = "the guard of this host is gone, so nobody would notice a failure: ending the job"
                print(said, file=sys.stderr, flush=True)
                os._exit(FAILED)
            with suppress(Exception):  # not knowing is no reason to stop
                self._put(WAITS_AT, self.about() or "", SIZE)
            self._asked = self._numbers[ASKED] = time.monotonic()


class Watched:
    """Another rank's pulse, on the same host. Raises OSError if it is not kept there."""

    def __init__(self, path: Path):
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), SIZE, access=mmap.ACCESS_READ)

    def seen(self) -> Seen:
        return read_pulse(self._map[:])


def read_pulse(raw: bytes) -> Seen:
    """What a pulse's bytes say. Raises ValueError if they are none."""
    numbers = memoryview(raw).cast("d") if len(raw) == SIZE else [0.0]
    if numbers[MARK] != TRUE:
        raise ValueError("these bytes are no rank's pulse")
    beaten, step, state, asked = numbers[BEATEN], int(numbers[STEP]), int(numbers[STATE]), numbers[ASKED]
    texts = raw[WHERE_AT:WAITS_AT], raw[WAITS_AT:]
    where, waits = (text.split(b"\0")[0].decode(errors="replace") for text in texts)
    return Seen(beaten, step, state, asked, where, waits)
