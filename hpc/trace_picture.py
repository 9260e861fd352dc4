"""A few turns of every rank as a timeline: a thick lane of phases, thin ones of the exchange's parts below it.

What is read ahead meanwhile, a split's next piece, is a thin lane in the colour of reading.

Phases have the colours of the report's picture, and some of them a pattern too, for readers of grey; grey is what
belongs to no phase. Parts of the exchange run from dark to light, in a colour that no phase has.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Patch
from matplotlib.text import Text
from matplotlib.textpath import TextPath

from hpc.quantities import hidden_share, percent
from hpc.report_picture import LIGHT, PHASE_SERIES, dress, new_figure, png
from hpc.trace_records import (
    EXCHANGE,
    LOADING,
    STEP,
    WAITING,
    Attempt,
    RankTrace,
    Span,
    Turn,
    bucket_of,
    lanes_of,
    last_turns,
)

RANKS_AT_MOST = 24  # lanes that can be told apart; of more ranks, some are drawn
INCHES = 1.1  # of paper for 1.0 of height
PHASE_HEIGHT, PART_HEIGHT, GAP = 0.44, 0.18, 0.05
LINES_AT_MOST = 6  # of parts under way at the same time; with more they get thinner
MARGIN = 4.0  # points that a label leaves free at either side of its bar
SHADES = ("#3b1a66", "#8d66bd", "#d9c8ec", "#f4effa")  # of the kinds of an exchange's parts
DARK_SHADES = 2  # so many of them take white text
# What its colour alone does not tell from forward or backward in grey.
PATTERNS = {WAITING: "////", "read": "....", "checkpoint": "\\\\\\", "validate": "---",
            "log": "|||", "select": "xxx", "judge": "oo"}
PALE = "#fbe3d1"  # the ground of what is waited for, under stripes in the phase's colour
WORDS = {"reduce": "reduce: gather and sum", "update": "update: new weights from the sum",
         "share": "share: new weights to all"}


def draw(name: str, attempt: Attempt, count: int, slowest: int | None) -> bytes:
    """The last `count` turns of an attempt as a PNG, 1600 pixels wide.

    name     the run's, for the title
    attempt  the traces of its ranks
    count    turns to draw; fewer where fewer follow one another
    slowest  the rank to mark, drawn whatever the number of ranks; None: no one
    """
    return png(picture(name, attempt, count, slowest), LIGHT)


def picture(name: str, attempt: Attempt, count: int, slowest: int | None) -> Figure:
    """What `draw` renders."""
    ranks = chosen(sorted(attempt.ranks), slowest)
    steps = last_turns(attempt.ranks[slowest if slowest is not None else ranks[0]], count)
    drawn = {rank: _within(attempt.ranks[rank], steps) for rank in ranks}
    lines = {rank: list(lanes_of(s for s in drawn[rank] if s.lane == EXCHANGE).values()) for rank in ranks}
    loads = {rank: [s for s in drawn[rank] if s.lane == LOADING] for rank in ranks}
    spans = [span for held in drawn.values() for span in held]
    shown: list[Span | Turn] = [*spans]
    shown += [turn for rank in ranks for turn in attempt.ranks[rank].turns if turn.step in steps]
    begin, end = (min(s.begin for s in shown), max(s.end for s in shown)) if shown else (0, 1)
    scale = _Scale(begin, (end - begin) / 1e6, max(len(lines[rank]) + bool(loads[rank]) for rank in ranks))
    parts = [s for s in sorted(spans, key=lambda s: s.begin) if s.lane == EXCHANGE]
    kinds = list(dict.fromkeys(kind_of(s.name) for s in parts))
    figure = new_figure(1.75 + INCHES * scale.row * max(len(ranks), 2), LIGHT)
    axes = figure.add_subplot()
    dress(axes, LIGHT, _title(name, steps), f"milliseconds since step {steps[0]:,} began" if steps else "")
    for row, rank in enumerate(ranks):
        top = row * scale.row
        _turns(axes, top, attempt.ranks[rank], steps, scale)
        _phases(axes, top, [s for s in drawn[rank] if s.lane == STEP], scale)
        for number, held in enumerate(lines[rank]):
            _parts(axes, top + PHASE_HEIGHT + GAP + number * scale.line, held, scale, kinds)
        below = top + PHASE_HEIGHT + GAP + len(lines[rank]) * scale.line
        axes.broken_barh([scale.bar(s) for s in loads[rank]], (below, scale.line), zorder=2, **_look("read"))
    middles = [row * scale.row + PHASE_HEIGHT / 2 for row in range(len(ranks))]
    axes.set_yticks(middles, [_who(attempt.ranks[rank], slowest, len(ranks)) for rank in ranks])
    axes.tick_params(axis="y", labelcolor=LIGHT.ink)
    axes.set_ylim(len(ranks) * scale.row - GAP, -2 * GAP)
    axes.set_xlim(-0.002 * scale.width, 1.002 * scale.width)
    axes.grid(False, axis="y")
    axes.set_title(_hidden_words(attempt, steps), loc="right", fontsize=10.5, color=LIGHT.ink, pad=20)
    handles = _legend(spans, kinds)
    legend = figure.legend(handles=handles, loc="outside lower center", ncols=5, title=_explained(parts),
                           title_fontsize=10, frameon=False, fontsize=10, labelcolor=LIGHT.ink, handlelength=1.8,
                           columnspacing=1.4)
    legend.get_title().set_color(LIGHT.ink)
    figure.draw_without_rendering()  # only now it is known how wide the axes are
    scale.points = axes.get_window_extent().width * 72 / figure.dpi / 1.004
    _name_steps(axes, [turn for turn in attempt.ranks[ranks[0]].turns if turn.step in steps], scale)
    for row, rank in enumerate(ranks):
        top = row * scale.row
        _name_phases(axes, top, [s for s in drawn[rank] if s.lane == STEP], scale)
        for number, held in enumerate(lines[rank]):
            middle = top + PHASE_HEIGHT + GAP + (number + 0.5) * scale.line
            _name_parts(axes, middle, held, scale, kinds, len({bucket_of(s.name) for s in parts}) > 1)
        middle = top + PHASE_HEIGHT + GAP + (len(lines[rank]) + 0.5) * scale.line
        for span in loads[rank]:
            left, length = scale.bar(span)
            _say(axes, left + length / 2, middle, scale.fitting(length, (span.name,), 8), 8, LIGHT.ink)
    return figure


class _Scale:
    """Where things go. begin: what is 0 (ns); width: milliseconds drawn; lines: of parts, below a rank's phases."""

    def __init__(self, begin: int, width: float, lines: int):
        self.begin, self.width = begin, width
        self.points = 0.0  # that `width` takes on paper
        self.line = PART_HEIGHT * min(1.0, LINES_AT_MOST / max(lines, 1))
        self.row = PHASE_HEIGHT + 3 * GAP + (GAP + lines * self.line if lines else 0.0)

    def bar(self, span: Span | Turn) -> tuple[float, float]:
        """(left, length) in milliseconds."""
        return (span.begin - self.begin) / 1e6, (span.end - span.begin) / 1e6

    def fitting(self, length: float, said: Sequence[str], size: float) -> str:
        """The first of what could be said in a bar of so many milliseconds that fits it; "" if none does."""
        room = length / self.width * self.points - 2 * MARGIN
        return next((text for text in said if text_width(text, size) <= room), "") if room > 0 else ""


@cache
def text_width(text: str, size: float) -> float:
    """How many points wide a text is: its longest line."""
    font = FontProperties(size=size)
    return max(float(TextPath((0, 0), line, prop=font).get_extents().width) for line in text.split("\n"))


def chosen(ranks: Sequence[int], slowest: int | None) -> list[int]:
    """At most RANKS_AT_MOST of the ranks, evenly spread, the slowest among them."""
    if len(ranks) <= RANKS_AT_MOST:
        return list(ranks)
    spread = {ranks[i * len(ranks) // RANKS_AT_MOST] for i in range(RANKS_AT_MOST)}
    if slowest is not None and slowest not in spread:
        spread.discard(max(spread))
        spread.add(slowest)
    return sorted(spread)


def kind_of(name: str) -> str:
    """What a part of an exchange does, whichever bucket it is of: "bucket 3 reduce" is "reduce"."""
    return name.split()[-1] if name.split() else name


def _within(trace: RankTrace, steps: Sequence[int]) -> list[Span]:
    """The spans of these turns, and what lies between them."""
    turns = [turn for turn in trace.turns if turn.step in set(steps)]
    if not turns:
        return []
    begin, end = turns[0].begin, turns[-1].end
    return [s for s in trace.spans if s.lane in (STEP, EXCHANGE, LOADING) and s.begin >= begin and s.begin < end]


def _turns(axes: Axes, top: float, trace: RankTrace, steps: Sequence[int], scale: _Scale) -> None:
    """Each turn's ground, in the colour of what belongs to no phase, and a line at its end."""
    for turn in trace.turns:
        if turn.step not in steps:
            continue
        left, length = scale.bar(turn)
        axes.broken_barh([(left, length)], (top, PHASE_HEIGHT), facecolor=LIGHT.grid, linewidth=0)
        axes.plot([left + length] * 2, [top - GAP, top + scale.row - 2 * GAP], color=LIGHT.ink, linewidth=1.1, zorder=4)


def _name_steps(axes: Axes, turns: Sequence[Turn], scale: _Scale) -> None:
    """The step of every turn above it, where it fits."""
    for turn in turns:
        left, length = scale.bar(turn)
        said = scale.fitting(length, (f"step {turn.step:,}", f"{turn.step:,}"), 9.5)
        axes.annotate(said, (left + length / 2, 1.0), xycoords=axes.get_xaxis_transform(), xytext=(0, 2),
                      textcoords="offset points", ha="center", va="bottom", fontsize=9.5, color=LIGHT.muted)


def _phases(axes: Axes, top: float, spans: Sequence[Span], scale: _Scale) -> None:
    for name in dict.fromkeys(span.name for span in spans):
        bars = [scale.bar(s) for s in spans if s.name == name]
        axes.broken_barh(bars, (top, PHASE_HEIGHT), zorder=2, **_look(name))


def _parts(axes: Axes, top: float, spans: Sequence[Span], scale: _Scale, kinds: Sequence[str]) -> None:
    """One line of an exchange's parts."""
    for kind in kinds:
        bars = [scale.bar(s) for s in spans if kind_of(s.name) == kind]
        axes.broken_barh(bars, (top, scale.line), facecolor=_shade(kind, kinds), edgecolor=LIGHT.surface, linewidth=0.6,
                         zorder=2)


def _name_phases(axes: Axes, top: float, spans: Sequence[Span], scale: _Scale) -> None:
    """A phase's name and milliseconds, or these alone, where they fit."""
    for span in spans:
        left, length = scale.bar(span)
        said = scale.fitting(length, (f"{span.name}\n{length:.3g} ms", f"{length:.3g} ms"), 9)
        colour = LIGHT.on_phase(span.name) if span.name in PHASE_SERIES else "#ffffff"
        if span.name == WAITING:
            colour = LIGHT.ink
        text = _say(axes, left + length / 2, top + PHASE_HEIGHT / 2, said, 9, colour)
        if text and span.name in PATTERNS:  # letters on a pattern cannot be read
            text.set_bbox({"facecolor": _look(span.name)["facecolor"], "linewidth": 0, "pad": 1.5})


def _name_parts(
    axes: Axes, middle: float, spans: Sequence[Span], scale: _Scale, kinds: Sequence[str], several: bool
) -> None:
    """What a part does and of which bucket, if there are several; or the bucket alone; where it fits."""
    if scale.line < 0.6 * PART_HEIGHT:
        return
    for span in spans:
        left, length = scale.bar(span)
        kind, bucket = kind_of(span.name), bucket_of(span.name).split()[-1:]
        said = scale.fitting(length, [" ".join([kind, *bucket]), *bucket] if several else [kind], 8)
        dark = list(kinds).index(kind) < DARK_SHADES
        _say(axes, left + length / 2, middle, said, 8, "#ffffff" if dark else "#101418")


def _say(axes: Axes, x: float, y: float, said: str, size: float, colour: str) -> Text | None:
    if not said:
        return None
    return axes.text(x, y, said, ha="center", va="center_baseline" if "\n" not in said else "center", fontsize=size,
                     color=colour, zorder=3, clip_on=True, linespacing=1.15)


def _look(phase: str) -> dict[str, Any]:
    """How a phase's bars are filled; what the report knows no colour for ("log") is muted."""
    colour = LIGHT.phase(phase) if phase in PHASE_SERIES else LIGHT.muted
    if phase not in PATTERNS:
        return {"facecolor": colour, "linewidth": 0}
    ground, lines = (PALE, colour) if phase == WAITING else (colour, "#ffffff")
    return {"facecolor": ground, "edgecolor": lines, "hatch": PATTERNS[phase], "linewidth": 0}


def _shade(kind: str, kinds: Sequence[str]) -> str:
    """The colour of a kind of an exchange's parts."""
    return SHADES[min(list(kinds).index(kind), len(SHADES) - 1)]


def _who(trace: RankTrace, slowest: int | None, ranks: int) -> str:
    mark = "\nthe slowest" if trace.rank == slowest and ranks > 1 else ""
    return f"rank {trace.rank} · {trace.host}{mark}"


def _title(name: str, steps: Sequence[int]) -> str:
    count = len(steps)
    return f"{name}: the last {f'{count} turns' if count > 1 else 'turn'} traced" if steps else f"{name}: no whole turn"


def _hidden_words(attempt: Attempt, steps: Sequence[int]) -> str:
    turns = [turn for trace in attempt.ranks.values() for turn in trace.turns if turn.step in steps]
    waited = sum(turn.spent().get(WAITING, 0.0) for turn in turns)
    share = hidden_share(waited, sum(turn.exchanging() for turn in turns))
    if len({trace.host for trace in attempt.ranks.values()}) == 1:
        return ""  # they exchange between two layers themselves: nothing is hidden from them
    return "" if share is None else f"exchange hidden {percent(share)}"


def _legend(spans: Sequence[Span], kinds: Sequence[str]) -> list[Patch]:
    phases = dict.fromkeys(span.name for span in sorted(spans, key=lambda s: s.begin) if span.lane == STEP)
    said = {WAITING: f"{WAITING}: waiting for it"}
    handles = [Patch(label=said.get(phase, phase), **_look(phase)) for phase in phases]
    handles.append(Patch(color=LIGHT.grid, label="other"))
    if any(span.lane == LOADING for span in spans):
        handles.append(Patch(label="below: a split's next piece is read ahead", **_look("read")))
    return handles + [Patch(color=_shade(kind, kinds), label=WORDS.get(kind, kind)) for kind in kinds]


def _explained(parts: Sequence[Span]) -> str:
    """What the thin bars are, and the numbers in them."""
    buckets = len({bucket_of(span.name) for span in parts})
    said = "Thick bars: what a rank is doing. Thin bars: the exchange"
    if buckets > 1:
        return f"{said}, in {buckets} buckets; number 0 holds the model's last layers, where backward begins."
    return f"{said}, all of it at once." if buckets else ""
