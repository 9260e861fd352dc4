"""`trireme folds`: cross-validation, a run a fold, each fold's model measured on its own test set."""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from collectives.comm import Comm
from hpc import training
from hpc.build import load_run, registry
from hpc.config import Recipe, load
from hpc.evaluate import evaluate
from hpc.files import write_json
from hpc.quantities import metric, spoken
from hpc.records import SUCCESS, read_records
from hpc.run import compare_fields, read_data
from hpc.runtime import PREEMPTED, StopFlag
from hpc.shards import MANIFEST, DataError, Dataset, read_manifest

RESULT = "folds.json"
SCORE = "fold.json"  # in a fold's run folder
FOLD = re.compile(r"fold-\d+")
ABOUT = """Train a recipe on every fold of a data set in turn, fold-00 first, each in a run folder of its own
(RUN/fold-00 ...; RUN is the recipe's 'run'), and measure the model that each run ships on the fold's test set.

RUN/folds.json and the table have every fold's result, their mean and standard deviation, and the seconds that an epoch
took (without validation). A finished fold is kept and an interrupted one goes on, so the same command finishes what was
begun. The recipe's data.train and data.validation are set here."""
EXAMPLES = """examples:
  trireme prepare sentences rt-polarity.all data/mr --folds 10
  trireme folds jobs/recipes/sentences.toml data/mr
  trireme folds jobs/recipes/sentences.toml data/mr run=runs/mr-lstm task.encoder=lstm task.dropout=0.3
  trireme folds --only 0,1 jobs/recipes/sentences.toml data/mr schedule.epochs=2
  mpiexec -n 2 python -m mpi4py -m hpc folds jobs/recipes/sentences.toml data/mr
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = ABOUT, EXAMPLES
    parser.add_argument("recipe", help="a recipe file (TOML)")
    parser.add_argument("data", type=Path, help="a folder of folds: what 'trireme prepare sentences --folds' wrote")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="recipe keys to set")
    parser.add_argument("--only", metavar="K,...", help="these folds alone, e.g. 0,1 (default: all)")


def run(arguments: argparse.Namespace, comm: Comm) -> int:
    """Train on and measure every fold; 0, or PREEMPTED if asked to stop (collective)."""
    names = comm.on_root(lambda: find_folds(arguments.data, arguments.only))
    folder = Path(comm.on_root(lambda: _recipe(arguments, names[0]).run))
    device = comm.on_root(lambda: _recipe(arguments, names[0]).device)
    for number, name in enumerate(names, 1):
        comm.on_root(partial(_say, f"{name}, {number} of {len(names)}"))
        words = [*arguments.overrides, *overrides_of(arguments.data / name), f"run={json.dumps(str(folder / name))}"]
        code = training.run(argparse.Namespace(recipe=arguments.recipe, overrides=words), comm)
        if code:
            return code
        stop = StopFlag().listen()
        score(folder / name, arguments.data / name, device, comm)
        comm.on_root(partial(_say_score, folder / name))
        if any(comm.gather(stop.requested)):
            return PREEMPTED
    comm.on_root(lambda: show(write_result(folder, arguments.data)))
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _say_score(run: Path) -> None:
    """A finished fold's line."""
    scored = _scored(run) or {}
    parts = [(part, _with_accuracy(scored[part])) for part in ("test", "validation") if part in scored]
    numbers = [f"{part} {spoken(name)} {metric(name, value)}" for part, held in parts for name, value in held.items()]
    _say(f"{run.name}: {', '.join(numbers)}")


def _recipe(arguments: argparse.Namespace, name: str) -> Recipe:
    return load(arguments.recipe, [*arguments.overrides, *overrides_of(arguments.data / name)], registry())


def find_folds(data: Path, only: str | None = None) -> list[str]:
    """The names of a data set's folds, in order: all, or those of a list of numbers.

    Raises DataError if there are none, or one has no training or test set; ValueError for a number that is no fold.
    """
    names = sorted(path.name for path in data.glob("fold-*") if FOLD.fullmatch(path.name)) if data.is_dir() else []
    if not names:
        raise DataError(f"'{data}' holds no folds (fold-00 ...); make them with 'trireme prepare sentences --folds 10'")
    for name in names:
        for part in ("train", "test"):
            if not (data / name / part / MANIFEST).is_file():
                raise DataError(f"'{data / name}' has no finished data set '{part}'; run 'trireme prepare' again")
    if only is None:
        return names
    by_number = {int(name.removeprefix("fold-")): name for name in names}
    wanted = only.split(",")
    wrong = [word for word in wanted if not word.strip().isdecimal() or int(word) not in by_number]
    if wrong:
        raise ValueError(f"--only {only}: {wrong[0]!r} is no fold; '{data}' has {min(by_number)} to {max(by_number)}")
    return [by_number[number] for number in sorted({int(word) for word in wanted})]


def overrides_of(fold: Path) -> list[str]:
    """What a fold sets in the recipe: its data."""
    judged = fold / "validation"
    values = {
        "data.train": str(fold / "train"),
        "data.validation": str(judged) if (judged / MANIFEST).is_file() else "",
    }
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]


def score(run: Path, fold: Path, device_name: str, comm: Comm) -> None:
    """Measure a finished run's model on its fold's test and validation sets (collective).

    What comes out is kept as `fold.json` in the run; nothing is done if that is there for this very model.
    """
    if comm.on_root(lambda: _scored(run) is not None):
        return
    _, task, model, device = load_run(run, device_name, comm)
    measured: dict[str, dict[str, float]] = {}
    for part in ("test", "validation"):
        if not comm.on_root(partial(_fits, run, fold / part)):
            continue
        dataset = Dataset(fold / part, task.fields, task.targets)
        measured[part] = evaluate(task, model, dataset, comm, device.place, device.autocast)
        dataset.close()
    scored = {"sha256": comm.on_root(lambda: _shipped(run)["sha256"]), **measured}
    comm.on_root(lambda: write_json(run / SCORE, scored))


def _fits(run: Path, data: Path) -> bool:
    """Whether there is a data set; raises RunError if it is another than the run was trained on."""
    if not (data / MANIFEST).is_file():
        return False
    compare_fields(read_data(run)["fields"], read_manifest(data)["fields"], str(data))
    return True


def _shipped(run: Path) -> dict[str, Any]:
    return json.loads((run / SUCCESS).read_text(encoding="utf-8"))


def _scored(run: Path) -> dict[str, Any] | None:
    """What was measured of a run's model before, or None."""
    try:
        scored = json.loads((run / SCORE).read_text(encoding="utf-8"))
        return scored if scored["sha256"] == _shipped(run)["sha256"] else None
    except (OSError, ValueError, KeyError):
        return None


def write_result(folder: Path, data: Path) -> dict[str, Any]:
    """Join what was measured of all finished folds of a run folder into its folds.json, and return that.

    {"run", "data", "folds": [{"fold", "test": {metric: value}, "validation", "epochs", "best_epoch", "epoch_s"}],
    "mean": {...}, "deviation": {...}}: means over folds of every test metric, of "validation_..." and of "epoch_s", and
    their sample standard deviations (null for one fold). "accuracy" stands beside a metric "error". Without validation,
    "best_epoch" is null.
    """
    folds = []
    for path in sorted(folder.glob("fold-*")):
        scored = _scored(path) if FOLD.fullmatch(path.name) else None
        if scored is not None:
            measured: dict[str, Any] = {p: _with_accuracy(scored[p]) for p in ("test", "validation") if p in scored}
            fold: dict[str, Any] = {"fold": path.name, "sha256": scored["sha256"], **measured, **_history(path)}
            folds.append(fold)
    columns: dict[str, list[float]] = {}
    for fold in folds:
        seconds: dict[str, float] = {} if fold["epoch_s"] is None else {"epoch_s": fold["epoch_s"]}
        for name, value in (_values(fold) | seconds).items():
            columns.setdefault(name, []).append(value)
    deviation = {name: statistics.stdev(held) if len(held) > 1 else None for name, held in columns.items()}
    result: dict[str, Any] = {
        "run": str(folder), "data": str(data), "folds": folds,
        "mean": {name: statistics.fmean(held) for name, held in columns.items()}, "deviation": deviation,
    }
    write_json(folder / RESULT, result)
    return result


def _values(fold: dict[str, Any]) -> dict[str, float]:
    """A fold's metrics by the names that their columns have."""
    return fold["test"] | {f"validation_{name}": value for name, value in fold.get("validation", {}).items()}


def _with_accuracy(metrics: dict[str, float]) -> dict[str, float]:
    return {**metrics, "accuracy": 1.0 - metrics["error"]} if "error" in metrics else metrics


def _history(run: Path) -> dict[str, Any]:
    """Epochs trained, the epoch of the shipped model, and the median seconds an epoch took, read off the log."""
    records = read_records(run)
    trained = [record for record in records if record["event"] == "train"]
    per_epoch = next(record["steps_per_epoch"] for record in records if record["event"] == "start")
    best = _shipped(run).get("best_step", -1)  # -1: nothing was validated
    return {
        "epochs": trained[-1]["epoch"] if trained else 0, "epoch_s": seconds_an_epoch(records),
        "best_epoch": best / per_epoch if best >= 0 else None,
    }


def seconds_an_epoch(records: Sequence[dict[str, Any]]) -> float | None:
    """The median over a log's stretches of the seconds of training that an epoch takes; None if nothing was trained."""
    rates: list[float] = []
    reached: float | None = None
    for record in records:
        if record["event"] == "start":
            reached = 0.0 if record["step"] == 0 else None
        elif record["event"] == "train":
            own = record["by_rank"][0]
            seconds = record["seconds"] - own["validate"] - own["checkpoint"] - own.get("select", 0.0)
            if reached is not None and record["epoch"] > reached:
                rates.append(seconds / (record["epoch"] - reached))
            reached = record["epoch"]
    return statistics.median(rates) if rates else None


def show(result: dict[str, Any]) -> None:
    """Print a line a fold, and mean and standard deviation over folds."""
    known = result["mean"]
    names = [name for name in ("accuracy", "validation_accuracy") if name in known]
    names = names or [name for name in known if name != "epoch_s"]
    table = Table(title=f"{result['run']} on {result['data']}")
    table.add_column("fold", no_wrap=True)
    for heading in [*map(spoken, names), "epochs", "best epoch", "s an epoch"]:
        table.add_column(heading, justify="right")
    for fold in result["folds"]:
        values = [metric(name, _values(fold).get(name)) for name in names]
        best = "–" if fold["best_epoch"] is None else f"{fold['best_epoch']:.3g}"
        table.add_row(fold["fold"], *values, f"{fold['epochs']:.3g}", best, _seconds(fold["epoch_s"]))
    table.add_section()
    for row in ("mean", "deviation"):
        held = result[row]
        table.add_row(row, *(metric(name, held[name]) for name in names), "", "", _seconds(held.get("epoch_s")))
    Console().print(table)


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
