"""`trireme bench`: what this machine and this code do, beside a peer or a limit measured in the same minutes.

Every benchmark yields records; each is printed as one JSON line, progress goes to stderr. What is compared is measured
in turns (A B, B A, A B ...), so that a busy machine troubles both sides alike; a ratio is given of the medians, and as
the median over the pairs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np

from hpc.bench_options import (
    allreduce_arguments,
    data_arguments,
    onebit_arguments,
    sru_arguments,
    train_arguments,
    writable,
)
from hpc.quantities import counted, doubt
from hpc.shards import ShardWriter, shard_name, write_manifest

EXAMPLES = """examples:
  trireme bench data --gb 1                            reading, shuffling, stacking, waiting: on generated shards
  trireme bench data --data data/demo/train            on your own
  trireme bench train                                  a training step beside a plain torch loop, 2 ranks beside 1
  trireme bench train --precision bfloat16 --ranks 1,2,4 --out results.jsonl
  trireme bench train --layers 3 --width 512 --batch 512 --repeat 5
  trireme bench train --hosts 2 --link 1gbit --batch 4096   how much of the exchange hides behind backward
  trireme bench allreduce --plot all-reduce.png        sums of gradients beside MPI's, gloo's, and the limit
  trireme bench sru --d 512 --length 128 --batch 32    a layer of SRU beside LSTM and convolutions
  trireme bench onebit --sizes 2048x2048               1-bit quantization beside a copy of as many bytes

Every line of standard output is a JSON object. See benchmarks/README.md for how to read them.
"""
LEAST_ROUNDS = 3


class Benchmark(NamedTuple):
    """module: where `measure(arguments)`, which yields records, is."""

    help: str
    module: str
    arguments: Callable[[argparse.ArgumentParser], None]


BENCHMARKS = {
    "data": Benchmark("loading, shuffling and stacking frames; waiting for them", "hpc.bench_data", data_arguments),
    "train": Benchmark("a whole training step, alone and on several ranks", "hpc.bench_train", train_arguments),
    "allreduce": Benchmark(
        "sums of gradients beside MPI, gloo and the machine's limit", "hpc.bench_allreduce", allreduce_arguments
    ),
    "sru": Benchmark("a layer of SRU beside LSTM, convolutions and its own parts", "hpc.bench_sru", sru_arguments),
    "onebit": Benchmark(
        "1-bit quantization and its sums beside a copy, numpy and torch", "hpc.bench_onebit", onebit_arguments
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    chosen = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    for name, benchmark in BENCHMARKS.items():
        sub = chosen.add_parser(
            name, help=benchmark.help, description=f"Measure {benchmark.help}.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        benchmark.arguments(sub)
        sub.add_argument("--out", metavar="FILE", type=writable, help="append the JSON lines to this file too")


def run(arguments: argparse.Namespace) -> int:
    """Measure, and print every record as it comes, and which of its ratios say nothing; the exit code."""
    measure = import_module(BENCHMARKS[arguments.benchmark].module).measure
    ratios = doubted = 0
    for record in chain([machine()], measure(arguments)):
        show({"bench": arguments.benchmark, **record}, arguments.out)
        why = {key.removesuffix("_doubt"): text for key, text in record.items() if key.endswith("_doubt")}
        ratios, doubted = ratios + sum(key.endswith("_of_pairs") for key in record), doubted + len(why)
        if why:
            say(f"  too uncertain to be quoted: {', '.join(f'{name} ({text})' for name, text in why.items())}")
    if doubted:
        busy = f"load {os.getloadavg()[0]:.1f} on {counted(_cores(), 'core')}"
        say(f"{doubted} of {counted(ratios, 'ratio')} say nothing: measured too few times, or quartiles too far apart "
            f"({busy}); measure again when it is quiet, with more rounds or larger sizes")
    return 0


def show(record: dict[str, Any], out: Path | None) -> None:
    """Print a measurement as a JSON line, and append it to a file if one is given."""
    line = json.dumps(rounded(record))
    print(line, flush=True)
    if out:
        with open(out, "a", encoding="utf-8") as file:
            file.write(line + "\n")


def rounded(value: Any) -> Any:
    """JSON values with floats of five digits: more are noise."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list | tuple) else value


def say(text: str) -> None:
    """Progress, for whoever watches."""
    print(text, file=sys.stderr, flush=True)


def machine() -> dict[str, Any]:
    """What the numbers were measured on, and how busy it was before."""
    from hpc.runtime import versions

    names: list[str] = []
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "what": "machine", "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": _cores(), "load": os.getloadavg()[0], "system": platform.system(),
        "versions": versions(),
    }


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def spread(seconds: Sequence[float], prefix: str = "") -> dict[str, Any]:
    """Median, minimum and quartiles of repeated measurements, and their number."""
    low, high = (float(q) for q in np.quantile(seconds, (0.25, 0.75)))
    return {
        f"{prefix}median_s": statistics.median(seconds), f"{prefix}min_s": min(seconds),
        f"{prefix}quartiles_s": [low, high], f"{prefix}repetitions": len(seconds),
    }


def quotient(upper: Sequence[float], lower: Sequence[float], name: str = "ratio") -> dict[str, Any]:
    """How many times `upper` is `lower`: of the medians; the median over neighbours in time; of the minima.

    With the quartiles over the neighbours; where these say that the ratio means nothing, NAME_doubt is why.
    """
    pairs = [a / b for a, b in zip(upper, lower, strict=True)]
    why = doubt(pairs)
    return {
        name: statistics.median(upper) / statistics.median(lower), f"{name}_of_pairs": statistics.median(pairs),
        f"{name}_of_minima": min(upper) / min(lower), f"{name}_quartiles": spread(pairs)["quartiles_s"],
        **({f"{name}_doubt": why} if why else {}),
    }


def in_turns(round_: int, sides: Sequence[Any]) -> Sequence[Any]:
    """The sides in this round's order: there and back, so that a drift of the machine favours nobody."""
    return sides[::-1] if round_ % 2 else sides


def timed(
    acts: Mapping[str, Callable[[], object]], rounds: int, turn_s: float, budget: float = math.inf
) -> dict[str, list[float]]:
    """Seconds of a call of every act, round by round, the acts in turns, each called twice before.

    turn_s  what is quick is called again and again until it takes about so many seconds, and divided
    budget  seconds after which no further round is begun, but for the first LEAST_ROUNDS
    """
    repeats = {}
    for name, act in acts.items():
        act()
        began = time.perf_counter()
        act()
        repeats[name] = max(1, min(1000, int(turn_s / (time.perf_counter() - began + 1e-7))))
    seconds: dict[str, list[float]] = {name: [] for name in acts}
    began = time.monotonic()
    for turn in range(rounds):
        if turn >= LEAST_ROUNDS and time.monotonic() - began > budget:
            break
        for name in in_turns(turn, list(acts)):
            act, start = acts[name], time.perf_counter()
            for _ in range(repeats[name]):
                act()
            seconds[name].append((time.perf_counter() - start) / repeats[name])
    return seconds


@contextmanager
def scratch() -> Iterator[Path]:
    """A short-named temporary folder for generated data, run folders and sockets."""
    with TemporaryDirectory(prefix="trireme-bench-") as name:
        yield Path(name)


def make_data(folder: Path, frames: int, *, width: int = 40, classes: int = 1000, shards: int = 4) -> None:
    """A data set of random frames in the schema of `trireme prepare frames`.

    folder   made if it is not there
    frames   at least so many (utterances of 200 to 600 frames, none cut)
    width    values a frame, normal, float32
    classes  labels are uniform over them, int32
    """
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(1)
    pool = random.standard_normal((1 << 16, width), np.float32)  # drawing all of them would take longer than reading
    entries, utterances, written = [], 0, 0
    for shard in range(shards):
        paths = {kind: folder / shard_name(kind, shard, shards) for kind in ("features", "labels")}
        features = ShardWriter(paths["features"], {"features": ((width,), np.float32)})
        labels = ShardWriter(paths["labels"], {"labels": ((), np.int32)})
        goal = frames * (shard + 1) // shards
        with features, labels:
            while written < goal:
                length, key = int(random.integers(200, 601)), f"utterance-{utterances:07d}"
                at = int(random.integers(0, len(pool) - length))
                features.append(key, {"features": pool[at : at + length]})
                labels.append(key, {"labels": random.integers(0, classes, length, dtype=np.int32)})
                written, utterances = written + length, utterances + 1
        entries.append({"files": [features.summary, labels.summary]})
    fields = {
        "features": {"dtype": "float32", "width": width, "mean": [0.0] * width, "std": [1.0] * width},
        "labels": {"dtype": "int32", "classes": classes, "names": [str(c) for c in range(classes)]},
    }
    manifest = {"kind": "frames", "fields": fields, "utterances": utterances, "frames": written}
    write_manifest(folder, manifest | {"shards": entries})


def recipe_for(folder: Path, run: Path, **tables: Any) -> dict[str, Any]:
    """A recipe for benchmarks, as nested tables: one epoch of the data set in `folder`, nothing judged.

    tables  the recipe's other keys and tables; "task" and "data" are completed
    """
    plain: dict[str, Any] = {
        "run": str(run), "task": {"name": "frames", **tables.pop("task")},
        "data": {"train": str(folder), "verify": False, **tables.pop("data")},
        "optim": {"name": "momentum", "learning_rate": 0.01}, "schedule": {"name": "constant", "epochs": 1},
        "log": {"tensorboard": False, "watchdog": 0.0},
    }
    return plain | tables
