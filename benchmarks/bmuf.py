"""Block training on AN4's states: tables 1 to 4 and figure 1 of paper 003.

    python benchmarks/bmuf.py accuracy --tune              the learning rate of every row, on seed 1
    python benchmarks/bmuf.py accuracy --jobs 2            every row with every seed, each at its best rate
    python benchmarks/bmuf.py accuracy --network blstm     the same of a bidirectional LSTM by chunks, 8 and 16 splits
    python benchmarks/bmuf.py accuracy --network blstm-whole            the same by whole utterances
    python benchmarks/bmuf.py rejection --jobs 2           master and slaves, one of eight being wrong
    python benchmarks/bmuf.py sweep                        where a sweep's time goes, on 1 and 2 ranks (a quiet machine)
    python benchmarks/bmuf.py chunks                       frames/s by chunks and by whole utterances (a quiet machine)
    python benchmarks/bmuf.py summary --plot docs/bmuf.png              the tables and the curves; trains nothing

AN4 is prepared as docs/bmuf.md says, with 102 states of its own alignment: 9 training speakers are the validation set,
the official test set is judged once, by the model that is best on validation. A run is one process with one thread that
holds all splits; on as many ranks it would learn the same bits. A finished run is a JSON line of --out and is not made
again, and an interrupted one is gone on with.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from blocks import accuracy, rejection, sweep, tables
from runs import ROOT, Record


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    errors = commands.add_parser("accuracy", help="frame errors of SGD, MA, CBM and NBM")
    accuracy.add_common(errors, ROOT, "bmuf_accuracy.jsonl", 8)
    accuracy.add_arguments(errors)
    judged = commands.add_parser("rejection", help="master and slaves, one of them wrong")
    accuracy.add_common(judged, ROOT, "bmuf_rejection.jsonl", 12)
    rejection.add_arguments(judged)
    sweep.add_arguments(commands.add_parser("sweep", help="a sweep's time on 1 and 2 ranks"))
    sweep.add_arguments(commands.add_parser("chunks", help="a sweep's time by chunks and by whole utterances"))
    told = commands.add_parser("summary", help="the tables, from what was measured")
    told.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="the folder of the lines")
    told.add_argument("--plot", type=Path, metavar="FILE", help="draw the learning curves, too (PNG)")
    arguments = parser.parse_args()
    if arguments.command == "accuracy":
        accuracy.Accuracy(arguments).work()
    elif arguments.command == "rejection":
        rejection.Rejection(arguments).work()
    elif arguments.command in sweep.PAIRS:
        sweep.measure(arguments)
    else:
        summary(arguments.results, arguments.plot)
    return 0


def summary(results: Path, plot: Path | None) -> None:
    """Print all tables; draw."""
    def lines(name: str) -> list[Record]:
        path = results / f"bmuf_{name}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    for name, table in (("accuracy", tables.accuracy), ("rejection", tables.rejection), ("sweep", tables.sweeps)):
        if lines(name):
            print(table(lines(name)), end="\n\n")
    if plot:
        plot.write_bytes(tables.curves(lines("accuracy")))


if __name__ == "__main__":
    sys.exit(main())
