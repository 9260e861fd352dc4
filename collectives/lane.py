"""Where the exchange's arithmetic runs, and how one knows that it is done.

On the CPU everything is done when the call returns. On a GPU the work is queued on a stream of the exchange's own,
beside backward's, and marks in the streams say how far they are: nothing is told to a peer, or sent, before its mark is
passed. This file is the one place that knows the difference.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

NAP_S = 5e-5  # between two looks at a GPU


class Lane:
    """The CPU's: work is done at once."""

    @contextmanager
    def working(self) -> Iterator[None]:
        """A stretch of the exchange's own work."""
        yield

    def follow(self) -> None:
        """The exchange's next work comes after what this thread has queued so far."""

    def mark(self) -> Callable[[float], bool] | None:
        """Whether what this thread queued so far is done, to be asked again and again; None: it is."""
        return None


class StreamLane(Lane):
    """A GPU's: a stream of high priority beside the one that computes."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device, priority=-1)

    @contextmanager
    def working(self) -> Iterator[None]:
        with torch.cuda.stream(self.stream):
            yield

    def follow(self) -> None:
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))

    def mark(self) -> Callable[[float], bool] | None:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.stream.device))

        def over(patience: float) -> bool:
            if patience and not event.query():
                time.sleep(min(patience, NAP_S))
            return event.query()

        return over


def lane_of(device: torch.device) -> Lane:
    """The lane for tensors on this device."""
    return StreamLane(device) if device.type == "cuda" else Lane()
