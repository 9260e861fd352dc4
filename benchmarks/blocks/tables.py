"""What came of `bmuf.py`, from its JSON lines: tables in markdown, and the learning curves of figure 1."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from blocks.rejection import BAD, CASES, TOO_HIGH, WITHOUT
from blocks.rows import METHODS, NETWORKS
from blocks.sweep import PAIRS
from runs import Record, rate_of_best, spread

from hpc.quantities import counted
from hpc.report_picture import LIGHT, dress, fraction_axis, legend, new_figure, png

Key = tuple[str, str, str, int]  # data, network, method, splits
TEXT = {"sgd": "single-worker SGD", **METHODS}
DASHES = {"sgd": "solid", "ma": (0, (1, 1.5)), "cbm": (0, (4, 2)), "nbm": "solid"}


def chosen(records: Iterable[Record], tuning_seed: int) -> dict[Key, list[Record]]:
    """Every row's runs at the rate of its best validation error with the tuning seed, by seed."""
    by_row: dict[Key, list[Record]] = {}
    for r in records:
        by_row.setdefault((r["data"], r["network"], r["method"], r["splits"]), []).append(r)
    found = {}
    for key, runs in by_row.items():
        rate = rate_of_best(
            (r["rate"], 1 - r["validation"]) for r in runs
            if r["seed"] == tuning_seed and not r["diverged"] and r["validation"] is not None
        )
        if rate is not None:
            found[key] = sorted((r for r in runs if r["rate"] == rate), key=lambda r: r["seed"])
    networks, methods = list(NETWORKS), list(TEXT)
    return dict(sorted(
        found.items(), key=lambda item: (item[0][0], networks.index(item[0][1]), methods.index(item[0][2]), item[0][3])
    ))


def accuracy(records: Sequence[Record], tuning_seed: int = 1) -> str:
    """A table for every data set and network: frame errors, beside the paper's word errors."""
    rows, out = chosen(records, tuning_seed), []
    for data, network in dict.fromkeys(key[:2] for key in rows):
        kind = NETWORKS[network]
        sgd = {r["seed"]: r for r in rows.get((data, network, "sgd", 1), [])}
        out += [
            f"**{data}, {network}.** Frame error (%), mean ± sample deviation over seeds; gaps to SGD, seed by seed. "
            f"Paper: word error (%), Eval2000 ({kind.columns}).", "",
            "| | splits | rate | blocks (wanted) | validation | test | gap | last sweep, validation | seeds | paper |",
            "|---" * 10 + "|",
        ]
        for (_, _, method, splits), runs in ((k, v) for k, v in rows.items() if k[:2] == (data, network)):
            gap = [r["test"] - sgd[r["seed"]]["test"] for r in runs if r["seed"] in sgd]
            blocks = f"{runs[0]['blocks']:,} ({runs[0]['blocks_wanted']:.0f})" if method in ("cbm", "nbm") else (
                f"{runs[0]['blocks']:,}" if method == "ma" else "–"
            )
            out.append(
                f"| {TEXT[method]} | {splits} | {runs[0]['rate']:g} | {blocks} | "
                f"{spread([r['validation'] for r in runs])} | {spread([r['test'] for r in runs])} | "
                f"{'' if method == 'sgd' else spread(gap, '+')} | {spread([r['curve'][-1] for r in runs])} | "
                f"{len(runs)} | {kind.paper.get(method, {}).get(splits, '–')} |"
            )
        out += ["", f"Rates tried, with seed {tuning_seed}'s validation error (%):", ""]
        out += ["| | splits | |", "|---|---|---|"]
        for key in (key for key in rows if key[:2] == (data, network)):
            _, _, method, splits = key
            tried = sorted(
                (r["rate"], "failed" if r["diverged"] else f"{r['validation']:.2%}") for r in records
                if r["seed"] == tuning_seed and (r["data"], r["network"], r["method"], r["splits"]) == key
            )
            said = ", ".join(f"{rate:g}: {error}" for rate, error in tried)
            out.append(f"| {TEXT[method]} | {splits} | {said} |")
        out.append("")
    return "\n".join(out)


def curves(records: Sequence[Record], tuning_seed: int = 1) -> bytes:
    """Figure 1's shape: validation frame error by sweep, a panel a method, means over seeds. A PNG."""
    rows = chosen(records, tuning_seed)
    kinds = list(dict.fromkeys(key[:2] for key in rows))
    methods = list(METHODS)
    figure = new_figure(3.6 * max(1, len(kinds)), LIGHT)
    grid = figure.subplots(max(1, len(kinds)), len(methods), squeeze=False, sharey="row")
    for line, (data, network) in enumerate(kinds):
        measured = [method for method in methods if any(key[:3] == (data, network, method) for key in rows)]
        for column, method in enumerate(methods):
            axes = grid[line][column]
            if method not in measured:
                axes.set_visible(False)
                continue
            first = method == measured[0]
            said = "" if column else "validation error"
            dress(axes, LIGHT, f"{data}, {network}: {METHODS[method]}", "sweeps", said)
            axes.tick_params(labelleft=first)
            drawn = []
            for key, runs in rows.items():
                if key[:2] != (data, network) or key[2] not in ("sgd", method):
                    continue
                mean = [statistics.fmean(errors) for errors in zip(*(r["curve"] for r in runs), strict=False)]
                number = 7 if key[2] == "sgd" else [8, 16, 32, 64].index(key[3])
                said = "SGD" if key[2] == "sgd" else f"{key[3]} splits"
                axes.plot(range(1, len(mean) + 1), mean, color=LIGHT.series[number], linewidth=1.6, label=said,
                          linestyle=DASHES[method] if key[2] == "sgd" else "solid")
                drawn += mean
            fraction_axis(axes, drawn)
            legend(axes, LIGHT)
    return png(figure, LIGHT)


def rejection(records: Sequence[Record]) -> str:
    """The cases of `bmuf.py rejection`: errors, and who was rejected, rightly and falsely."""
    out = [
        "| | slaves | test error (%) | beside the run without it, by seed | validation (%) | epochs, by seed | "
        "rejected of judged | rightly | falsely | time judging |",
        "|---" * 10 + "|",
    ]
    without = {r["seed"]: r["test"] for r in records if r["case"] == WITHOUT}
    for name in (*CASES, TOO_HIGH):
        runs = sorted((r for r in records if r["case"] == name), key=lambda r: r["seed"])
        if not runs:
            continue
        slaves, fault, judged = CASES.get(name, (8, "", True))
        verdicts = [(int(split), times) for r in runs for epoch in r["rejected"] for split, times in epoch.items()]
        count = sum(times for _, times in verdicts)
        right = sum(times for split, times in verdicts if fault and split == BAD)
        share = statistics.fmean(r["phases"]["judge"] / sum(r["phases"].values()) for r in runs) if judged else 0.0
        errors = [
            spread([r[key] for r in runs if r[key] is not None]) + ("†" if any(r["diverged"] for r in runs) else "")
            for key in ("test", "validation")
        ]
        told = [f"{count} of {sum(r['slaves'] for r in runs)}", str(right), str(count - right)]
        if name == TOO_HIGH:
            told[1:] = ["–", "–"]
        gaps = [f"{100 * (r['test'] - without[r['seed']]):+.2f}" for r in runs if r["test"] and r["seed"] in without]
        epochs, beside = ", ".join(str(len(r["curve"])) for r in runs), "" if name == WITHOUT else ", ".join(gaps)
        out.append(
            f"| {name} | {slaves} | {errors[0]} | {beside} | {errors[1]} | {epochs} | "
            f"{' | '.join(told if judged else ['–'] * 3)} | {f'{share:.0%}' if judged else '–'} |"
        )
    return "\n".join([*out, "", "† a run stopped or learned nothing."])


def sweeps(records: Sequence[Record]) -> str:
    """Table 4's shape, and chunks beside whole utterances, of the last measurements."""
    out = [
        "| | splits | ranks | optimize | aggregate | validate | checkpoint | sum, s | aggregate's share | frames/s |",
        "|---" * 10 + "|",
    ]
    last = {(r["network"], r["method"], r["ranks"], r["runs"]): r for r in records if r.get("what") in PAIRS}
    for (network, method, ranks, runs), r in last.items():
        parts = ("optimize", "aggregate", "validate", "checkpoint", "sum")
        spent = " | ".join(f"{r[f'{part}_s']:.2f}" for part in parts)
        crew = f"{runs} runs of {ranks}" if runs > 1 else str(ranks)
        out.append(
            f"| {network}, {TEXT[method]} | {r['splits']} | {crew} | {spent} | {r['aggregate_share']:.2%} | "
            f"{r['frames_per_s']:,.0f} |"
        )
    ratios = [r for r in records if r.get("what") in [f"{what} ratio" for what in PAIRS]]
    for r in {(r["network"], r["method"], r["runs"]): r for r in ratios}.values():
        low, high = r["ratio_quartiles"]
        one, other = (
            f"{k['network']}, {TEXT[k['method']]}, {'two runs at once, each of ' * (k['runs'] > 1)}"
            f"{counted(k['ranks'], 'rank')}" for k in (r["beside"], r)
        )
        out += ["", f"{other}, beside {one}: {r['ratio_of_pairs']:.2f} times as fast ({low:.2f} to {high:.2f})."]
    return "\n".join(out)
