"""The all-reduce benchmark in one picture: bytes a second by size, a panel for every setting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

from hpc.report_picture import LIGHT, dress, empty, legend, new_figure, png, wide_scale

STYLES = {  # of an implementation: which of the theme's series, dashes, marker
    ("trireme", "owners"): (0, "solid", "o"), ("trireme", "everyone"): (5, "solid", "^"),
    ("trireme", "ring"): (4, "solid", "v"), ("mpi", "in place"): (1, (0, (5, 2)), "s"),
    ("gloo", ""): (3, (0, (2, 1.5)), "D"),
}
LIMITS = {"memcpy": "copy (limit)", "tcp": "one TCP stream (limit)"}
TICKS = 6


def draw(records: Sequence[dict[str, Any]]) -> bytes:
    """The records of `trireme bench allreduce` as a PNG, 1600 pixels wide."""
    measured = [record for record in records if record["what"] == "all-reduce"]
    settings = sorted({(r["hosts"], r["ranks"], r["link"] or "") for r in measured})
    figure = new_figure(4.8, LIGHT)
    panels = figure.subplots(1, max(1, len(settings)), squeeze=False)[0]
    if not settings:
        empty(panels[0], LIGHT, "nothing measured")
    for axes, (hosts, ranks, link) in zip(panels, settings, strict=False):
        where = f"{hosts} hosts, {link}" if hosts > 1 else "one host"
        own = [r for r in measured if (r["hosts"], r["ranks"], r["link"] or "") == (hosts, ranks, link)]
        _panel(axes, f"{ranks} ranks, {where}", [r for r in own if hosts == 1 or r["impl"] != "memcpy"])
    return png(figure, LIGHT)


def _panel(axes: Axes, title: str, records: Sequence[dict[str, Any]]) -> None:
    dress(axes, LIGHT, title, "bytes summed", "GB/s")
    shown: list[float] = []
    for impl, algorithm in dict.fromkeys((r["impl"], r["algorithm"]) for r in records):
        own = sorted(
            (r for r in records if (r["impl"], r["algorithm"]) == (impl, algorithm)), key=lambda r: int(r["bytes"])
        )
        sizes, speeds = [r["bytes"] for r in own], [r["gbps"] for r in own]
        shown += speeds
        if impl in LIMITS:
            axes.plot(sizes, speeds, color=LIGHT.muted, linewidth=1.3, linestyle=(0, (1, 1.5)), label=LIMITS[impl])
            continue
        series, dashes, marker = STYLES[impl, algorithm]
        axes.plot(
            sizes, speeds, color=LIGHT.series[series], linestyle=dashes, marker=marker, linewidth=1.8, markersize=5,
            label=f"{impl} {algorithm}".strip(),
        )
    axes.set_xscale("log", base=2)
    sizes = sorted({r["bytes"] for r in records})
    axes.xaxis.set_major_locator(FixedLocator(sizes[:: -(-len(sizes) // TICKS)]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: in_bytes(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    wide_scale(axes, shown)
    legend(axes, LIGHT)


def in_bytes(count: float) -> str:
    """A size as it is spoken of.

    >>> in_bytes(4096), in_bytes(1.5 * 2**20)
    ('4 KiB', '1.5 MiB')
    """
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= unit:
            return f"{count / unit:g} {name}"
    return f"{count:g} B"
