"""A run in one picture: loss, error, learning rate, throughput by rank, and where the time went.

Colours are Okabe and Ito's, told apart by colour-blind readers; every series also has its label or marker.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from hpc.quantities import is_fraction, metric, spoken
from hpc.records import number
from hpc.summary import RunHistory, error_name, phases_in, time_by_rank

WIDTH, DPI = 12.5, 128  # inches and dots an inch: 1600 pixels
# Which of a theme's series a phase has; "compute" is what forward and backward were before they were told apart.
PHASE_SERIES = {"compute": 0, "backward": 0, "forward": 5, "exchange": 1, "read": 3, "validate": 2, "checkpoint": 4,
                "select": 6, "judge": 6}
WHITE_ON = ("compute", "backward", "exchange", "validate", "select", "judge")  # dark enough, in LIGHT, for white text
LINES_AT_MOST = 8  # ranks drawn one line each; more become a band
BARS_AT_MOST = 16  # ranks with a labelled bar


@dataclass(frozen=True)
class Theme:
    """The colours of a picture."""

    surface: str
    ink: str
    muted: str
    grid: str
    series: tuple[str, ...]

    def phase(self, name: str) -> str:
        """The colour of a phase; OTHER, and whatever is none, is muted."""
        return self.series[PHASE_SERIES[name]] if name in PHASE_SERIES else self.grid

    def on_phase(self, name: str) -> str:
        """The colour of text on a phase's colour."""
        if name not in PHASE_SERIES:
            return self.ink
        return "#ffffff" if self is LIGHT and name in WHITE_ON else "#101418"


LIGHT = Theme("#ffffff", "#1b1f24", "#656d76", "#d8dce1",
              ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#8a6d00", "#1b1f24"))
DARK = Theme("#161a20", "#e8eaed", "#9aa4af", "#353c45",
             ("#56B4E9", "#F0803C", "#2FBF94", "#E69F00", "#DD9CC0", "#9AD0F5", "#F0E442", "#e8eaed"))


def new_figure(height: float, theme: Theme) -> Figure:
    """An empty figure of WIDTH x `height` inches that `png` renders; no pyplot state is touched."""
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12, wspace=0.03, hspace=0.03)
    return Figure(figsize=(WIDTH, height), dpi=DPI, layout=layout, facecolor=theme.surface)


def png(figure: Figure, theme: Theme) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, facecolor=theme.surface)
    return buffer.getvalue()


def dress(axes: Axes, theme: Theme, title: str, x: str, unit: str = "") -> None:
    """Give an axes its title (with the unit of y), its x label and the theme's colours."""
    axes.set_facecolor(theme.surface)
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=theme.ink, pad=9)
    if unit:
        axes.set_title(unit, loc="right", fontsize=9.5, color=theme.muted, pad=9)
    axes.set_xlabel(x, fontsize=9.5, color=theme.muted)
    axes.tick_params(colors=theme.muted, labelsize=9.5, length=0, which="both")
    axes.grid(True, color=theme.grid, linewidth=0.7)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(theme.muted)


def legend(axes: Axes, theme: Theme, **options: Any) -> None:
    """A frameless legend in the theme's ink, where it hides least."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(**{"frameon": False, "fontsize": 9.5, "labelcolor": theme.ink, "loc": "best", **options})


def empty(axes: Axes, theme: Theme, text: str) -> None:
    """Say in an axes why it has nothing to show."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=theme.muted, fontsize=11)
    axes.set_xticks([])
    axes.set_yticks([])


def wide_scale(axes: Axes, values: Iterable[float], ratio: float = 20.0) -> None:
    """A log y axis with plain numbers on it, if the positive `values` span more than `ratio`."""
    good = [v for v in values if math.isfinite(v) and v > 0]
    if not good or max(good) / min(good) <= ratio:
        return
    axes.set_yscale("log")
    decades = math.log10(max(good) / min(good))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 4 else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def fraction_axis(axes: Axes, values: Iterable[float]) -> None:
    """A y axis in percent that ends where errors and accuracies do: at 0, and at 100 if no value is above.

    values  what is drawn; an error of words can be above 1
    """
    axes.yaxis.set_major_formatter(FuncFormatter(lambda fraction, _: f"{100 * fraction:.4g}%"))
    low, high = axes.get_ylim()
    above = any(value > 1 for value in values)
    axes.set_ylim(max(low, 0.0), high if above else min(high, 1.0))


def draw(run: RunHistory, theme: Theme = LIGHT) -> bytes:
    """The picture of a run as a PNG, 1600 pixels wide."""
    return png(picture(run, theme), theme)


def picture(run: RunHistory, theme: Theme = LIGHT) -> Figure:
    """What `draw` renders."""
    bars = time_by_rank([*run.of("train"), *run.of("rest")])
    spent_height = 1.0 + (0.32 * max(len(bars), 2) if len(bars) <= BARS_AT_MOST else 2.6)
    heights = [3.5, 2.8, *([2.8] if run.of("minibatch") else []), spent_height]
    figure = new_figure(sum(heights), theme)
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
    judged = error_name(run.of("validate"))
    losses = figure.add_subplot(grid[0, 0] if judged else grid[0, :])
    panels = [losses]
    _losses(losses, run, theme)
    if judged:
        panels.append(figure.add_subplot(grid[0, 1]))
        _metric(panels[-1], run, theme, judged)
    panels += [figure.add_subplot(grid[1, 0]), figure.add_subplot(grid[1, 1])]
    _learning_rate(panels[-2], run, theme)
    _throughput(panels[-1], run, theme)
    if run.of("minibatch"):
        panels.append(figure.add_subplot(grid[2, :]))
        _minibatch(panels[-1], run, theme)
    last = max((number(r["epoch"]) for r in run.records if "epoch" in r), default=1.0)
    for axes in panels:
        if axes.lines:
            axes.set_xlim(0, last * 1.02 or 1.0)
            for at in _resumes(run):
                axes.axvline(at, color=theme.muted, linewidth=1.2, linestyle=(0, (1, 3)), zorder=1)
                if axes is losses:
                    axes.text(at, 0.02, " resumed", transform=axes.get_xaxis_transform(), color=theme.muted, fontsize=9)
    _time_spent(figure.add_subplot(grid[-1, :]), bars, theme)
    return figure


def _resumes(run: RunHistory) -> list[float]:
    """The epochs at which later attempts took up the run."""
    per_epoch = [s["steps_per_epoch"] for s in run.of("start") if s.get("steps_per_epoch")]
    return [s["step"] / per_epoch[-1] for s in run.of("start")[1:] if per_epoch and s["step"]]


def _series(records: Sequence[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    return (np.array([number(r.get("epoch")) for r in records]), np.array([number(r.get(name)) for r in records]))


def _marker(count: int) -> dict[str, Any]:
    return {"marker": "o", "markersize": 4.5 if count <= 40 else 0}


def _mark_best(axes: Axes, theme: Theme, best: dict[str, Any] | None, name: str, shown: str) -> None:
    """Ring the best validation and say its value above the axes, where it covers no curve."""
    if best is None or not math.isfinite(number(best.get(name))):
        return
    x, y = number(best.get("epoch")), best[name]
    axes.plot([x], [y], "o", markersize=11, markerfacecolor="none", markeredgecolor=theme.ink, markeredgewidth=1.6,
              clip_on=False)
    axes.set_title(f"best {shown} at epoch {x:.4g}", loc="right", fontsize=10.5, color=theme.ink, pad=9)


def _losses(axes: Axes, run: RunHistory, theme: Theme) -> None:
    dress(axes, theme, "Loss", "epoch")
    trains, validations = run.of("train"), run.of("validate")
    if not trains and not validations:
        return empty(axes, theme, "no training interval logged yet")
    x, y = _series(trains, "loss")
    many = len(x) > 60
    axes.plot(x, y, color=theme.series[0], linewidth=0.8 if many else 1.8, alpha=0.4 if many else 1.0,
              label=None if many else "training")
    if many:
        width = max(5, len(y) // 40) | 1
        smooth = np.convolve(y, np.ones(width) / width, "valid")
        axes.plot(x[width // 2 : width // 2 + len(smooth)], smooth, color=theme.series[0], linewidth=2,
                  label=f"training (mean of {width} intervals)")
    vx, vy = _series(validations, "loss")
    if len(vx):
        axes.plot(vx, vy, color=theme.series[1], linewidth=2, label="validation", **_marker(len(vx)))
    wide_scale(axes, [*y, *vy])
    best = run.best
    _mark_best(axes, theme, best, "loss", f"{best['loss']:.4g}" if best and best.get("loss") is not None else "")
    legend(axes, theme, loc="upper right")
    return None


def _metric(axes: Axes, run: RunHistory, theme: Theme, name: str) -> None:
    dress(axes, theme, f"Validation {spoken(name)}", "epoch")
    x, y = _series(run.of("validate"), name)
    axes.plot(x, y, color=theme.series[1], linewidth=2, **_marker(len(x)))
    if is_fraction(name):
        fraction_axis(axes, y)
    else:
        wide_scale(axes, y)
    best = run.best
    value = number(best.get(name)) if best else math.nan
    _mark_best(axes, theme, best, name, f"{value:.2%}" if is_fraction(name) else f"{value:.4g}")


def _learning_rate(axes: Axes, run: RunHistory, theme: Theme) -> None:
    dress(axes, theme, "Learning rate", "epoch", "log scale")
    x, y = _series(run.of("train"), "learning_rate")
    good = y[np.isfinite(y) & (y > 0)]
    if not len(good):
        return empty(axes, theme, "no learning rate logged yet")
    # An interval's rate held since the interval before: the line steps at the interval's beginning.
    axes.plot(np.append(0.0, x), np.append(y[0], np.where(y > 0, y, np.nan)), color=theme.series[0], linewidth=2,
              drawstyle="steps-pre")
    wide_scale(axes, [float(good.min()) / 1.5, float(good.max()) * 1.5], ratio=1.0)
    axes.set_ylim(good.min() / 1.5, good.max() * 1.5)
    used = np.unique(good.astype(np.float32))
    if len(used) <= 6:
        axes.yaxis.set_major_locator(FixedLocator(used.tolist()))
        axes.yaxis.set_minor_locator(FixedLocator([]))
    return None


def _minibatch(axes: Axes, run: RunHistory, theme: Theme) -> None:
    """The size in use, and at every selection what each size tried came to."""
    selections = run.of("minibatch")
    name = selections[-1]["metric"]
    dress(axes, theme, "Minibatch size", "epoch", f"beside the sizes tried: {spoken(name)} on the stretch tried on")
    x, y = _series(selections, "chosen")
    first = number(run.start.get("batch"))
    last = max(number(r["epoch"]) for r in run.records if "epoch" in r)
    axes.plot([0.0, *x, last], [first, *y, y[-1]], color=theme.series[0], linewidth=2, drawstyle="steps-post")
    for selection in selections:
        for size, value in selection["tried"].items():
            failed = value is None
            axes.plot([selection["epoch"]], [int(size)], "x" if failed else "o", markersize=5,
                      color=theme.series[1] if failed else theme.muted)
            axes.annotate("failed" if failed else metric(name, value), (selection["epoch"], int(size)), (5, 4),
                          textcoords="offset points", fontsize=8, color=theme.muted)
    sizes = sorted({int(size) for selection in selections for size in selection["tried"]} | {int(first)})
    axes.set_yscale("log", base=2)
    axes.set_ylim(sizes[0] / 1.5, sizes[-1] * 1.5)
    axes.yaxis.set_major_locator(FixedLocator(sizes))
    axes.yaxis.set_minor_locator(FixedLocator([]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _throughput(axes: Axes, run: RunHistory, theme: Theme) -> None:
    dress(axes, theme, "Throughput by rank", "epoch", f"{run.noun}/s")
    trains = [t for t in run.of("train") if t.get("by_rank")]
    ranks = sorted({part["rank"] for t in trains for part in t["by_rank"]})
    if not ranks:
        return empty(axes, theme, "no training interval logged yet")
    x = np.array([number(t["epoch"]) for t in trains])
    speeds = np.full((len(ranks), len(trains)), np.nan)
    for column, train in enumerate(trains):
        for part in train["by_rank"]:
            speeds[ranks.index(part["rank"]), column] = number(part.get("frames_per_s"))
    if len(ranks) <= LINES_AT_MOST:
        for row, rank in enumerate(ranks):
            axes.plot(x, speeds[row], color=theme.series[row], linewidth=1.5, label=f"rank {rank}",
                      marker="o", markersize=3 if len(x) <= 40 else 0)
    else:
        masked = np.ma.masked_invalid(speeds)
        axes.fill_between(x, masked.min(0), masked.max(0), color=theme.series[0], alpha=0.25, linewidth=0,
                          label=f"slowest to fastest of {len(ranks)} ranks")
        axes.plot(x, np.ma.median(masked, 0), color=theme.series[0], linewidth=2, label="median rank")
    top = float(np.nanmax(speeds)) if np.isfinite(speeds).any() else 1.0
    axes.set_ylim(0, (top or 1.0) * 1.3)  # room for the legend
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if top >= 10 else f"{value:g}"))
    legend(axes, theme, loc="upper right", ncols=4)
    return None


def _time_spent(axes: Axes, bars: dict[tuple[int, str], dict[str, float]], theme: Theme) -> None:
    dress(axes, theme, "Where each rank's time went", "")
    if not any(sum(row.values()) for row in bars.values()):
        return empty(axes, theme, "no training interval logged yet")
    axes.grid(False, axis="y")
    y, left = np.arange(len(bars)), np.zeros(len(bars))
    total = np.array([sum(row.values()) or 1.0 for row in bars.values()])
    few = len(bars) <= BARS_AT_MOST
    for phase in phases_in(bars):
        share = np.array([row[phase] for row in bars.values()]) / total
        axes.barh(y, share, left=left, height=0.72 if few else 1.0, color=theme.phase(phase), label=phase,
                  edgecolor=theme.surface, linewidth=0.8 if few else 0)
        for row in np.flatnonzero(share >= 0.025).tolist() if few else ():
            axes.text(left[row] + share[row] / 2, row, f"{share[row]:.0%}", ha="center", va="center_baseline",
                      fontsize=9.5, color=theme.on_phase(phase))
        left += share
    if few:
        axes.set_yticks(y, [f"rank {rank} · {host}" for rank, host in bars])
    else:
        axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.set_ylabel("rank", fontsize=9.5, color=theme.muted)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.spines["bottom"].set_visible(False)
    legend(axes, theme, loc="lower right", bbox_to_anchor=(1.01, 1.0), ncols=8, borderaxespad=0.1, handlelength=1.2)
    return None
