"""Which algorithm and which bucket: from a short measurement on the machine at hand, or as asked for.

What is measured is the exchange itself, with the job's own buffers: every candidate in turn, a few times, the slowest
rank counting. The bucket is the smallest that is nearly as fast as the best, for with small buckets less is left to do
when backward ends.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from collectives.comm import Comm
from collectives.exchange import Exchange

MIB = 1 << 20
BUCKETS = (1 * MIB, 4 * MIB, 16 * MIB)  # bytes; candidates
DEFAULT_BUCKET = 4 * MIB
SMALL = 1 * MIB  # bytes of a model up to which every island may as well do all the work itself
ROUNDS = 5
BUDGET_S = 2.0  # after so long no further round is begun
NEARLY = 1.1


@dataclass(frozen=True)
class Candidate:
    """algorithm: "owners", "everyone" or "ring"; bucket in bytes."""

    algorithm: str
    bucket: int

    def __str__(self) -> str:
        return f"{self.algorithm} {self.bucket / MIB:g} MiB"


@dataclass(frozen=True)
class Choice:
    """What was chosen, and why; `where` is what it holds for, `seconds` what was measured."""

    algorithm: str
    bucket: int
    why: str
    where: dict[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.algorithm}, buckets of {self.bucket / MIB:g} MiB: {self.why}"


def candidates(wanted: str, bucket: int, size: int, islands: int, ranks: int) -> list[Candidate]:
    """What may be chosen from.

    wanted   "auto" (whatever keeps the same bits), "fastest" (the ring too), or an algorithm by name
    bucket   bytes, or 0: to be chosen
    size     bytes of the model
    """
    names = [wanted]
    if wanted in ("auto", "fastest"):
        names = ["owners"]
        if islands > 1 and size <= SMALL:
            names.append("everyone")
        if islands > 2 and wanted == "fastest":
            names.append("ring")
    buckets = [bucket] if bucket else [DEFAULT_BUCKET]
    if not bucket and ranks > 1:
        buckets = [b for b in BUCKETS if b < 2 * size] or [BUCKETS[0]]
    return [Candidate(name, b) for name in names for b in buckets]


def where_of(comm: Comm, size: int, wire: str, device: torch.device) -> dict[str, Any]:
    """What a measurement holds for: as many islands and ranks, a model as large."""
    return {"islands": [len(i) for i in comm.islands], "bytes": size, "wire": wire, "device": device.type}


def choose(
    comm: Comm, build: Callable[[Candidate], Exchange], found: Sequence[Candidate], where: dict[str, Any],
    remembered: dict[str, Any] | None,
) -> tuple[Choice, Exchange]:
    """The choice, and its exchange, built (collective).

    build       makes a candidate's exchange (collective); what it applies while it is measured must change nothing
    found       the candidates
    remembered  an earlier choice's `to_dict`, used again if it holds for this and is still a candidate
    """
    if len(found) == 1:
        only = found[0]
        return Choice(only.algorithm, only.bucket, "nothing to choose", where), build(only)
    if remembered and remembered.get("where") == where:
        again = Candidate(remembered["algorithm"], remembered["bucket"])
        if again in found:
            why = "as measured before"
            return Choice(again.algorithm, again.bucket, why, where, remembered["seconds"]), build(again)
    built = {candidate: build(candidate) for candidate in found}
    seconds = _measured(comm, built)
    best = min(seconds.values())
    chosen = min((c for c in found if seconds[c] <= NEARLY * best), key=lambda c: c.bucket)
    told = {str(candidate): seconds[candidate] for candidate in found}
    listed = ", ".join(f"{name} {1e3 * s:.2f} ms" for name, s in sorted(told.items(), key=lambda item: item[1]))
    why = f"the smallest bucket within {NEARLY - 1:.0%} of the quickest; measured {listed}"
    for candidate, exchange in built.items():
        if candidate != chosen:
            exchange.close()
    return Choice(chosen.algorithm, chosen.bucket, why, where, told), built[chosen]


def _measured(comm: Comm, built: dict[Candidate, Exchange]) -> dict[Candidate, float]:
    """Seconds of a whole exchange by candidate: the median over rounds of the slowest rank's."""
    rounds: list[list[float]] = []
    began = time.monotonic()
    spent = 0.0
    while len(rounds) <= ROUNDS and spent < BUDGET_S:  # the first round only settles
        mine = []
        for exchange in built.values():
            comm.barrier()
            start = time.perf_counter()
            exchange.run_through()
            mine.append(time.perf_counter() - start)
        everyone = comm.gather([mine, time.monotonic() - began])
        rounds.append([max(rank[0][k] for rank in everyone) for k in range(len(built))])
        spent = max(rank[1] for rank in everyone)
    counted = rounds[1:] or rounds
    return {c: statistics.median(r[k] for r in counted) for k, c in enumerate(built)}
