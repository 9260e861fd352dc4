"""Training under random faults and restarts ends with the bytes of the undisturbed run: `make soak`.

    python tests/faults/soak.py --runs 20 --faults 100
    python tests/faults/soak.py --runs 2 --faults 10 --seed 7       a short one

Each run trains one of the strategies with 2 to 4 ranks, another number after every fault, on one host or on pretend
hosts whose link is cut. Faults are drawn: what, in which rank, after which step, in which phase; and while no job runs,
a byte of the newest checkpoint flips, or a file of it is cut short, or a byte of a shard flips (and is restored once
a job has refused it). Prints a line a fault, and last

    {"runs", "faults", "lost", "torn_loaded", "hangs", "equal", "max_detection_s"}

lost: runs that did not come to their end. torn_loaded: altered checkpoints that a job went on from, altered shards that
one learned from. hangs: jobs that were still there 10 s after the fault (of a hang: after the watchdog's time). equal:
runs that ended with the undisturbed run's model, byte for byte. max_detection_s: from the fault to the end of its job
(of a hang: beyond the watchdog's time). Root only: it mounts a small file system for every run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]

from inject import no_memory_cgroup  # noqa: E402
from material import write_recipe  # noqa: E402

from hpc.bench_crew import mpiexec, outside_a_job  # noqa: E402
from hpc.checkpoint import CheckpointError, check  # noqa: E402
from hpc.files import sha256_of  # noqa: E402
from hpc.hosts import Hosts, missing_rights  # noqa: E402
from hpc.records import read_attempts  # noqa: E402
from jobs.attempt import Attempt  # noqa: E402

WATCHDOG = 4.0
PATIENCE_S = 10.0  # beyond the watchdog's time, after which a job that was struck counts as a hang
SPLITS, EPOCHS = 12, 24
WORDS = [
    f"log.watchdog={WATCHDOG}", "log.silence=3", "log.every=20", "log.trace=0",
    "checkpoint.every=300", "checkpoint.keep=3",
    f"schedule={{name='newbob', epochs={EPOCHS}, min_epochs={EPOCHS}}}", "data.batch=48",
]
STRATEGIES = {
    "allreduce": 'strategy={name="allreduce"}',
    "onebit": 'strategy={name="onebit", cold_start=300}',
    "onebit double buffered": 'strategy={name="onebit", cold_start=300, double_buffering=true}',
    "bmuf": 'strategy={name="bmuf", block_steps=5, turn_steps=2}',
    "elastic": 'strategy={name="elastic", block_steps=5, turn_steps=2}',
    "master_slave": 'strategy={name="master_slave", turn_steps=3}',
}
INSIDE = ["kill", "stop", "raise", "hang", "locked", "memory", "disk", "exchange"]
BETWEEN = ["flip", "truncate", "shard"]
NETWORK = ["link", "host"]
PHASES = ["read", "forward", "backward", "exchange", "validate", "checkpoint"]
LATE = {"stop", "hang", "locked"}  # what only the watchdog notices


class Soak:
    def __init__(self, work: Path, seed: int):
        self.work, self.random = work, random.Random(seed)
        self.environment = outside_a_job() | {"OMP_NUM_THREADS": "1"}
        self.counts = dict.fromkeys(("runs", "faults", "lost", "torn_loaded", "hangs", "equal"), 0)
        self.longest = 0.0
        self.unexplained = 0  # ends that no fault accounts for
        self.digests: dict[str, tuple[str, str]] = {}
        self.recipe = write_recipe(work / "data", splits=SPLITS) if not (work / "data").mkdir() else None
        self.kinds = [kind for kind in INSIDE if kind != "memory" or not no_memory_cgroup()]
        self.network = NETWORK if not missing_rights() else []

    def reference(self, strategy: str) -> tuple[str, str]:
        """The digests of what comes of an undisturbed run, on one rank."""
        if strategy not in self.digests:
            run = self.work / f"undisturbed-{strategy.replace(' ', '-')}"
            words = [sys.executable, "-m", "mpi4py", "-m", "hpc", "train", str(self.recipe), *self.words(strategy, run)]
            subprocess.run(words, env=self.environment, cwd=ROOT, check=True, capture_output=True)
            self.digests[strategy] = digests(run)
        return self.digests[strategy]

    def words(self, strategy: str, run: Path) -> list[str]:
        return [*WORDS, STRATEGIES[strategy], f"run={run}"]

    def run(self, number: int, faults: int) -> None:
        """One run, from its start to its end, under so many faults."""
        strategy = list(STRATEGIES)[number % len(STRATEGIES)]
        expected = self.reference(strategy)
        steps = max(r["step"] for a in read_attempts(self.folder_of(strategy)) for r in a)
        self.counts["runs"] += 1
        with ExitStack() as up:
            place = self.work / f"run-{number}"
            place.mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", place], check=True)
            up.callback(subprocess.run, ["umount", "-l", place])
            run, left = place / "run", faults
            at = sorted(self.random.randrange(steps) for _ in range(faults))
            for _ in range(4 * faults + 8):
                if left and (run / "success").exists():
                    break
                struck = self.attempt(run, strategy, number, at[faults - left] if left else None, faults - left)
                self.counts["faults"] += struck
                if not struck and not left:
                    break
                left = max(0, left - struck)
            if not (run / "success").exists():
                self.counts["lost"] += 1
                print(json.dumps({"run": number, "lost": True}), flush=True)
            else:
                self.counts["equal"] += digests(run) == expected

    def folder_of(self, strategy: str) -> Path:
        return self.work / f"undisturbed-{strategy.replace(' ', '-')}"

    def attempt(self, run: Path, strategy: str, number: int, step: int | None, count: int) -> int:
        """A job until it ends; how many faults came to pass."""
        kind = "" if step is None else self.random.choice([*self.kinds, *self.kinds, *BETWEEN, *self.network])
        if kind in ("flip", "truncate") and sum(map(whole, (run / "checkpoints").glob("step-*/"))) < 2:
            kind = "kill"  # with its only checkpoint altered a run is refused, and somebody must decide
        ranks = self.random.choice([2, 3, 4])
        altered = self.alter(run, kind) if kind in ("flip", "truncate") else None
        shard = self.flip_a_shard() if kind == "shard" else None
        inside = kind if kind in INSIDE else self.random.choice(self.kinds) if altered else ""
        mark = self.work / f"struck-{number}-{count}"
        plan = []
        if inside:
            plan = [{
                "what": inside, "rank": self.random.randrange(ranks), "step": step, "mark": str(mark),
                "phase": self.random.choice(PHASES), "room": str(run.parent),
            }]
        (self.work / "plan.json").write_text(json.dumps(plan))
        program = [
            sys.executable, "-m", "mpi4py", str(Path(__file__).with_name("inject.py")), str(self.work / "plan.json"),
            "train", str(self.recipe), *self.words(strategy, run),
        ]
        with ExitStack() as up:
            world, additions = None, {}
            command = [mpiexec(), "-launcher", "fork", "-n", str(ranks), *program]
            if kind in NETWORK:
                ranks = 3
                world = up.enter_context(Hosts(3))
                command, additions = world.mpiexec([1, 1, 1], program)
            attempt = Job(command, self.environment | additions, run, mark)
            if world is not None:
                attempt.strike = lambda: self.cut(world, kind, mark)
                attempt.step = step
            outcome = attempt.make()
        (run.parent / "filler").unlink(missing_ok=True)
        record: dict[str, Any] = {"run": number, "strategy": strategy, "ranks": ranks, "step": step}
        ended = {"outcome": outcome.state, "said": outcome.said[:160]}
        struck = int(mark.exists())
        if not struck and altered is None and shard is None and outcome.state != "finished":
            self.unexplained += 1
            print(f"run {number}: nothing struck it, and it {outcome.state}: {outcome.said}", file=sys.stderr)
        if altered is not None or shard is not None:
            struck += 1
            if shard is not None:
                path, content = shard
                path.write_bytes(content)
                loaded = outcome.state == "finished" or path.name not in attempt.last_words()
            else:
                loaded = self.went_on_from(run, str(altered))
            self.counts["torn_loaded"] += loaded
            print(json.dumps(record | {"fault": kind, "struck": True, "loaded": loaded, **ended}), flush=True)
            kind = inside
        if plan:
            record |= {"rank": plan[0]["rank"], "phase": plan[0]["phase"]}
        if mark.exists() and outcome.state != "finished":
            record["detection_s"] = seconds = round(attempt.ended - mark.stat().st_mtime, 2)
            late = WATCHDOG if kind in LATE else 0.0
            self.longest = max(self.longest, seconds - late)
            if seconds - late > PATIENCE_S:
                self.counts["hangs"] += 1
        if kind or not struck:
            print(json.dumps(record | {"fault": kind or "none", "struck": mark.exists(), **ended}), flush=True)
        return struck

    def alter(self, run: Path, kind: str) -> str:
        """Flip a byte of a file of the newest checkpoint, or cut it short; the checkpoint's name."""
        folder = max((run / "checkpoints").glob("step-*/"))
        file = self.random.choice(sorted(p for p in folder.iterdir() if p.stat().st_size))
        content = bytearray(file.read_bytes())
        where = self.random.randrange(len(content))
        if kind == "flip":
            content[where] ^= 1 << self.random.randrange(8)
        file.write_bytes(content if kind == "flip" else content[:where])
        assert not whole(folder), f"{file}: byte {where} changed ({kind}) and nobody noticed"
        return folder.name

    def flip_a_shard(self) -> tuple[Path, bytes]:
        """Flip a byte of a shard; the shard, and what was in it."""
        path = self.random.choice(sorted((self.work / "data").glob("[tv]*/*.h5")))
        content = path.read_bytes()
        changed = bytearray(content)
        changed[self.random.randrange(len(content))] ^= 1 << self.random.randrange(8)
        path.write_bytes(changed)
        return path, content

    def went_on_from(self, run: Path, name: str) -> bool:
        return read_attempts(run)[-1][0].get("resumed_from") == name

    def cut(self, world: Hosts, kind: str, mark: Path) -> None:
        mark.touch()
        world.cut(2)
        if kind == "host":
            world.kill(2)


def digests(run: Path) -> tuple[str, str]:
    """Of the model that a run ships, which is the best, and of that at its end."""
    return sha256_of(run / "model.safetensors"), sha256_of(max((run / "checkpoints").glob("step-*/model.safetensors")))


def whole(checkpoint: Path) -> bool:
    try:
        check(checkpoint)
        return True
    except CheckpointError:
        return False


class Job(Attempt):
    """An attempt that cuts a link once a step is reached, and that says less."""

    prints = subprocess.DEVNULL

    def __init__(self, command: list[str], environment: dict[str, str], run: Path, mark: Path):
        super().__init__(command, environment, run)
        self.mark, self.step, self.strike, self.ended = mark, 0, None, 0.0
        self.earlier = len(read_attempts(run)) if (run / "metrics.jsonl").exists() else 0

    def last_words(self) -> str:
        return " ".join(self._last)

    def _show(self) -> None:
        for line in self.process.stderr:
            self._last.append(line.rstrip())

    def _wait(self, asked: Callable[[], int]) -> int:
        """As it is, beside somebody who pulls a cable, and who ends it after so long that it counts as a hang."""
        beside = threading.Thread(target=self._meddle, daemon=True)
        beside.start()
        code = super()._wait(asked)
        self.ended = time.time()
        return code

    def _meddle(self) -> None:
        began = time.monotonic()
        while self.process.poll() is None:
            if self.strike and not self.mark.exists() and self._reached(self.step or 0):
                self.strike()
            struck = time.time() - self.mark.stat().st_mtime if self.mark.exists() else 0.0
            if struck > WATCHDOG + PATIENCE_S + 5 or time.monotonic() - began > 300:
                self._end()
            time.sleep(0.05)

    def _reached(self, step: int) -> bool:
        """By this attempt: those before it may have been there."""
        try:
            own = read_attempts(self.run)[self.earlier :]
        except (OSError, ValueError):
            return False
        return any(r["event"] == "train" and r["step"] >= step for attempt in own for r in attempt)


def summary(path: Path) -> str:
    """A table in markdown of faults and what became of them, from the lines that were printed."""
    records = [json.loads(line) for line in path.read_text().splitlines() if '"struck": true' in line]
    out = ["| fault | times | job ended after, median (most) | what came of it |", "|---|---|---|---|"]
    for kind in [*INSIDE, *NETWORK, *BETWEEN]:
        struck = [record for record in records if record["fault"] == kind]
        seconds = sorted(record["detection_s"] for record in struck if "detection_s" in record)
        ended = f"{statistics.median(seconds):.1f} s ({seconds[-1]:.1f})" if seconds else "–"
        loaded = Counter("gone on from" if r["loaded"] else "not gone on from" for r in struck if "loaded" in r)
        counts = Counter(record["outcome"] for record in struck) + loaded
        states = ", ".join(f"{count} {state}" for state, count in counts.items())
        out.append(f"| {kind} | {len(struck)} | {ended} | {states} |")
    return "\n".join(out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--faults", type=int, default=100, help="over all runs (default: 100)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--summary", type=Path, metavar="FILE", help="print the table of such lines; strike nothing")
    arguments = parser.parse_args()
    if arguments.summary:
        print(summary(arguments.summary))
        return 0
    if os.geteuid():
        parser.error("it mounts a small file system for every run: root only")
    work = Path(tempfile.mkdtemp(prefix="soak-"))
    try:
        soak = Soak(work, arguments.seed)
        each, more = divmod(arguments.faults, arguments.runs)
        for number in range(arguments.runs):
            soak.run(number, each + (number < more))
        for number in range(arguments.runs, 2 * arguments.runs):  # some runs came to their end before their last fault
            if soak.counts["faults"] < arguments.faults:
                soak.run(number, min(each, arguments.faults - soak.counts["faults"]))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(json.dumps(soak.counts | {"max_detection_s": round(soak.longest, 2)}))
    counts = soak.counts
    short = counts["faults"] < arguments.faults or counts["equal"] < counts["runs"]
    return int(short or bool(counts["lost"] or counts["torn_loaded"] or counts["hangs"] or soak.unexplained))


if __name__ == "__main__":
    sys.exit(main())
