"""What a run came to: its status, best validation, time spent and speed, from the files in its folder alone."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc.quantities import bytes_sent, hidden_share
from hpc.records import metrics_of, number, read_attempts, read_records

PHASES = ("forward", "backward", "exchange", "read", "validate", "checkpoint", "judge", "select")
SELDOM = ("judge", "select")  # of them, what few runs have
COMPUTE = "compute"  # forward and backward in one, as runs were recorded before they were told apart
OTHER = "other"  # what an interval took beyond its phases
FINISHED, FAILED, PREEMPTED, OPEN = "finished", "failed", "preempted", "running or interrupted"


@dataclass(frozen=True)
class RunHistory:
    """A run as its folder tells it; made by `read_run`."""

    path: Path
    records: list[dict[str, Any]]
    seconds: float  # wall clock of all attempts, lost work included, the gaps between them not
    recipe: str | None
    failure: dict[str, Any] | None
    succeeded: bool

    @property
    def name(self) -> str:
        return self.path.resolve().name

    def of(self, event: str) -> list[dict[str, Any]]:
        """The records of one event, in order."""
        return [record for record in self.records if record["event"] == event]

    @property
    def start(self) -> dict[str, Any]:
        """The last "start" ({} if there is none)."""
        return (self.of("start") or [{}])[-1]

    @property
    def noun(self) -> str:
        """What the loss counts: "frames", "words"."""
        return self.start.get("noun", "frames")

    @property
    def end(self) -> dict[str, Any] | None:
        """The "end" of the last attempt, or None while it has none."""
        closing = [r for r in self.records if r["event"] in ("start", "end")][-1:]
        return closing[0] if closing and closing[0]["event"] == "end" else None

    @property
    def best(self) -> dict[str, Any] | None:
        """The best "validate" record: the last one marked so, else that of the lowest loss; None without any."""
        validations = self.of("validate")
        marked = [v for v in validations if v.get("best")]
        finite = [v for v in validations if math.isfinite(number(v.get("loss")))]
        return marked[-1] if marked else min(finite, key=lambda v: v["loss"], default=None)

    @property
    def status(self) -> str:
        """FINISHED, FAILED, PREEMPTED or OPEN, told by the last attempt."""
        if self.end and self.end.get("stopped") != "preempted" and (self.succeeded or not self.failure):
            return FINISHED
        if self.failure:
            return FAILED
        return PREEMPTED if self.end else OPEN


def read_run(path: Path) -> RunHistory:
    """Read a run's folder.

    path  the run's folder; only its metrics.jsonl must be there
    Raises ValueError if this is no run folder or its metrics.jsonl is damaged.
    """
    attempts = read_attempts(path)
    recipe = path / "recipe.toml"
    last_start = attempts[-1][0]["time"] if attempts else 0.0
    return RunHistory(
        path=path,
        records=read_records(path),
        seconds=sum(max(0.0, attempt[-1]["time"] - attempt[0]["time"]) for attempt in attempts),
        recipe=recipe.read_text("utf-8", errors="replace") if recipe.is_file() else None,
        failure=_read_failure(path / "failure.json", last_start),
        succeeded=(path / "success").is_file(),
    )


def _read_failure(path: Path, last_start: float) -> dict[str, Any] | None:
    """failure.json as a dict, unless an attempt was started after it was written; torn text goes under "cause"."""
    if not path.is_file():
        return None
    text = path.read_text("utf-8", errors="replace")
    try:
        failure = json.loads(text)
    except ValueError:
        failure = text
    if not isinstance(failure, dict):
        failure = {"cause": str(failure).strip() or "failure.json is empty"}
    written = number(failure.get("time", path.stat().st_mtime))
    return None if written < int(last_start) else failure


def cause_of(failure: dict[str, Any]) -> str:
    """One line on why a run failed, from its failure.json."""
    causes = [str(failure[key]) for key in ("cause", "error", "message", "reason") if failure.get(key)]
    what = causes[0] if causes else "no cause given"
    where = [f"{key} {failure[key]}" for key in ("rank", "host", "step") if failure.get(key) is not None]
    where += [str(failure["where"])] if failure.get("where") else []
    line = (what.strip().splitlines() or [what])[0]
    return f"{line} ({', '.join(where)})" if where else line


def error_name(validations: Sequence[dict[str, Any]]) -> str | None:
    """The metric drawn beside the loss: frame_error, else the first error, else the first other; None without."""
    names = list(dict.fromkeys(name for v in validations for name in metrics_of(v) if name != "loss"))
    errors = [name for name in names if name.endswith("error")]
    return "frame_error" if "frame_error" in names else next(iter(errors + names), None)


def training_loss(trains: Sequence[dict[str, Any]], after: int, until: int) -> float:
    """The mean training loss over steps (after, until], intervals weighted by their frames; NaN without any."""
    total = frames = 0.0
    seen = 0
    for train in trains:
        here, seen = train["frames"] - seen, train["frames"]
        if after < train["step"] <= until:
            total, frames = total + number(train.get("loss")) * here, frames + here
    return total / frames if frames else math.nan


def time_by_rank(trains: Sequence[dict[str, Any]]) -> dict[tuple[int, str], dict[str, float]]:
    """Seconds spent in COMPUTE, each of PHASES and OTHER by (rank, host), ascending, summed over "train" records."""
    spent: dict[tuple[int, str], dict[str, float]] = {}
    for train in trains:
        for part in train.get("by_rank", ()):
            who = (part["rank"], str(part.get("host", "?")))
            row = spent.setdefault(who, dict.fromkeys((COMPUTE, *PHASES, OTHER), 0.0))
            seconds = {phase: number(part.get(phase, 0.0)) for phase in (COMPUTE, *PHASES)}
            for phase, value in seconds.items():
                row[phase] += value
            row[OTHER] += max(0.0, number(train.get("seconds", 0.0)) - sum(seconds.values()))
    return dict(sorted(spent.items()))


def phases_in(spent: dict[tuple[int, str], dict[str, float]]) -> tuple[str, ...]:
    """The phases to show of what `time_by_rank` found: COMPUTE where a run was recorded so, all others, OTHER."""
    together, apart = (any(row[p] for row in spent.values() for p in some) for some in ((COMPUTE,), PHASES[:2]))
    named = [phase for phase in PHASES if phase not in SELDOM or any(row[phase] for row in spent.values())]
    return (*((COMPUTE,) if together else ()), *(named if apart or not together else named[2:]), OTHER)


def exchange_hidden(trains: Sequence[dict[str, Any]]) -> dict[int, tuple[float, float]]:
    """Seconds (waited for an exchange, with an exchange under way) by rank, over the intervals that recorded both."""
    found: dict[int, tuple[float, float]] = {}
    for part in (part for train in trains for part in train.get("by_rank", ())):
        active = number(part.get("exchange_active"))
        if active > 0:
            waited, before = found.get(part["rank"], (0.0, 0.0))
            found[part["rank"]] = (waited + number(part.get("exchange", 0.0)), before + active)
    return found


def hidden_of(trains: Sequence[dict[str, Any]]) -> float | None:
    """The share of all ranks' exchange that was hidden behind computing, 0 to 1; None where it was not recorded."""
    by_rank = exchange_hidden(trains).values()
    return hidden_share(sum(waited for waited, _ in by_rank), sum(active for _, active in by_rank))


def sent_of(run: RunHistory) -> dict[str, int]:
    """Bytes that ranks sent each other, over all intervals (`quantities.bytes_sent`)."""
    parts = [part for record in [*run.of("train"), *run.of("rest")] for part in record.get("by_rank", ())]
    return bytes_sent([{key.removeprefix("sent_"): value for key, value in part.items()} for part in parts])


def frames_per_second(trains: Sequence[dict[str, Any]]) -> float:
    """Frames a second of all ranks together, over the training intervals; NaN without any."""
    seconds = sum(number(t["seconds"]) for t in trains)
    return sum(number(t["frames_per_s"]) * number(t["seconds"]) for t in trains) / seconds if seconds else math.nan


def summarize(run: RunHistory) -> dict[str, Any]:
    """The headline numbers of a run: status, cause, best and last validation, steps, epochs, frames, seconds, speed.

    "frames" are what the loss counts; "noun" says what these are.
    """
    validations, progress = run.of("validate"), [r for r in run.records if "frames" in r]
    latest = max(progress, key=lambda r: r["step"], default={})
    epochs = [number(r["epoch"]) for r in run.records if "epoch" in r]

    def told(validation: dict[str, Any] | None) -> dict[str, Any] | None:
        if validation is None:
            return None
        return {"step": validation["step"], "epoch": validation.get("epoch"), **metrics_of(validation)}

    return {
        "run": str(run.path),
        "status": run.status,
        "stopped": run.end.get("stopped") if run.end else None,
        "cause": cause_of(run.failure) if run.status == FAILED and run.failure else None,
        "best": told(run.best),
        "last": told(validations[-1] if validations else None),
        "steps": max((r["step"] for r in run.records), default=0),
        "epochs": max(epochs, default=0.0),
        "noun": run.noun,
        "frames": latest.get("frames", 0),
        "seconds": run.seconds,
        "frames_per_s": frames_per_second(run.of("train")),
        "exchange_hidden": hidden_of(run.of("train")),
        "sent": sent_of(run),
        "ranks": run.start.get("ranks"),
        "hosts": sorted(set(run.start.get("hosts", ()))),
        "resumes": max(0, len(run.of("start")) - 1),
    }


def strict_json(value: Any) -> str:
    """One line of JSON that any reader takes: NaN and infinities become null."""

    def clean(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: clean(inner) for key, inner in item.items()}
        if isinstance(item, list | tuple):
            return [clean(inner) for inner in item]
        return None if isinstance(item, float) and not math.isfinite(item) else item

    return json.dumps(clean(value), ensure_ascii=False, allow_nan=False)
