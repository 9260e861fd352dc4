"""Several runs' learning curves over one another, against the frames each has seen."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from hpc.quantities import amount, is_fraction, spoken
from hpc.records import number
from hpc.report_picture import LIGHT, dress, empty, fraction_axis, new_figure, png, wide_scale
from hpc.summary import RunHistory, error_name

DASHES = ("solid", (0, (5, 2)), (0, (2, 1.5)), (0, (6, 2, 1, 2)))
MARKERS = "osD^vP*X"


def draw(runs: Mapping[str, RunHistory]) -> bytes:
    """The overlaid curves of runs (name -> run) as a PNG, 1600 pixels wide.

    Colour, dash and marker all tell the runs apart, and each line is thinner than the one before: identical curves
    stay visible under one another.
    """
    metric = error_name([v for run in runs.values() for v in run.of("validate")])
    figure = new_figure(4.6 + 0.3 * math.ceil(len(runs) / 4), LIGHT)
    panels = figure.subplots(1, 3 if metric else 2, squeeze=False)[0]
    _curves(panels[0], runs, "train", "loss", "Training loss")
    _curves(panels[1], runs, "validate", "loss", "Validation loss")
    if metric:
        _curves(panels[2], runs, "validate", metric, f"Validation {spoken(metric)}")
    handles, labels = panels[1].get_legend_handles_labels()
    if not handles:
        handles, labels = panels[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False,
                      fontsize=10.5, labelcolor=LIGHT.ink, handlelength=3.2)
    return png(figure, LIGHT)


def _curves(axes: Axes, runs: Mapping[str, RunHistory], event: str, name: str, title: str) -> None:
    dress(axes, LIGHT, title, " or ".join(dict.fromkeys(run.noun for run in runs.values())))
    everything: list[float] = []
    for index, (label, run) in enumerate(runs.items()):
        records = run.of(event)
        x = np.array([number(r.get("frames")) for r in records])
        y = np.array([number(r.get(name)) for r in records])
        everything += y.tolist()
        axes.plot(
            x, y, label=label, color=LIGHT.series[index % len(LIGHT.series)], linestyle=DASHES[index % len(DASHES)],
            linewidth=max(1.2, 4.0 - 1.2 * index) if event == "validate" else 1.3,
            marker=MARKERS[index % len(MARKERS)] if event == "validate" else None,
            markersize=max(3.5, 8 - 2 * index) if len(x) <= 40 else 0,
        )
    if not everything:
        return empty(axes, LIGHT, "nothing logged yet")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda frames, _: amount(frames)))
    axes.locator_params(axis="x", nbins=5)
    if is_fraction(name):
        fraction_axis(axes, everything)
    else:
        wide_scale(axes, everything)
    return None
