"""Comm: the ranks of a job and what they send each other. The only place that imports mpi4py.

A Comm knows which splits its rank holds, and it is passed in, never global. A world of one rank is ordinary MPI: no
other file branches on rank or size. Ranks that see each other's memory form an island: on CPUs, those of a host; on
GPUs, whatever `on` finds out (`transport.py`). Small records travel as JSON, so no code is ever unpickled.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mpi4py import MPI

from collectives.aware import cuda_aware
from collectives.errors import PeerLost, RootFailed, everywhere, is_refusal
from collectives.launch import LaunchError, check_dealing, check_world_size
from collectives.memory import Memory
from collectives.message import Message, Straight, gather_records
from collectives.transport import CPU_WHY, Transport, choose_transport, look_around

__all__ = ["Comm", "LaunchError", "Message", "PeerLost", "RootFailed", "check_dealing", "everywhere", "is_refusal"]

FINISH_S = 300.0  # how long ranks may wait for each other at their end
ABORT_S = 3.0  # how long an abort may take
_NOTHING = np.empty(0, np.uint8)


def mpi_library() -> str:
    """The MPI library's own name and version, one line."""
    return " ".join(MPI.Get_library_version().split("\n")[0].replace("\0", "").split())


def thread_level() -> str:
    """What MPI promised for threads: "single", "funneled", "serialized" or "multiple"."""
    names = {
        MPI.THREAD_SINGLE: "single", MPI.THREAD_FUNNELED: "funneled",
        MPI.THREAD_SERIALIZED: "serialized", MPI.THREAD_MULTIPLE: "multiple",
    }
    return names[MPI.Query_thread()]


class Comm:
    """The ranks of one job, with the splits of the data dealt to them in ascending contiguous runs.

    n_splits   how many splits the recipe has; the number of ranks must divide it
    islands    which ranks share memory, island by island; None: those of a host
    transport  how they share and send it; None: as ranks on CPUs do
    """

    def __init__(
        self, n_splits: int | None = None, world: Any = None, islands: list[list[int]] | None = None,
        transport: Transport | None = None,
    ):
        self._world = MPI.COMM_WORLD.Dup() if world is None else world
        self._agreeing = self._world.Dup()
        self._messages = self._world.Dup()
        self.hosts: list[str] = []  # by rank
        self.waiting = ""  # what this rank waits for outside the exchange, where it may be long
        self._pending: tuple[Any, np.ndarray] | None = None
        # Bytes that this rank has sent so far, by what they were ("reduce", "share"), counted where MPI takes them.
        self.sent: Counter[str] = Counter()
        self.rank: int = self._world.Get_rank()
        self.size: int = self._world.Get_size()
        self.host = socket.gethostname()
        self._local: Any = self._world.Split_type(MPI.COMM_TYPE_SHARED)
        self.local_rank: int = self._local.Get_rank()
        self.local_size: int = self._local.Get_size()
        if islands is not None:
            island = next(i for i, ranks in enumerate(islands) if self.rank in ranks)
            self._local = self._world.Split(island, self.rank)
        first = np.array([self.rank], np.int64)
        self._local.Bcast(first)
        met = self.gather([int(first[0]), os.getpid(), self.host, _processes()])
        self.hosts = [host for _, _, host, _ in met]
        self._pids: list[int] = [pid for _, pid, _, _ in met]
        firsts = [found for found, _, _, _ in met]
        self.islands: list[list[int]] = [[r for r in range(self.size) if firsts[r] == f] for f in sorted(set(firsts))]
        self.island = next(i for i, ranks in enumerate(self.islands) if self.rank in ranks)
        spaces = [space for _, _, _, space in met]  # neighbours whose process numbers mean something here:
        self._seen = [r for r in self.neighbours if spaces[r] and spaces[r] == spaces[self.rank]]
        self._crews: dict[Any, dict[int, int]] = {}
        for rank, (_, pid, host, space) in enumerate(met):
            self._crews.setdefault((host, space) if space else rank, {})[rank] = pid
        self.transport = transport or Transport("window", CPU_WHY, self.islands)
        self.memory = Memory(
            self.neighbours, self.rank, lambda value: gather_records(value, self._local), self._allocate_shared,
            self.transport.mapped,
        )
        self.n_splits = self.size if n_splits is None else n_splits
        check_dealing(self.n_splits, self.size)

    @classmethod
    def start(cls) -> Comm:
        """The world this process was started into. Raises LaunchError if launcher and library do not match."""
        check_world_size(MPI.COMM_WORLD.Get_size(), os.environ, mpi_library())
        return cls()

    def with_splits(self, n_splits: int) -> Comm:
        """The same ranks, holding `n_splits` splits. Raises ValueError if the ranks do not divide them."""
        return Comm(n_splits, self._world, self.islands, self.transport)

    def with_islands(self, islands: list[list[int]]) -> Comm:
        """The same ranks and splits, of which only those of an island use each other's memory (collective)."""
        return Comm(self.n_splits, self._world, islands, self.transport)

    def apart(self) -> Comm:
        """This rank by itself, a world of its own with one split: for what it measures alone."""
        return Comm(1, MPI.COMM_SELF)

    def on(self, device: torch.device, nccl: bool = False) -> Comm:
        """The same ranks and splits, with a way to share and send this device's memory (collective).

        nccl  whether NCCL is asked for; where it cannot be used, `transport.why` says so
        """
        aware, why = cuda_aware(ctypes.CDLL(MPI.__file__), mpi_library(), os.environ)
        facts = look_around(self, device, (aware, f"{mpi_library().split(', package')[0]}, {why}"))
        transport = choose_transport(facts, self.islands, nccl)
        return Comm(self.n_splits, self._world, transport.islands, transport)

    # -- who holds what ---------------------------------------------------------------------------------------------

    @property
    def splits(self) -> range:
        """The splits this rank holds, ascending."""
        return self.splits_of(self.rank)

    def splits_of(self, rank: int) -> range:
        held = self.n_splits // self.size
        return range(rank * held, (rank + 1) * held)

    def mine(self, count: int) -> range:
        """This rank's share of `count` pieces of work, dealt round robin."""
        return range(self.rank, count, self.size)

    @property
    def label(self) -> str:
        """Who speaks, in front of a message: "[rank 3 on node7] ", or nothing where there is one rank."""
        return f"[rank {self.rank} on {self.host}] " if self.size > 1 else ""

    @property
    def alone(self) -> bool:
        """Whether there is nobody to exchange with."""
        return self.size == 1

    @property
    def threads(self) -> bool:
        """Whether any thread may call MPI at any time."""
        return thread_level() == "multiple"

    def is_root(self) -> bool:
        """Whether this rank is rank 0: for whoever owns the display and the files of a run."""
        return self.rank == 0

    @property
    def neighbours(self) -> list[int]:
        """The ranks of this rank's island, ascending, itself among them."""
        return self.islands[self.island]

    # -- who lives --------------------------------------------------------------------------------------------------

    def alive(self, rank: int) -> bool:
        """Whether a neighbour's process still runs; True for ranks elsewhere, of which one cannot know."""
        if rank not in self._seen:
            return True
        try:
            status = Path(f"/proc/{self._pids[rank]}/stat").read_text()
        except OSError:
            return False
        return status.rpartition(")")[2].split()[0] not in "ZX"

    def crews(self) -> list[dict[int, int]]:
        """The ranks of every host, with the numbers of their processes: those that see each other's."""
        return list(self._crews.values())

    def name_of(self, rank: int) -> str:
        """A rank and where it is, for messages: "rank 3 on node7"."""
        return f"rank {rank} on {self.hosts[rank]}"

    # -- small records ----------------------------------------------------------------------------------------------

    def gather(self, value: Any) -> list[Any]:
        """Every rank's JSON value, in rank order, on every rank (collective)."""
        with self._waits("all ranks' records"):
            return gather_records(value, self._world)

    def on_root(self, act: Callable[[], Any]) -> Any:
        """Run `act` on rank 0 alone; its JSON value on every rank (collective).

        Raises what `act` raised, on rank 0; RootFailed on the others.
        """
        answer: dict[str, Any] = {}
        failure: BaseException | None = None
        if self.rank == 0:
            try:
                answer = {"value": act()}
            except Exception as error:  # carried to every rank, raised again below
                failure = error
                answer = {"failed": f"{type(error).__name__}: {error}", "refused": is_refusal(error)}
        text = np.frombuffer(json.dumps(answer).encode(), np.uint8)
        size = np.array([len(text)], np.int64)
        with self._waits(self.name_of(0)):
            self._world.Bcast(size)
            body = text.copy() if self.rank == 0 else np.empty(int(size[0]), np.uint8)
            self._world.Bcast(body)
        if failure is not None:
            raise everywhere(failure)
        answer = json.loads(body.tobytes())
        if "failed" in answer:
            raise RootFailed(answer["failed"], answer["refused"])
        return answer["value"]

    def each(self, act: Callable[[], Any]) -> list[Any]:
        """Run `act` on every rank; all JSON values in rank order (collective).

        If any rank raises, all raise: the ranks that failed their own error, the others RootFailed.
        """
        failure: BaseException | None = None
        value: Any = None
        try:
            value = act()
        except Exception as error:  # carried to every rank, raised again below
            failure = error
        answers = self.gather({"value": value} if failure is None else {
            "failed": str(failure), "refused": is_refusal(failure)
        })
        if failure is not None:
            raise everywhere(failure)
        for rank, answer in enumerate(answers):
            if "failed" in answer:
                raise RootFailed(f"rank {rank}: {answer['failed']}", answer["refused"])
        return [answer["value"] for answer in answers]

    def barrier(self) -> None:
        """Wait until every rank is here (collective)."""
        with self._waits("all ranks to come so far"):
            self._world.Barrier()

    @contextmanager
    def _waits(self, what: str) -> Iterator[None]:
        """A call in which this rank may wait long, named for whoever must explain a hang."""
        self.waiting = what
        try:
            yield
        finally:
            self.waiting = ""

    def agree(self, flag: bool, now: bool = False) -> bool:
        """Whether any rank's flag was up at the previous call: non-blocking, one turn late, the same on all ranks.

        now  whether to wait for the answer at this call, too (the same on all ranks)
        """
        answer = self.settle()
        mine, result = np.array([flag], np.int32), np.zeros(1, np.int32)
        self._pending = (self._agreeing.Iallreduce(mine, result, op=MPI.MAX), result)
        self._sent = mine  # MPI reads it until the call completes
        return (self.settle() or answer) if now else answer

    def settle(self) -> bool:
        """Complete the last `agree` still on its way; its answer (False if there is none)."""
        if self._pending is None:
            return False
        request, result = self._pending
        with self._waits("the answer of all ranks whether to stop"):
            request.Wait()
        self._pending = None
        return bool(result[0])

    # -- memory and tensors -----------------------------------------------------------------------------------------

    def _allocate_shared(self, size: int) -> tuple[list[Any], Callable[[], None]]:
        """So many bytes of this rank, and its neighbours', in MPI's own shared memory, and its fence (collective)."""
        window = MPI.Win.Allocate_shared(size, 1, MPI.INFO_NULL, self._local)
        self.memory.keep(window)  # what is returned points into it
        found = [window.Shared_query(k)[0] for k in range(len(self.neighbours))]
        window.Lock_all()
        return found, window.Sync

    @property
    def most_tag(self) -> int:
        """The largest number that a message may carry as its tag."""
        most: Any = self._messages.Get_attr(MPI.TAG_UB)
        return int(most)

    def sending(self, tensor: torch.Tensor, to: int, tag: int, what: str = "messages") -> Message:
        """A message that will carry a contiguous tensor's values to a rank, as often as it is started.

        what  the name under which its bytes are counted in `sent`
        """

        def prepare(part: torch.Tensor) -> Message:
            full = self._messages.Send_init(_buffer(part), to, tag)
            empty = self._messages.Send_init([_NOTHING, 0, MPI.BYTE], to, tag)
            size = part.numel() * part.element_size()
            return Straight(to, full, empty, MPI.Status(), lambda: self.sent.update({what: size}))

        return self.transport.staging.sending(tensor, prepare) if self.transport.staged else prepare(tensor)

    def receiving(self, tensor: torch.Tensor, source: int, tag: int) -> Message:
        """A message that will fill a contiguous tensor with a rank's values, or leave it, if an empty one comes."""

        def prepare(part: torch.Tensor) -> Message:
            return Straight(source, self._messages.Recv_init(_buffer(part), source, tag), None, MPI.Status())

        return self.transport.staging.receiving(tensor, prepare) if self.transport.staged else prepare(tensor)

    def all_values(self, mine: np.ndarray) -> np.ndarray:
        """Every rank's float64 values, in rank order (collective)."""
        mine = np.ascontiguousarray(mine, np.float64)
        sizes = np.empty(self.size, np.int64)
        with self._waits("all ranks' values"):
            self._world.Allgather(np.array([len(mine)], np.int64), sizes)
        everyone = np.empty(int(sizes.sum()))
        with self._waits("all ranks' values"):
            self._world.Allgatherv(mine, (everyone, sizes))
        return everyone

    def spread_(self, flat: torch.Tensor, pieces: list[list[tuple[int, int]]]) -> None:
        """Fill `flat` in place with what other ranks hold of it (collective).

        pieces  by rank: the floats [low, high) of it, one run or none, that this rank has
        """
        host = flat.cpu()
        runs = [held[0] if held else (0, 0) for held in pieces]
        counts, lows = [high - low for low, high in runs], [low for low, _ in runs]
        with self._waits("all ranks' parts of the model"):
            self._world.Allgatherv(MPI.IN_PLACE, [host.numpy(), counts, lows, MPI.FLOAT])
        self.sent["share"] += 4 * counts[self.rank] * (self.size - 1)
        if host is not flat:
            flat.copy_(host)

    def from_root_(self, flat: torch.Tensor) -> None:
        """Overwrite `flat` with rank 0's on every rank, in place (collective)."""
        host = flat.cpu()
        self._world.Bcast(_buffer(host))
        if host is not flat:
            flat.copy_(host)

    # -- the end ----------------------------------------------------------------------------------------------------

    def finish(self, code: int = 0) -> None:
        """Leave MPI in good order, so that a process may end with any exit code without aborting the others.

        code  the exit code, should MPI never come back: a rank that it waits for is gone
        """
        last = self._in_the_end(FINISH_S, code)
        MPI.Finalize()
        last.cancel()
        faulthandler.cancel_dump_traceback_later()

    def abort(self, code: int) -> None:
        """End every rank of the job now, with this exit code; a rank alone has nobody to end."""
        if self.size == 1:
            return self.finish()
        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(1.0)  # the launcher passes on what was said last, before it hears of the abort and ends everything
        self._in_the_end(ABORT_S, code)  # a rank that is cut off has no launcher that would end it
        MPI.COMM_WORLD.Abort(code)

    def _in_the_end(self, seconds: float, code: int) -> threading.Timer:
        """This process ends after so long, unless that is cancelled; also amid a call that holds Python's lock."""
        faulthandler.dump_traceback_later(seconds + 1, exit=True, file=2)
        last = threading.Timer(seconds, os._exit, (code,))
        last.daemon = True
        last.start()
        return last


def _processes() -> str:
    """Which set of process numbers this process lives in; "" where that is not known."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _buffer(tensor: torch.Tensor) -> list[Any]:
    """A contiguous tensor of any dtype as an MPI buffer of bytes (numpy has no bfloat16, and sees no GPU's memory)."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)  # what made it was queued; later on, marks are awaited (`lane.py`)
        return [MPI.buffer.fromaddress(tensor.data_ptr(), tensor.numel() * tensor.element_size()), MPI.BYTE]
    return [tensor.detach().view(torch.uint8).numpy(), MPI.BYTE]
