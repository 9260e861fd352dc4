"""Which utterances are held out for validation, in which order they are written, and how shards cut that order."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np

from hpc.prepare.labels import some
from hpc.shards import DataError

Item = TypeVar("Item")


@dataclass(frozen=True)
class Holdout:
    """What to hold out.

    fraction  this share of the utterances, or of the groups if there is a pattern; 0: nothing
    pattern   a regular expression whose first group, found in a key, is the key's speaker (or other group): groups are
              held out whole
    groups    exactly this many groups, instead of a fraction
    keys      exactly these utterances, instead of a fraction

    Raises ValueError if these contradict each other.
    """

    fraction: float | None = None
    pattern: str | None = None
    groups: int | None = None
    keys: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("fraction", "groups", "keys") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of --validation, --validation-groups, --validation-list; got {given or 'none'}")
        if self.fraction is not None and not 0 <= self.fraction < 1:
            raise ValueError(
                f"--validation {self.fraction}: expected a fraction from 0 to below 1, e.g. 0.1 for a tenth; for a "
                "number of groups use --validation-groups"
            )
        if self.groups is not None and (self.groups < 1 or self.pattern is None):
            raise ValueError(
                f"--validation-groups {self.groups}: expected at least 1, and --group REGEX that finds a key's group"
            )
        if self.pattern is not None:
            if self.keys is not None:
                raise ValueError("--group and --validation-list contradict each other; give one of them")
            try:
                captures = re.compile(self.pattern).groups
            except re.error as error:
                raise ValueError(f"--group '{self.pattern}' is no regular expression ({error})") from error
            if not captures:
                raise ValueError(f"--group '{self.pattern}' captures nothing; bracket the speaker, e.g. '^([^-]+)-'")

    def options(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}

    def choose(self, keys: Sequence[str], seed: int) -> set[str]:
        """The keys to hold out.

        Utterances (or groups) are taken in the order of SHA-256 of seed and key, so that data added later changes the
        choice little. A fraction above 0 takes at least one and leaves at least one.

        Raises DataError for a key without a group, a key that does not exist, or if nothing would be left to train on.
        """
        if self.keys is not None:
            known = set(keys)
            missing = [key for key in self.keys if key not in known]
            if missing:
                raise DataError(
                    f"--validation-list: {len(missing)} of {len(self.keys)} keys are no utterances of this data (or "
                    f"were left out): {some(missing)}; remove them from the list"
                )
            if len(self.keys) >= len(known) or not self.keys:
                raise DataError(f"--validation-list has {len(self.keys)} of {len(known)} utterances; take some of them")
            return set(self.keys)
        if self.fraction == 0:
            return set()
        group_of = {key: self._group(key) for key in keys}
        ranked = sorted(set(group_of.values()), key=lambda g: hashlib.sha256(f"{seed}:{g}".encode()).digest())
        what = "utterances" if self.pattern is None else "groups"
        count = self.groups if self.groups is not None else max(1, round(len(ranked) * (self.fraction or 0)))
        if self.groups is None:
            count = min(count, max(1, len(ranked) - 1))
        if count >= len(ranked):
            raise DataError(
                f"{count} of {len(ranked)} {what} would be held out and none would be left to train on; hold out less, "
                "or nothing with --validation 0"
            )
        chosen = set(ranked[:count])
        return {key for key in keys if group_of[key] in chosen}

    def _group(self, key: str) -> str:
        if self.pattern is None:
            return key
        found = re.search(self.pattern, key)
        if found is None or found[1] is None:
            raise DataError(f"utterance '{key}': --group '{self.pattern}' finds no group in it; widen the expression")
        return found[1]


def shuffled(keys: Sequence[str], seed: int) -> list[str]:
    """The sorted keys in a random order that the seed decides, so that any contiguous run is a fair sample."""
    ordered = sorted(keys)
    return [ordered[i] for i in np.random.default_rng(seed).permutation(len(ordered))]


def runs(keys: Sequence[Item], pieces: int) -> list[list[Item]]:
    """The keys (or other items) cut into at most `pieces` contiguous runs, none empty, of sizes one apart at most."""
    pieces = min(pieces, len(keys))
    bounds = [len(keys) * i // pieces for i in range(pieces + 1)]
    return [list(keys[low:high]) for low, high in pairwise(bounds)]
