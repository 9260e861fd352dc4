"""What the command lines of all converters share: fractions or files, names of sets, and what is printed at the end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Part = float | Path  # what is held out: a fraction, or a file of its own
LEFT = ("set", "majority")  # columns of words; the others hold numbers


def part_of(text: str) -> Part:
    """A fraction if it reads as a number, whatever files there are; else a file (./0.1 is one)."""
    try:
        return float(text)
    except ValueError:
        return Path(text)


def check_set(name: str) -> None:
    """Raise ValueError unless a set may be called so."""
    if not name.replace("-", "").replace("_", "").isalnum():
        raise ValueError(f"--set '{name}': expected a name of letters, digits, '-' and '_', e.g. test")


def show_prepared(report: dict[str, Any], out: Path, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print what was prepared: a table of the sets, and what is worth knowing.

    report   "state", "resumed", "notes" and "seconds" are read
    out      the folder of the data sets
    columns  the table's headings
    rows     a row a set
    """
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    table = Table(box=None, pad_edge=False)
    for heading in columns:
        table.add_column(heading, no_wrap=True, justify="left" if heading in LEFT else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    say = [f"note: {note}" for note in report["notes"]]
    if report["resumed"]:
        say.append(f"{report['resumed']} shards were finished before and were kept")
    if report["state"] == "finished":
        say.append(f"'{out}' was finished before with the same options and data; nothing was done")
    else:
        say.append(f"written to '{out}' in {report['seconds']:.1f} s")
    for line in say:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
