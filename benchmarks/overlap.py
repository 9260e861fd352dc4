"""How much of an exchange between two hosts is hidden behind backward, and how much could be.

    python benchmarks/overlap.py                   two pretend hosts, a link of 1 Gbit/s (as root)
    python benchmarks/overlap.py --busy 0          a backward that leaves the processor alone, as a GPU's does

Backward is played by matrix products (or sleep) of 60 ms a layer, for the eight layers of the 7 x 1024 DNN; the
exchange is the real one, of 31 MB, with a momentum update. On pretend hosts the kernel carries every packet with the
same two cores that compute. So the floor is measured too: two plain TCP streams of as many bytes, one each way, beside
the same backward.

Prints JSON lines: {"busy", "backward_s", "exchange_alone_s", "hidden", "hidden_by_plain_tcp", ...}, medians over
interleaved rounds; hidden = (without overlap - with) / exchange alone, round by round.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from threading import Thread

import torch

from collectives.comm import Comm
from collectives.exchange import Exchange
from collectives.layout import GRAIN, Layout
from collectives.leaves import Leaves
from collectives.plan import Plan
from hpc.bench_crew import outside_a_job
from hpc.hosts import Hosts

LAYERS = [1_025_000] + [1_049_600] * 6 + [451_584]  # parameters, in the order in which backward comes to them
LAYER_S = 0.06
FLOATS = -(-sum(LAYERS) // GRAIN) * GRAIN


class Backward:
    """Keeps busy (or not) for LAYER_S a layer, and says after each how many floats are final."""

    def __init__(self, busy: bool):
        self.left, self.right = torch.randn(512, 1024), torch.randn(1024, 1024)
        self.out = torch.empty(512, 1024)
        self._multiply(20)  # the first ones are slow
        began = time.perf_counter()
        self._multiply(20)
        self.products = max(1, round(LAYER_S / (time.perf_counter() - began) * 20)) if busy else 0

    def _multiply(self, times: int) -> None:
        for _ in range(times):
            torch.mm(self.left, self.right, out=self.out)

    def __call__(self, final: Callable[[int], None]) -> None:
        done = 0
        for size in LAYERS:
            self._multiply(self.products) if self.products else time.sleep(LAYER_S)
            done += size
            final(done)


def exchanging(exchange: Exchange, backward: Backward | None, overlap: bool) -> None:
    """One turn: backward, with buckets handed over as they fill, or all at its end; then what is left."""
    ends = [FLOATS - low for low, _ in exchange.plan.layout.buckets]
    ready = iter(range(len(ends)))
    waiting = next(ready)
    rank = exchange.comm.rank
    exchange.enter(rank)

    def final(done: int) -> None:
        nonlocal waiting
        while overlap and waiting < len(ends) and ends[waiting] <= done:
            exchange.full(waiting)
            waiting = next(ready, len(ends))

    if backward:
        backward(final)
    exchange.stepped(rank, 1)
    exchange.finish()


def streaming(sockets: list[socket.socket], given: bytearray, found: bytearray, backward: Backward | None) -> None:
    """As many bytes in plain TCP, both ways at once, beside backward."""

    def receive() -> None:
        left = memoryview(found)
        while left:
            left = left[sockets[1].recv_into(left[: 1 << 18], 0, socket.MSG_WAITALL) :]

    threads = [Thread(target=sockets[0].sendall, args=(given,)), Thread(target=receive)]
    for thread in threads:
        thread.start()
    if backward:
        backward(lambda done: None)
    for thread in threads:
        thread.join()


def connect(comm: Comm) -> list[socket.socket]:
    """A socket to send on and one to receive on."""
    if comm.rank == 0:
        with socket.create_server(("", 0)) as listener:
            comm.gather(listener.getsockname()[1])
            return [listener.accept()[0] for _ in range(2)]
    port = comm.gather(0)[0]
    return [socket.create_connection((comm.hosts[0], port)) for _ in range(2)][::-1]


def work(busy: bool, rounds: int) -> None:
    """What each of the two ranks does."""
    torch.set_num_threads(1)
    comm = Comm()
    leaves, weights = Leaves(comm, FLOATS), torch.zeros(FLOATS)
    momentum = torch.zeros(FLOATS)

    def apply(total: torch.Tensor, low: int) -> None:
        part = slice(low, low + len(total))
        momentum[part].mul_(0.9).add_(total)
        weights[part].add_(momentum[part], alpha=-1e-3)

    plan = Plan(leaves, comm.memory.results(weights), weights, Layout(FLOATS, comm.islands, 1 << 18))
    exchange = Exchange(comm, weights, plan, apply=apply, threaded=True)
    sockets, backward = connect(comm), Backward(busy)
    given, found = bytearray(4 * FLOATS), bytearray(4 * FLOATS)
    sides: dict[str, Callable[[], None]] = {
        "backward": lambda: backward(lambda done: None),
        "exchange": lambda: exchanging(exchange, None, False),
        "without": lambda: exchanging(exchange, backward, False),
        "with": lambda: exchanging(exchange, backward, True),
        "tcp": lambda: streaming(sockets, given, found, None),
        "backward and tcp": lambda: streaming(sockets, given, found, backward),
    }
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name, act in sides.items():
            comm.barrier()
            began = time.perf_counter()
            act()
            taken[name].append(max(comm.gather(time.perf_counter() - began)))
    s = {name: statistics.median(values[1:]) for name, values in taken.items()}
    extra = {
        name: [a - b for a, b in zip(values[1:], taken["backward"][1:], strict=True)] for name, values in taken.items()
    }  # seconds beyond the same round's backward
    by_ours = [(a - b) / s["exchange"] for a, b in zip(extra["without"], extra["with"], strict=True)]
    by_tcp = [1.0 - a / s["tcp"] for a in extra["backward and tcp"]]
    told = {
        "busy": busy, "bytes": 4 * FLOATS, "rounds": rounds, "backward_s": s["backward"],
        "exchange_alone_s": s["exchange"], "without_s": s["without"], "with_s": s["with"],
        "hidden": statistics.median(by_ours), "hidden_quartiles": quartiles(by_ours), "tcp_alone_s": s["tcp"],
        "backward_and_tcp_s": s["backward and tcp"], "hidden_by_plain_tcp": statistics.median(by_tcp),
        "hidden_by_plain_tcp_quartiles": quartiles(by_tcp),
    }
    if comm.is_root():
        print(json.dumps(told), flush=True)


def quartiles(values: Sequence[float]) -> list[float]:
    low, _, high = statistics.quantiles(values, n=4)
    return [low, high]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", type=int, choices=(0, 1), action="append", help="(default both)")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--link", default="1gbit")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    busy = arguments.busy or [1, 0]
    if arguments.rank:
        work(bool(busy[0]), arguments.rounds)
        return 0
    with Hosts(2, arguments.link) as hosts:
        for each in busy:
            words = [__file__, "--rank", "--busy", str(each), "--rounds", str(arguments.rounds)]
            command, variables = hosts.mpiexec([1, 1], [sys.executable, "-m", "mpi4py", *words])
            done = subprocess.run(command, env=outside_a_job() | variables)
            if done.returncode:
                return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
