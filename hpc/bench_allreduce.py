"""`trireme bench allreduce`: our sum of gradients beside MPI's and gloo's, and beside what the machine can do at all.

All implementations live in the same processes and take turns, round by round. A time is the slowest rank's from a
common start until it can read the whole sum. The limit on one host is a plain copy by every rank at once; between hosts
it is one TCP stream.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

from hpc.bench import quotient, say, scratch, spread
from hpc.bench_crew import Crew
from hpc.hosts import Hosts, missing_rights
from hpc.quantities import counted

LEAST_ROUNDS = 3
BUFFERS = 5  # of the largest size, that every rank holds

Name = tuple[str, str]  # implementation, algorithm
Seconds = dict[Name, list[float]]  # of every round


class Setting(NamedTuple):
    """So many ranks, spread evenly over so many hosts; link None: one host."""

    ranks: int
    hosts: int
    link: str | None

    def __str__(self) -> str:
        where = counted(self.hosts, "host")
        return f"{counted(self.ranks, 'rank')} on {where}{', ' + self.link if self.link else ''}"


def settings_of(ranks: list[int] | None, hosts: list[int] | None, link: str) -> list[Setting]:
    """What is measured: every number of ranks asked for on every number of hosts; if none is, what shows most.

    Raises ValueError for ranks that cannot be spread evenly.
    """
    pairs = [(k, h) for h in hosts or [1] for k in ranks or [max(2, h)]]
    if ranks is None and hosts is None:
        pairs = [(2, 1), (4, 1), (2, 2), (4, 2)]
    for k, h in pairs:
        if k % h or k < 2:
            asked = f"{counted(k, 'rank')} on {counted(h, 'host')}"
            raise ValueError(f"{asked}: give two ranks or more, and a multiple of the hosts")
    return [Setting(k, h, link if h > 1 else None) for k, h in pairs]


def check_memory(size: int, ranks: int) -> None:
    """Raise ValueError if so many ranks cannot hold their buffers of `size` bytes in this machine's memory."""
    need, have = BUFFERS * ranks * size, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if need > have:
        raise ValueError(
            f"--sizes: {size / 2**30:,.0f} GiB take {need / 2**30:,.0f} GiB of memory on {counted(ranks, 'rank')}, and "
            f"this machine has {have / 2**30:,.1f} GiB; ask for smaller sizes"
        )


def measure(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A record of every implementation and size, and what follows from them.

    Raises ValueError for ranks that cannot be spread over the hosts or sizes beyond the memory, OSError where pretend
    hosts are asked for and cannot be made.
    """
    settings = settings_of(arguments.ranks, arguments.hosts, arguments.link)
    check_memory(max(arguments.sizes), max(s.ranks for s in settings))
    missing = missing_rights() if any(s.hosts > 1 for s in settings) else ""
    if missing and arguments.hosts:
        raise OSError(missing)
    found: list[dict[str, Any]] = []
    for setting in settings:
        if missing and setting.hosts > 1:
            say(f"{setting}: left out, {missing}")
            yield {"what": "left out", **setting._asdict(), "why": missing}
            continue
        for record in _measured(setting, arguments):
            found.append(record)
            yield record
    if arguments.plot:
        from hpc.bench_picture import draw  # matplotlib: only where it is wanted

        arguments.plot.write_bytes(draw(found))
        say(f"drawn: {arguments.plot}")


def _measured(setting: Setting, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    with scratch() as folder, ExitStack() as stack:
        hosts = stack.enter_context(Hosts(setting.hosts, setting.link)) if setting.link else None
        spec = {
            "bucket": arguments.bucket, "sizes": arguments.sizes, "store": str(folder / "gloo"),
            "interface": "eth0" if hosts else "lo",
        }
        crew = stack.enter_context(
            Crew("all-reduce", setting.ranks, "hpc.bench_reducer", spec, folder=folder, hosts=hosts)
        )
        for size in arguments.sizes:
            seconds, repeats = _rounds(crew, size, arguments.rounds, arguments.seconds)
            medians = ", ".join(
                f"{' '.join(filter(None, name))} {1e3 * spread(taken)['median_s']:.4g} ms"
                for name, taken in seconds.items()
            )
            say(f"{setting}, {size:,} bytes: {medians}")
            yield from _records(setting, size, seconds, repeats, arguments.bucket)


def _rounds(crew: Crew, size: int, rounds: int, limit_s: float) -> tuple[Seconds, int]:
    """The slowest rank's seconds of every implementation and round, and how often a timing repeats an operation."""
    seconds: Seconds = {}
    began = time.monotonic()
    for round_ in range(rounds):
        if round_ >= LEAST_ROUNDS and time.monotonic() > began + limit_s:
            break
        reports = crew.take(size)
        for number, (impl, algorithm) in enumerate(reports[0]["sides"]):
            slowest = max(report["seconds"][number] for report in reports)
            seconds.setdefault((impl, algorithm), []).append(slowest)
    return seconds, reports[0]["repeats"]


def touched(impl: str, setting: Setting, size: int) -> float | None:
    """Bytes that every rank must really read and write for a buffer of `size`; None where that is not the limit.

    Ours reads all K ranks' part of one piece of K, and writes the sum of that piece.
    """
    if impl == "memcpy":
        return 2.0 * size
    return (setting.ranks + 1) * size / setting.ranks if impl == "trireme" and setting.hosts == 1 else None


def crossing(setting: Setting, size: int) -> float:
    """Bytes that must leave every host, and come to it, so that all have the sum: 2 (H - 1) / H of the size."""
    return 2 * (setting.hosts - 1) * size / setting.hosts


def _records(
    setting: Setting, size: int, seconds: Seconds, repeats: int, bucket: int
) -> Iterator[dict[str, Any]]:
    where: dict[str, Any] = {**setting._asdict(), "bytes": size}
    if setting.hosts > 1:
        where["shared_machine"] = True  # the hosts are pretended: they share this machine's cores and memory
    for (impl, algorithm), taken in seconds.items():
        timing = spread(taken)
        record = {"what": "all-reduce", "impl": impl, "algorithm": algorithm, **where}
        if impl == "trireme":
            record["bucket"] = bucket if setting.hosts > 1 else size
        moved = touched(impl, setting, size)
        speeds = {"gbps": size / timing["median_s"] / 1e9}
        if moved is not None:
            speeds["memory_gbps"] = moved / timing["median_s"] / 1e9
        yield record | timing | {"repeats": repeats} | speeds
    for name in seconds:
        if name[0] == "trireme":
            yield _summary(name, where, setting, size, seconds)


def _summary(name: Name, where: dict[str, Any], setting: Setting, size: int, seconds: Seconds) -> dict[str, Any]:
    """How many times as fast as MPI and gloo, and what share of the limit; with their quartiles."""
    ours, by_impl = seconds[name], {impl: taken for (impl, _), taken in seconds.items() if impl != "trireme"}
    record = {"what": "all-reduce against others", "algorithm": name[1], **where, "pairs": len(ours)}
    for peer in ("mpi", "gloo"):
        record |= quotient(by_impl[peer], ours, f"times_{peer}")
    if setting.hosts == 1:
        share = (touched("trireme", setting, size) or 0.0) / (2 * size)
        limit, label = by_impl["memcpy"], "of_copy_bandwidth"
    else:
        share = crossing(setting, size) / size
        limit, label = by_impl["tcp"], "of_tcp_goodput"
    return record | quotient([share * taken for taken in limit], ours, label)
