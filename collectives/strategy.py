"""The Strategy protocol: who owns the weights, when they are updated, and what ranks send each other.

The training loop calls `enter / step / leave` for every split a rank holds and `advance` once a turn; the strategy
calls the update rule where its paper wants it. Design, section 2.

Legend: P parameters (padded), S floats that this rank owns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch

from collectives.comm import Comm


class TrainingFailed(RuntimeError):
    """Training met numbers that it cannot go on with; the message names step, rank and split."""


class Rate(NamedTuple):
    """What the schedule sets for the next turn: the learning rate, and the epoch (0-based) that it belongs to."""

    learning_rate: float
    epoch: int


class Weights(Protocol):
    """A model's parameters and gradients as flat buffers [P] (`hpc.flat.Flat`)."""

    weights: torch.Tensor
    size: int
    names: list[str]
    shapes: list[tuple[int, tuple[int, ...]]]  # of every parameter, its first float and its shape

    def bind_grads(self, grads: torch.Tensor) -> None: ...
    def on_grad(self, told: Callable[[int], None]) -> None: ...
    def within(self, low: int, high: int) -> range: ...
    def name_at(self, index: int) -> str: ...


class Rule(Protocol):
    """A flat update rule (`hpc.optim`): changes `weights` [S] in place from `scale` times `grad` [S] and its slots [S].

    Returns whether all of the gradient, and of the slots after it, is finite.
    """

    slots: tuple[str, ...]

    def __call__(
        self, weights: torch.Tensor, grad: torch.Tensor, slots: dict[str, torch.Tensor], rate: Rate, updates: int,
        scale: float,
    ) -> bool: ...


@dataclass
class State:
    """What a strategy must keep beside the weights, in the three kinds that let another number of ranks resume.

    pieces   the floats [low, high) that this rank owns, ascending; S is their number
    slices   name -> [S], joined over ranks into a [P] and cut anew on restore
    splits   split -> name -> tensor, for the splits this rank holds
    common   JSON values, the same on every rank
    """

    pieces: list[tuple[int, int]] = field(default_factory=list)
    slices: dict[str, torch.Tensor] = field(default_factory=dict)
    splits: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    common: dict[str, Any] = field(default_factory=dict)


class Joined(Protocol):
    """A saved state, readable by any number of ranks (`hpc.checkpoint.Checkpoint`)."""

    common: dict[str, Any]

    def weights_into(self, weights: torch.Tensor) -> None: ...
    def slice(self, name: str, low: int, high: int) -> torch.Tensor: ...
    def split(self, split: int) -> dict[str, torch.Tensor]: ...


class Strategy:
    """The base of all strategies; the methods in the order in which the loop calls them.

    comm    the ranks and the splits they hold
    flat    the model's flat weights and gradients
    rule    the update rule, called on slices
    batch   what the loss counts in the recipe's batch over all splits (frames, words), on average: what gradient sums
            are divided by, so that every frame weighs the same, those of an epoch's last and smaller step too
    """

    rate: Rate
    shares_weights = False  # whether the ranks of an island may all compute on one buffer of weights (`Comm.common`)
    operational: tuple[str, ...] = ()  # options that do not change what is learned
    remedy = "lower optim.learning_rate"  # what to do where numbers are not finite

    def __init__(self, comm: Comm, flat: Weights, rule: Rule, batch: float):
        self.comm, self.flat, self.rule, self.batch = comm, flat, rule, batch
        # For strategies that judge models: the validation metrics of the model as it is, by all ranks together (False),
        # or by this one alone (True). Set by build.py; None: there is no validation set.
        self.evaluate: Callable[[bool], dict[str, float]] | None = None
        # Told of every part of an exchange, from any thread: its name ("bucket 3 reduce"), begin and end in
        # time.monotonic_ns(); set by build.py.
        self.note: Callable[[str, int, int], None] = lambda name, begin_ns, end_ns: None
        # Counts the seconds of a block as a phase's ("exchange", "judge"); set by build.py.
        self.phase: Callable[[str], AbstractContextManager[None]] = lambda name: nullcontext()
        self.updates = 0  # of the rule, so far
        # Seconds so far in which an exchange was under way on this rank, hidden behind computing or not.
        self.active_s: float = 0.0
        self.float32_bytes = 0  # that this rank would have sent so far, were what it sent packed float32; 0: none is
        self.batches = 1  # minibatch size, in the recipe's batches; what selects it sets it, between turns
        self.undelayed = False  # whether updates are to wait for nothing, though the recipe delays them
        self.lenient = False  # whether numbers that are not finite are to be noted in `failed` instead of raised
        self.failed = False

    @staticmethod
    def check(**options: Any) -> None:
        """Raise ValueError for options that do not go together, before anything is made of them."""

    @staticmethod
    def parts_of_a_batch(**options: Any) -> int:
        """In how many parts, each a batch to the loop, the recipe's batch is learned under these options."""
        return 1

    def sent(self) -> dict[str, int]:
        """Bytes of gradients and weights that this rank sent so far, counted where MPI takes them (NCCL's: calculated).

        "reduce": to whom sums them up; "share": to whom needs the result; "float32": what both would have been as
        float32 (0 if they were).
        """
        return {"reduce": self.comm.sent["reduce"], "share": self.comm.sent["share"], "float32": self.float32_bytes}

    def fail(self, message: str) -> None:
        """Numbers are not finite: raise TrainingFailed, or note it in `failed` where they are lenient with it."""
        self.failed = True
        if not self.lenient:
            raise TrainingFailed(message)

    def fail_at(self, low: int, where: str, arrays: Sequence[tuple[str, torch.Tensor]], otherwise: str) -> None:
        """`fail` at the first of some arrays that is not finite all over, naming the parameter.

        low        the float of the flat buffer that the arrays, each [n], begin at
        where      for the message: whose arrays they are
        arrays     (what it is, values)
        otherwise  what happened if all of them are finite
        """
        what, parameter = otherwise, self.flat.name_at(low)
        for name, values in arrays:
            bad = torch.nonzero(~torch.isfinite(values))
            if len(bad):
                what = f"{name} is not finite"
                parameter = f"{self.flat.name_at(low + int(bad[0]))}, {len(bad)} values"
                break
        self.fail(
            f"{what} at update {self.updates} (rank {self.comm.rank}, {where}, parameter {parameter}); "
            f"{self.remedy}"
        )

    def prepare(self, remembered: dict[str, Any] | None = None) -> dict[str, Any]:
        """Settle how to exchange, once, before anything else (collective).

        remembered  what an earlier call returned, for the same run, or None

        Returns JSON values that say what was settled, "said" being a line for the log; {} where there is no choice.
        """
        return {}

    def doubt(self, steps: int) -> str:
        """What speaks against the options in a run of so many steps, for the log; "" if nothing does."""
        return ""

    def waiting_for(self) -> str:
        """Which rank and which part of an exchange this rank waits for right now, or ""; from any thread."""
        return ""

    def begin(self) -> None:
        """A fresh run starts from the weights in `flat` (collective). A resumed run calls `restore` instead."""
        self.comm.from_root_(self.flat.weights)

    def span(self, limit: int) -> int:
        """How many batches each split takes before the next `advance`, at most `limit`."""
        return 1

    def enter(self, split: int) -> None:
        """The model's weights and `.grad` become this split's; `.grad` is zero."""
        raise NotImplementedError

    def step(self, split: int, count: int) -> None:
        """One backward of this split is done over `count` frames (0: the split is dry)."""
        raise NotImplementedError

    def leave(self, split: int) -> None:
        """The last batch of this split in this turn is done."""

    def advance(self, n: int) -> None:
        """Exchange what the turn learned; owners update their slices (collective)."""
        raise NotImplementedError

    def end(self) -> None:
        """At recipe points only: drain what is in flight; the model becomes the one that ships (collective)."""

    def told(self, metrics: dict[str, float]) -> dict[str, Any]:
        """What it has to tell at a validation, once, for the journal: JSON values, the same on every rank.

        metrics  of the model that `end` left

        "said": the same for people. "stayed": whether all that was learned since the last one was thrown away; the
        learning rate is halved then.
        """
        return {}

    def state(self) -> State:
        """What is needed beside the weights to go on; observing changes nothing."""
        raise NotImplementedError

    def restore(self, joined: Joined) -> None:
        """Go on from a saved state, saved by any number of ranks (collective)."""
        raise NotImplementedError
