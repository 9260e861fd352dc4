"""failure.json: why a run's last job ended without coming to its end. The first to write it has found the cause.

Whoever notices a failure writes it: the rank that raised, the guard of a host, or, where a job ended without a word,
what looks after it (`jobs/`). The next job in the run folder keeps it in its "start" in metrics.jsonl.
"""

from __future__ import annotations

import socket
import sys
import time
from pathlib import Path
from typing import Any

from hpc.files import read_json, write_json
from hpc.lock import Lock

FAILURE = "failure.json"
FAILED = 70  # exit code (EX_SOFTWARE): it may do better when it is started again; 1: it would be refused again


def write_failure(
    lock: Lock, kind: str, rank: int | None, host: str, where: str, error: str, final: bool = False, **more: Any
) -> bool:
    """Write a run's failure.json, if this job has none yet and the run folder is still its own; whether it was.

    lock   of the run folder, as this job holds or held it

    kind   "raised", "gone", "hang", "silent" or "unknown"
    rank   the rank that failed, or the first that shows it; None where that is not known
    where  what it was doing
    final  whether the same would happen again
    more   JSON values: "step", "call", "ranks" ...

    A disk too full even for that is not the failure to report: it is only said.
    """
    cause = {
        "time": time.time(), "kind": kind, "rank": rank, "host": host, "where": where, "error": error,
        "found_by": socket.gethostname(), "final": final, **more,
    }
    try:
        return not lock.lost() and write_json(lock.path.with_name(FAILURE), cause, first=True)
    except OSError as second:
        print(f"({FAILURE} could not be written either: {second})", file=sys.stderr)
        return False


def read_failure(folder: Path) -> dict[str, Any] | None:
    """What a run's failure.json says; None if there is none."""
    return read_json(folder / FAILURE)
