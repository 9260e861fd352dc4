"""Block training on AN4's states: tables 1 to 4 and figure 1 of paper 003.

    python benchmarks/bmuf.py accuracy --tune              the learning rate of every row, on seed 1
    python benchmarks/bmuf.py accuracy --jobs 2            every row with every seed, each at its best rate

AN4 is prepared as docs/bmuf.md says, with 102 states of its own alignment: 9 training speakers are the validation set,
the official test set is judged once, by the model that is best on validation. A run is one process with one thread that
holds all splits; on as many ranks it would learn the same bits. A finished run is a JSON line of --out and is not made
again, and an interrupted one is gone on with.
"""

from __future__ import annotations

import argparse
import sys

from blocks import accuracy
from runs import ROOT


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    accuracy.add_arguments(commands.add_parser("accuracy", help="frame errors of SGD, MA, CBM and NBM"), ROOT)
    arguments = parser.parse_args()
    accuracy.Accuracy(arguments).work()
    return 0


if __name__ == "__main__":
    sys.exit(main())
