"""The benchmark of SRU in one picture: how many times as long as ours every other layer takes, by width."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

from hpc.quantities import counted
from hpc.report_picture import LIGHT, dress, empty, legend, new_figure, png

STYLES = {  # of a layer: its name, which of the theme's series, marker
    "lstm": ("LSTM", 1, "s"), "package sru": ("package sru", 4, "v"), "conv3": ("Conv1d, k = 3", 2, "o"),
    "conv2": ("Conv1d, k = 2", 5, "^"), "product": ("the product alone", 7, "x"),
}


def draw(records: Sequence[dict[str, Any]]) -> bytes:
    """The records of `trireme bench sru`, forward with backward, as a PNG: a panel for every precision and thread."""
    measured = [r for r in records if r["what"] == "layer" and r["pass"] == "forward+backward"]
    settings = sorted({(r["dtype"], r["threads"]) for r in measured}, key=lambda s: (s[0] != "float32", s[1]))
    figure = new_figure(4.8, LIGHT)
    panels = figure.subplots(1, max(1, len(settings)), squeeze=False, sharey=True)[0]
    if not settings:
        empty(panels[0], LIGHT, "nothing measured")
    for axes, (dtype, threads) in zip(panels, settings, strict=False):
        own = [r for r in measured if (r["dtype"], r["threads"]) == (dtype, threads)]
        _panel(axes, f"{dtype}, {counted(threads, 'thread')}", own)
    if settings:
        panels[0].set_ylabel("times as long as SRU (median; least to most)", fontsize=9.5, color=LIGHT.muted)
        legend(panels[0], LIGHT)
    return png(figure, LIGHT)


def _panel(axes: Axes, title: str, records: Sequence[dict[str, Any]]) -> None:
    """Medians over lengths and batches, with a bar from the least to the most."""
    dress(axes, LIGHT, title, "units")
    ours = {_size(r): r["median_s"] for r in records if r["layer"] == "sru"}
    widths = sorted({r["d"] for r in records})
    present = [name for name in STYLES if any(r["layer"] == name for r in records)]
    for place, name in enumerate(present):
        label, series, marker = STYLES[name]
        times = [[r["median_s"] / ours[_size(r)] for r in records if (r["layer"], r["d"]) == (name, d)] for d in widths]
        middles = [statistics.median(found) for found in times]
        below = [middle - min(found) for middle, found in zip(middles, times, strict=True)]
        above = [max(found) - middle for middle, found in zip(middles, times, strict=True)]
        aside = 1.0 + 0.05 * (place - (len(present) - 1) / 2)  # bars of the same width beside each other
        axes.errorbar(
            [d * aside for d in widths], middles, yerr=[below, above], color=LIGHT.series[series], marker=marker,
            linewidth=1.6, elinewidth=0.9, markersize=5, capsize=2, label=label,
        )
    axes.axhline(1.0, color=LIGHT.muted, linewidth=1.3, linestyle=(0, (1, 1.5)))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(widths))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    low, high = axes.get_ylim()
    ticks = [2.0**k for k in range(math.floor(math.log2(low)), math.ceil(math.log2(high)) + 1)]
    axes.yaxis.set_major_locator(FixedLocator(ticks))


def _size(record: dict[str, Any]) -> tuple[int, ...]:
    return record["d"], record["length"], record["batch"]
