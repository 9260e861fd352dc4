"""A message between two ranks, as those see it who send and await it; and records of all ranks, by a communicator."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np


class Message(Protocol):
    """A message between two ranks, prepared once and started every turn.

    peer      the other rank
    received  bytes that came, after `arrived` was true: 0 for an empty message
    """

    peer: int
    received: int

    def start(self, empty: bool = False) -> None:
        """Set out; `empty`: without the tensor's values (a sender's choice)."""

    def arrived(self) -> bool:
        """Whether it is through: what was sent may be changed, what was awaited is there."""
        ...

    def free(self) -> None:
        """It is through, and will not be started again."""


class Straight(Message):
    """A message that MPI takes from where it lies, and puts where it belongs.

    full    the persistent request that carries the values
    empty   one that carries nothing; None where this rank receives
    status  an MPI status to use
    sent    called whenever values set out
    """

    def __init__(self, peer: int, full: Any, empty: Any, status: Any, sent: Callable[[], None] = lambda: None):
        self.peer, self._full, self._empty, self._status, self._sent = peer, full, empty, status, sent
        self._under_way: Any = None
        self.received = 0

    def start(self, empty: bool = False) -> None:
        self._under_way = self._empty if empty else self._full
        if not empty:
            self._sent()
        self._under_way.Start()

    def arrived(self) -> bool:
        if self._under_way is None:
            return True
        if not self._under_way.Test(self._status):
            return False
        self._under_way = None
        self.received = self._status.Get_count() if self._empty is None else 0  # in bytes
        return True

    def free(self) -> None:
        for request in (self._full, self._empty):
            if request is not None:
                request.Free()


def gather_records(value: Any, ranks: Any) -> list[Any]:
    """Every rank's JSON value, in rank order, on every rank of an MPI communicator (collective)."""
    mine = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.empty(ranks.Get_size(), np.int64)
    ranks.Allgather(np.array([len(mine)], np.int64), sizes)
    everyone = np.empty(int(sizes.sum()), np.uint8)
    ranks.Allgatherv(mine, (everyone, sizes))
    ends = np.cumsum(sizes)
    return [json.loads(everyone[e - s : e].tobytes()) for s, e in zip(sizes, ends, strict=True)]
