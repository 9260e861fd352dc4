"""What every rank needs for itself, made so that a complaint is heard once, not once a rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from collectives.comm import Comm

Made = TypeVar("Made")


def made_everywhere(comm: Comm, make: Callable[[], Made]) -> Made:
    """What `make` returns, made on rank 0 first and then on every other rank (collective).

    Raises what `make` raised, on the ranks where it did (on rank 0 alone, if it did there); RootFailed on the others.
    """
    made: list[Made] = []

    def act() -> None:
        if not made:
            made.append(make())

    comm.on_root(act)
    comm.each(act)
    return made[0]
