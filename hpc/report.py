"""`trireme report RUN`: a run folder becomes one picture and one HTML page."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from rich.console import Console

from hpc.files import temporary_of
from hpc.report_page import page
from hpc.summary import read_run, strict_json, summarize

EXAMPLES = """examples:
  trireme report runs/timit            write runs/timit/report.png and runs/timit/report.html
  trireme report runs/timit --json     the same; the headline numbers as one JSON line

A run that is still going, was killed or failed gives a page too.
"""


def report(run: Path) -> dict[str, Any]:
    """Write RUN/report.png and RUN/report.html; returns `summary.summarize` of the run with their paths.

    run  the run's folder; both files are replaced whole
    Raises ValueError if this is no run folder or its metrics.jsonl is damaged, OSError if it cannot be written to.
    """
    from hpc.report_picture import DARK, LIGHT, draw  # matplotlib: only where something is drawn

    found = read_run(run)
    light = draw(found, LIGHT)
    written = {"png": run / "report.png", "html": run / "report.html"}
    replace_file(written["png"], light)
    replace_file(written["html"], page(found, light, draw(found, DARK)).encode())
    return {**summarize(found), **{kind: str(path) for kind, path in written.items()}}


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that readers see the old one or the new one, never a part. Raises OSError."""
    temporary = temporary_of(path)
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give `trireme report` its arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = "Draw a run (learning curves, learning rate, throughput, time spent) as a picture and a page."
    parser.epilog = EXAMPLES
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    parser.add_argument("--json", action="store_true", help="print the headline numbers as one JSON line")


def run(args: argparse.Namespace) -> int:
    """Do what the parsed arguments ask; the exit status."""
    summary = report(args.run)
    if args.json:
        print(strict_json(summary))
        return 0
    console = Console(highlight=False, markup=False, soft_wrap=True)
    cause = f": {summary['cause']}" if summary["cause"] else ""
    console.print(f"{args.run}: {summary['status']}{cause}")
    console.print(f"wrote {summary['png']}")
    console.print(f"wrote {summary['html']}")
    return 0
