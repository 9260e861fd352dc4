"""Block training on AN4's states: tables 1 to 4 and figure 1 of paper 003.

    python benchmarks/bmuf.py accuracy --tune              the learning rate of every row, on seed 1
    python benchmarks/bmuf.py accuracy --jobs 2            every row with every seed, each at its best rate
    python benchmarks/bmuf.py accuracy --network blstm     the same of a bidirectional LSTM by chunks, 8 and 16 splits
    python benchmarks/bmuf.py rejection --jobs 2           master and slaves, one of eight being wrong
    python benchmarks/bmuf.py sweep                        where a sweep's time goes, on 1 and 2 ranks (a quiet machine)

AN4 is prepared as docs/bmuf.md says, with 102 states of its own alignment: 9 training speakers are the validation set,
the official test set is judged once, by the model that is best on validation. A run is one process with one thread that
holds all splits; on as many ranks it would learn the same bits. A finished run is a JSON line of --out and is not made
again, and an interrupted one is gone on with.
"""

from __future__ import annotations

import argparse
import sys

from blocks import accuracy, rejection, sweep
from runs import ROOT


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    accuracy.add_arguments(commands.add_parser("accuracy", help="frame errors of SGD, MA, CBM and NBM"), ROOT)
    judged = commands.add_parser("rejection", help="master and slaves, one of them wrong")
    accuracy.add_arguments(judged, ROOT)
    rejection.add_arguments(judged)
    judged.set_defaults(out=ROOT / "benchmarks" / "results" / "bmuf_rejection.jsonl", sweeps=12)
    sweep.add_arguments(commands.add_parser("sweep", help="a sweep's time on 1 and 2 ranks"))
    arguments = parser.parse_args()
    if arguments.command == "accuracy":
        accuracy.Accuracy(arguments).work()
    elif arguments.command == "rejection":
        rejection.Rejection(arguments).work()
    else:
        sweep.measure(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
