"""A run's metrics log, read back as one history: `metrics.jsonl`, one JSON object a line, appended as things happen.

Every record has "event" (start, train, validate, checkpoint, end), "time" (unix seconds) and "step". A run that was
killed and resumed appends to the same log, so some steps may be there twice: the later attempt counts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"
# What else is in a run's folder (run.py). Here, because who only looks at runs needs no torch.
RECIPE, DATA, SUCCESS, STOPPED, MODEL = "recipe.toml", "data.json", "success", "stopped", "model.safetensors"
EXCHANGE, SUBMITTED = "exchange.json", "submitted.json"
# What a validation record says besides its metrics.
BOOKKEEPING = frozenset(
    {"event", "time", "step", "epoch", "frames", "learning_rate", "seconds", "verdict", "best", "told"}
)


def read_attempts(run: Path) -> list[list[dict[str, Any]]]:
    """Every record of a run in the order written, cut into attempts (one a "start"); nothing superseded is dropped.

    run  the run's folder, which holds metrics.jsonl
    Raises ValueError if there is no metrics.jsonl, or if a line within an attempt is damaged. A torn line at the end
    of an attempt (the process died while writing it) is left out.
    """
    path = run / METRICS
    if not path.is_file():
        what = "it holds no 'metrics.jsonl'" if run.is_dir() else "there is no such folder"
        raise ValueError(
            f"'{run}' is not a run folder: {what}; a run folder is what 'trireme train' writes "
            "(recipe.toml, metrics.jsonl, checkpoints/, logs/)"
        )
    lines = [(n, line) for n, line in enumerate(path.read_bytes().split(b"\n"), 1) if line.strip()]
    attempts: list[list[dict[str, Any]]] = []
    damaged: tuple[int, str] | None = None
    for number, line in lines:
        record, fault = _parse(line)
        starting = record.get("event") == "start"
        if damaged and not starting:  # a torn line may only end an attempt
            raise ValueError(
                f"'{path}', line {damaged[0]}: {damaged[1]}; restore the file, or delete this line to go on without it"
            )
        damaged = (number, fault) if fault else None
        if fault:
            continue
        if starting or not attempts:
            attempts.append([])
        attempts[-1].append(record)
    return attempts


def read_records(run: Path) -> list[dict[str, Any]]:
    """A run's records with what a later attempt did over again left out: steps only ever rise between "start"s.

    run  the run's folder
    When a "start" resumes at step s, earlier records of steps beyond s are dropped (earlier "start"s stay).
    Raises ValueError as `read_attempts` does.
    """
    kept: list[dict[str, Any]] = []
    for attempt in read_attempts(run):
        first = attempt[0]
        if first["event"] == "start":
            fresh = first["step"] == 0 and first.get("resumed_from") is None
            reached = -1 if fresh else first["step"]
            kept = [old for old in kept if old["event"] == "start" or old["step"] <= reached]
        kept += attempt
    return kept


def metrics_of(validation: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a "validate" record ({"loss": .., "frame_error": ..}); a null reads as NaN."""
    return {name: number(value) for name, value in validation.items() if name not in BOOKKEEPING}


def number(value: Any) -> float:
    """A JSON number as a float; anything else is NaN."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _parse(line: bytes) -> tuple[dict[str, Any], str]:
    """One line as (record, ""), or ({}, what is wrong with it)."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is one too
        return {}, f"not whole JSON ({error})"
    if not isinstance(record, dict):
        return {}, f"a JSON {type(record).__name__}, expected an object"
    for key, kind in (("event", str), ("time", int | float), ("step", int)):
        if not isinstance(record.get(key), kind):
            return {}, f"a record without a valid '{key}' (got {record.get(key)!r})"
    return record, ""
