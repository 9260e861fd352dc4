"""`trireme jobs`: the runs below a folder, and how each of them is doing."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hpc.config import RecipeError, read_toml
from hpc.failure import read_failure
from hpc.files import read_json
from hpc.lock import LOCK, holder_lives
from hpc.quantities import duration
from hpc.records import DATA, METRICS, RECIPE, STOPPED, SUBMITTED, SUCCESS, read_attempts
from hpc.summary import cause_of

EXAMPLES = """examples:
  trireme jobs                      all runs below runs/
  trireme jobs runs/night results   those below two folders
  trireme jobs --json               a JSON line each

finished; running; queued (at Slurm: what `trireme submit` has sent, or what has run before); stopped: asked to, and to
go on; failed: RUN/failure.json says why; lost: it ended without a word; made: nothing was learned yet. Start a run's
command again to have it go on.
"""
PRIVATE = ".submitit"  # beside run folders: what submitit pickles, and what its jobs said
WIDE = 240  # columns, where there is no terminal
DEPTH = 4  # of folders that are looked into
COLOURS = {"finished": "green", "running": "cyan", "queued": "cyan", "stopped": "yellow", "failed": "red",
           "lost": "red", "made": "white"}


@dataclass(frozen=True)
class Job:
    """How a run is doing.

    epoch, epochs  where it is, and where it ends; None: not known
    metric         the last validation's judged metric
    restarts       how often it went on
    ago            seconds since it last wrote a record
    about          the Slurm job, or why it failed
    """

    run: str
    state: str
    step: int | None = None
    epoch: float | None = None
    epochs: float | None = None
    metric: str = ""
    restarts: int = 0
    ago: float | None = None
    about: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    parser.add_argument("folders", nargs="*", type=Path, default=[Path("runs")], help="(default: runs)")
    parser.add_argument("--json", action="store_true", help="print a JSON object a run")


def run(arguments: argparse.Namespace) -> int:
    missing = [str(folder) for folder in arguments.folders if not folder.is_dir()]
    if missing:
        raise ValueError(f"no folder {', '.join(missing)}; give the folders that hold your runs: trireme jobs FOLDER")
    paths = sorted({path for folder in arguments.folders for path in runs_below(folder)})
    waiting = queue([sent["job"] for path in paths if (sent := submission(path)).get("place") == "slurm"])
    jobs = [job_of(path, waiting) for path in paths]
    if arguments.json:
        for job in jobs:
            print(json.dumps(asdict(job)))
    elif jobs:
        show(jobs)
    else:
        print(f"no runs below {', '.join(map(str, arguments.folders))}")
    return 0


def runs_below(folder: Path, depth: int = DEPTH) -> Iterator[Path]:
    """The run folders in and below a folder; within a run there are no others."""
    if (folder / DATA).is_file() or (folder / SUBMITTED).is_file():
        yield folder
    elif depth:
        for path in sorted(folder.iterdir()):
            if path.is_dir() and not path.is_symlink() and not path.name.startswith("."):
                yield from runs_below(path, depth - 1)


def submission(run: Path) -> dict[str, str]:
    """What `trireme submit` noted of a run's last job: place, job, log; {} if nothing."""
    found = read_json(run / SUBMITTED) or {}
    return {key: str(found[key]) for key in ("place", "job", "log")} if {"place", "job", "log"} <= found.keys() else {}


def queue(jobs: Sequence[str]) -> dict[str, str]:
    """What Slurm says of its jobs: number -> state, "PENDING" say; those that it does not know are left out."""
    if not jobs or not shutil.which("squeue"):
        return {}
    with suppress(OSError, subprocess.TimeoutExpired):
        words = ["squeue", "--me", "--noheader", "--array", "--format=%i %T"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=20)
        return dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if " " in line)
    return {}


def job_of(run: Path, waiting: dict[str, str] | None = None) -> Job:
    """How a run is doing, by its folder and by what Slurm says of its jobs."""
    sent, failure = submission(run), read_failure(run)
    attempts = []
    if (run / METRICS).is_file():
        with suppress(ValueError):  # a line that is being written
            attempts = read_attempts(run)
    records = [record for attempt in attempts for record in attempt]
    trained = [record for record in records if "epoch" in record]
    judged = [record for record in records if record["event"] == "validate"]
    epochs, judge = None, "loss"
    with suppress(RecipeError, KeyError, OSError, TypeError, ValueError):
        recipe = read_toml(run / RECIPE)
        epochs, judge = float(recipe["schedule"]["epochs"]), recipe["validate"]["metric"]
    about = f"{sent['place']} job {sent['job']}" if sent else ""
    if (run / SUCCESS).exists():
        state = "finished"
    elif (run / LOCK).exists() and holder_lives(run / LOCK):
        state = "running"
    elif (waiting or {}).get(str(sent.get("job"))) in ("PENDING", "CONFIGURING", "REQUEUED"):
        state = "queued"
    elif (run / STOPPED).exists():
        state = "stopped"
    elif failure:
        state, about = "failed", cause_of(failure)
    else:
        state = "lost" if records else "made"
        about += "; 'trireme logs' says more" if sent else ""
    return Job(
        str(run), state, records[-1]["step"] if records else None, trained[-1]["epoch"] if trained else None, epochs,
        f"{judge} {judged[-1].get(judge):.4g}" if judged and judged[-1].get(judge) is not None else "",
        max(0, len(attempts) - 1), time.time() - records[-1]["time"] if records else None, about,
    )


def show(jobs: Sequence[Job]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("run", "state", "step", "epoch", "last validation", "restarts", "last heard of", ""):
        right = heading in ("step", "epoch", "restarts")
        table.add_column(heading, justify="right" if right else "left", overflow="fold" if heading else "ellipsis")
    for job in jobs:
        of = f" of {job.epochs:g}" if job.epochs else ""
        table.add_row(
            escape(job.run), f"[{COLOURS[job.state]}]{job.state}[/]", "" if job.step is None else f"{job.step:,}",
            "" if job.epoch is None else f"{job.epoch:.2f}{of}", escape(job.metric), str(job.restarts or ""),
            "" if job.ago is None else f"{duration(job.ago)} ago", escape(job.about),
        )
    Console(width=None if sys.stdout.isatty() else WIDE).print(table)


