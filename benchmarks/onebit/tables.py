"""What came of `onebit_speed.py`, from its JSON lines: tables in markdown, and a picture."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter
from runs import rate_of_best, spread

from hpc.report_picture import LIGHT, dress, empty, fraction_axis, legend, new_figure, png, wide_scale

Record = dict[str, Any]
STYLES = {  # which of the theme's series, dashes, marker: ours are solid, torch's dashed
    "float32": (0, "solid", "o"), "onebit": (1, "solid", "o"), "onebit-db": (4, "solid", "^"),
    "ddp": (7, (0, (4, 2)), "s"), "powersgd1": (2, (0, (4, 2)), "s"), "powersgd4": (3, (0, (4, 2)), "D"),
    "bmuf": (2, "solid", "v"), "postlocal": (5, (0, (4, 2)), "v"),
}
STEP = 0.005  # accuracies that times are compared at are multiples of this


def spoken(link: str) -> str:
    """A rate in tc's words, as it is written: 1 Gbit/s."""
    found = re.fullmatch(r"([0-9.]+)([kmgt]?)bit", link)
    return f"{found[1]} {'k' if found[2] == 'k' else found[2].upper()}bit/s" if found else link


# -- frames a second ------------------------------------------------------------------------------------------------


def speeds(records: Sequence[Record], what: str = "speed") -> list[Record]:
    """The lines of the last setup that was measured."""
    lines = [r for r in records if r["what"] == what]
    return [r for r in lines if r["setup"] == lines[-1]["setup"]]


def speed_tables(records: Sequence[Record], sides: Mapping[str, Any]) -> list[str]:
    lines, ratios = speeds(records), speeds(records, "speed ratio")
    out: list[str] = []
    for link in dict.fromkeys(r["link"] for r in lines):
        here = {(r["side"], r["batch"]): r for r in lines if r["link"] == link}
        sizes = sorted({batch for _, batch in here})
        names = [name for name in sides if any((name, batch) in here for batch in sizes)]
        setup, rate = lines[-1]["setup"], spoken(link)
        out += [
            f"**Frames a second over minibatch size, {rate}**, {setup['ranks']} hosts of one rank and one core, "
            f"{lines[-1]['parameters'] / 1e6:.1f} M parameters; medians (quartiles of a step's).", "",
            f"| | {' | '.join(map(str, sizes))} |", "|---" * (len(sizes) + 1) + "|",
        ]
        out += [
            f"| {sides[name].text} | " + " | ".join(_speed(here.get((name, batch))) for batch in sizes) + " |"
            for name in names
        ]
        compared = {(r["side"], r["beside"], r["batch"]): r for r in ratios if r["link"] == link}
        out += ["", f"How many times as fast, {rate}: medians of pairs (quartiles); ? where they say nothing.", ""]
        out += [f"| | beside | {' | '.join(map(str, sizes))} |", "|---" * (len(sizes) + 2) + "|"]
        for name, other in dict.fromkeys((name, other) for name, other, _ in compared):
            cells = [_ratio(compared.get((name, other, batch))) for batch in sizes]
            out.append(f"| {sides[name].text} | {sides[other].text} | {' | '.join(cells)} |")
        out += [
            "", f"Bytes that a rank sends a step, and that left its host, {rate}, minibatches of {sizes[0]}:", "",
            "| | bytes | by | crossed the link | more | times fewer than float32 |", "|---" * 6 + "|",
        ]
        for name in names:
            if record := here.get((name, sizes[0])):
                more = record["link_bytes"] / record["bytes"] - 1 if record["bytes"] else 0.0
                fewer = 4 * record["parameters"] / record["bytes"]
                out.append(
                    f"| {sides[name].text} | {record['bytes']:,.0f} | {record['bytes_by']} | "
                    f"{record['link_bytes']:,.0f} | {more:.1%} | {fewer:.1f} |"
                )
        out.append("")
    return out


def _speed(record: Record | None) -> str:
    if record is None:
        return "–"
    slow, fast = (record["batch"] / seconds for seconds in reversed(record["quartiles_s"]))
    return f"{record['frames_per_s']:,.0f} ({slow:,.0f} to {fast:,.0f})"


def _ratio(record: Record | None) -> str:
    if record is None:
        return "–"
    low, high = record["ratio_quartiles"]
    return f"{record['ratio_of_pairs']:.2f}{'?' if 'ratio_doubt' in record else ''} ({low:.2f} to {high:.2f})"


# -- accuracy -------------------------------------------------------------------------------------------------------


def best_rate(records: Sequence[Record]) -> float | None:
    """The rate of the best held-out accuracy, among runs that went well."""
    return rate_of_best((r["rate"], best(r)) for r in records if r["curve"] and not r["failure"])


def best(record: Record) -> float:
    return float(max((point["accuracy"] for point in record["curve"]), default=0.0))


def raced(records: Sequence[Record], setup: Record, sides: Mapping[str, Any]) -> dict[str, list[Record]]:
    """Every side's runs at its rate, those on a link first; the rate is the first seed's best."""
    lines = [r for r in records if r["what"] == "accuracy" and r["setup"] == setup]
    found = {}
    for name in sides:
        own = [r for r in lines if r["side"] == name]
        first = [r for r in own if r["seed"] == own[0]["seed"]]
        rate = best_rate(first)
        if rate is not None:
            found[name] = sorted((r for r in own if r["rate"] == rate), key=lambda r: (r["link"] == "none", r["seed"]))
    return found


def at_time(record: Record, seconds: float) -> float:
    """The accuracy of the last validation before so many seconds; 0 if there was none."""
    return max(((p["seconds"], p["accuracy"]) for p in record["curve"] if p["seconds"] <= seconds), default=(0, 0.0))[1]


def until(record: Record, accuracy: float) -> float | None:
    """Seconds until a validation had this accuracy."""
    return min((p["seconds"] for p in record["curve"] if p["accuracy"] >= accuracy), default=None)


def accuracy_tables(records: Sequence[Record], setup: Record, sides: Mapping[str, Any]) -> list[str]:
    found = raced(records, setup, sides)
    timed = {name: [r for r in runs if r["link"] != "none"] for name, runs in found.items()}
    timed = {name: runs for name, runs in timed.items() if runs}
    if not found:
        return []
    frames = max(runs[0]["curve"][-1]["frames"] for runs in found.values())
    ends = [runs[0]["curve"][-1]["seconds"] for runs in timed.values()]
    first = min(ends, default=0.0)
    level = STEP * int(min((best(runs[0]) for runs in timed.values()), default=0.0) / STEP)
    link = next((runs[0]["link"] for runs in timed.values()), "no link")
    out = [
        f"**AN4, held-out frame accuracy at equal frames and at equal time**, {spoken(link)}, {setup['layers']} x "
        f"{setup['width']}, minibatches of {setup['batch']}, {setup['epochs']} epochs, {frames:,} frames, the first "
        f"{setup['cold']} steps uncompressed.", "",
        f"| | rate | at the end, % | best, % | seeds | seconds | after {first:.0f} s | seconds to {level:.1%} "
        "| bytes a step over the link, the run's mean |", "|---" * 9 + "|",
    ]
    for name, runs in found.items():
        by_seed = {r["seed"]: r for r in reversed(runs)}  # a run on the link before one without
        ended = [r["curve"][-1]["accuracy"] for r in by_seed.values()]
        cells = [spread(ended), spread([best(r) for r in by_seed.values()]), str(len(by_seed))]
        if name in timed:
            run = timed[name][0]
            reached = until(run, level)
            cells += [
                f"{run['curve'][-1]['seconds']:.0f}", f"{at_time(run, first):.2%}" if at_time(run, first) else "–",
                "–" if reached is None else f"{reached:.0f}", f"{run['link_bytes']:,.0f}",
            ]
        else:
            cells += ["–"] * 4
        out.append(f"| {sides[name].text} | {runs[0]['rate']:g} | {' | '.join(cells)} |")
    out += ["", "Rates tried without a throttle, with the best held-out accuracy:", "", "| | rates |", "|---|---|"]
    lines = [r for r in records if r["what"] == "accuracy" and r["setup"] == setup and r["link"] == "none"]
    for name in found:
        tried = sorted((r for r in lines if r["side"] == name), key=lambda r: (r["seed"], r["rate"]))
        first_seed = [r for r in tried if r["seed"] == tried[0]["seed"]]
        said = ", ".join(f"{r['rate']:g}: {'failed' if r['failure'] else f'{best(r):.2%}'}" for r in first_seed)
        like = sides[name].like
        out.append(f"| {sides[name].text} | {said or (f'as {sides[like].text}' if like else '–')} |")
    return [*out, ""]


def markdown(records: Sequence[Record], setup: Record, sides: Mapping[str, Any]) -> str:
    """All tables; `setup` is that of the runs on AN4."""
    return "\n".join([*speed_tables(records, sides), *accuracy_tables(records, setup, sides)])


# -- the picture ----------------------------------------------------------------------------------------------------


def draw(records: Sequence[Record], setup: Record, sides: Mapping[str, Any]) -> bytes:
    """Frames a second over minibatch size, a panel a link; below, accuracy over frames and over time. A PNG."""
    lines, found = speeds(records), raced(records, setup, sides)
    all_links = list(dict.fromkeys(r["link"] for r in lines))
    rows = bool(all_links) + bool(found)
    figure = new_figure(max(1, rows) * 4.6, LIGHT)
    grid = figure.add_gridspec(max(1, rows), 2)
    if not rows:
        empty(figure.add_subplot(grid[0, :]), LIGHT, "nothing measured")
    for column, link in enumerate(all_links[:2]):
        axes = figure.add_subplot(grid[0, column])
        _speed_panel(axes, link, [r for r in lines if r["link"] == link], sides, named=not column)
    if found:
        timed = {name: runs[0] for name, runs in found.items() if runs[0]["link"] != "none"}
        over_frames, over_time = (figure.add_subplot(grid[rows - 1, column]) for column in (0, 1))
        first = {name: runs[0] for name, runs in found.items()}
        _curve_panel(over_frames, "AN4: held-out accuracy over frames", "frames trained on", "frames", first, sides)
        over_frames.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        legend(over_frames, LIGHT, loc="lower right")
        link = next(iter(timed.values()))["link"] if timed else "no link yet"
        title = f"AN4: held-out accuracy over time, {spoken(link)}"
        _curve_panel(over_time, title, "seconds of training", "seconds", timed, sides)
        if timed:
            over_time.set_xscale("log")
            over_time.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            over_time.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            over_time.xaxis.set_minor_formatter(NullFormatter())
    return png(figure, LIGHT)


def _style(name: str) -> dict[str, Any]:
    series, dashes, marker = STYLES[name]
    return {"color": LIGHT.series[series], "linestyle": dashes, "marker": marker, "linewidth": 1.8, "markersize": 4.5}


def _speed_panel(axes: Axes, link: str, lines: Sequence[Record], sides: Mapping[str, Any], named: bool) -> None:
    dress(axes, LIGHT, f"Frames a second, {spoken(link)}", "frames of a minibatch", "frames/s")
    for name in (name for name in sides if any(r["side"] == name for r in lines)):
        own = sorted((r for r in lines if r["side"] == name), key=lambda r: int(r["batch"]))
        sizes = [r["batch"] for r in own]
        axes.plot(sizes, [r["frames_per_s"] for r in own], label=sides[name].text, **_style(name))
        low, high = ([r["batch"] / r["quartiles_s"][k] for r in own] for k in (1, 0))
        axes.fill_between(sizes, low, high, color=_style(name)["color"], alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sorted({r["batch"] for r in lines})))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    wide_scale(axes, [r["frames_per_s"] for r in lines], ratio=8.0)
    if named:
        legend(axes, LIGHT, loc="best")


def _curve_panel(
    axes: Axes, title: str, x: str, key: str, runs: Mapping[str, Record], sides: Mapping[str, Any]
) -> None:
    dress(axes, LIGHT, title, x)
    shown: list[float] = []
    for name, run in runs.items():
        values = [point["accuracy"] for point in run["curve"]]
        shown += values
        axes.plot([point[key] for point in run["curve"]], values, label=sides[name].text, **_style(name))
    if shown:  # the first validations are far below, where nothing is to be told apart
        axes.set_ylim(float(np.quantile(shown, 0.1)) - 0.01, max(shown) + 0.01)
        fraction_axis(axes, shown)
