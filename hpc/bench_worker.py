"""A rank of a benchmark: Trireme's own training loop on a real recipe, stepped from outside.

Started as `python -m mpi4py -m hpc.bench_worker SPEC`; SPEC is JSON: the driver's `address`, `recipe` as nested tables,
and perhaps `alone`: whether to time the strategy's exchange by itself too, after every turn. Nothing of the loop is
copied: the job is built by `hpc.build` and run by `hpc.train`; only its Meter is exchanged for one that notes what
every step cost and waits for the driver between turns.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from typing import Any

from collectives.comm import Comm
from hpc.bench_crew import Gate
from hpc.build import make_job, registry
from hpc.config import options, resolve
from hpc.hosts import crossed
from hpc.meter import PHASES, Meter
from hpc.pulse import Pulse
from hpc.run import RunFolder
from hpc.runtime import Device, StopFlag
from hpc.train import train


class Dismissed(Exception):
    """The driver has seen enough."""


class PacedMeter(Meter):
    """A Meter that keeps the seconds of every step and its phases, and waits at a gate when its steps are used up.

    A step is a whole batch of the recipe, in however many parts the strategy learns it. Of a turn's steps each also has
    its share of the bytes that the turn sent: as the strategy counts them, and as they crossed the host's link.

    meter  the job's own
    gate   tells how many steps a turn has
    parts  of the recipe's batch
    drain  run at the end of every turn, so that nothing of it is under way when others have theirs
    alone  run after that; its seconds are reported with each of the turn's steps. None: nothing
    """

    def __init__(
        self, meter: Meter, gate: Gate, parts: int = 1, drain: Callable[[], object] = lambda: None,
        alone: Callable[[], object] | None = None,
    ):
        super().__init__(
            meter.comm, meter.journal, meter.pulse, meter.every, meter.progress, active=meter.active, sent=meter.sent
        )
        self.gate, self.parts, self.drain, self.alone = gate, parts, drain, alone
        self.steps: list[dict[str, float]] = []
        self._await()
        self._mark()

    def _await(self) -> None:
        self.left = self.gate.wait()
        self._bytes_before = self._bytes()

    def _bytes(self) -> dict[str, int]:
        sent, received = crossed()
        return {**self.sent(), "link_sent": sent, "link_received": received}

    def _mark(self) -> None:
        self._before = dict(self.totals)
        self._began, self._cpu_began = time.perf_counter(), time.process_time()

    def turn(self, at: int, learning_rate: float) -> None:
        super().turn(at, learning_rate)
        if at % self.parts:
            return
        phases = {phase: self.totals[phase] - self._before[phase] for phase in PHASES}
        cpu = time.process_time() - self._cpu_began
        self.steps.append({"seconds": time.perf_counter() - self._began, "cpu": cpu, **phases})
        self.left -= 1
        if not self.left:
            self._report()
            self._await()
            if not self.left:
                raise Dismissed
        self._mark()

    def _report(self) -> None:
        self.drain()
        extra = {what: (size - self._bytes_before[what]) / len(self.steps) for what, size in self._bytes().items()}
        if self.alone is not None:
            extra["alone"] = self._alone(self.alone)
        self.gate.report([step | extra for step in self.steps])
        self.steps = []

    def _alone(self, act: Callable[[], object]) -> float:
        """Seconds of `act` from a common start, after one that only settles (collective)."""
        act()
        self.comm.barrier()
        began = time.perf_counter()
        act()
        return time.perf_counter() - began


def work(spec: dict[str, Any]) -> None:
    """Build the job, introduce this rank, and train until dismissed."""
    logging.getLogger("trireme").setLevel(logging.WARNING)
    comm = Comm.start()
    log = spec["recipe"].get("log", {}) | {"trace": 0}  # the paced meter has no turns to trace
    recipe = resolve(spec["recipe"] | {"log": log}, registry())
    device = Device(recipe.device, recipe.precision, comm.local_rank, recipe.threads)
    pulse = Pulse(0)
    made = make_job(recipe, comm, device, RunFolder(recipe.run), pulse, StopFlag())
    assert made is not None, "a benchmark's run folder is new"
    job, at, carries = made
    hello = {
        "rank": comm.rank, "parameters": job.saver.flat.count, "device": str(device.torch),
        "bytes_exchanged": job.saver.flat.size * 4,
    }
    exchange = getattr(job.strategy, "exchange", None)  # some strategies have none
    alone = exchange.run_through if exchange is not None and spec.get("alone") else None
    parts = job.strategy.parts_of_a_batch(**options(recipe.strategy))
    job.meter = PacedMeter(job.meter, Gate(spec["address"], hello), parts, job.strategy.end, alone)
    try:
        if train(job, at, carries):
            raise ValueError(f"the data set is used up after {job.schedule.steps} steps; give the benchmark more data")
    except Dismissed:
        pass
    comm.settle()
    job.batches.close()
    job.saver.close()
    job.meter.journal.close()
    pulse.close()
    comm.finish()


if __name__ == "__main__":
    work(json.loads(sys.argv[1]))
