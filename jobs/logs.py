"""`trireme logs RUN`: what all ranks said, and what the jobs around them said, in the order of time."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from hpc.failure import read_failure
from hpc.lock import LOCK, holder_lives
from hpc.records import DATA, SUBMITTED
from hpc.summary import cause_of
from jobs.listing import PRIVATE, submission

EXAMPLES = """examples:
  trireme logs runs/demo                 everything so far
  trireme logs runs/demo --last 20       the last lines
  trireme logs runs/demo --follow        and what comes, until the job ends (Ctrl-C to leave)

Lines of ranks have the time and the rank in front. What is around them (Slurm, a launcher) says its own without: they
come by when their file was last written.
"""
TIMED = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ")
LOOK_S = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("-f", "--follow", action="store_true", help="go on as long as the job lives")
    parser.add_argument("--last", type=int, default=0, metavar="N", help="only so many lines of what there is")


def run(arguments: argparse.Namespace) -> int:
    folder = arguments.run
    if not any((folder / name).is_file() for name in (DATA, SUBMITTED)) and not any(folder.glob("logs/*.log")):
        raise ValueError(f"'{folder}' is not a run folder, or no job has begun there; 'trireme jobs' lists runs")
    reader = Reader(folder)
    for line in list(reader.news())[-arguments.last :]:
        print(line)
    try:
        while arguments.follow and _lives(folder):
            sys.stdout.flush()
            time.sleep(LOOK_S)
            for line in reader.news():
                print(line)
    except KeyboardInterrupt:
        return 130
    if failure := read_failure(folder):
        print(f"failed: {cause_of(failure)}")
    return 0


class Reader:
    """A run's logs, read as they grow."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._at: dict[Path, int] = {}

    def news(self) -> Iterator[str]:
        """The whole lines written since the last call, merged by time."""
        lines: list[tuple[str, int, str]] = []
        for path in self._files():
            read = self._read(path)
            written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(path.stat().st_mtime))
            since = next((line[:23] for line in read if TIMED.match(line)), written)
            for line in read:
                since = line[:23] if TIMED.match(line) else since
                lines.append((since, len(lines), line))
        yield from (line for _, _, line in sorted(lines))

    def _files(self) -> list[Path]:
        """The logs of ranks, and what the job around them said last."""
        own = sorted((self.folder / "logs").glob("*.log")) if (self.folder / "logs").is_dir() else []
        around = Path(submission(self.folder).get("log", "")).resolve()
        ours = around.is_relative_to((self.folder.parent / PRIVATE).resolve())  # a stranger's may name any file
        job = [around, around.with_suffix(".err")] if ours else []
        return [path for path in (*job, *own) if path.is_file()]

    def _read(self, path: Path) -> list[str]:
        with open(path, "rb") as file:
            file.seek(self._at.get(path, 0))
            raw = file.read()
        whole = raw[: raw.rfind(b"\n") + 1]
        self._at[path] = self._at.get(path, 0) + len(whole)
        return whole.decode(errors="replace").splitlines()


def _lives(folder: Path) -> bool:
    return (folder / LOCK).exists() and holder_lives(folder / LOCK)
