"""The peer of the training benchmark: a plain torch training loop of the same model, as one would write it by hand.

Started as `python -m mpi4py -m hpc.bench_loop SPEC`, once or several times side by side; with a `store` (a path to meet
at) in SPEC, the loops are one of torch's DistributedDataParallel on gloo, with `powersgd` (a rank above 0) under its
PowerSGD hook. It knows nothing of Trireme but the gate it waits at: torch modules, `torch.optim.SGD` with momentum,
batches stacked in memory beforehand.

Legend: N batches in memory, B frames of a batch, I values of a stacked window.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from itertools import count, pairwise
from typing import Any

import torch
import torch.distributed
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from hpc.bench_crew import Gate
from hpc.hosts import crossed

BATCHES = 8  # stacked in memory, taken in turn
POWERSGD_STARTS = 2  # the least that the hook allows: before, DDP orders its buckets anew
ONE_BUCKET_MIB = 4096
PATIENCE_S = 300.0  # after which a loop that waits for another fails


def plain_model(inputs: int, layers: int, width: int, classes: int, activation: str) -> nn.Sequential:
    """Fully connected layers of one width, then logits."""
    kinds = {"sigmoid": nn.Sigmoid, "relu": nn.ReLU}
    stack: list[nn.Module] = []
    for before, after in pairwise([inputs] + [width] * layers):
        stack += [nn.Linear(before, after), kinds[activation]()]
    return nn.Sequential(*stack, nn.Linear(width if layers else inputs, classes))


def join_gloo(store: str, size: int, interface: str, rank: int | None = None, timeout_s: float = 1800.0) -> int:
    """Become one of `size` processes of torch.distributed on gloo (collective); the rank.

    store      a file on a file system that all of them see; made anew
    interface  the network they talk over: "lo", "eth0"
    rank       None: in the order in which they come
    timeout_s  after which one who waits for another fails
    """
    os.environ["GLOO_SOCKET_IFNAME"] = interface
    met = torch.distributed.FileStore(store, size)
    if rank is None:
        rank = met.add("came", 1) - 1
    patience = timedelta(seconds=timeout_s)
    torch.distributed.init_process_group("gloo", store=met, rank=rank, world_size=size, timeout=patience)
    return rank


def join_ddp(model: nn.Module, spec: dict[str, Any]) -> tuple[DistributedDataParallel, int]:
    """The model as one of DistributedDataParallel's on gloo, and the rank (collective).

    spec  `store`, `ranks`, `interface` as for `join_gloo`; `powersgd`: the rank of PowerSGD's matrices, 0 (the default)
          being plain; `starts`: from which step on

    PowerSGD has all gradients in one bucket: its hook starts further messages from gloo's threads, and with several
    buckets two ranks may do so in different orders, which gloo takes for a mismatch and ends.
    """
    powersgd = spec.get("powersgd", 0)
    rank = join_gloo(spec["store"], spec["ranks"], spec["interface"], timeout_s=PATIENCE_S)
    parallel = DistributedDataParallel(model, bucket_cap_mb=ONE_BUCKET_MIB if powersgd else None)
    if powersgd:
        state = PowerSGDState(
            None, matrix_approximation_rank=powersgd, start_powerSGD_iter=spec.get("starts", POWERSGD_STARTS),
            orthogonalization_epsilon=1e-8,  # or a unit without a gradient makes NaN
        )
        parallel.register_comm_hook(state, powerSGD_hook)
    return parallel, rank


def work(spec: dict[str, Any]) -> None:
    """Train until dismissed."""
    torch.set_num_threads(spec["threads"])
    torch.manual_seed(1)
    wanted = spec["device"]
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted)
    model: nn.Module = plain_model(*(spec[key] for key in ("inputs", "layers", "width", "classes", "activation")))
    model, rank = model.to(device), 0
    parameters = sum(p.numel() for p in model.parameters())
    if "store" in spec:
        model, rank = join_ddp(model, spec)
    optimizer = torch.optim.SGD(model.parameters(), lr=spec["learning_rate"], momentum=spec["momentum"])
    inputs_NBI = torch.randn(BATCHES, spec["batch"], spec["inputs"]).to(device)
    labels_NB = torch.randint(spec["classes"], (BATCHES, spec["batch"])).to(device)
    mixed = spec["precision"] == "bfloat16"
    gate = Gate(spec["address"], {"rank": rank, "parameters": parameters, "device": str(device)})
    total = 0.0
    for turn in count():
        steps = gate.wait()
        if not steps:
            return
        taken, before = [], crossed()
        for t in range(turn * steps, turn * steps + steps):
            began, cpu_began = time.perf_counter(), time.process_time()
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
                logits_BC = model(inputs_NBI[t % BATCHES])
                loss = functional.cross_entropy(logits_BC, labels_NB[t % BATCHES])
            loss.backward()
            optimizer.step()
            total += loss.item()
            cpu = time.process_time() - cpu_began
            taken.append({"seconds": time.perf_counter() - began, "cpu": cpu})
        link = [b - a for a, b in zip(before, crossed(), strict=True)]
        gate.report([step | {"link_sent": link[0] / steps, "link_received": link[1] / steps} for step in taken])


if __name__ == "__main__":
    work(json.loads(sys.argv[1]))
