"""The rows of paper 003's tables 1 to 3, as `bmuf.py accuracy` trains them, and what the paper has there."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

ETA = {8: 0.9, 16: 0.94, 32: 0.97, 64: 0.986}  # block momentum by splits, paper 003, section 3.1
METHODS = {"ma": "MA", "cbm": "BMUF-CBM", "nbm": "BMUF-NBM"}


@dataclass(frozen=True)
class Network:
    """An acoustic model, and how its splits are cut.

    task        the recipe's [task]
    minibatch   items of a split's minibatch; single-worker SGD's too
    block       splits -> minibatches of every split in a block, tau: so many that a run has 3 / (1 - eta) blocks
    rates       method (SGD: "sgd") -> splits -> where the search for its learning rate starts
    initial     the learning rate of the one sweep that all start from
    paper       table: what the paper has, by method and splits, word error rate (%) on Eval2000
    """

    task: dict[str, Any]
    minibatch: int
    block: dict[int, int]
    rates: dict[str, dict[int, float]]
    initial: float
    paper: dict[str, dict[int, float]] = field(default_factory=dict)
    columns: str = ""


DNN = Network(
    {"context": 5, "layers": 2, "width": 512, "activation": "sigmoid", "init": "glorot"},
    minibatch=64, block={8: 16, 16: 16, 32: 8, 64: 2},
    rates={
        "sgd": {1: 0.05}, "ma": {8: 0.2, 16: 0.4, 32: 0.4, 64: 1.6}, "cbm": {8: 0.1, 16: 0.1, 32: 0.1, 64: 0.4},
        "nbm": {8: 0.1, 16: 0.1, 32: 0.1, 64: 0.4},
    },
    initial=0.1,
    paper={
        "sgd": {1: 14.0}, "ma": {8: 14.2, 16: 14.8, 32: 15.5}, "cbm": {8: 13.4, 16: 13.4, 32: 13.5},
        "nbm": {8: 13.3, 16: 13.4, 32: 13.4, 64: 13.6},
    },
    columns="table 3, DNN, SWB+Fisher",
)
BLSTM = Network(
    {"network": "lstm", "bidirectional": True, "layers": 2, "width": 64, "activation": "", "context": 0,
     "bptt": "chunks", "chunk": "21-64+21"},
    minibatch=8, block={8: 4, 16: 4},
    rates={"sgd": {1: 0.4}, "ma": {8: 1.6, 16: 1.6}, "cbm": {8: 0.8, 16: 0.8}, "nbm": {8: 0.8, 16: 0.8}},
    initial=0.2,
    paper={"sgd": {1: 14.8}, "ma": {8: 15.4, 16: 16.0}, "cbm": {8: 14.7, 16: 15.0}, "nbm": {8: 14.9, 16: 14.8}},
    columns="table 1, DBLSTM by CSC-BPTT, SWB",
)
WHOLE = replace(  # by epoch-wise BPTT; two utterances have as many frames as eight chunks
    BLSTM, task=BLSTM.task | {"bptt": "utterance", "chunk": ""}, minibatch=2,
    paper={
        "sgd": {1: 14.8}, "ma": {8: 15.6, 16: 16.2}, "cbm": {8: 14.7, 16: 14.8}, "nbm": {8: 14.5, 16: 14.3},
    },
    columns="table 2, DBLSTM by epoch-wise BPTT, SWB",
)
NETWORKS = {"dnn": DNN, "blstm": BLSTM, "blstm-whole": WHOLE}


def strategy(method: str, splits: int, block_steps: int) -> dict[str, Any]:
    """The recipe's [strategy]."""
    if method == "sgd":
        return {"name": "allreduce"}
    found: dict[str, Any] = {"name": "bmuf", "block_steps": block_steps}
    if method == "ma":
        return found | {"scheme": "averaging"}
    return found | {"scheme": {"cbm": "classical", "nbm": "nesterov"}[method], "block_momentum": ETA[splits]}


def blocks_wanted(method: str, splits: int) -> float:
    """How many blocks a run should have at least: 3 / (1 - eta), block momentum's time constant three times over."""
    return 3 / (1 - ETA[splits]) if method in ("cbm", "nbm") else 0.0
