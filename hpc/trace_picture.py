"""A few turns of every rank as a timeline: a thick lane of phases, a thin one of the exchange's parts below it.

Colours are those of the report's picture; grey is what belongs to no phase.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch

from hpc.quantities import hidden_share, percent
from hpc.report_picture import LIGHT, PHASE_SERIES, dress, new_figure, png
from hpc.trace_records import EXCHANGE, STEP, WAITING, Attempt, RankTrace, Span, Turn, lanes_of, last_turns

RANKS_AT_MOST = 24  # lanes that can be told apart; of more ranks, some are drawn
INCHES = 1.1  # of paper for 1.0 of height
PHASE_HEIGHT, PART_HEIGHT, GAP = 0.44, 0.18, 0.05
LINES_AT_MOST = 6  # of parts under way at the same time; with more they get thinner
NAMED, TIMED = 0.06, 0.042  # shares of the width from which a bar carries its name and milliseconds, or these alone
TINTS = (0.0, 0.42, 0.68)  # how far the kinds of an exchange's parts are from its colour to white


def draw(name: str, attempt: Attempt, count: int, slowest: int | None) -> bytes:
    """The last `count` turns of an attempt as a PNG, 1600 pixels wide.

    name     the run's, for the title
    attempt  the traces of its ranks
    count    turns to draw; fewer where fewer follow one another
    slowest  the rank to mark, drawn whatever the number of ranks; None: no one
    """
    ranks = chosen(sorted(attempt.ranks), slowest)
    steps = last_turns(attempt.ranks[slowest if slowest is not None else ranks[0]], count)
    drawn = {rank: _within(attempt.ranks[rank], steps) for rank in ranks}
    lines = {rank: list(lanes_of(s for s in drawn[rank] if s.lane == EXCHANGE).values()) for rank in ranks}
    spans = [span for held in drawn.values() for span in held]
    begin, end = (min(s.begin for s in spans), max(s.end for s in spans)) if spans else (0, 1)
    scale = _Scale(begin, (end - begin) / 1e6, max(len(held) for held in lines.values()))
    kinds = list(dict.fromkeys(kind_of(s.name) for s in sorted(spans, key=lambda s: s.begin) if s.lane == EXCHANGE))
    figure = new_figure(1.6 + INCHES * scale.row * max(len(ranks), 2), LIGHT)
    axes = figure.add_subplot()
    dress(axes, LIGHT, _title(name, steps), f"milliseconds since step {steps[0]:,} began" if steps else "")
    for row, rank in enumerate(ranks):
        top = row * scale.row
        _turns(axes, top, attempt.ranks[rank], steps, scale, label=not row)
        _phases(axes, top, [s for s in drawn[rank] if s.lane == STEP], scale)
        for number, held in enumerate(lines[rank]):
            _parts(axes, top + PHASE_HEIGHT + GAP + number * scale.line, held, scale, kinds)
    middles = [row * scale.row + PHASE_HEIGHT / 2 for row in range(len(ranks))]
    axes.set_yticks(middles, [_who(attempt.ranks[rank], slowest, len(ranks)) for rank in ranks])
    axes.tick_params(axis="y", labelcolor=LIGHT.ink)
    axes.set_ylim(len(ranks) * scale.row - GAP, -2 * GAP)
    axes.set_xlim(-0.002 * scale.width, 1.002 * scale.width)
    axes.grid(False, axis="y")
    axes.set_title(_hidden_words(attempt, steps), loc="right", fontsize=10.5, color=LIGHT.ink, pad=20)
    handles = _legend(spans, kinds)
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles) if len(handles) < 10 else 6,
                  frameon=False, fontsize=10, labelcolor=LIGHT.ink, handlelength=1.2, columnspacing=1.4)
    return png(figure, LIGHT)


class _Scale:
    """Where things go. begin: what is 0 (ns); width: milliseconds drawn; lines: of parts, below a rank's phases."""

    def __init__(self, begin: int, width: float, lines: int):
        self.begin, self.width = begin, width
        self.line = PART_HEIGHT * min(1.0, LINES_AT_MOST / max(lines, 1))
        self.row = PHASE_HEIGHT + 3 * GAP + (GAP + lines * self.line if lines else 0.0)

    def bar(self, span: Span | Turn) -> tuple[float, float]:
        """(left, length) in milliseconds."""
        return (span.begin - self.begin) / 1e6, (span.end - span.begin) / 1e6


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
    return [s for s in trace.spans if s.lane in (STEP, EXCHANGE) and s.begin >= begin and s.begin < end]


def _turns(axes: Axes, top: float, trace: RankTrace, steps: Sequence[int], scale: _Scale, label: bool) -> None:
    """Each turn's ground, in the colour of what belongs to no phase, a line at its end, and its step above."""
    for turn in trace.turns:
        if turn.step not in steps:
            continue
        left, length = scale.bar(turn)
        axes.broken_barh([(left, length)], (top, PHASE_HEIGHT), facecolor=LIGHT.grid, linewidth=0)
        axes.plot([left + length] * 2, [top - GAP, top + scale.row - 2 * GAP], color=LIGHT.ink, linewidth=1.1, zorder=4)
        if label:
            axes.annotate(f"step {turn.step:,}", (left + length / 2, 1.0), xycoords=axes.get_xaxis_transform(),
                          xytext=(0, 2), textcoords="offset points", ha="center", va="bottom", fontsize=9.5,
                          color=LIGHT.muted)


def _phases(axes: Axes, top: float, spans: Sequence[Span], scale: _Scale) -> None:
    for name in dict.fromkeys(span.name for span in spans):
        bars = [scale.bar(s) for s in spans if s.name == name]
        axes.broken_barh(bars, (top, PHASE_HEIGHT), facecolor=_colour(name), linewidth=0, zorder=2)
        for left, length in bars:
            said = f"{length:.3g} ms" if length >= TIMED * scale.width else ""
            said = f"{name}\n{said}" if length >= NAMED * scale.width else said
            axes.text(left + length / 2, top + PHASE_HEIGHT / 2, said, ha="center", va="center", fontsize=9,
                      color=LIGHT.on_phase(name) if name in PHASE_SERIES else "#ffffff", zorder=3, clip_on=True,
                      linespacing=1.15)


def _parts(axes: Axes, top: float, spans: Sequence[Span], scale: _Scale, kinds: Sequence[str]) -> None:
    """One line of an exchange's parts; the number of the bucket is written where it fits."""
    for index, kind in enumerate(kinds):
        held = [s for s in spans if kind_of(s.name) == kind]
        bars = [scale.bar(s) for s in held]
        axes.broken_barh(bars, (top, scale.line), facecolor=_tint(index), edgecolor=LIGHT.surface, linewidth=0.6,
                         zorder=2)
        for span, (left, length) in zip(held, bars, strict=True):
            numbers = re.findall(r"\d+", span.name)
            if numbers and length >= 0.012 * scale.width and scale.line >= 0.6 * PART_HEIGHT:
                axes.text(left + length / 2, top + scale.line / 2, numbers[0], ha="center", va="center_baseline",
                          fontsize=8, color="#101418" if index else "#ffffff", zorder=3, clip_on=True)


def _colour(phase: str) -> str:
    """A phase's colour; what the report knows no colour for ("log") is muted."""
    return LIGHT.phase(phase) if phase in PHASE_SERIES else LIGHT.muted


def _tint(index: int) -> tuple[float, float, float]:
    """The exchange's colour, lighter for every further kind of part."""
    far = TINTS[min(index, len(TINTS) - 1)]
    red, green, blue = to_rgb(LIGHT.phase(WAITING))
    return (red + (1 - red) * far, green + (1 - green) * far, blue + (1 - blue) * far)


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
    said = {WAITING: f"{WAITING}: waited for"}
    handles = [Patch(color=_colour(phase), label=said.get(phase, phase)) for phase in phases]
    handles.append(Patch(color=LIGHT.grid, label="other"))
    return handles + [Patch(color=_tint(i), label=f"bucket: {kind}") for i, kind in enumerate(kinds)]
