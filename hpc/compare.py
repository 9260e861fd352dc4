"""`trireme compare RUN RUN [...]`: what differs between runs, in their recipes and in what they learned."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from hpc.config import flatten, read_toml
from hpc.files import sha256_of
from hpc.quantities import amount, duration, metric, percent, spoken
from hpc.records import MODEL, metrics_of, number
from hpc.report import replace_file
from hpc.summary import RunHistory, read_run, strict_json, summarize

EXAMPLES = """examples:
  trireme compare runs/one-rank runs/four-ranks       did the number of ranks change anything?
  trireme compare runs/sync runs/bmuf --out /tmp      write /tmp/compare.png
  trireme compare runs/* --json                       one JSON line instead of the tables
"""


def compare(runs: Sequence[Path], out: Path | None = None) -> dict[str, Any]:
    """Compare runs with the first of them and draw their learning curves over each other.

    runs  two or more run folders
    out   the picture to write, or a folder to write compare.png into; None: compare.png in the current folder

    Returns {"names": shortest distinct names, "recipe": {dotted key: a value a run, None where it is not set},
    "runs": `summary.summarize` a run, each with "sha256" of its model (None without one) and "curve": how far its
    validations equal the first run's (`same_until`), "models_identical": bool or None if a model is missing,
    "png": path}.
    Raises ValueError for fewer than two runs, what is no run folder, or a damaged metrics.jsonl or recipe.toml;
    OSError if the picture cannot be written.
    """
    if len(runs) < 2:
        raise ValueError(f"got {len(runs)} run, expected two or more to compare: trireme compare RUN RUN [...]")
    found, names = [read_run(path) for path in runs], distinct_names(runs)
    picture = Path("compare.png") if out is None else out / "compare.png" if out.is_dir() else out
    rows = []
    for run in found:
        model = run.path / MODEL
        digest = sha256_of(model) if model.is_file() else None
        rows.append({**summarize(run), "sha256": digest, "curve": same_until(found[0], run)})
    digests = [row["sha256"] for row in rows]
    answer = {
        "names": names,
        "recipe": recipe_differences([_recipe_of(run) for run in found]),
        "runs": rows,
        "models_identical": None if None in digests else len(set(digests)) == 1,
        "png": str(picture),
    }
    from hpc.compare_picture import draw  # matplotlib: only where something is drawn

    replace_file(picture, draw(dict(zip(names, found, strict=True))))
    return answer


def distinct_names(runs: Sequence[Path]) -> list[str]:
    """The shortest tails of the runs' paths that tell them apart; a run given twice gets a number."""
    paths = [path.resolve() for path in runs]
    longest = max(len(path.parts) for path in paths)
    for length in range(1, longest + 1):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            break
    return [f"{name} #{names[: i + 1].count(name)}" if names.count(name) > 1 else name for i, name in enumerate(names)]


def same_until(first: RunHistory, other: RunHistory) -> dict[str, Any]:
    """How far two validation curves are equal, to the last bit, in step and every metric.

    Returns {"equal": how many validations, "until": the step of the last equal one (None without), "differs_at": the
    step of the first difference (None: equal throughout), "why": "metrics", "step", "length" (only one run has a
    validation there) or None, "metrics": the names that differ there}.
    """
    ours, theirs = first.of("validate"), other.of("validate")
    equal, until = 0, None
    for a, b in zip(ours, theirs, strict=False):
        one, two = metrics_of(a), metrics_of(b)
        names = [name for name in {**one, **two} if not _same(one.get(name), two.get(name))]
        if names or a["step"] != b["step"]:
            why, names = ("metrics", names) if a["step"] == b["step"] else ("step", [])
            first_step = min(a["step"], b["step"])
            return {"equal": equal, "until": until, "differs_at": first_step, "why": why, "metrics": names}
        equal, until = equal + 1, a["step"]
    longer = ours[equal:] or theirs[equal:]
    end = longer[0]["step"] if longer else None
    return {"equal": equal, "until": until, "differs_at": end, "why": "length" if longer else None, "metrics": []}


def _same(one: float | None, two: float | None) -> bool:
    """Equal bits of meaning: NaN equals NaN, a missing metric equals none."""
    return one == two or (one is not None and two is not None and math.isnan(one) and math.isnan(two))


def recipe_differences(recipes: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Dotted keys whose values differ -> a value a recipe, None where it is not set; the run's own folder left out."""
    flat = [dict(flatten(recipe)) for recipe in recipes]
    keys = dict.fromkeys(key for recipe in flat for key in recipe if key != "run")
    return {
        key: [recipe.get(key) for recipe in flat]
        for key in keys
        if any(key not in recipe or recipe[key] != flat[0].get(key) for recipe in flat)
    }


def _recipe_of(run: RunHistory) -> dict[str, Any]:
    return read_toml(run.path / "recipe.toml") if run.recipe else {}


def show(comparison: Mapping[str, Any], console: Console) -> None:
    """Print what `compare` returned: the recipe keys that differ, the runs side by side, the verdict in words."""
    names, runs = comparison["names"], comparison["runs"]
    recipe = _new_table("recipe", names)
    for key, values in comparison["recipe"].items():
        recipe.add_row(key, *("–" if value is None else str(value) for value in values))
    if comparison["recipe"]:
        console.print(recipe)
    else:
        console.print("The recipes are the same.")
    results = _new_table("result", names)
    metrics = dict.fromkeys(name for row in runs for name in (row["last"] or {}) if name not in ("step", "epoch"))
    results.add_row("status", *(row["status"] for row in runs))
    for which in ("best", "last"):
        for name in metrics:
            told = [metric(name, (row[which] or {}).get(name)) for row in runs]
            results.add_row(f"{which} {spoken(name)}", *told)
    results.add_row("epochs", *(f"{row['epochs']:.4g}" for row in runs))
    noun = " or ".join(dict.fromkeys(row["noun"] for row in runs))
    results.add_row(noun, *(amount(row["frames"]) for row in runs))
    results.add_row("wall clock", *(duration(row["seconds"]) for row in runs))
    results.add_row(f"{noun}/s in training", *(amount(row["frames_per_s"]) for row in runs))
    results.add_row("speed against the first", *(_ratio(row, runs[0]) for row in runs))
    if any(row["exchange_hidden"] is not None for row in runs):
        results.add_row("exchange hidden", *(percent(row["exchange_hidden"]) for row in runs))
    results.add_row("ranks", *(amount(row["ranks"]) for row in runs))
    results.add_row("hosts", *(str(len(row["hosts"])) for row in runs))
    results.add_row("model SHA-256", *((row["sha256"] or "no model")[:12] for row in runs))
    console.print(results)
    for name, row in list(zip(names, runs, strict=True))[1:]:
        words = f"{name}: {curve_words(row['curve'], names[0])}; {_model_words(row, runs[0])}"
        console.print(words, soft_wrap=True)


def _new_table(what: str, names: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="bold")
    table.add_column(what, no_wrap=True)
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    return table


def _ratio(row: Mapping[str, Any], first: Mapping[str, Any]) -> str:
    base = number(first["frames_per_s"])
    return f"{number(row['frames_per_s']) / base:.2f} x" if base > 0 and number(row["frames_per_s"]) > 0 else "–"


def curve_words(curve: Mapping[str, Any], first: str) -> str:
    """`same_until`'s answer as words."""
    if not curve["equal"] and curve["why"] in (None, "length"):
        return "no validations to compare"
    if curve["differs_at"] is None:
        plural = "s" * (curve["equal"] != 1)
        return f"validation curve identical to {first}'s ({curve['equal']} validation{plural})"
    at = f"step {curve['differs_at']:,}"
    what = {
        "metrics": f"first difference at {at}, in {', '.join(spoken(name) for name in curve['metrics'])}",
        "step": f"at {at} only one of the two validates",
        "length": f"only one of the two goes on (to {at})",
    }[curve["why"]]
    if not curve["equal"]:
        return f"validation curve differs from {first}'s from the beginning: {what}"
    return f"validation curve identical to {first}'s until step {curve['until']:,}; {what}"


def _model_words(row: Mapping[str, Any], first: Mapping[str, Any]) -> str:
    if row["sha256"] is None or first["sha256"] is None:
        return "not both have a model"
    return "models byte-identical" if row["sha256"] == first["sha256"] else "models differ"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give `trireme compare` its arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = "Compare runs: recipes, results, speed, and whether they learned the same to the last bit."
    parser.epilog = EXAMPLES
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="two or more run folders")
    parser.add_argument("--out", type=Path, help="picture to write, or a folder for it (default: ./compare.png)")
    parser.add_argument("--json", action="store_true", help="print one JSON line instead of the tables")


def run(args: argparse.Namespace) -> int:
    """Do what the parsed arguments ask; the exit status."""
    comparison = compare(args.runs, args.out)
    if args.json:
        print(strict_json(comparison))
        return 0
    console = Console(highlight=False, markup=False)
    show(comparison, console)
    console.print(f"wrote {comparison['png']}", soft_wrap=True)
    return 0
