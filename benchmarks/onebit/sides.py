"""Whom `onebit_speed.py` compares, where, and the JSON lines that it writes."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpc.bench import rounded
from hpc.bench_options import bits_of

RANKS = 2  # one a host
BURST_S = 0.002  # of its rate, a link which rested lets through at once
RESTARTS = 3


@dataclass(frozen=True)
class Side:
    """One of those compared.

    strategy  of Trireme's recipe; None: torch's DistributedDataParallel
    powersgd  the rank of PowerSGD's matrices there; 0: plain
    start     where the search for the learning rate begins
    like      the side whose learning rate it has, as it learns the same; "": its own
    beside    whom it is compared with
    """

    text: str
    strategy: dict[str, Any] | None = None
    powersgd: int = 0
    start: float = 0.2
    like: str = ""
    beside: list[str] = field(default_factory=list)


PEERS = ["float32", "ddp", "powersgd1", "powersgd4"]
SIDES = {
    "float32": Side(
        "float32 all-reduce", {"name": "allreduce", "algorithm": "owners", "bucket_mib": 1.0}, beside=["ddp"]
    ),
    "onebit": Side("1-bit", {"name": "onebit"}, beside=PEERS),
    "onebit-db": Side(
        "1-bit, double buffering", {"name": "onebit", "double_buffering": True}, beside=["onebit", *PEERS]
    ),
    "ddp": Side("torch DDP", like="float32"),
    "powersgd1": Side("torch DDP, PowerSGD of rank 1", powersgd=1),
    "powersgd4": Side("torch DDP, PowerSGD of rank 4", powersgd=4),
}


def burst_kib(link: str) -> int:
    """What a link lets through at once after a pause; with less, this machine does not reach the rate."""
    return max(32, round(bits_of(link) * BURST_S / 8192))


class Lines:
    """The JSON lines of --out: those that are there, and those that come."""

    def __init__(self, path: Path):
        self.path = path
        self.records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def add(self, records: list[dict[str, Any]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = [{"bench": "onebit_speed", **rounded(record)} for record in records]
        self.records += new
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in new)

    def of(self, what: str, **values: Any) -> list[dict[str, Any]]:
        wanted = {"what": what, **values}
        return [r for r in self.records if all(r.get(key) == value for key, value in wanted.items())]
