"""The peers of onebit_speed.py's accuracy runs: torch's DistributedDataParallel on gloo, plain, under PowerSGD's hook,
or as post-local SGD (torch's own hook, averager and optimizer).

    python -m mpi4py benchmarks/onebit/ddp.py SPEC              on every rank; onebit_speed.py starts it

A plain torch loop: `torch.optim.SGD` with momentum, cross-entropy, DDP. From Trireme it has what both sides must have
in common: the recipe, the data's reader and the order of its batches, the model with its first weights, and when the
learning rate changes. Rank 0 writes SPEC's "out": {"curve": [{"frames", "seconds", "loss", "accuracy"}, ...], "steps",
"failure"}; the clock stands while it validates.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.algorithms.model_averaging.utils import average_parameters
from torch.distributed.optim import PostLocalSGDOptimizer
from torch.nn.parallel import DistributedDataParallel

from hpc.batches import Batches, make_order
from hpc.bench_loop import join_ddp
from hpc.build import make_model, make_policy, make_task, registry
from hpc.config import load
from hpc.evaluate import add_up, batches_of, pieces_of
from hpc.runtime import Device
from hpc.schedule import Schedule
from hpc.shards import Dataset
from models.task import Task


def judged(
    task: Task, model: torch.nn.Module, held_out: Dataset, device: Device, rank: int, ranks: int
) -> tuple[float, float]:
    """Mean loss and frame accuracy over a data set, of which every rank computes its share (collective)."""
    model.eval()
    found = []
    with torch.no_grad():
        for runs in pieces_of(task, held_out)[rank::ranks]:
            found += [task.metrics(model, batch, None)[0] for batch in batches_of(task, held_out, runs, device.place)]
    sums = add_up(found)
    model.train()
    total = torch.tensor([*sums["loss"], *sums["frame_error"]], dtype=torch.float64)
    torch.distributed.all_reduce(total)
    loss, count, errors, _ = total.tolist()
    return loss / count, 1.0 - errors / count


def local_from(
    parallel: DistributedDataParallel, optimizer: torch.optim.Optimizer, spec: dict[str, Any]
) -> torch.optim.Optimizer:
    """After so many steps ranks keep their gradients to themselves, and average their models every `period` steps."""
    alone, _ = torch.distributed.new_subgroups(group_size=1)
    parallel.register_comm_hook(PostLocalSGDState(None, alone, spec["starts"]), post_localSGD_hook)
    averager = PeriodicModelAverager(period=spec["period"], warmup_steps=spec["starts"])
    return PostLocalSGDOptimizer(optimizer, averager)


def judged_average(parallel: torch.nn.Module, judge: Callable[[], tuple[float, float]]) -> tuple[float, float]:
    """What is judged is the mean of all ranks' models; they go on from their own (collective)."""
    own = [p.detach().clone() for p in parallel.parameters()]
    average_parameters(parallel.parameters(), torch.distributed.group.WORLD)
    found = judge()
    with torch.no_grad():
        for parameter, values in zip(parallel.parameters(), own, strict=True):
            parameter.copy_(values)
    return found


def work(spec: dict[str, Any]) -> None:
    recipe = load(spec["recipe"], spec["overrides"], registry())
    device, ranks = Device("cpu", recipe.precision, 0, recipe.threads), spec["ranks"]
    training, held_out = Dataset(recipe.data.train), Dataset(recipe.data.validation)
    task = make_task(recipe, training.manifest["fields"])
    model = make_model(task, device, recipe.seed)
    order = make_order(
        training, task, ranks, batch=recipe.data.batch, split_frames=recipe.data.split_frames, runs=recipe.data.runs,
        seed=recipe.seed,
    )
    batches = Batches(order, recipe.seed, device.place)
    schedule = Schedule(make_policy(recipe), order.per_epoch, recipe.validate_.every // recipe.data.batch)
    parallel, rank = join_ddp(model, spec)
    optimizer: torch.optim.Optimizer = torch.optim.SGD(
        parallel.parameters(), recipe.optim.learning_rate, recipe.optim.momentum
    )
    if spec["period"]:
        optimizer = local_from(parallel, optimizer, spec)
    curve, failure, seconds = list[dict[str, float]](), "", 0.0
    torch.distributed.barrier()
    began = time.perf_counter()
    for t in range(schedule.steps):
        batch = batches(rank, t)
        assert batch is not None, "every rank has something of an epoch's last batch"
        optimizer.param_groups[0]["lr"] = schedule.rate(t).learning_rate
        optimizer.zero_grad()
        total, _, _ = task.loss(parallel, batch, None)
        (total * (ranks / recipe.data.batch)).backward()  # DDP takes the mean over ranks: the sum over frames / batch
        optimizer.step()
        if not math.isfinite(total.item()):
            failure = f"the loss is {total.item()} at step {t}"
        if t + 1 == schedule.next_judgement(t) and not failure:
            seconds += time.perf_counter() - began
            loss, right = judged_average(parallel, lambda: judged(task, model, held_out, device, rank, ranks))
            curve.append({"frames": batches.progress(t + 1)[1], "seconds": seconds, "loss": loss, "accuracy": right})
            failure = "" if math.isfinite(loss) else f"the loss on held-out data is {loss} at step {t + 1}"
            began = time.perf_counter()
        if failure:
            break
    batches.close()
    if rank == 0 or failure:
        result = {"curve": curve, "steps": t + 1, "failure": failure}
        Path(spec["out"]).write_text(json.dumps(result), encoding="utf-8")
    if failure:
        sys.exit(1)  # the other rank, which may not have seen it, is ended with this one
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    work(json.loads(sys.argv[1]))
