"""`trireme trace RUN`: what every rank did when, as a timeline for a trace viewer, a picture and a table."""

from __future__ import annotations

import argparse
import json
import statistics
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from hpc.quantities import duration, hidden_share, percent
from hpc.report import replace_file
from hpc.summary import OTHER, PHASES, strict_json
from hpc.trace_records import WAITING, Attempt, RankTrace, Span, lanes_of, read_traces

EVEN = 0.05  # ranks whose work differs by less are called even
EXAMPLES = """examples:
  trireme trace runs/timit                    write runs/timit/trace.json and runs/timit/trace.png
  trireme trace runs/timit --turns 8          eight turns in the picture (the JSON holds all that were recorded)
  trireme trace runs/timit --out /tmp/t.json  write /tmp/t.json and /tmp/t.png

Open the JSON at https://ui.perfetto.dev (nothing is uploaded) or in chrome://tracing. Training records the first
'log.trace' turns (a recipe key, default 20) after every start and every validation; a run that is still going, was
killed or failed can be looked at too. On a GPU "forward" is the time to launch it, and "backward" what both take.

The table's figures are means over the turns that a rank recorded, so a row's parts add up to its turn.
"""


def trace(run: Path, out: Path | None = None, turns: int = 3) -> dict[str, Any]:
    """Write a run's timeline as Chrome trace JSON and as a picture; returns what the table shows.

    run    the run's folder
    out    the JSON file, or a folder to write trace.json into; None: RUN/trace.json. The picture gets the same name
    turns  how many turns to draw

    Returns {"json", "png": paths, "attempts": how many were traced, "step": where the last of them began,
    "ranks": `shares` of the last, "hidden": the share of its exchange that no rank waited for (or None), "slowest": the
    rank that the others wait for, "behind": how much longer it works than the median of the others, as a fraction}.
    Raises ValueError if the run has no trace; OSError if a file cannot be written.
    """
    from hpc.trace_picture import draw  # matplotlib: only where something is drawn

    target = run / "trace.json" if out is None else out / "trace.json" if out.is_dir() else out
    if target.suffix == ".png":
        raise ValueError(f"--out '{out}' is the name of a picture; give that of the JSON, the picture is put beside it")
    attempts = read_traces(run)
    if not target.parent.is_dir():
        raise ValueError(f"--out '{target}': there is no folder '{target.parent}'; make it first")
    last = next((a for a in reversed(attempts) if any(r.turns for r in a.ranks.values())), attempts[-1])
    hidden = hidden_over(last.ranks.values())
    ranks = [shares(rank) | ({} if hidden is not None else {"exchange_hidden": None}) for rank in last.ranks.values()]
    working = {row["rank"]: row["working_s"] for row in ranks if row["turns"]}
    slowest = max(working, key=lambda rank: working[rank], default=None)
    others = [seconds for rank, seconds in working.items() if rank != slowest]
    usual = statistics.median(others) if others else 0.0
    replace_file(target, json.dumps(chrome(attempts)).encode())
    replace_file(target.with_suffix(".png"), draw(run.resolve().name, last, turns, slowest))
    return {
        "json": str(target), "png": str(target.with_suffix(".png")), "attempts": len(attempts),
        "step": next(iter(last.ranks.values())).step, "ranks": ranks, "hidden": hidden,
        "slowest": slowest,
        "behind": working[slowest] / usual - 1 if slowest is not None and usual else 0.0,
    }


def hidden_over(ranks: Iterable[RankTrace]) -> float | None:
    """The share of all these ranks' exchange that was hidden; None where its parts were not recorded.

    Not of ranks on one host: they exchange between two layers themselves, which is in their backward's time.
    """
    ranks = list(ranks)
    if len({rank.host for rank in ranks}) == 1:
        return None
    turns = [turn for rank in ranks for turn in rank.turns]
    waited = sum(turn.spent().get(WAITING, 0.0) for turn in turns)
    return hidden_share(waited, sum(turn.exchanging() for turn in turns))


def shares(trace: RankTrace) -> dict[str, Any]:
    """A rank's traced turns in numbers: how many, and means over all of them, so that the parts add up to the whole.

    "turn_s" is the mean turn's seconds, "shares" are each phase's part of it, and OTHER what belongs to none;
    "working_s" is what of "turn_s" lies outside the phase "exchange", where a rank waits for slower ones;
    "exchange_hidden" the share of its exchanges that it did not wait for (None where their parts were not recorded).
    """
    turns = trace.turns
    whole = sum(turn.seconds for turn in turns)
    spent: dict[str, float] = {}
    for turn in turns:
        for phase, seconds in turn.spent().items():
            if phase in PHASES:
                spent[phase] = spent.get(phase, 0.0) + seconds
    spent[OTHER] = max(0.0, whole - sum(spent.values()))
    waited, exchanging = spent.get(WAITING, 0.0), sum(turn.exchanging() for turn in turns)
    return {
        "rank": trace.rank, "host": trace.host, "turns": len(turns),
        "turn_s": whole / len(turns) if turns else None,
        "shares": {phase: seconds / whole for phase, seconds in spent.items()} if whole else {},
        "working_s": (whole - waited) / len(turns) if turns else None,
        "exchange_hidden": hidden_share(waited, exchanging),
    }


def chrome(attempts: Sequence[Attempt]) -> dict[str, Any]:
    """Attempts as a Chrome trace: a process a rank, a thread a lane, times in microseconds from the first span on."""
    zero = min(span.begin for attempt in attempts for rank in attempt.ranks.values() for span in rank.spans)
    names: dict[int, str] = {}
    lanes: dict[tuple[int, str], int] = {}
    events: list[dict[str, Any]] = []
    for number, attempt in enumerate(attempts, 1):
        for rank, trace in attempt.ranks.items():
            names[rank] = f"rank {rank} on {trace.host}"
            where = _Where(trace)
            for lane, spans in lanes_of(trace.spans).items():
                thread = lanes.setdefault((rank, lane), 1 + sum(held == rank for held, _ in lanes))
                for span in spans:
                    args = {**where(span), **span.args, **({"attempt": number} if len(attempts) > 1 else {})}
                    events.append({
                        "name": span.name, "cat": span.lane, "ph": "X", "pid": rank, "tid": thread, "args": args,
                        "ts": (span.begin - zero) / 1e3, "dur": (span.end - span.begin) / 1e3,
                    })
    return {"displayTimeUnit": "ms", "traceEvents": [*_labels(names, lanes), *events]}


def _labels(names: dict[int, str], lanes: dict[tuple[int, str], int]) -> Iterator[dict[str, Any]]:
    """The events that name processes and threads, and put them in order."""
    for rank, name in sorted(names.items()):
        yield {"ph": "M", "pid": rank, "name": "process_name", "args": {"name": name}}
        yield {"ph": "M", "pid": rank, "name": "process_sort_index", "args": {"sort_index": rank}}
    for (rank, lane), thread in lanes.items():
        yield {"ph": "M", "pid": rank, "tid": thread, "name": "thread_name", "args": {"name": lane}}
        yield {"ph": "M", "pid": rank, "tid": thread, "name": "thread_sort_index", "args": {"sort_index": thread}}


class _Where:
    """The step and epoch of a span: those that its turn ended with; between turns, those of the turn before."""

    def __init__(self, trace: RankTrace):
        self._turns = [span for span in trace.spans if span.lane == "turn"]
        self._begins = [span.begin for span in self._turns]
        self._first = trace.step

    def __call__(self, span: Span) -> dict[str, Any]:
        at = bisect_right(self._begins, span.begin) - 1
        return dict(self._turns[at].args) if at >= 0 else {"step": self._first}


def show(found: dict[str, Any], console: Console) -> None:
    """Print what `trace` returned: where it is, how to open it, a rank's time by phase, the slowest rank."""
    console.print(f"wrote {found['json']}: open it at https://ui.perfetto.dev or in chrome://tracing", soft_wrap=True)
    console.print(f"wrote {found['png']}", soft_wrap=True)
    ranks = [row for row in found["ranks"] if row["turns"]]
    if not ranks:
        return console.print("No turn was recorded whole yet.")
    phases = list(dict.fromkeys(phase for row in ranks for phase in row["shares"] if phase != OTHER))
    hidden = any(row["exchange_hidden"] is not None for row in ranks)
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, collapse_padding=True)
    for name in ("rank", "host", "turns", "a turn", *phases, OTHER, *(["hidden"] if hidden else [])):
        table.add_column(name, justify="left" if name == "host" else "right", overflow="fold")
    for row in ranks:
        told = [f"{share} %" for share in percents([row["shares"].get(phase, 0.0) for phase in (*phases, OTHER)])]
        told += [percent(row["exchange_hidden"])] if hidden else []
        table.add_row(str(row["rank"]), row["host"], str(row["turns"]), duration_of_turn(row["turn_s"]), *told)
    console.print(table)
    console.print("Means over each rank's turns: the parts of a row add up to its turn.", soft_wrap=True)
    if hidden:
        console.print(f"Of the exchange, {percent(found['hidden'])} was hidden behind computing.", soft_wrap=True)
    console.print(slowest_words(found), soft_wrap=True)
    if found["attempts"] > 1:
        console.print(
            f"The table and the picture are of the last attempt that recorded turns (from step {found['step']:,}); "
            f"the JSON holds {found['attempts']}.", soft_wrap=True,
        )
    return None


def percents(parts: Sequence[float]) -> list[int]:
    """Parts of 1 in whole percent that add up as the parts do: what rounding leaves over goes to the largest rests.

    >>> percents([1 / 3, 1 / 3, 1 / 3])
    [34, 33, 33]
    """
    found = [int(100 * part) for part in parts]
    rests = sorted(range(len(parts)), key=lambda at: found[at] - 100 * parts[at])
    for at in rests[: round(100 * sum(parts)) - sum(found)]:
        found[at] += 1
    return found


def duration_of_turn(seconds: float) -> str:
    """Seconds as "12.3 ms" below a second, else as durations are said."""
    return f"{1e3 * seconds:.3g} ms" if seconds < 0.9995 else duration(seconds)


def slowest_words(found: dict[str, Any]) -> str:
    """Which rank the others wait for."""
    ranks = [row for row in found["ranks"] if row["turns"]]
    row = next(row for row in ranks if row["rank"] == found["slowest"])
    works = f"{duration_of_turn(row['working_s'])} of a turn's {duration_of_turn(row['turn_s'])} outside 'exchange'"
    if len(ranks) == 1:
        return f"One rank: {works}."
    others = [other["rank"] for other in ranks if other is not row]
    one = len(others) == 1
    whom = f"rank {others[0]}" if one else "the median of the others"
    wait = f", which {'waits' if one else 'wait'} for it in 'exchange'."
    verdict = ": the ranks are even." if found["behind"] < EVEN else wait
    more = f"{percent(found['behind'])} more than {whom}{verdict}"
    return f"The slowest is rank {row['rank']} on {row['host']}: {works}, {more}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give `trireme trace` its arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = "Draw when each rank read, computed and exchanged: for a trace viewer, and as a picture."
    parser.epilog = EXAMPLES
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write the JSON (default: RUN/trace.json)")
    parser.add_argument("--turns", type=_positive, default=3, metavar="N", help="turns in the picture (default: 3)")
    parser.add_argument("--json", action="store_true", help="print the table as one JSON line")


def _positive(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"'{text}' is no number of turns; expected 1 or more")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Do what the parsed arguments ask; the exit status."""
    found = trace(args.run, args.out, args.turns)
    if args.json:
        print(strict_json(found))
        return 0
    show(found, Console(highlight=False, markup=False))
    return 0
