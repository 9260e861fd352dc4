"""Comm: the ranks of a job and what they send each other. The only place that imports mpi4py.

A Comm knows which splits its rank holds, and it is passed in, never global. A world of one rank is ordinary MPI: no
other file branches on rank or size. Device tensors are staged through host memory (a CUDA-aware path comes with the
all-reduce at the speed of memory); small records travel as JSON, so no code is ever unpickled.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from mpi4py import MPI

# What each launcher promises its ranks. SLURM_STEP_NUM_TASKS is set inside srun's steps only, not in a batch script.
PROMISES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


class RootFailed(RuntimeError):
    """Another rank raised inside `on_root` or `each`; it reports the cause itself, this one only stops."""

    raised_everywhere = True


def everywhere(error: BaseException) -> BaseException:
    """Mark an error as raised on all ranks at once: nobody waits, so the job can end without an abort."""
    error.raised_everywhere = True  # type: ignore[attr-defined]
    return error


class LaunchError(RuntimeError):
    """The ranks that were started are not the ranks that MPI sees."""


def promised_size(environment: Mapping[str, str]) -> int | None:
    """How many ranks the launcher says it started, or None if no launcher is known to have started this process."""
    found = [int(environment[name]) for name in PROMISES if environment.get(name, "").isdigit()]
    return max(found) if found else None


def check_world_size(size: int, environment: Mapping[str, str]) -> None:
    """Raise LaunchError if the launcher promised another number of ranks than MPI reports.

    One MPI's mpiexec with another's library gives several worlds of one rank, each of which believes it is rank 0.
    """
    promised = promised_size(environment)
    if promised is not None and promised != size:
        raise LaunchError(
            f"the launcher started {promised} ranks, but MPI sees a world of {size}: mpiexec and the MPI library "
            f"({mpi_library()}) do not match; use that library's own mpiexec ('trireme doctor' shows both)"
        )


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


def check_dealing(n_splits: int, ranks: int) -> None:
    """Raise ValueError if the splits cannot be dealt evenly to the ranks."""
    if n_splits % ranks:
        fitting = [k for k in range(1, n_splits + 1) if n_splits % k == 0]
        raise ValueError(
            f"splits = {n_splits} cannot be dealt evenly to {ranks} ranks; start one of {fitting} ranks, or set "
            f"'splits' to a multiple of {ranks}"
        )


class Comm:
    """The ranks of one job, with the splits of the data dealt to them in ascending contiguous runs.

    n_splits  how many splits the recipe has; the number of ranks must divide it
    """

    def __init__(self, n_splits: int | None = None, world: Any = None):
        self._world = MPI.COMM_WORLD.Dup() if world is None else world
        self._agreeing = self._world.Dup()
        self._stages: dict[Any, torch.Tensor] = {}
        self._pending: tuple[Any, np.ndarray] | None = None
        self.rank: int = self._world.Get_rank()
        self.size: int = self._world.Get_size()
        self.host = socket.gethostname()
        local = self._world.Split_type(MPI.COMM_TYPE_SHARED)
        self.local_rank: int = local.Get_rank()
        self.local_size: int = local.Get_size()
        local.Free()
        self.n_splits = self.size if n_splits is None else n_splits
        check_dealing(self.n_splits, self.size)

    @classmethod
    def start(cls) -> Comm:
        """The world this process was started into. Raises LaunchError if launcher and library do not match."""
        check_world_size(MPI.COMM_WORLD.Get_size(), os.environ)
        return cls()

    def with_splits(self, n_splits: int) -> Comm:
        """The same ranks, holding `n_splits` splits. Raises ValueError if the ranks do not divide them."""
        return Comm(n_splits, self._world)

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

    def is_root(self) -> bool:
        """Whether this rank is rank 0: for whoever owns the display and the files of a run."""
        return self.rank == 0

    # -- storage ----------------------------------------------------------------------------------------------------

    def zeros(self, count: int, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A flat buffer [count] of zeros where this Comm wants weights and gradients to live (private memory)."""
        return torch.zeros(count, dtype=dtype, device=device)

    # -- small records ----------------------------------------------------------------------------------------------

    def gather(self, value: Any) -> list[Any]:
        """Every rank's JSON value, in rank order, on every rank (collective)."""
        mine = np.frombuffer(json.dumps(value).encode(), np.uint8)
        sizes = np.empty(self.size, np.int64)
        self._world.Allgather(np.array([len(mine)], np.int64), sizes)
        everyone = np.empty(int(sizes.sum()), np.uint8)
        self._world.Allgatherv(mine, (everyone, sizes))
        ends = np.cumsum(sizes)
        return [json.loads(everyone[e - s : e].tobytes()) for s, e in zip(sizes, ends, strict=True)]

    def sum_counts(self, count: int) -> int:
        """The sum of every rank's count (collective); integers, so no order to agree on."""
        total = np.zeros(1, np.int64)
        self._world.Allreduce(np.array([count], np.int64), total)
        return int(total[0])

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
                failure, answer = error, {"failed": f"{type(error).__name__}: {error}"}
        text = np.frombuffer(json.dumps(answer).encode(), np.uint8)
        size = np.array([len(text)], np.int64)
        self._world.Bcast(size)
        body = text.copy() if self.rank == 0 else np.empty(int(size[0]), np.uint8)
        self._world.Bcast(body)
        if failure is not None:
            raise everywhere(failure)
        answer = json.loads(body.tobytes())
        if "failed" in answer:
            raise RootFailed(answer["failed"])
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
        answers = self.gather({"value": value} if failure is None else {"failed": str(failure)})
        if failure is not None:
            raise everywhere(failure)
        for rank, answer in enumerate(answers):
            if "failed" in answer:
                raise RootFailed(f"rank {rank}: {answer['failed']}")
        return [answer["value"] for answer in answers]

    def barrier(self) -> None:
        """Wait until every rank is here (collective)."""
        self._world.Barrier()

    def agree(self, flag: bool) -> bool:
        """Whether any rank's flag was up at the previous call: non-blocking, one turn late, the same on all ranks."""
        answer = self.settle()
        mine, result = np.array([flag], np.int32), np.zeros(1, np.int32)
        self._pending = (self._agreeing.Iallreduce(mine, result, op=MPI.MAX), result)
        self._sent = mine  # MPI reads it until the call completes
        return answer

    def settle(self) -> bool:
        """Complete the last `agree` still on its way; its answer (False if there is none)."""
        if self._pending is None:
            return False
        request, result = self._pending
        request.Wait()
        self._pending = None
        return bool(result[0])

    # -- tensors ----------------------------------------------------------------------------------------------------

    def exchange(
        self, sends: Sequence[tuple[torch.Tensor, int]], receives: Sequence[tuple[torch.Tensor, int]]
    ) -> None:
        """Send contiguous tensors to ranks and fill others from ranks; messages between two ranks keep their order.

        sends     (tensor, to rank); a tensor sent to oneself is an error of the caller
        receives  (tensor to fill in place, from rank)
        """
        requests, fills = [], []
        for tensor, source in receives:
            host = tensor if tensor.device.type == "cpu" else torch.empty_like(tensor, device="cpu", pin_memory=True)
            fills.append((tensor, host))
            requests.append(self._world.Irecv(_buffer(host), source))
        staged = [(tensor.cpu(), target) for tensor, target in sends]  # .cpu() copies nothing that is there already
        requests += [self._world.Isend(_buffer(host), target) for host, target in staged]
        MPI.Request.Waitall(requests)
        for tensor, host in fills:
            if host is not tensor:
                tensor.copy_(host)

    def share_slices_(self, flat: torch.Tensor, bounds: Sequence[int]) -> None:
        """All-gather in place: rank k's slice `flat[bounds[k]:bounds[k + 1]]` goes to every rank (collective)."""
        host = flat if flat.device.type == "cpu" else self._pinned(flat)
        if host is not flat:
            mine = slice(bounds[self.rank], bounds[self.rank + 1])
            host[mine].copy_(flat[mine])
        counts = np.diff(np.asarray(bounds)) * host.element_size()
        starts = np.asarray(bounds[:-1]) * host.element_size()
        self._world.Allgatherv(MPI.IN_PLACE, [host.view(torch.uint8).numpy(), (counts, starts), MPI.BYTE])
        if host is not flat:
            flat.copy_(host)

    def _pinned(self, like: torch.Tensor) -> torch.Tensor:
        """A pinned host buffer of a device tensor's size, kept for the next time."""
        key = (like.numel(), like.dtype)
        if key not in self._stages:
            self._stages[key] = torch.empty_like(like, device="cpu", pin_memory=True)
        return self._stages[key]

    def from_root_(self, flat: torch.Tensor) -> None:
        """Overwrite `flat` with rank 0's on every rank, in place (collective)."""
        host = flat.cpu()
        self._world.Bcast(_buffer(host))
        if host is not flat:
            flat.copy_(host)

    # -- the end ----------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Leave MPI in good order, so that a process may end with any exit code without aborting the others."""
        MPI.Finalize()

    def abort(self, code: int) -> None:
        """End every rank of the job now, with this exit code; a rank alone has nobody to end."""
        if self.size == 1:
            return self.finish()
        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(1.0)  # the launcher passes on what was said last, before it hears of the abort and ends everything
        MPI.COMM_WORLD.Abort(code)


def _buffer(host: torch.Tensor) -> list[Any]:
    """A contiguous host tensor of any dtype as an MPI buffer of bytes (numpy has no bfloat16)."""
    return [host.detach().view(torch.uint8).numpy(), MPI.BYTE]
