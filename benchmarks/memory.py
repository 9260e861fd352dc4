"""Memory of a rank while it trains on a data set much larger than it: resident peak, by rank.

    python benchmarks/memory.py --gb 4 --ranks 2

Generates the data, trains one epoch through the command (default split_frames, shards verified), and reads every rank's
VmHWM from /proc until the end. Prints one JSON line: {"bench": "memory", "gb", "ranks", "peak_mb": [...], ...}.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tomli_w

from hpc.bench import make_data, recipe_for
from jobs.demo import ranks_command


def ranks_of(run: Path) -> list[int]:
    """Process numbers of the Python processes that train in a run folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except (FileNotFoundError, ProcessLookupError):
                continue
            if f"run={run}".encode() in words and b"python" in Path(words[0].decode()).name.encode():
                found.append(int(entry.name))
    return found


def peak_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=4.0)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--splits", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_data(folder / "data", int(arguments.gb * 1e9 / 164), classes=50, shards=16)
        size = sum(p.stat().st_size for p in (folder / "data").iterdir())
        tables = recipe_for(
            folder / "data", folder / "run", splits=arguments.splits, data={"batch": 8192, "verify": True},
            task={"context": 5, "layers": 1, "width": 64},
        )
        (folder / "recipe.toml").write_text(tomli_w.dumps(tables))
        run = folder / "run"
        words = [*ranks_command(arguments.ranks), "train", str(folder / "recipe.toml"), f"run={run}"]
        process = subprocess.Popen(words)
        peaks: dict[int, float] = {}
        began = time.monotonic()
        while process.poll() is None:
            for pid in ranks_of(run):
                try:
                    peaks[pid] = max(peaks.get(pid, 0.0), peak_mb(pid))
                except (FileNotFoundError, ProcessLookupError):
                    continue
            time.sleep(0.5)
        frames = json.loads((run / "success").read_text())["frames"]
    print(json.dumps({
        "bench": "memory", "gb": round(size / 1e9, 2), "frames": frames, "ranks": arguments.ranks,
        "splits": arguments.splits, "peak_mb": sorted(round(p) for p in peaks.values() if p > 50),
        "seconds": round(time.monotonic() - began, 1),
    }))
    return process.returncode


if __name__ == "__main__":
    sys.exit(main())
