"""The rows of paper 002's tables 2 and 3, as `onebit_accuracy.py` trains them, and what the paper has there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from runs import rate_of_best

Record = dict[str, Any]  # a finished run's

# Hidden layers and what the paper's tables say of them. SVD-LL (task.factored) is not among them yet.
NETWORKS = {"sigmoid": {"activation": "sigmoid", "init": "glorot"}, "relu": {"activation": "relu", "init": "he"}}
MOMENTUM: dict[str, Any] = {"name": "momentum", "momentum": 0.9}
BEFORE: dict[str, Any] = {"name": "adagrad", "momentum": 0.9, "placement": "before"}
AFTER = BEFORE | {"placement": "after"}


@dataclass(frozen=True)
class Row:
    """A row of a table, and what the paper has there.

    rates   where the search for the learning rate starts, by network; only networks named here have the row
    paper   word error rate and training-set frame accuracy (%), by network
    """

    table: int
    name: str
    text: str
    rates: dict[str, float]
    optim: dict[str, Any] = field(default_factory=lambda: MOMENTUM)
    onebit: dict[str, Any] | None = None  # options of strategy "onebit"; None: float32, "allreduce"
    paper: dict[str, str] = field(default_factory=dict)


BOTH, SIGMOID = {"sigmoid": 0.2, "relu": 0.025}, {"sigmoid": 0.005}
ROWS = {row.name: row for row in (
    Row(2, "baseline", "baseline, float32", BOTH, paper={"sigmoid": "16.5 (55.6)", "relu": "16.5 (62.8)"}),
    Row(2, "onebit", "1-bit", BOTH, onebit={}, paper={"sigmoid": "16.3 (55.5)", "relu": "16.6 (61.7)"}),
    Row(2, "onebit-db", "1-bit, double buffering", BOTH, onebit={"double_buffering": True},
        paper={"sigmoid": "16.5 (55.3)", "relu": "16.6 (62.4)"}),
    Row(2, "onebit-no-feedback", "1-bit without error feedback", BOTH, onebit={"error_feedback": False},
        paper={"sigmoid": "diverges", "relu": "diverges"}),
    Row(3, "smoothed", "AdaGrad on the momentum-smoothed gradient, float32", SIGMOID, AFTER,
        paper={"sigmoid": "16.5 (57.4)"}),
    Row(3, "raw", "AdaGrad on the raw gradient, float32", SIGMOID, BEFORE, paper={"sigmoid": "16.2 (58.2)"}),
    Row(3, "partial", "AdaGrad on partial gradients, 1-bit", SIGMOID, MOMENTUM, {"local_adagrad": True},
        paper={"sigmoid": "16.1 (57.4)"}),
    Row(3, "aggregate", "AdaGrad on the aggregate gradient, 1-bit", SIGMOID, BEFORE, {},
        paper={"sigmoid": "15.8 (59.1)"}),
    Row(3, "aggregate-db", "the same, double buffering", SIGMOID, BEFORE, {"double_buffering": True},
        paper={"sigmoid": "15.8 (59.4)"}),
)}
REFERENCE = {2: "baseline", 3: "raw"}  # what a table's other rows are compared with, seed by seed


def best_rate(records: Iterable[dict[str, Any]]) -> float | None:
    """The rate of the best held-out accuracy, among runs that did not diverge."""
    return rate_of_best((r["rate"], r["held_out"]) for r in records if not r["diverged"])
