"""Seeing a run: seconds by phase and rank, loss, frames a second; metrics.jsonl, TensorBoard and the live display.

Every rank has a Meter; records are joined over ranks at fixed steps and written by rank 0. Losses are joined in the
order of the splits, so the recorded numbers do not depend on the number of ranks either.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from collectives.comm import Comm
from hpc.pulse import Pulse
from hpc.quantities import hidden_share, percent
from hpc.spans import Spans

PHASES = ("read", "forward", "backward", "exchange", "judge", "validate", "checkpoint", "select")


class Journal(Protocol):
    """Where rank 0's records go."""

    def write(self, event: str, **values: Any) -> None: ...
    def show(self, at: int, text: str) -> None: ...
    def close(self) -> None: ...


class Silence:
    """The journal of every rank but rank 0, and of loops that only measure."""

    def write(self, event: str, **values: Any) -> None:
        pass

    def show(self, at: int, text: str) -> None:
        pass

    def close(self) -> None:
        pass


class RunJournal:
    """metrics.jsonl (appended, a line an event), TensorBoard events, and a progress bar on a terminal.

    folder       the run's folder
    steps        the run's last step, for the bar
    tensorboard  whether to write events to `folder/tensorboard`
    """

    def __init__(self, folder: Path, steps: int, tensorboard: bool):
        path = folder / "metrics.jsonl"
        torn = path.exists() and not path.read_bytes().endswith(b"\n")
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed in close)
        self._file.write("\n" if torn else "")  # a crash may have left half a line
        self._folder, self._tensorboard = folder, tensorboard
        self._board: Any = None
        self._steps, self._first, self._began = steps, 0, time.monotonic()
        self._live = sys.stderr.isatty()
        self._bar = Progress(
            TextColumn("training"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(),
            TextColumn("{task.description}"), disable=not self._live, console=Console(stderr=True),
        )
        self._task = self._bar.add_task("", total=steps)
        self._bar.start()

    def write(self, event: str, **values: Any) -> None:
        if event == "start":
            self._first, self._began = values["step"], time.monotonic()
        if event == "start" and self._tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # slow to import: only where it is wanted

            self._board = SummaryWriter(str(self._folder / "tensorboard"), purge_step=values["step"])
        self._file.write(json.dumps({"event": event, "time": time.time(), **values}) + "\n")
        self._file.flush()
        if self._board is not None and event in ("train", "validate"):
            for name, value in values.items():
                if isinstance(value, float):
                    self._board.add_scalar(f"{event}/{name}", value, values["step"])

    def show(self, at: int, text: str) -> None:
        logging.getLogger("trireme").debug(text)  # for the rank's file; the screen has it already
        self._bar.update(self._task, completed=at, description=text)
        if not self._live:
            left = (time.monotonic() - self._began) / max(at - self._first, 1) * (self._steps - at)
            print(f"{text}  {timedelta(seconds=round(left))} left", file=sys.stderr, flush=True)

    def close(self) -> None:
        self._bar.stop()
        self._file.close()
        if self._board is not None:
            self._board.close()
            self._board = None


class Meter:
    """Counts seconds by phase, losses by split, and frames; beats the pulse; has its spans recorded.

    comm       to join the ranks' counts
    journal    where rank 0 writes
    every      steps between records
    progress   step -> (epochs, frames) from the start of training to there, over all splits
    noun       what frames are here: "words", say
    spans      records what was done when; None: nobody
    active     seconds so far in which an exchange was under way on this rank (`Strategy.active_s`)
    sent       bytes that this rank sent so far, by what they were (`Strategy.sent`)
    """

    def __init__(
        self, comm: Comm, journal: Journal, pulse: Pulse, every: int,
        progress: Callable[[int], tuple[float, int]], noun: str = "frames", spans: Spans | None = None,
        active: Callable[[], float] = lambda: 0.0, sent: Callable[[], dict[str, int]] = lambda: {},
    ):
        self.comm, self.journal, self.pulse = comm, journal, pulse
        self.every, self.progress, self.noun = every, progress, noun
        self.spans, self.active, self.sent = spans or Spans(), active, sent
        self.at, self._rate = 0, 0.0
        self.totals = dict.fromkeys(PHASES, 0.0)  # seconds of this rank since it started
        self._under: list[tuple[str, int]] = []  # phases under way, one within the other, and since when
        self._clear(self.sent())

    def _clear(self, sent: dict[str, int]) -> None:
        """A new interval; `sent`: up to its beginning, for a thread may go on sending."""
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._losses: dict[int, list[float]] = {}
        self._since, self._active, self._sent = time.perf_counter(), self.active(), sent

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count the seconds of a block as this phase's; those of a phase within it are that one's alone."""
        self.pulse.beat(f"in phase '{phase}'", self.at)
        now = time.monotonic_ns()
        if self._under:
            self._spent(*self._under[-1], now)
        self._under.append((phase, now))
        try:
            yield
        finally:
            now = time.monotonic_ns()
            self._spent(*self._under.pop(), now)
            if self._under:
                self._under[-1] = (self._under[-1][0], now)

    def _spent(self, phase: str, began: int, ended: int) -> None:
        self.spans.add(phase, began, ended)
        self._seconds[phase] += (ended - began) / 1e9
        self.totals[phase] += (ended - began) / 1e9

    @contextmanager
    def aside(self, phase: str) -> Iterator[None]:
        """A block that is no part of training: its losses are dropped, and all of its seconds are this phase's."""
        active, seconds, totals, losses, spans = (
            self.active(), dict(self._seconds), dict(self.totals), self._losses, self.spans
        )
        self._losses, self.spans = {}, Spans()
        began = time.monotonic_ns()
        try:
            yield
        finally:
            ended = time.monotonic_ns()
            self._seconds, self.totals, self._losses, self.spans = seconds, totals, losses, spans
            self.spans.add(phase, began, ended)
            self._active += self.active() - active
            self._seconds[phase] += (ended - began) / 1e9
            self.totals[phase] += (ended - began) / 1e9

    def note(self, name: str, begin: int, end: int) -> None:
        """A part of an exchange took from `begin` to `end` (time.monotonic_ns()). From any thread."""
        self.spans.note(name, begin, end)

    def add(self, split: int, total: torch.Tensor, count: int) -> float:
        """Take in a batch's summed loss, if it is finite; returns it as a number."""
        value = float(total.detach())
        if not math.isfinite(value):
            return value
        held = self._losses.setdefault(split, [0.0, 0])
        held[0] += value
        held[1] += count
        return value

    def turn(self, at: int, learning_rate: float) -> None:
        """A turn is done; every `every` steps the ranks' counts are joined and recorded (collective then)."""
        before, self.at, self._rate = self.at, at, learning_rate
        if at // self.every != before // self.every:
            began = time.monotonic_ns()
            self._record(at, learning_rate)
            self.spans.add("log", began, time.monotonic_ns())
        if self.spans.left:
            self.spans.turn(at, self.progress(at)[0])

    def finish(self) -> None:
        """The end of training: record what came after the last record (collective)."""
        self._record(self.at, self._rate)
        self.spans.flush()

    def _record(self, at: int, learning_rate: float) -> None:
        seconds = time.perf_counter() - self._since
        apart = sum(self._seconds[phase] for phase in ("validate", "checkpoint", "select"))
        training = max(seconds - apart, 1e-9)
        frames, sent = sum(int(c) for _, c in self._losses.values()), self.sent()
        mine = {"rank": self.comm.rank, "host": self.comm.host, "frames_per_s": frames / training, **self._seconds,
                "exchange_active": self.active() - self._active,
                **{f"sent_{what}": size - self._sent.get(what, 0) for what, size in sent.items()}}
        joined = self.comm.gather({"mine": mine, "losses": sorted(self._losses.items())})
        losses = sorted(entry for rank in joined for entry in rank["losses"])
        count = sum(int(c) for _, (_, c) in losses)
        by_rank = [rank["mine"] for rank in joined]
        if not count:  # nothing trained on since the last record: only validated and saved
            self.journal.write("rest", step=at, seconds=seconds, by_rank=by_rank)
            return self._clear(sent)
        loss = math.fsum(total for _, (total, _) in losses) / count
        epoch, all_frames = self.progress(at)
        self.journal.write(
            "train", step=at, epoch=epoch, frames=all_frames, loss=loss, learning_rate=learning_rate,
            frames_per_s=count / training, seconds=seconds, by_rank=by_rank,
        )
        hidden = hidden_share(*(sum(part[key] for part in by_rank) for key in ("exchange", "exchange_active")))
        speed = f"{count / training:,.0f} {self.noun}/s"
        speed += "" if hidden is None else f"  exchange hidden {percent(hidden)}"
        self.journal.show(at, f"epoch {epoch:.2f}  loss {loss:.4g}  {speed}  learning rate {learning_rate:.4g}")
        self._clear(sent)
