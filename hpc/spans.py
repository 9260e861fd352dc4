"""What a rank did when: spans of time, recorded for some turns and written beside the run, for `trireme trace`.

Recording a span appends a tuple; files are written every few turns. Nothing here waits for another rank but `open`,
which sets the ranks' clocks against each other once.
"""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from collectives.comm import Comm
from hpc.trace_records import EXCHANGE, FOLDER, LOADING, STEP, TURN

FLUSH_TURNS = 5  # turns between writes
SPANS_AT_MOST = 20_000  # a start or a validation: a window that fills up ends early
CLOCK_ROUNDS = 16  # barriers to set the clocks by
BETWEEN = ("validate", "checkpoint", "select")  # phases that belong to no turn

Marks = Sequence[tuple[int, int]]  # of every barrier: (entered, left), ns of the rank's own clock


class Spans:
    """One rank's recorder. It records nothing until `open` is called, and nothing at all with `turns` = 0.

    run    the run's folder
    turns  how many turns to record from `open` on, and again from every validation on
    """

    def __init__(self, run: Path = Path(), turns: int = 0):
        self.run, self.turns = run, turns
        self.left = self._room = 0
        self._path = Path()
        self._held: deque[tuple[str, int, int, str, dict[str, Any] | None]] = deque()  # appended to by any thread
        self._from: int | None = None  # where the turn under way began

    def open(self, comm: Comm, at: int) -> None:
        """Begin an attempt at step `at` (collective; the same `turns` on every rank)."""
        if not self.turns:
            return
        offset, error = clock_offset(comm)
        header = {"rank": comm.rank, "host": comm.host, "ranks": comm.size, "step": at, "offset_ns": offset,
                  "error_ns": error, "attempt": comm.gather(time.time_ns())[0]}
        self._path = self.run / FOLDER / f"rank-{comm.rank:05d}.jsonl"
        self.left, self._room = self.turns, SPANS_AT_MOST
        self._write(json.dumps(header) + "\n", first=True)

    def add(self, name: str, begin: int, end: int, lane: str = STEP, args: dict[str, Any] | None = None) -> None:
        """Something took from `begin` to `end` (time.monotonic_ns()); `args` are JSON values. From any thread."""
        if name == "validate" and self._path.name:
            self.left, self._room = self.turns, SPANS_AT_MOST
        if not self.left:
            return
        self._room -= 1
        if self._room < 0:
            self.left = 0
            return
        if lane == STEP:
            self._from = end if name in BETWEEN else begin if self._from is None else self._from
        self._held.append((name, begin, end, lane, args))

    def note(self, name: str, begin: int, end: int) -> None:
        """A part of an exchange took from `begin` to `end` (time.monotonic_ns()). From any thread."""
        self.add(name, begin, end, EXCHANGE)

    def loaded(self, split: int, epoch: int, block: int, begin: int, end: int) -> None:
        """A split's next piece was read ahead from `begin` to `end` (time.monotonic_ns()). From any thread."""
        self.add(f"load split {split}", begin, end, LOADING, {"epoch": epoch, "block": block})

    def turn(self, at: int, epoch: float) -> None:
        """A turn ended with step `at`; what comes now belongs to the next one."""
        if not self.left:
            return
        now = time.monotonic_ns()
        began, self._from = self._from, now
        if began is not None:
            self._held.append((f"step {at}", began, now, TURN, {"step": at, "epoch": epoch}))
        self.left -= 1
        if self.left % FLUSH_TURNS == 0:
            self.flush()

    def flush(self) -> None:
        """Write what was recorded since the last time."""
        lines = []
        while self._held:
            lines.append(json.dumps(self._held.popleft(), separators=(",", ":")) + "\n")
        if lines:
            self._write("".join(lines))

    def _write(self, text: str, first: bool = False) -> None:
        """Append to this rank's file. A trace is worth no run: if it cannot be written, tracing ends with a warning."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            torn = first and self._path.exists() and not self._path.read_bytes().endswith(b"\n")
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(("\n" if torn else "") + text)  # a killed attempt may have left half a line
        except OSError as error:
            logging.getLogger("trireme").warning("tracing ends here, '%s' cannot be written: %s", self._path, error)
            self.turns = self.left = 0


def clock_offset(comm: Comm) -> tuple[int, int]:
    """What to add to this rank's time.monotonic_ns() to get rank 0's wall clock, and how far that may be off, in ns.

    Ranks of one running kernel share a clock. Between others a barrier tells: nobody leaves it before everybody has
    entered. Clocks that drift apart later are not set again. Collective.
    """
    marks = []
    for _ in range(CLOCK_ROUNDS):
        entered = time.monotonic_ns()
        comm.barrier()
        marks.append((entered, time.monotonic_ns()))
    mine = _clock_name(comm.host)
    told = comm.gather({"clock": mine, "wall": time.time_ns() - time.monotonic_ns(), "marks": marks})
    wall, first = int(told[0]["wall"]), told[0]["clock"]
    if mine == first:
        return wall, 0
    there, here = ([t["marks"] for t in told if t["clock"] == clock] for clock in (first, mine))
    low, high = offset_bounds(there, here)
    return wall + (low + high) // 2, (high - low + 1) // 2


def offset_bounds(there: Sequence[Marks], here: Sequence[Marks]) -> tuple[int, int]:
    """The least and the most that can be added to the clock `here` to get the clock `there`, in ns.

    there, here  of every rank with that clock: when it entered and left the same barriers
    """
    pairs = [pair for one in there for other in here for pair in zip(one, other, strict=True)]
    return max(a[0] - b[1] for a, b in pairs), min(a[1] - b[0] for a, b in pairs)


def _clock_name(host: str) -> str:
    """What tells one kernel's clock from another's."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip() or host
    except (OSError, ValueError):
        return host
