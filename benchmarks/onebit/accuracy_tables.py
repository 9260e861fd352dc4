"""What came of `onebit_accuracy.py`, from its JSON lines: tables 2 and 3 in markdown, and a picture."""

from __future__ import annotations

import statistics
from typing import Protocol

from onebit.rows import REFERENCE, ROWS, Record, Row, best_rate
from runs import spread

from hpc.report_picture import LIGHT, dress, new_figure, png


class Bench(Protocol):
    """The finished runs.

    tuning_seed  whose runs say which rate is best
    rates        these instead; mostly empty
    """

    tuning_seed: int
    rates: list[float]

    def of(self, row: Row, network: str, seed: int | None = None) -> list[Record]: ...


def rates_of(bench: Bench, row: Row, network: str) -> list[float]:
    """Those asked for; else the row's best, or its smallest if all of the tuning seed's runs diverged."""
    if bench.rates:
        return bench.rates
    tuned = bench.of(row, network, bench.tuning_seed)
    best = best_rate(tuned)
    return [min((r["rate"] for r in tuned), default=row.rates[network]) if best is None else best]


def chosen(bench: Bench, row: Row, network: str) -> list[Record]:
    """A row's records at its rate, by seed."""
    rate = rates_of(bench, row, network)[0]
    return sorted((r for r in bench.of(row, network) if r["rate"] == rate), key=lambda r: r["seed"])


def listed(records: list[Record], name: str) -> str:
    """Every seed's number, in percent; a run that diverged is marked."""
    return ", ".join(
        ("–" if r[name] is None else f"{100 * r[name]:.2f}") + ("†" if r["diverged"] else "") for r in records
    )


def cpu_seconds(records: list[Record]) -> str:
    known = [r["cpu_s"] for r in records if r["cpu_s"] is not None]
    return f"{statistics.median(known):.0f}" if known else "–"


def gaps(bench: Bench, row: Row, network: str, name: str) -> list[float]:
    """What a row has more than its table's reference, seed by seed, where both have a number."""
    reference = {r["seed"]: r[name] for r in chosen(bench, ROWS[REFERENCE[row.table]], network) if r[name] is not None}
    return [r[name] - reference[r["seed"]] for r in chosen(bench, row, network) if r["seed"] in reference and r[name]]


def panels(row_names: list[str], networks: list[str]) -> list[tuple[int, str, list[Row]]]:
    """(table, network, its rows): what is shown together."""
    found: dict[tuple[int, str], list[Row]] = {}
    for network in networks:
        for row in map(ROWS.__getitem__, row_names):
            if network in row.rates:
                found.setdefault((row.table, network), []).append(row)
    return [(table, network, found[table, network]) for table, network in sorted(found, key=lambda key: key[0])]


def markdown(bench: Bench, row_names: list[str], networks: list[str]) -> str:
    """Both tables, and the rates that were tried."""
    out = []
    for table, network, rows in panels(row_names, networks):
        if not any(bench.of(row, network) for row in rows):
            continue
        reference = ROWS[REFERENCE[table]].text
        out += [
            f"**Table {table}, {network}.** Frame accuracy (%), mean ± sample deviation; gaps to \"{reference}\", seed "
            "by seed. Paper: Hub-5'00 WER (training-set frame accuracy). † diverged.", "",
            "| | rate | held out | gap | last epoch | training set | gap | held out, every seed "
            "| training set, every seed | CPU s | paper |", "|---" * 11 + "|",
        ]
        for row in rows:
            runs = chosen(bench, row, network)
            if not runs:
                out.append(f"| {row.text} |" + " – |" * 9 + f" {row.paper.get(network, '–')} |")
                continue
            good = [r for r in runs if r["held_out"] is not None]
            gap = {
                name: spread(gaps(bench, row, network, name), "+") if row.name != REFERENCE[table] else ""
                for name in ("held_out", "training")
            }
            out.append(
                f"| {row.text} | {runs[0]['rate']:g} | {spread([r['held_out'] for r in good])} | {gap['held_out']} | "
                f"{spread([r['held_out_last'] for r in good])} | "
                f"{spread([r['training'] for r in good if r['training'] is not None])} | {gap['training']} | "
                f"{listed(runs, 'held_out')} | {listed(runs, 'training')} | "
                f"{cpu_seconds(runs)} | {row.paper.get(network, '–')} |"
            )
        seed = bench.tuning_seed
        out += ["", f"Rates tried, with seed {seed}'s held-out accuracy (%):", "", "| | rates |", "|---|---|"]
        for row in rows:
            tried = sorted(bench.of(row, network, seed), key=lambda r: r["rate"])
            said = ", ".join(f"{r['rate']:g}: {listed([r], 'held_out')}" for r in tried)
            out.append(f"| {row.text} | {said or '–'} |")
        out.append("")
    return "\n".join(out)


def draw(bench: Bench, row_names: list[str], networks: list[str]) -> bytes:
    """Every seed a dot, mean and deviation of every row; held out above, the training set below."""
    shown = panels(row_names, networks)
    figure = new_figure(7.5, LIGHT)
    grid = figure.subplots(2, len(shown), squeeze=False)
    for column, (table, network, rows) in enumerate(shown):
        for line, (name, text) in enumerate((("held_out", "held-out"), ("training", "training-set"))):
            axes = grid[line][column]
            dress(axes, LIGHT, f"Table {table}, {network}", f"{text} frame accuracy (%)")
            for place, row in enumerate(rows):
                colour = LIGHT.series[0 if row.onebit is None else 1]
                runs = chosen(bench, row, network)
                values = [100 * r[name] for r in runs if r[name] is not None]
                if not values:
                    axes.text(
                        0.5, place, "diverged" if runs else "not run yet", transform=axes.get_yaxis_transform(),
                        color=LIGHT.muted, ha="center", va="center", fontsize=9,
                    )
                    continue
                axes.scatter(values, [place + 0.15] * len(values), s=22, color=colour, alpha=0.6, linewidths=0)
                deviation = statistics.stdev(values) if len(values) > 1 else 0.0
                mean = statistics.fmean(values)
                axes.errorbar(mean, place - 0.15, xerr=deviation, fmt="D", markersize=5, capsize=3, color=colour)
            axes.set_yticks(range(len(rows)), [wrapped(row.text) for row in rows])
            axes.set_ylim(len(rows) - 0.5, -0.5)
    for marker, colour, text in (
        ("o", LIGHT.muted, "a seed"), ("D", LIGHT.muted, "mean and deviation"), ("s", LIGHT.series[0], "float32"),
        ("s", LIGHT.series[1], "1-bit"),
    ):
        grid[0][0].plot([], [], marker, color=colour, label=text)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9.5, labelcolor=LIGHT.ink)
    return png(figure, LIGHT)


def wrapped(text: str) -> str:
    """A label in lines of about 20 characters."""
    lines = [""]
    for word in text.split():
        lines[-1:] = [f"{lines[-1]} {word}".strip()] if len(lines[-1]) + len(word) < 22 else [lines[-1], word]
    return "\n".join(lines)
