"""What becomes of a job in which something goes wrong, beside torchrun's: `docs/faults.md`.

    python benchmarks/faults.py                         every fault, Trireme's and torchrun's in turn
    python benchmarks/faults.py --rounds 5 --out FILE
    python benchmarks/faults.py --summary FILE          the table in markdown, from such lines

Both sides train a small network on 3 ranks of this machine, over MPI (by mpiexec) and over gloo (DDP by torchrun), and
are struck in rank 1, by the same fault, in the middle of training; to both 10 s without progress are a hang. Prints a
JSON line a round: {"fault", "side", "seconds", "code", "names_rank", "says_why", "said"}: from the fault to the end of
the job, its exit code, whether what it said names the rank that was struck, and what was wrong with it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from material import write_recipe  # noqa: E402

from hpc.bench import show  # noqa: E402
from hpc.bench_crew import mpiexec, outside_a_job  # noqa: E402

RANKS, RANK, PATIENCE_S, LIMIT_S = 3, 1, 10.0, 120.0
FAULTS = {
    "kill": r"gone without a word|Signal 9|SIGKILL", "raise": r"injected: nobody expected this",
    "hang": r"no progress|[Tt]imed out|timeout", "locked": r"no progress|[Tt]imed out|timeout",
    "stop": r"is stopped|[Tt]imed out|timeout", "memory": r"out of memory|OOM|oom",
}
NAMES_RANK = {  # as the one that is to blame, not among those that were ended
    "trireme": rf"\[guard of \S+\] rank {RANK} on|\[rank {RANK} on \S+\] trireme train:",
    "torchrun": rf"Root Cause[^=]*?rank +: {RANK} ",
}


def ours(folder: Path, fault: str) -> list[str]:
    recipe = write_recipe(folder, splits=6)
    plan = [{"what": fault, "rank": RANK, "step": 40, "phase": "forward", "mark": str(folder / "mark")}]
    (folder / "plan.json").write_text(json.dumps(plan))
    words = [sys.executable, "-m", "mpi4py", str(ROOT / "tests/faults/inject.py"), str(folder / "plan.json"), "train"]
    changes = [f"log.watchdog={PATIENCE_S}", "schedule.epochs=5000", "log.every=10"]
    return [mpiexec(), "-n", str(RANKS), *words, str(recipe), *changes]


def torchruns(folder: Path, fault: str) -> list[str]:
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    return [*words, __file__, "--peer", fault, str(folder / "mark")]


def peer(fault: str, mark: Path) -> None:
    """A rank of the other side: DDP over gloo, struck after 40 steps."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    sys.path.insert(0, str(ROOT / "tests/faults"))
    import inject

    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=PATIENCE_S))
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(40, 40))
    rule = torch.optim.SGD(model.parameters(), lr=0.1)
    step = 0
    while True:
        if step == 40 and dist.get_rank() == RANK:
            inject.strike({"what": fault, "rank": RANK, "mark": str(mark)})
        rule.zero_grad()
        model(torch.randn(16, 40)).square().mean().backward()
        rule.step()
        step += 1


def measured(side: str, fault: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        folder = Path(name)
        command = (ours if side == "trireme" else torchruns)(folder, fault)
        process = subprocess.Popen(
            command, env=outside_a_job() | {"OMP_NUM_THREADS": "1"}, cwd=ROOT, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
        )
        try:
            said, _ = process.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            said, _ = process.communicate()
        ended = time.time()
        mark = folder / "mark"
        assert mark.exists(), said[-2000:]
        told = re.sub(r"injected: \w+ in rank \d", "", said)  # the harness's own words
        return {
            "fault": fault, "side": side, "seconds": round(ended - mark.stat().st_mtime, 2), "code": process.returncode,
            "names_rank": bool(re.search(NAMES_RANK[side], told)), "says_why": bool(re.search(FAULTS[fault], told)),
            "said": " / ".join(line.strip() for line in told.splitlines() if re.search(FAULTS[fault], line))[-400:],
        }


def summary(path: Path) -> str:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    columns = ["ends after", "names the rank", "says why"]
    out = [f"| fault | Trireme {' | '.join(columns)} | torchrun, DDP on gloo {' | '.join(columns)} |", "|---" * 7 + "|"]
    for fault in FAULTS:
        cells = [fault]
        for side in ("trireme", "torchrun"):
            rounds = [r for r in records if (r["fault"], r["side"]) == (fault, side)]
            seconds = [r["seconds"] for r in rounds]
            low, high = min(seconds, default=0.0), max(seconds, default=0.0)
            cells.append(f"{statistics.median(seconds):.1f} s ({low:.1f} to {high:.1f})" if seconds else "–")
            cells += [f"{sum(r[key] for r in rounds)} of {len(rounds)}" for key in ("names_rank", "says_why")]
        out.append(f"| {' | '.join(cells)} |")
    return "\n".join(out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--fault", action="append", choices=list(FAULTS), help="default: all")
    parser.add_argument("--out", type=Path, help="append the lines here, too")
    parser.add_argument("--summary", type=Path, metavar="FILE", help="print the table; measure nothing")
    parser.add_argument("--peer", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        peer(arguments.peer[0], Path(arguments.peer[1]))
    elif arguments.summary:
        print(summary(arguments.summary))
    else:
        for _ in range(arguments.rounds):
            for fault in arguments.fault or FAULTS:
                for side in ("trireme", "torchrun"):
                    show(measured(side, fault), arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
