"""What runs on AN4 have in common: the recipe, the schedule of the rate, how rates are chosen and numbers are told."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "jobs" / "recipes" / "an4_frames.toml"
STEPS = {0.625: 0.25, 0.875: 0.0625}  # after this part of the epochs, the learning rate times that


def schedule(rate: float, epochs: int) -> dict[str, Any]:
    """A recipe's table: the same two steps for all runs, whatever their rate."""
    at, rates = [part * epochs for part in STEPS], [rate * factor for factor in STEPS.values()]
    return {"name": "steps", "epochs": epochs, "at": at, "rates": rates}


def toml(value: Any) -> str:
    """A value as TOML: JSON's is the same but for tables."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}={toml(held)}" for key, held in value.items()) + "}"
    return json.dumps(value)


def rate_of_best(found: Iterable[tuple[float, float]]) -> float | None:
    """Of pairs (learning rate, held-out accuracy) the rate of the best; None if there are none."""
    return max(found, key=lambda pair: pair[1], default=(None, 0.0))[0]


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean and sample deviation of fractions, in percent."""
    if not values:
        return "–"
    deviation = f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):{sign}.2f}{deviation}"
