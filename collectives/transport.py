"""How ranks see and send each other's buffers: looked into once, decided by a pure function, told in one line.

On CPUs the ranks of a host share windows, and messages leave from host memory. Buffers on a GPU are mapped by the ranks
of a host whose devices can do it (CUDA IPC); an MPI that says that it reads GPU memory gets them as they are; for any
other, messages are staged through host memory (`staged.py`). NCCL only where it is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch

from collectives.staged import Staging
from kernels import gpu

if TYPE_CHECKING:
    from collectives.comm import Comm

CPU_WHY = "ranks compute on the CPU"


@dataclass(frozen=True)
class Facts:
    """What one rank found out about its device and its libraries.

    device     which GPU, the same words for the same one; "" for the CPU
    aware      whether the MPI library says that it reads GPU memory
    aware_why  what it said
    maps       the ranks of its host whose GPU memory it has mapped, and read rightly
    maps_why   why not the others' ("" if there are none)
    nccl_why   why it cannot use NCCL; "" if it can
    """

    device: str = ""
    aware: bool = False
    aware_why: str = ""
    maps: Sequence[int] = ()
    maps_why: str = ""
    nccl_why: str = ""


@dataclass(frozen=True)
class Transport:
    """What was chosen, and why.

    kind     within islands, "+" between them: "window" or "ipc", "messages" (of host memory), "cuda-aware" or "staged";
             or "nccl", or "alone"
    islands  the ranks that see each other's buffers, island by island
    staged   whether messages go through host memory, chunk by chunk; if not, MPI gets tensors as they are
    mapped   whether the ranks of an island map each other's GPU memory
    nccl     whether NCCL was asked for and can be used
    staging  how messages are staged
    """

    kind: str
    why: str
    islands: list[list[int]]
    staged: bool = False
    mapped: bool = False
    nccl: bool = False
    staging: Staging = field(default_factory=Staging, compare=False, repr=False)

    def __str__(self) -> str:
        return f"{self.kind}, because {self.why}"


def choose_transport(facts: Sequence[Facts], islands: Sequence[Sequence[int]], nccl: bool = False) -> Transport:
    """What the ranks can do together.

    facts    every rank's
    islands  the ranks that share host memory, island by island
    nccl     whether NCCL was asked for
    """
    alone = [[rank] for rank in range(len(facts))]
    missing = _missing_for_nccl(facts) if nccl else ""
    if nccl and not missing:
        why = "it was asked for, and every rank has a GPU of its own and CuPy with NCCL; it promises no order of sums"
        return Transport("nccl", why, alone, staged=True, nccl=True)
    if not any(f.device for f in facts):
        kind = "window" if len(islands) == 1 else "window + messages"
        why = f"{CPU_WHY}; NCCL, which was asked for, is for GPUs alone" if nccl else CPU_WHY
        return Transport(kind, why, [list(island) for island in islands])
    reasons: list[str] = []
    found = sorted(group for island in islands for group in _mapping(island, facts))
    mapped = any(len(group) > 1 for group in found)
    if mapped:
        reasons.append("ranks of a host map each other's GPU memory")
    unmapped = [r for r, f in enumerate(facts) if f.maps_why]
    if unmapped:
        reasons.append(f"rank {unmapped[0]} cannot map all of its host's GPU memory: {facts[unmapped[0]].maps_why}")
    kinds = ["ipc"] if mapped else []
    staged = not all(f.aware for f in facts)
    if len(found) > 1:
        kinds.append("staged" if staged else "cuda-aware")
        told = next((f for f in facts if not f.aware), facts[0])
        reasons.append(f"MPI {'says' if told.aware else 'does not say'} that it reads GPU memory ({told.aware_why})")
    reasons = reasons or ["there is one rank"]
    reasons += [f"NCCL was asked for, but {missing}"] if missing else []
    return Transport(" + ".join(kinds) or "alone", "; ".join(reasons), found, staged, mapped)


def _missing_for_nccl(facts: Sequence[Facts]) -> str:
    """Why the ranks cannot use NCCL together; "" if they can."""
    for rank, fact in enumerate(facts):
        if not fact.device:
            return f"rank {rank} computes on the CPU"
        if fact.nccl_why:
            return f"rank {rank}: {fact.nccl_why}"
    for (one, first), (other, second) in combinations(enumerate(facts), 2):
        if first.device == second.device:
            return f"ranks {one} and {other} share a GPU, and it wants one for every rank"
    return ""


def _mapping(island: Sequence[int], facts: Sequence[Facts]) -> list[list[int]]:
    """An island cut into groups of ranks that all map each other."""
    groups: list[list[int]] = []
    for rank in island:
        for group in groups:
            if all(rank in facts[other].maps and other in facts[rank].maps for other in group):
                group.append(rank)
                break
        else:
            groups.append([rank])
    return groups


# -- looking ------------------------------------------------------------------------------------------------------


def look_around(comm: Comm, device: torch.device, aware: tuple[bool, str]) -> list[Facts]:
    """Every rank's facts (collective). Nothing that a rank misses is an error here: it becomes a reason.

    device  where this rank computes
    aware   what its MPI library says (`aware.cuda_aware`)
    """
    on_gpu = device.type == "cuda"
    if not any(comm.gather(on_gpu)):
        return [Facts()] * comm.size
    shown, handle, failure = None, "", ""
    if on_gpu and len(comm.neighbours) > 1:
        shown, handle, failure = _show(comm.rank, device)
    handles = comm.gather([handle, failure])
    maps, maps_why = _try_to_map(comm, device, handles) if shown is not None else ([], failure)
    fact = Facts(
        f"{comm.host} {gpu.bus(device)}" if on_gpu else "", *aware, maps, maps_why, gpu.nccl_missing() if on_gpu else ""
    )
    everyone = [Facts(**record) for record in comm.gather(asdict(fact))]
    comm.memory.keep((shown, maps))  # a buffer must not go while another process may have it mapped
    return everyone


def _show(rank: int, device: torch.device) -> tuple[Any, str, str]:
    """A buffer with this rank's number in it, its handle, or why there is none."""
    try:
        shown = gpu.zeros(1, device)
        shown.fill_(rank + 1)
        torch.cuda.synchronize(device)
        return shown, gpu.handle(shown), ""
    except Exception as error:  # whatever is wrong with this machine's IPC, there is another way
        return None, "", _one_line(error)


def _try_to_map(comm: Comm, device: torch.device, handles: Sequence[Sequence[str]]) -> tuple[list[int], str]:
    """The neighbours whose buffer could be mapped and holds the right number, and why not the others."""
    maps, why = [comm.rank], ""
    for rank in comm.neighbours:
        handle, failure = handles[rank]
        if rank == comm.rank:
            continue
        try:
            if not handle:
                raise OSError(f"rank {rank} has none to map: {failure or 'it computes on the CPU'}")
            read = float(gpu.mapped(handle, 1, device)[0])
            if read != rank + 1:
                raise OSError(f"rank {rank}'s buffer reads {read:g} where {rank + 1} was written")
            maps.append(rank)
        except Exception as error:
            why = why or _one_line(error)
    return sorted(maps), why


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
