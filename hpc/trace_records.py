"""A run's traces, read back: `RUN/trace/rank-00000.jsonl`, what each rank did when, for some turns of every attempt.

A file is appended to by every attempt. An attempt's first line is its header, a JSON object: "rank", "host", "ranks",
"step" (where it went on), "attempt" (when it began, the same number on all ranks), "offset_ns" (what to add to this
rank's times to get rank 0's wall clock) and "error_ns" (how far that may be off). Every other line is a span, a list:
name, begin, end (ns of the rank's monotonic clock), lane, arguments (a JSON object, or null).
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = "trace"
HEADER = frozenset({"rank", "host", "ranks", "step", "attempt", "offset_ns", "error_ns"})
# Lanes: whole turns, the loop's phases, the parts of exchanges, and what is read ahead meanwhile.
TURN, STEP, EXCHANGE, LOADING = "turn", "step", "exchange", "loading"
WAITING = "exchange"  # the phase in which a rank waits for what an exchange has not done yet


class Span(NamedTuple):
    """What was done from `begin` to `end` (ns on rank 0's wall clock)."""

    name: str
    begin: int
    end: int
    lane: str
    args: dict[str, Any]


class Turn(NamedTuple):
    """A turn of the loop with what was done in it. step: the one it ended with."""

    step: int
    begin: int
    end: int
    phases: list[Span]
    exchanges: list[Span]

    @property
    def seconds(self) -> float:
        return (self.end - self.begin) / 1e9

    def spent(self) -> dict[str, float]:
        """Seconds by phase."""
        found: dict[str, float] = {}
        for span in self.phases:
            found[span.name] = found.get(span.name, 0.0) + (span.end - span.begin) / 1e9
        return found

    def exchanging(self) -> float:
        """Seconds in which an exchange was under way: from a bucket's first part to its last, overlaps counted once."""
        ways: dict[str, tuple[int, int]] = {}
        for span in self.exchanges:
            bucket = bucket_of(span.name)
            begin, end = ways.get(bucket, (span.begin, span.end))
            ways[bucket] = (min(begin, span.begin), max(end, span.end))
        total, reached = 0, 0
        for begin, end in sorted(ways.values()):
            total += max(0, end - max(begin, reached))
            reached = max(reached, end)
        return total / 1e9


@dataclass(frozen=True)
class RankTrace:
    """One rank's spans of one attempt, in the order of their begins."""

    rank: int
    host: str
    step: int
    spans: list[Span]

    @cached_property
    def turns(self) -> list[Turn]:
        """The turns recorded whole, in order."""
        whole = [s for s in self.spans if s.lane == TURN]
        begins = [s.begin for s in whole]
        inside: list[dict[str, list[Span]]] = [{STEP: [], EXCHANGE: []} for _ in whole]
        for span in self.spans:
            at = bisect_right(begins, span.begin) - 1
            if span.lane != TURN and at >= 0 and span.begin < whole[at].end and span.lane in inside[at]:
                inside[at][span.lane].append(span)
        return [
            Turn(int(s.args["step"]), s.begin, s.end, found[STEP], found[EXCHANGE])
            for s, found in zip(whole, inside, strict=True)
        ]


@dataclass(frozen=True)
class Attempt:
    """One attempt's traces by rank, ascending."""

    began: int
    ranks: dict[int, RankTrace]


def read_traces(run: Path) -> list[Attempt]:
    """The traces of a run's attempts, in order; attempts that recorded no span are left out.

    run  the run's folder; the run may still be going on, or have been killed
    Raises ValueError if the run has no trace, saying how to record one, or if a file is damaged.
    """
    files = sorted((run / FOLDER).glob("rank-*.jsonl"))
    if not files:
        raise ValueError(_missing(run))
    attempts: dict[int, dict[int, RankTrace]] = {}
    for path in files:
        for began, trace in _attempts_of(path):
            if trace.spans:
                attempts.setdefault(began, {})[trace.rank] = trace
    if not attempts:
        raise ValueError(f"'{run / FOLDER}' holds no span yet; they are written every few turns, try again later")
    return [Attempt(began, dict(sorted(attempts[began].items()))) for began in sorted(attempts)]


def _missing(run: Path) -> str:
    if not (run / "recipe.toml").is_file():
        what = "it holds no 'recipe.toml'" if run.is_dir() else "there is no such folder"
        return f"'{run}' is not a run folder: {what}; a run folder is what 'trireme train' writes"
    return (
        f"'{run}' has no trace (no '{FOLDER}/rank-*.jsonl'): either the recipe key 'log.trace' is 0, or nothing was "
        "trained yet; it says how many turns to record from every start and every validation on, log.trace=20 say"
    )


def _attempts_of(path: Path) -> Iterator[tuple[int, RankTrace]]:
    """A rank's attempts: when each began, and its spans. A torn line may only end an attempt."""
    header: dict[str, Any] | None = None
    spans: list[Span] = []
    torn = 0
    for line_number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        value = _json(line)
        if isinstance(value, dict) and value.keys() >= HEADER:
            if header:
                yield _finished(header, spans)
            header, spans, torn = value, [], 0
        elif torn:
            raise ValueError(f"'{path}', line {torn}: not a span; delete this line, or the file, to go on without it")
        elif header and isinstance(value, list) and [type(v) for v in value[:4]] == [str, int, int, str]:
            offset = header["offset_ns"]
            spans.append(Span(value[0], value[1] + offset, value[2] + offset, value[3], value[4] or {}))
        else:
            torn = line_number
    if header:
        yield _finished(header, spans)


def _json(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:  # UnicodeDecodeError is one too
        return None


def _finished(header: dict[str, Any], spans: list[Span]) -> tuple[int, RankTrace]:
    ordered = sorted(spans, key=lambda s: (s.begin, -s.end))
    return header["attempt"], RankTrace(header["rank"], str(header["host"]), header["step"], ordered)


def bucket_of(name: str) -> str:
    """Whose part of an exchange a span is: "bucket 3 reduce" is of "bucket 3"."""
    return name.rpartition(" ")[0]


def lanes_of(spans: Iterable[Span]) -> dict[str, list[Span]]:
    """Spans in order by lane, TURN and STEP first; what overlaps within a lane goes to further ones: "exchange 2".

    The parts of a bucket stay in one lane where that is free.
    """
    found: dict[str, list[Span]] = {TURN: [], STEP: []}
    homes: dict[tuple[str, str], str] = {}
    for span in spans:
        home = (span.lane, bucket_of(span.name))
        count, lane = 0, homes.get(home, span.lane)
        while found.get(lane) and found[lane][-1].end > span.begin:
            count += 1
            lane = f"{span.lane} {count}" if count > 1 else span.lane
        found.setdefault(lane, []).append(span)
        homes[home] = lane
    return {lane: held for lane, held in found.items() if held}


def last_turns(trace: RankTrace, count: int) -> list[int]:
    """The steps of the last `count` turns that follow one another without a long break; fewer if there are fewer."""
    runs: list[list[Turn]] = []
    turns = trace.turns
    usual = sorted(t.end - t.begin for t in turns)[len(turns) // 2] if turns else 0
    for turn in turns:
        if runs and turn.begin - runs[-1][-1].end <= usual:
            runs[-1].append(turn)
        else:
            runs.append([turn])
    best: Sequence[Turn] = max(reversed(runs), key=lambda run: min(len(run), count), default=[])
    return [turn.step for turn in best[-count:]]
