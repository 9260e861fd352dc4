"""`trireme train` with one slave that is wrong: its batches are changed on their way to the model.

    python -m mpi4py benchmarks/blocks/faulty.py SPLIT FAULT RECIPE key=value ...

FAULT: "permuted": its labels are another permutation's; "exploding": its features are 1,000 times too large; "nan": of
its every 50th batch the features are no numbers. All else is the command's own.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch

from hpc.__main__ import main
from hpc.batches import Batches

FAULTS = ("permuted", "exploding", "nan")
TIMES, EVERY = 1000.0, 50
SHUFFLED = torch.randperm(102, generator=torch.Generator().manual_seed(1))  # AN4's 102 states


def spoil(batch: Any, fault: str, t: int) -> Any:
    if fault == "permuted":
        return batch._replace(labels=SHUFFLED[batch.labels])
    if fault == "exploding":
        return batch._replace(inputs=batch.inputs * TIMES)
    return batch._replace(inputs=batch.inputs * math.nan) if t % EVERY == EVERY - 1 else batch


def run() -> int:
    split, fault = int(sys.argv[1]), sys.argv[2]
    assert fault in FAULTS, fault
    honest = Batches.__call__

    def called(self: Batches, of: int, t: int) -> Any | None:
        batch = honest(self, of, t)
        return batch if batch is None or of != split else spoil(batch, fault, t)

    Batches.__call__ = called  # type: ignore[method-assign]
    sys.argv[1:] = ["train", *sys.argv[3:]]
    return main()


if __name__ == "__main__":
    sys.exit(run())
