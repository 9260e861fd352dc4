"""Numbers as people read them: durations, counts, metrics, moments."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from hpc.records import number

FEWEST = 3  # measurements that say anything of how far they spread
WIDE = 1.5  # quartiles whose quotient is above this: others used the machine, or too little was measured


def moment(seconds: float) -> str:
    """Unix seconds as a date and time, in UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def duration(seconds: float) -> str:
    """Seconds as people say them: "0.21 s", "41.2 s", "12 min 3 s", "5 h 07 min"; "–" if they are not known."""
    if not math.isfinite(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    minutes = seconds / 60
    if minutes < 60:
        return f"{int(minutes)} min {int(seconds % 60)} s"
    return f"{int(minutes // 60):,} h {int(minutes % 60):02d} min"


def counted(count: int, what: str) -> str:
    """So many of what is named in the singular: "1 rank", "2 ranks", "1,293 frames"."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def amount(value: Any) -> str:
    """A count in at most five characters and a letter: "980", "41.3 k", "2.15 M"; "–" if it is not known."""
    value = number(value)
    if not math.isfinite(value):
        return "–"
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            scaled = value / (1e3 if letter == "k" else size)
            return f"{scaled:.3g} {letter}" if scaled < 1000 else f"{scaled:,.0f} {letter}"
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 100 else f"{value:.3g}"


def metric(name: str, value: Any) -> str:
    """A metric as text: errors and accuracies in percent, the rest to four decimals; "–" if it is not known."""
    value = number(value)
    if math.isnan(value):
        return "–"
    if is_fraction(name):
        return f"{value:.2%}"
    return f"{value:.4f}" if 0.01 <= abs(value) < 1000 else f"{value:.5g}"


def bytes_sent(by_rank: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Bytes that ranks sent each other, summed over ranks: "bytes" in all, of which to the owners of sums "reduce" and
    back "share"; "float32" is what they would have been, had they been packed less (0 if they were not packed).

    by_rank  what `Strategy.sent` says
    """
    found = {what: sum(int(number(rank.get(what, 0))) for rank in by_rank) for what in ("reduce", "share", "float32")}
    return {"bytes": found["reduce"] + found["share"], **found}


def said_of_bytes(sent: Mapping[str, int]) -> str:
    """What `bytes_sent` found, in words: "12.3 M bytes, 30.9 times fewer than float32 (to owners 30.9, back 30.9)"."""
    said = f"{amount(sent['bytes'])} bytes"
    if not sent["float32"] or not sent["bytes"]:
        return said
    times = sent["float32"] / sent["bytes"]
    ways = [
        f"{name} {sent['float32'] / 2 / sent[way]:.1f}" for name, way in (("to owners", "reduce"), ("back", "share"))
        if sent[way]
    ]
    return f"{said}, {times:.1f} times fewer than float32 ({', '.join(ways)})"


def hidden_share(waited: float, active: float) -> float | None:
    """The share of an exchange that was hidden behind computing, 0 to 1; None if there was none.

    waited  seconds that ranks stood waiting for it
    active  seconds in which it was under way
    """
    return min(1.0, max(0.0, 1.0 - waited / active)) if active > 0 else None


def percent(share: float | None) -> str:
    """A fraction of 1 in whole percent: "83 %"; "–" if it is not known."""
    return "–" if share is None or not math.isfinite(share) else f"{100 * share:.0f} %"


def doubt(ratios: Sequence[float]) -> str:
    """Why the median of measured ratios says nothing: how few they are, or how far apart; "" if it does.

    >>> doubt([1.0, 1.1]), doubt([1.0, 4.0, 9.0]), doubt([1.0, 1.1, 1.2])
    ('2 pairs only', 'quartiles 2.5 and 6.5', '')
    """
    if len(ratios) < FEWEST:
        return f"{counted(len(ratios), 'pair')} only"
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return f"quartiles {amount(low)} and {amount(high)}" if not high <= WIDE * low else ""


def is_fraction(name: str) -> bool:
    """Whether a metric is shown as a percentage: errors and accuracies are fractions of 1."""
    return name.endswith(("error", "accuracy"))


def spoken(name: str) -> str:
    """A key as people say it: "frame_error" is "frame error"."""
    return name.replace("_", " ")
