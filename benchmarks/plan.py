"""How near `trireme plan` comes: predicted steps beside measured ones, on pretend hosts.

    python benchmarks/plan.py --out benchmarks/results/plan.jsonl        some minutes; as root

Two hosts of one rank each, with throttled links. For every batch and link the plan is made first, from its own
measurements between these hosts; then the real training loops run, Trireme's with every strategy and torch's DDP with
PowerSGD, in turns. On pretend hosts the kernel carries every packet with the cores that compute, so exchanges that are
hidden are not free.

Prints JSON lines: {"batch", "link", "strategy", "predicted_s", "measured_s", "quartiles_s", "error", ...}; a step is a
whole minibatch, of two turns where it is double buffered; error = predicted / measured - 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import tomli_w
from onebit.sides import RANKS, SIDES, WARM_UP, Team, burst_kib

from hpc.bench import in_turns, machine, make_data, rounded, say, scratch, spread
from hpc.bench_crew import outside_a_job
from hpc.bench_sides import PHASES, WIDTH, Setup, Steps, median
from hpc.hosts import Hosts

SETTLE = 2  # minibatches that bring memory back into the caches, and get a first delayed exchange under way
CLASSES = 1000
# A side's name in a plan.
NAMES = {"float32": "float32", "onebit": "onebit", "onebit-db": "halves", "powersgd1": "powersgd1",
        "powersgd4": "powersgd4"}


def frames_for(batch: int, arguments: argparse.Namespace) -> int:
    """Frames of data that no side uses up."""
    return (WARM_UP + arguments.rounds * (SETTLE + arguments.steps) + 1) * batch


def planned(setup: Setup, hosts: Hosts) -> dict[str, Any]:
    """The plan for a batch between these hosts, as `trireme plan --json` gives it."""
    path, strategy = setup.folder / "plan.toml", SIDES["float32"].strategy
    assert strategy is not None
    path.write_text(tomli_w.dumps(setup.recipe("plan", RANKS, strategy)))
    words = [sys.executable, "-m", "mpi4py", "-m", "hpc", "plan", str(path), "--nodes", str(RANKS), "--json"]
    command, variables = hosts.mpiexec([1] * RANKS, words)
    done = subprocess.run(command, env=outside_a_job() | variables, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"the plan failed: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def trained(setup: Setup, arguments: argparse.Namespace) -> dict[str, Steps]:
    """Minibatches by side, as `hpc.bench_sides` joins them over ranks, sides in turns."""
    taken: dict[str, Steps] = {name: [] for name in NAMES}
    with ExitStack() as stack:
        teams = {name: Team(name, setup, stack) for name in NAMES}
        for round_ in range(arguments.rounds):
            for name in in_turns(round_, list(NAMES)):
                taken[name] += teams[name].take(SETTLE + arguments.steps)[SETTLE:]
    return taken


def records(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A line for every batch, link and strategy."""
    batches = [int(word) for word in arguments.batches.split(",")]
    for link in arguments.links.split(","):
        with Hosts(RANKS, link, burst_kib(link)) as hosts:
            for batch in batches:
                with scratch() as folder:
                    make_data(folder / "data", frames_for(batch, arguments), width=WIDTH, classes=CLASSES)
                    say(f"batch {batch}, {link}: planning")
                    setup = Setup(
                        data=folder / "data", split_frames=frames_for(batch, arguments), batch=batch,
                        layers=arguments.layers, width=arguments.width, classes=CLASSES, activation="sigmoid",
                        folder=folder, hosts=hosts,
                    )
                    plan = planned(setup, hosts)
                    say(f"batch {batch}, {link}: training")
                    taken = trained(setup, arguments)
                (row,) = plan["nodes"]
                for side, steps in taken.items():
                    way = NAMES[side]
                    predicted, timing = row[way]["step_s"], spread([step["seconds"] for step in steps])
                    record = {
                        "batch": batch, "link": link, "strategy": side, "parameters": plan["parameters"],
                        "hosts": RANKS, "predicted_s": predicted, "measured_s": timing["median_s"],
                        "quartiles_s": timing["quartiles_s"], "repetitions": len(steps),
                        "error": predicted / timing["median_s"] - 1,
                        **{key: row[way][key] for key in ("compute_s", "work_s", "link_s", "not_hidden_s")},
                    }
                    if "reduce" in steps[0]:  # torch's sides tell no more than seconds
                        record |= {
                            **{f"measured_{phase}_s": median(steps, phase) for phase in PHASES},
                            "measured_bytes": median(steps, "reduce") + median(steps, "share"),
                            "predicted_bytes": row[way]["bytes_to_owners"] + row[way]["bytes_back"],
                        }
                    yield record | ({"plan": plan} if arguments.plans else {})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", default="256,1024,4096")
    parser.add_argument("--links", default="1gbit,100mbit")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5, help="turns of every strategy (default 5)")
    parser.add_argument("--steps", type=int, default=3, help="minibatches of a turn (default 3)")
    parser.add_argument("--plans", action="store_true", help="the whole plan in every line")
    parser.add_argument("--out", type=Path, help="append the lines to this file too")
    arguments = parser.parse_args()
    errors = []
    _print(machine(), arguments.out)
    for record in records(arguments):
        if record["strategy"] not in ("powersgd1", "powersgd4"):
            errors.append(abs(record["error"]))
        _print(record, arguments.out)
    found = {"largest_error": max(errors), "median_error": statistics.median(errors)}
    _print({"what": "all of Trireme's", **found}, arguments.out)
    return 0


def _print(record: dict[str, Any], out: Path | None) -> None:
    line = json.dumps(rounded(record))
    print(line, flush=True)
    if out:
        with open(out, "a", encoding="utf-8") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    sys.exit(main())
