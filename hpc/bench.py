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
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np

from hpc.hosts import MOST
from hpc.quantities import counted, doubt
from hpc.shards import MANIFEST, SCHEMA, ShardWriter, shard_name, write_json

EXAMPLES = """examples:
  trireme bench data --gb 1                            reading, shuffling, stacking, waiting: on generated shards
  trireme bench data --data data/demo/train            on your own
  trireme bench train                                  a training step beside a plain torch loop, 2 ranks beside 1
  trireme bench train --precision bfloat16 --ranks 1,2,4 --out results.jsonl
  trireme bench train --layers 3 --width 512 --batch 512 --repeat 5
  trireme bench train --hosts 2 --link 1gbit --batch 4096   how much of the exchange hides behind backward
  trireme bench allreduce --plot all-reduce.png        sums of gradients beside MPI's, gloo's, and the limit

Every line of standard output is a JSON object. See benchmarks/README.md for how to read them.
"""
DATA_EXAMPLES = """examples:
  trireme bench data --gb 1
  trireme bench data --data data/demo/train --split-frames 100000 --repeat 30 --out results.jsonl
"""
TRAIN_EXAMPLES = """examples:
  trireme bench train
  trireme bench train --precision bfloat16
  trireme bench train --layers 7 --width 2048 --classes 9304 --batch 1024 --ranks 1,2,4 --steps 3
  trireme bench train --hosts 2 --link 1gbit --batch 4096
"""
ALLREDUCE_EXAMPLES = """examples:
  trireme bench allreduce --plot all-reduce.png        one host with 2 and 4 ranks, and two throttled hosts
  trireme bench allreduce --ranks 2 --sizes 1K,64M,256M --out results.jsonl
  trireme bench allreduce --ranks 2,4 --hosts 2 --link 1gbit --bucket 4M
"""
KIB = 1 << 10
SIZES = [KIB << shift for shift in range(0, 20, 2)]  # 1 KiB to 256 MiB
SLOWEST, QUICKEST = 1e5, 1e12  # bits a second that a link can be throttled to
UNITS = {"": 1, "K": KIB, "M": KIB << 10, "G": KIB << 20}


class Benchmark(NamedTuple):
    """module: where `measure(arguments)`, which yields records, is."""

    help: str
    module: str
    arguments: Callable[[argparse.ArgumentParser], None]


def data_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = DATA_EXAMPLES
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--data", metavar="FOLDER", type=Path, help="a data set; without it one is generated")
    where.add_argument("--gb", type=_positive(float), default=1.0, help="size of the generated data set (default 1)")
    parser.add_argument(
        "--split-frames", type=_positive(int), default=262144, metavar="N", help="frames of a split (default 262144)"
    )
    parser.add_argument("--batch", type=_positive(int), default=1024, help="frames of a batch (default 1024)")
    parser.add_argument("--repeat", type=_positive(int), default=15, metavar="R", help="pairs to measure (default 15)")
    parser.add_argument(
        "--steps", type=_positive(int), default=60, help="training steps for the share of waiting (default 60)"
    )


def train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = TRAIN_EXAMPLES
    number = _positive(int)
    parser.add_argument("--layers", type=number, default=7, help="hidden layers (default 7)")
    parser.add_argument("--width", type=number, default=1024, help="units a hidden layer (default 1024)")
    parser.add_argument("--classes", type=number, default=1000, help="classes (default 1000)")
    parser.add_argument("--activation", choices=("sigmoid", "relu"), default="sigmoid")
    parser.add_argument("--batch", type=number, default=1024, help="frames of a step, over all splits (default 1024)")
    parser.add_argument(
        "--ranks", type=_dividing, default=[1, 2], metavar="K,K", help="numbers of ranks (default 1,2)"
    )
    parser.add_argument(
        "--hosts", type=_host, default=1, metavar="H", help="pretend hosts on this machine (default 1: itself)"
    )
    parser.add_argument("--link", type=_link, default="1gbit", help="rate of every pretend host's link (default 1gbit)")
    parser.add_argument(
        "--bucket", type=_size, default=UNITS["M"], metavar="B",
        help="bytes that several hosts exchange at a time (default 1M)",
    )
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cpu", help="(default cpu)")
    parser.add_argument("--threads", type=number, default=1, help="threads a rank (default 1)")
    parser.add_argument("--steps", type=number, default=4, help="steps a turn, after one that settles (default 4)")
    parser.add_argument("--repeat", type=number, default=15, metavar="R", help="turns of every side (default 15)")
    parser.add_argument("--bind", action="store_true", help="let mpiexec bind every rank to a core of its own")


def allreduce_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = ALLREDUCE_EXAMPLES
    parser.add_argument(
        "--sizes", type=_sizes, default=SIZES, metavar="B,B", help="bytes; K, M: KiB, MiB (default 1K,4K,16K ... 256M)"
    )
    parser.add_argument("--ranks", type=_numbers, metavar="K,K", help="numbers of ranks, over all hosts")
    parser.add_argument(
        "--hosts", type=_hosts, metavar="H,H",
        help="numbers of pretend hosts on this machine (default, without --ranks: 2 and 4 ranks on one, 2 on two)",
    )
    parser.add_argument("--link", type=_link, default="1gbit", help="rate of every pretend host's link (default 1gbit)")
    parser.add_argument("--rounds", type=_positive(int), default=15, metavar="R", help="turns of all (default 15)")
    parser.add_argument(
        "--seconds", type=_positive(float), default=60.0, metavar="S",
        help="begin no further round of a size after so long, but for the first three (default 60)",
    )
    parser.add_argument(
        "--bucket", type=_size, default=UNITS["M"], metavar="B",
        help="bytes that several hosts exchange at a time (default 1M); within a host all at once",
    )
    parser.add_argument("--plot", metavar="FILE", type=_picture, help="draw the result (PNG)")


BENCHMARKS = {
    "data": Benchmark("loading, shuffling and stacking frames; waiting for them", "hpc.bench_data", data_arguments),
    "train": Benchmark("a whole training step, alone and on several ranks", "hpc.bench_train", train_arguments),
    "allreduce": Benchmark(
        "sums of gradients beside MPI, gloo and the machine's limit", "hpc.bench_allreduce", allreduce_arguments
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
        sub.add_argument("--out", metavar="FILE", type=_file, help="append the JSON lines to this file too")


def run(arguments: argparse.Namespace) -> int:
    """Measure, and print every record as it comes, and which of its ratios say nothing; the exit code."""
    measure = import_module(BENCHMARKS[arguments.benchmark].module).measure
    ratios = doubted = 0
    for record in chain([machine()], measure(arguments)):
        _show({"bench": arguments.benchmark, **record}, arguments.out)
        why = {key.removesuffix("_doubt"): text for key, text in record.items() if key.endswith("_doubt")}
        ratios, doubted = ratios + sum(key.endswith("_of_pairs") for key in record), doubted + len(why)
        if why:
            say(f"  too uncertain to be quoted: {', '.join(f'{name} ({text})' for name, text in why.items())}")
    if doubted:
        busy = f"load {os.getloadavg()[0]:.1f} on {counted(_cores(), 'core')}"
        say(f"{doubted} of {counted(ratios, 'ratio')} say nothing: measured too few times, or quartiles too far apart "
            f"({busy}); measure again when it is quiet, with more rounds or larger sizes")
    return 0


def _show(record: dict[str, Any], out: Path | None) -> None:
    line = json.dumps(_rounded(record))
    print(line, flush=True)
    if out:
        with open(out, "a", encoding="utf-8") as file:
            file.write(line + "\n")


def _rounded(value: Any) -> Any:
    """Floats to five digits: more are noise."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list) else value


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
    manifest = {"schema": SCHEMA, "kind": "frames", "fields": fields, "utterances": utterances, "frames": written}
    write_json(folder / MANIFEST, manifest | {"shards": entries})


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


def _positive(kind: Any) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.inf
        if value == math.inf:
            raise argparse.ArgumentTypeError(f"'{text}' is not a {'whole ' if kind is int else ''}number above 0")
        if not value > 0:
            raise argparse.ArgumentTypeError(f"'{text}' is not above 0")
        return value

    return parse


def _numbers(text: str) -> list[int]:
    try:
        found = sorted({int(word) for word in text.split(",")})
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of numbers such as 1,2,4") from error
    if found[0] < 1:
        raise argparse.ArgumentTypeError(f"'{text}': every number must be above 0")
    return found


def _hosts(text: str) -> list[int]:
    found = _numbers(text)
    if found[-1] > MOST:
        raise argparse.ArgumentTypeError(f"'{text}': this machine can pretend to be 1 to {MOST} hosts")
    return found


def _host(text: str) -> int:
    found = _hosts(text)
    if len(found) > 1:
        raise argparse.ArgumentTypeError(f"'{text}': one number of hosts at a time")
    return found[0]


def _link(text: str) -> str:
    """A rate in tc's words, of bits a second."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgt]?)bit", text.lower())
    rate = float(found[1]) * 1000.0 ** " kmgt".index(found[2] or " ") if found else 0.0
    if not SLOWEST <= rate <= QUICKEST:
        raise argparse.ArgumentTypeError(f"'{text}' is not a rate such as 100mbit or 1gbit, from 100kbit to 1tbit")
    return text


def _file(text: str) -> Path:
    """A file to write: found out now, not after all was measured."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"'{text}' is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"'{text}': there is no folder '{path.parent}'; make it first")
    return path


def _picture(text: str) -> Path:
    if Path(text).suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"'{text}' is not the name of a PNG file; end it in .png")
    return _file(text)


def _dividing(text: str) -> list[int]:
    found = _numbers(text)
    if any(found[-1] % k for k in found):
        raise argparse.ArgumentTypeError(f"'{text}': every number must be above 0 and divide the largest")
    return found


def _size(text: str) -> int:
    """Bytes: "4096", "4K", "1M"; whole float32 values."""
    word = text.strip().upper().removesuffix("IB")
    digits, unit = (word[:-1], word[-1]) if word[-1:].isalpha() else (word, "")
    if not digits.isdigit() or unit not in UNITS or not int(digits) or int(digits) * UNITS[unit] % 4:
        raise argparse.ArgumentTypeError(f"'{text}' is not a size such as 4K or 256M, a multiple of 4 bytes")
    return int(digits) * UNITS[unit]


def _sizes(text: str) -> list[int]:
    return sorted({_size(word) for word in text.split(",")})
