"""Table 1's shape (paper 001): accuracy over ten folds and seconds an epoch, SRU beside LSTM and the wide CNN.

    python benchmarks/sentences.py DATA                         MR and SUBJ, all of it: hours on a CPU
    python benchmarks/sentences.py DATA --folds 1 --epochs 2 --dropouts 0.5     a look
    python benchmarks/sentences.py DATA --encoders sru,lstm,cnn,gru --out table1.jsonl
    python benchmarks/sentences.py DATA --vectors glove.6B.300d.txt             the paper's: given vectors, fixed

DATA holds Kim's (2014) files rt-polarity.all (MR) and subj.all (SUBJ); --sets names others: trec=trec.all. Every
setting is a run of `trireme folds` on jobs/recipes/sentences.toml below --work (default runs/table1); encoders take
turns fold by fold, so what else the machine does troubles all alike. The same command again goes on where it stopped
and trains nothing twice. Of a fold that is measured only the log and the result are kept.

Prints one JSON line a setting: {"bench": "sentences", "set", "encoder", "dropout", "epochs", "folds", "accuracy",
"accuracy_deviation", "validation_accuracy", "epoch_s", "epoch_s_of_folds", "chosen"}: means over folds, the
deviation of the test accuracy over folds, and the median over folds of the seconds an epoch took. "chosen" is the
dropout with the best validation accuracy of its set and encoder: the table on standard error has those alone.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from jobs.demo import ranks_command

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "jobs" / "recipes" / "sentences.toml"


class Setting(NamedTuple):
    """One line of the output, and where its folds are trained."""

    set: str
    encoder: str
    dropout: float

    def run(self, work: Path) -> Path:
        return work / f"{self.set}-{self.encoder}-{self.dropout:g}"


def call(words: list[str]) -> None:
    """Run a `trireme` command; its standard output is shown only if it fails."""
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(words)} ended with {done.returncode}:\n{done.stdout}")


def prepare(name: str, file: Path, arguments: argparse.Namespace) -> Path:
    """The set's folds, made if they are not there."""
    folder = arguments.work / "data" / name
    vectors = ["--vectors", str(arguments.vectors)] if arguments.vectors else []
    call([*trireme(1), "prepare", "sentences", str(file), str(folder), "--folds", str(arguments.of), *vectors])
    return folder


def trireme(ranks: int) -> list[str]:
    return [sys.executable, "-m", "mpi4py", "-m", "hpc"] if ranks == 1 else ranks_command(ranks)


def train(setting: Setting, fold: int, data: Path, arguments: argparse.Namespace) -> None:
    """Train and measure one fold, unless it was before."""
    run = setting.run(arguments.work)
    fold_run = run / sorted(path.name for path in data.glob("fold-*"))[fold]
    if not (fold_run / "fold.json").exists():
        print(f"{setting.set}, {setting.encoder}, dropout {setting.dropout:g}: {fold_run.name}", file=sys.stderr)
        words = [f"run={run}", f"task.encoder={setting.encoder}", f"task.dropout={setting.dropout}"]
        words += [f"schedule.epochs={arguments.epochs}"] if arguments.epochs else []
        words += [f"task.vectors={arguments.vectors}"] if arguments.vectors else []
        words += arguments.overrides
        call([*trireme(arguments.ranks), "folds", "--only", str(fold), str(RECIPE), str(data), *words])
    shutil.rmtree(fold_run / "checkpoints", ignore_errors=True)
    (fold_run / "model.safetensors").unlink(missing_ok=True)


def line(setting: Setting, arguments: argparse.Namespace) -> dict[str, Any]:
    """A setting's line, without "chosen"."""
    result = json.loads((setting.run(arguments.work) / "folds.json").read_text())
    folds = result["folds"][: arguments.folds]
    accuracies = [fold["test"]["accuracy"] for fold in folds]
    seconds = [fold["epoch_s"] for fold in folds if fold["epoch_s"] is not None]  # a fold resumed at its end has none
    return {
        "bench": "sentences", **setting._asdict(), "vectors": arguments.vectors or "learned",
        "epochs": statistics.fmean(fold["epochs"] for fold in folds), "folds": len(folds),
        "accuracy": statistics.fmean(accuracies),
        "accuracy_deviation": statistics.stdev(accuracies) if len(folds) > 1 else None,
        "validation_accuracy": statistics.fmean(fold["validation"]["accuracy"] for fold in folds),
        "best_epoch": statistics.fmean(fold["best_epoch"] for fold in folds),
        "epoch_s": statistics.median(seconds) if seconds else None, "epoch_s_of_folds": seconds,
    }


def choose(lines: list[dict[str, Any]]) -> None:
    """Mark, in place, the dropout of every set and encoder that validation speaks for."""
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for held in lines:
        held["chosen"] = False
        key = held["set"], held["encoder"]
        if key not in best or held["validation_accuracy"] > best[key]["validation_accuracy"]:
            best[key] = held
    for held in best.values():
        held["chosen"] = True


def show(lines: list[dict[str, Any]]) -> None:
    table = Table(title="Table 1: the dropout that validation chooses")
    for heading in ("set", "encoder", "dropout", "folds", "accuracy", "deviation", "best epoch", "s an epoch"):
        table.add_column(heading, justify="left" if heading in ("set", "encoder") else "right")
    for held in (held for held in lines if held["chosen"]):
        deviation, seconds = held["accuracy_deviation"], held["epoch_s"]
        table.add_row(
            held["set"], held["encoder"], f"{held['dropout']:g}", str(held["folds"]), f"{held['accuracy']:.2%}",
            "–" if deviation is None else f"{deviation:.2%}", f"{held['best_epoch']:.1f}",
            "–" if seconds is None else f"{seconds:.2f}",
        )
    Console(stderr=True).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the folder of the sets' files")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="recipe keys to set")
    parser.add_argument("--sets", default="mr=rt-polarity.all,subj=subj.all", metavar="NAME=FILE,...")
    parser.add_argument("--encoders", default="sru,lstm,cnn", help="also gru, qrnn, sru-later")
    parser.add_argument("--dropouts", default="0.1,0.3,0.5,0.7")
    parser.add_argument("--of", type=int, default=10, metavar="K", help="folds that a set is cut into (default 10)")
    parser.add_argument("--folds", type=int, metavar="N", help="train on the first N of them alone (default: all)")
    parser.add_argument("--epochs", type=int, help="at most so many (default: the recipe's)")
    parser.add_argument("--vectors", default="", metavar="FILE", help="word vectors, fixed (default: they are learned)")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "table1", help="where data and runs are kept")
    parser.add_argument("--out", type=Path, help="append the lines to this file too")
    arguments = parser.parse_intermixed_args()
    arguments.folds = arguments.folds or arguments.of
    arguments.vectors = str(Path(arguments.vectors).resolve()) if arguments.vectors else ""
    sets = dict(word.split("=", 1) for word in arguments.sets.split(","))
    data = {name: prepare(name, arguments.data / file, arguments) for name, file in sets.items()}
    settings = [
        Setting(name, encoder, float(dropout))
        for name in sets for dropout in arguments.dropouts.split(",") for encoder in arguments.encoders.split(",")
    ]
    for fold in range(arguments.folds):
        for setting in settings:
            train(setting, fold, data[setting.set], arguments)
    lines = [line(setting, arguments) for setting in settings]
    choose(lines)
    for held in lines:
        print(json.dumps(held), flush=True)
    if arguments.out:
        with open(arguments.out, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(held) + "\n" for held in lines)
    show(lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
