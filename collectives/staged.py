"""Messages of device memory through host memory, cut into chunks that are copied while others are on the wire.

The sender copies chunk i + 1 from the device while chunk i is sent; the receiver copies chunk i to the device while
chunk i + 1 arrives. Nothing here waits: whoever asks any message whether it has arrived moves all of them on, as far as
they can go. An empty message is one empty chunk; so a receiver that has not seen the first chunk awaits no second.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

from collectives.message import Message

CHUNK = 1 << 20  # bytes: enough for the speed of bus and network, few enough that the first is soon on its way
SLOTS = 3  # chunks of a message that are in host memory at a time

Done = Callable[[], bool]


class Copies(Protocol):
    """Copies between one device buffer and host memory; each says when it is done, in the order of the calls."""

    size: int  # bytes of the buffer

    def host(self, size: int) -> torch.Tensor:
        """Host memory, uint8 [size], that can be copied to and from."""
        ...

    def fetch(self, host: torch.Tensor, low: int) -> Done:
        """Start to copy the buffer's bytes from `low` on into all of `host`."""
        ...

    def store(self, host: torch.Tensor, low: int) -> Done:
        """Start to copy all of `host` into the buffer's bytes from `low` on."""
        ...


class Staging:
    """Makes staged messages, and moves those that are under way.

    copies  makes a tensor's Copies
    chunk   bytes
    slots   chunks of a message that are in host memory at a time
    """

    def __init__(self, copies: Callable[[torch.Tensor], Copies] | None = None, chunk: int = CHUNK, slots: int = SLOTS):
        self.copies, self.chunk, self.slots = copies or Copiers(), chunk, slots
        self.under_way: list[_Staged] = []
        self._lock = threading.Lock()

    def sending(self, tensor: torch.Tensor, prepare: Callable[[torch.Tensor], Message]) -> Message:
        """A message that sends a contiguous tensor; `prepare` makes the message of a chunk in host memory."""
        return _Sent(self, self.copies(tensor), prepare)

    def receiving(self, tensor: torch.Tensor, prepare: Callable[[torch.Tensor], Message]) -> Message:
        """A message that fills a contiguous tensor; `prepare` makes the message of a chunk in host memory."""
        return _Received(self, self.copies(tensor), prepare)

    def add(self, message: _Staged) -> None:
        """A message sets out."""
        with self._lock:
            self.under_way.append(message)
        self.move()

    def move(self) -> None:
        """Move all messages on that are under way."""
        with self._lock:
            for message in self.under_way:
                while not message.over and message.move():
                    pass
            self.under_way = [message for message in self.under_way if not message.over]


class _Chunk(NamedTuple):
    low: int
    host: torch.Tensor
    message: Message


class _Staged:
    """What both ends have in common: chunks [low, low + n), each in one of a few slots of host memory."""

    def __init__(self, staging: Staging, copies: Copies, prepare: Callable[[torch.Tensor], Message]):
        self.staging, self.copies, size = staging, copies, copies.size
        lows = range(0, max(size, 1), staging.chunk)
        slots = [copies.host(min(staging.chunk, size)) for _ in range(min(staging.slots, len(lows)))]
        parts = [slots[k % len(slots)][: min(staging.chunk, size - low)] for k, low in enumerate(lows)]
        self.chunks = [_Chunk(low, part, prepare(part)) for low, part in zip(lows, parts, strict=True)]
        self.slots = len(slots)
        self.copying: deque[Done] = deque()
        self.peer = self.chunks[0].message.peer
        self.received = 0
        self.over = True

    def start(self, empty: bool = False) -> None:
        assert self.over, "a message is started again before it arrived"
        self.over = False
        self.begin(empty or not self.copies.size)
        self.staging.add(self)

    def arrived(self) -> bool:
        if not self.over:
            self.staging.move()
        return self.over

    def free(self) -> None:
        for chunk in self.chunks:
            chunk.message.free()

    def begin(self, empty: bool) -> None:
        raise NotImplementedError

    def move(self) -> bool:
        """Do whatever can be done now; whether anything was done."""
        raise NotImplementedError


class _Sent(_Staged):
    """Chunks are fetched, sent, and through; `self.fetched >= self.sent >= self.through` say how many."""

    def begin(self, empty: bool) -> None:
        self.fetched = self.sent = self.through = 0
        self.empty = empty

    def move(self) -> bool:
        before = (self.fetched, self.sent, self.through)
        last = 1 if self.empty else len(self.chunks)
        if self.fetched < last and self.fetched - self.through < self.slots:
            chunk = self.chunks[self.fetched]
            self.copying.append(_at_once if self.empty else self.copies.fetch(chunk.host, chunk.low))
            self.fetched += 1
        if self.sent < self.fetched and self.copying[0]():
            self.copying.popleft()
            self.chunks[self.sent].message.start(self.empty)
            self.sent += 1
        if self.through < self.sent and self.chunks[self.through].message.arrived():
            self.through += 1
            self.over = self.through == last
        return before != (self.fetched, self.sent, self.through)


class _Received(_Staged):
    """Chunks are awaited, here, and stored; `self.awaited >= self.here >= self.stored` say how many."""

    def begin(self, empty: bool) -> None:
        self.awaited = self.here = self.stored = self.received = 0

    def move(self) -> bool:
        before = (self.awaited, self.here, self.stored)
        free = self.awaited - self.stored < self.slots
        if self.awaited < len(self.chunks) and free and (self.here or not self.awaited):
            self.chunks[self.awaited].message.start()
            self.awaited += 1
        if self.here < self.awaited and self.chunks[self.here].message.arrived():
            chunk = self.chunks[self.here]
            if not chunk.message.received:  # the first chunk, of an empty message
                self.over = True
                return False
            self.received += chunk.message.received
            self.copying.append(self.copies.store(chunk.host, chunk.low))
            self.here += 1
        if self.stored < self.here and self.copying[0]():
            self.copying.popleft()
            self.stored += 1
            self.over = self.stored == len(self.chunks)
        return before != (self.awaited, self.here, self.stored)


def _at_once() -> bool:
    return True


class HostCopies:
    """Of a tensor in host memory: for ranks on CPUs in a job where others' messages are staged."""

    def __init__(self, tensor: torch.Tensor):
        self.bytes = tensor.detach().view(torch.uint8)
        self.size = len(self.bytes)

    def host(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def fetch(self, host: torch.Tensor, low: int) -> Done:
        host.copy_(self.bytes[low : low + len(host)])
        return _at_once

    def store(self, host: torch.Tensor, low: int) -> Done:
        self.bytes[low : low + len(host)].copy_(host)
        return _at_once


class CudaCopies(HostCopies):
    """Of a tensor on a GPU, through pinned memory, on a stream for each direction."""

    def __init__(self, tensor: torch.Tensor, out: torch.cuda.Stream, into: torch.cuda.Stream):
        super().__init__(tensor)
        self.out, self.into = out, into

    def host(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def fetch(self, host: torch.Tensor, low: int) -> Done:
        return self._copy(host, self.bytes[low : low + len(host)], self.out)

    def store(self, host: torch.Tensor, low: int) -> Done:
        return self._copy(self.bytes[low : low + len(host)], host, self.into)

    @staticmethod
    def _copy(to: torch.Tensor, source: torch.Tensor, stream: torch.cuda.Stream) -> Done:
        with torch.cuda.stream(stream):
            to.copy_(source, non_blocking=True)
            event = torch.cuda.Event()
            event.record(stream)
        return event.query


class Copiers:
    """The Copies of tensors on any device; two streams a GPU."""

    def __init__(self) -> None:
        self.streams: dict[torch.device, tuple[torch.cuda.Stream, torch.cuda.Stream]] = {}

    def __call__(self, tensor: torch.Tensor) -> Copies:
        if tensor.device.type != "cuda":
            return HostCopies(tensor)
        if tensor.device not in self.streams:
            self.streams[tensor.device] = (torch.cuda.Stream(tensor.device), torch.cuda.Stream(tensor.device))
        torch.cuda.synchronize(tensor.device)  # what made the tensor was queued on another stream
        return CudaCopies(tensor, *self.streams[tensor.device])
