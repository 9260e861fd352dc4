"""How far a preparation is: a bar on a terminal, a line now and then elsewhere, nothing on other ranks than 0."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

EVERY = 30.0  # seconds between lines where there is no terminal
NOUNS = ("utterances", "frames")


class Counter:
    """Counts utterances and frames, and shows them. Use as a context manager.

    shown  whether this process shows anything
    total  utterances in all
    nouns  what utterances and frames are called
    """

    def __init__(self, shown: bool, total: int, nouns: tuple[str, str] = NOUNS):
        self._shown, self._total, self._nouns = shown, total, nouns
        self._utterances = self._frames = 0
        self._next_line = time.monotonic() + EVERY
        self._started = time.monotonic()
        self._bar: Progress | None = None
        if shown and sys.stderr.isatty():
            self._bar = Progress(
                TextColumn(nouns[0]), BarColumn(), MofNCompleteColumn(),
                TextColumn(f"{{task.fields[frames]:,}} {nouns[1]}"), TimeRemainingColumn(),
                console=Console(stderr=True), transient=True,
            )
            self._task = self._bar.add_task("", total=total, frames=0)

    def __enter__(self) -> Counter:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, frames: int) -> None:
        """One more utterance of this many frames is done on this rank."""
        self.correct(self._utterances + 1, self._frames + frames)

    def correct(self, utterances: int, frames: int) -> None:
        """What all ranks together have done so far."""
        self._utterances, self._frames = utterances, frames
        if self._bar:
            self._bar.update(self._task, completed=utterances, frames=frames)
        elif self._shown and time.monotonic() >= self._next_line:
            elapsed = time.monotonic() - self._started
            left = elapsed * (self._total - utterances) / max(1, utterances)
            done = f"{utterances:,} of {self._total:,} {self._nouns[0]}, {frames:,} {self._nouns[1]}"
            print(f"{done}, about {left:.0f} s left", file=sys.stderr, flush=True)
            self._next_line = time.monotonic() + EVERY
