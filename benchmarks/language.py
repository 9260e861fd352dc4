"""Table 3's shape (paper 001): perplexity at equal time, SRU beside LSTM, and beside both a 5-gram.

    python benchmarks/language.py data/kjv                                a few hours on two cores
    python benchmarks/language.py data/kjv precision=bfloat16 --minutes 20 --seeds 1,2,3 --rates 10,20,40
    python benchmarks/language.py data/kjv --kenlm build/bin              the 5-gram too: KenLM's lmplz and query

DATA is what `trireme prepare text` wrote: train, validation and test. Every kind of layer is trained at every learning
rate for a few epochs with the first seed; the rate with the best validation loss is taken. Then every kind is trained
with every seed for as many epochs as --minutes of training time allow (validation and checkpoints do not count), the
kinds of a seed side by side, so that what else the machine does troubles them alike; newbob halves the rate. The model
that is best on validation is measured on the test set. The same command again goes on where it stopped.

Prints one JSON line a run: {"bench": "language", "kind", "layers", "rate", "seed", "parameters", "epochs", "minutes",
"epoch_s", "validation_perplexity", "test_perplexity", "curve": [[minutes, validation perplexity], ...]}; the tuning's
as "what": "rate"; and the 5-gram's. --picture draws the curves.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hpc.quantities import spoken
from hpc.records import number, read_records
from hpc.report_picture import LIGHT, dress, legend, new_figure, png
from hpc.shards import Dataset

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "jobs" / "recipes" / "kjv_lm.toml"
STRANGER = "UNKNOWN-WORD"  # what the 5-gram sees for the unknown word, whose own name KenLM keeps for itself


class Setting(NamedTuple):
    """One run."""

    kind: str
    layers: int
    rate: float
    seed: int

    def run(self, folder: Path) -> Path:
        return folder / f"{self.kind}-{self.layers}-{self.rate:g}-{self.seed}"


def call(words: list[str]) -> str:
    """Run a command; its standard output."""
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(words)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def trireme(*words: object) -> str:
    return call([sys.executable, "-m", "mpi4py", "-m", "hpc", *map(str, words)])


def train(setting: Setting, folder: Path, epochs: int, arguments: argparse.Namespace) -> Path:
    """Train one run unless that was done before; its folder."""
    run = setting.run(folder)
    if not (run / "success").exists():
        print(f"{run.name}: {epochs} epochs", file=sys.stderr, flush=True)
        trireme(
            "train", RECIPE, *arguments.overrides, f"run={run}", f"data.train={arguments.data}/train",
            f"data.validation={arguments.data}/validation", f"task.kind={setting.kind}",
            f"task.layers={setting.layers}", f"optim.learning_rate={setting.rate}", f"seed={setting.seed}",
            f"schedule.epochs={epochs}", "log.every=20", "log.tensorboard=false", "checkpoint.keep=1",
        )
    return run


def curve(run: Path) -> list[list[float]]:
    """[minutes of training, validation perplexity] at every validation."""
    found, seconds = [], 0.0
    for record in read_records(run):
        if record["event"] in ("train", "rest"):
            part = record["by_rank"][0]
            seconds += record["seconds"] - part["validate"] - part["checkpoint"]
        if record["event"] == "validate":
            found.append([seconds / 60, number(record["perplexity"])])
    return found


def line(setting: Setting, run: Path) -> dict[str, Any]:
    """A finished run's record, without its test."""
    points = curve(run)
    start = next(r for r in read_records(run) if r["event"] == "start")
    return {
        "bench": "language", **setting._asdict(), "parameters": start["parameters"], "precision": start["precision"],
        "epochs": len(points), "minutes": points[-1][0], "epoch_s": 60 * points[-1][0] / len(points),
        "validation_perplexity": min(perplexity for _, perplexity in points), "curve": points,
    }


def side_by_side(settings: list[Setting], folder: Path, epochs: list[int], arguments: argparse.Namespace) -> list[Path]:
    """Train runs, --side-by-side of them at a time."""
    with ThreadPoolExecutor(arguments.side_by_side) as crew:
        return list(crew.map(lambda setting, count: train(setting, folder, count, arguments), settings, epochs))


def tune(layers: dict[str, int], arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The chosen record of every kind."""
    rates, seed = [float(rate) for rate in arguments.rates.split(",")], int(arguments.seeds.split(",")[0])
    settings = [Setting(kind, layers[kind], rate, seed) for rate in rates for kind in layers]
    folder = arguments.work / "rates"
    runs = side_by_side(settings, folder, [arguments.tuning_epochs] * len(settings), arguments)
    records = [line(setting, run) | {"what": "rate"} for setting, run in zip(settings, runs, strict=True)]
    for record in records:
        print(json.dumps(record), flush=True)
    return {
        kind: min((r for r in records if r["kind"] == kind), key=lambda r: r["validation_perplexity"])
        for kind in layers
    }


def grams(arguments: argparse.Namespace) -> dict[str, Any]:
    """A 5-gram with modified Kneser-Ney smoothing, estimated and measured on the very same words."""
    folder = arguments.work / "grams"
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("train", "test"):
        (folder / f"{part}.txt").write_text(text_of(arguments.data / part), encoding="utf-8")
    lmplz = [str(arguments.kenlm / "lmplz"), "-o", "5", "-S", "2G", "--text", str(folder / "train.txt")]
    call([*lmplz, "--arpa", str(folder / "5.arpa"), "--discount_fallback"])
    with open(folder / "test.txt", encoding="utf-8") as test:
        query = [str(arguments.kenlm / "query"), "-v", "summary", str(folder / "5.arpa")]
        said = subprocess.run(query, stdin=test, capture_output=True, text=True, check=True).stdout
    told = dict(text.split(":\t") for text in said.splitlines() if ":\t" in text)
    perplexity = next(float(value) for name, value in told.items() if name.startswith("Perplexity including"))
    return {"bench": "language", "kind": "5-gram", "test_perplexity": perplexity}


def text_of(folder: Path) -> str:
    """A data set's text, a sentence a line."""
    dataset = Dataset(folder, ("words",))
    about = dataset.field("words")
    numbers = np.empty(dataset.rows, np.int32)
    dataset.read("words", 0, dataset.rows, numbers)
    names = list(about["names"])
    names[about["unknown"]] = STRANGER
    names[about["sentence_end"]] = "\n"
    return " ".join(names[n] for n in numbers).replace(" \n ", "\n").replace(" \n", "\n")


def draw(lines: list[dict[str, Any]], gram: dict[str, Any] | None) -> bytes:
    """Validation perplexity over minutes of training, a colour a kind, a line a seed."""
    figure = new_figure(4.6, LIGHT)
    axes = figure.subplots()
    dress(axes, LIGHT, "Validation perplexity", "minutes of training")
    kinds = list(dict.fromkeys(held["kind"] for held in lines))
    for held in lines:
        first = held is next(other for other in lines if other["kind"] == held["kind"])
        minutes, perplexities = zip(*held["curve"], strict=True)
        axes.plot(
            minutes, perplexities, color=LIGHT.series[kinds.index(held["kind"])], marker="o", markersize=3.5,
            label=f"{spoken(held['kind']).upper()}, {held['layers']} layers" if first else None,
        )
    low = min(p for held in lines for _, p in held["curve"])
    axes.set_ylim(low * 0.95, low * 2)
    if gram:
        axes.axhline(gram["test_perplexity"], color=LIGHT.muted, linestyle="dashed", label="5-gram (test)")
    legend(axes, LIGHT)
    return png(figure, LIGHT)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a folder of prepared text: train, validation, test")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="recipe keys to set")
    parser.add_argument("--layers", default="sru=5,lstm=2", metavar="KIND=N,...", help="how many layers of which kind")
    parser.add_argument("--rates", default="10,20,40")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--minutes", type=float, default=20.0, help="of training time, for every run")
    parser.add_argument("--tuning-epochs", type=int, default=2)
    parser.add_argument("--side-by-side", type=int, default=2, metavar="N", help="runs at a time")
    parser.add_argument("--kenlm", type=Path, help="the folder of KenLM's lmplz and query")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "table3", help="where runs are kept")
    parser.add_argument("--out", type=Path, help="append the lines to this file too")
    parser.add_argument("--picture", type=Path, help="draw the curves (PNG)")
    arguments = parser.parse_intermixed_args()
    layers = {kind: int(count) for kind, count in (word.split("=") for word in arguments.layers.split(","))}
    gram = grams(arguments) if arguments.kenlm else None
    chosen = tune(layers, arguments)
    settings = [
        Setting(kind, layers[kind], chosen[kind]["rate"], int(seed))
        for seed in arguments.seeds.split(",") for kind in layers
    ]
    epochs = [max(1, int(60 * arguments.minutes / chosen[s.kind]["epoch_s"])) for s in settings]
    runs = side_by_side(settings, arguments.work / "runs", epochs, arguments)
    lines = [line(setting, run) for setting, run in zip(settings, runs, strict=True)]
    for held, run in zip(lines, runs, strict=True):
        held["test_perplexity"] = json.loads(trireme("evaluate", run, arguments.data / "test", "--json"))["perplexity"]
    for held in [*lines, *([gram] if gram else [])]:
        print(json.dumps(held), flush=True)
        if arguments.out:
            with open(arguments.out, "a", encoding="utf-8") as file:
                file.write(json.dumps(held) + "\n")
    for kind in layers:
        tests = [held["test_perplexity"] for held in lines if held["kind"] == kind]
        spread = f" (deviation {statistics.stdev(tests):.2f})" if len(tests) > 1 else ""
        print(f"{kind}: test perplexity {statistics.fmean(tests):.2f}{spread}", file=sys.stderr)
    if arguments.picture:
        arguments.picture.write_bytes(draw(lines, gram))
    return 0


if __name__ == "__main__":
    sys.exit(main())
