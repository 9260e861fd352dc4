"""A run folder's lock: one job at a time trains in it, on whichever host. Nothing but Python's own library.

The lock is a file that says who holds it. Its holder touches it every few seconds (`beat`, from the guard of rank 0's
host), so it is stale if its processes are gone from this host, or, held elsewhere, if nobody has touched it for a while
that is measured here, by this host's clock alone. A stale lock is taken over. Who finds another's name in a lock that
was its own has lost it, and must stop: rank 0 looks before it puts anything under its name (`check`).
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hpc.files import SMALL, read_json, read_start
from hpc.processes import boot, space, started

LOCK = "job.lock"
ATTEMPT = "TRIREME_ATTEMPT"  # in the environment of ranks: "job.attempt", by which what is around them knows its own
BEAT_S = 2.0  # between touches
STALE_S = 20.0  # without a touch, seen from another host, until a lock is stale
ENDING_S = 5.0  # that a holder on this host may still take to end
OWN_S = 60.0  # that an earlier attempt at this same job may, wherever it is
LOOK_S = 0.1


class Locked(ValueError):
    """A run folder in which another job trains."""


class Lingers(OSError):
    """A run folder in which an earlier attempt at the same job has not ended yet: later it will have."""


class Lock:
    """The lock of a run folder; nobody's until it is taken.

    folder  an existing run folder
    """

    def __init__(self, folder: Path):
        self.path = folder / LOCK
        self.token = secrets.token_hex(8)
        self._mine = False  # whether it must be there

    def take(self) -> None:
        """Hold the lock from now on; a stale one is taken over.

        Raises Locked, naming the holder, if there is one; Lingers if that is an earlier attempt at this job.
        """
        since, seen = time.monotonic(), ("", 0)
        while not self._placed():
            held, touched = self._holder()
            if held is None:
                continue  # it was released meanwhile
            if held["token"] != seen[0]:
                since, seen = time.monotonic(), (held["token"], touched)
            waited = time.monotonic() - since
            if _here(held):
                lives, sure = bool(processes_here(held)), waited > ENDING_S
            else:
                lives, sure = waited < STALE_S, touched != seen[1]
            own = _same_job(held)
            if not lives:
                self._take_over(held)
            elif waited > OWN_S if own else sure:
                raise self._complaint(held, own)
            else:
                time.sleep(LOOK_S)
        self._mine = True

    def hold(self, processes: Sequence[int]) -> None:
        """Name all processes of the job on this host: the lock is not stale before the last of them is gone."""
        self.check()
        renewed = self.path.with_name(f".{LOCK}.{self.token}")
        self._write(renewed, processes)
        os.replace(renewed, self.path)
        self._mine = True

    def lost(self) -> bool:
        """Whether another's name is in it, or none though this one held it. False if that cannot be known now."""
        held = read_json(self.path)
        if held is None and self._mine:
            time.sleep(LOOK_S)  # it may be moved aside for a moment, by one that took it for stale
            held = read_json(self.path)
            return held is None and self._gone()
        return isinstance(held, dict) and held.get("token") not in (None, self.token)

    def check(self) -> None:
        """Raise Locked if another job has taken this one's lock."""
        if self.lost():
            raise Locked(f"another job has taken the lock of '{self.path.parent}', which this one held; it stops")

    def beat(self) -> bool:
        """Touch the lock; False if it is another's now."""
        if self.lost():
            return False
        with suppress(OSError):
            os.utime(self.path)
        return True

    def release(self) -> None:
        """Nobody's from now on, if it was this one's."""
        if (read_json(self.path) or {}).get("token") == self.token:
            self._mine = False
            self.path.unlink(missing_ok=True)

    def _gone(self) -> bool:
        try:
            self.path.stat()
        except OSError as error:  # of a file system that does not answer nothing is known
            return isinstance(error, FileNotFoundError)
        return False

    def _placed(self) -> bool:
        mine = self.path.with_name(f".{LOCK}.{self.token}")
        self._write(mine, [os.getpid()])
        try:
            os.link(mine, self.path)
        except FileExistsError:
            return mine.stat().st_nlink == 2  # a network's server may have done it, and its answer been lost
        except OSError:  # a file system without links
            return self._created(mine)
        finally:
            mine.unlink()
        return True

    def _created(self, mine: Path) -> bool:
        try:
            descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with open(descriptor, "wb") as file:
            file.write(mine.read_bytes())
        return True

    def _write(self, path: Path, processes: Sequence[int]) -> None:
        job = os.environ.get("SLURM_JOB_ID", "")
        record = {
            "token": self.token, "host": socket.gethostname(), "boot": boot(), "space": space(), "job": job,
            "processes": [[pid, started(pid)] for pid in processes], "since": time.time(),
            "attempt": os.environ.get(ATTEMPT, ""),
        }
        with open(path, "w", encoding="utf-8") as file:
            file.write(json.dumps(record))
            file.flush()
            os.fsync(file.fileno())

    def _holder(self) -> tuple[dict[str, Any] | None, int]:
        """Who holds the lock, and when it was last touched, as the file's server says it."""
        try:
            text = read_start(self.path, SMALL)  # opening asks a network's server anew
            touched = self.path.stat().st_mtime_ns
        except FileNotFoundError:
            return None, 0
        except ValueError:
            text = b""
        return _parsed(text), touched

    def _take_over(self, held: dict[str, Any]) -> None:
        """Move a stale lock away; if it was another's by then, put it back."""
        aside = self.path.with_name(f".{LOCK}.{self.token}.stale")
        with suppress(FileNotFoundError):
            os.rename(self.path, aside)
            if (read_holder(aside) or held)["token"] != held["token"]:
                with suppress(OSError):
                    os.link(aside, self.path)
            aside.unlink()

    def _complaint(self, held: dict[str, Any], own: bool) -> Locked | Lingers:
        job = f", Slurm job {held['job']}" if held.get("job") else ""
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(held.get("since") or 0)))
        if own:
            where = f"'{self.path.parent}', on {held.get('host')}{job}"
            return Lingers(f"an earlier attempt at this job still holds {where}")
        return Locked(
            f"a job trains in '{self.path.parent}' already: on {held.get('host')}{job}, since {since}; wait for it, "
            f"end it, or choose another folder (run=...)"
        )


def _same_job(held: dict[str, Any]) -> bool:
    """Whether the holder is an earlier attempt at this job: of the same Slurm job, or the same `trireme launch`."""
    job, attempt = os.environ.get("SLURM_JOB_ID", ""), os.environ.get(ATTEMPT, "").partition(".")[0]
    theirs = str(held.get("attempt")).partition(".")[0]
    return bool(job and held.get("job") == job) or bool(attempt and theirs == attempt)


def _parsed(text: bytes) -> dict[str, Any]:
    """A lock's record. One that cannot be read is held by nobody known, from elsewhere: stale, if nobody touches it."""
    with suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        held = json.loads(text)
        processes = [[int(pid), int(since)] for pid, since in held["processes"]]
        return held | {"token": str(held["token"]), "processes": processes}
    return {"token": "unreadable", "host": "an unknown host", "processes": []}


def read_holder(path: Path) -> dict[str, Any] | None:
    """A lock's record, of whomever it is; None if there is no lock."""
    try:
        return _parsed(read_start(path, SMALL))
    except ValueError:
        return _parsed(b"")
    except OSError:
        return None


def processes_here(held: dict[str, Any]) -> list[int]:
    """The processes of a lock's holder that live on this host."""
    return [pid for pid, since in held["processes"] if since and started(pid) == since] if _here(held) else []


def holder_lives(path: Path) -> bool:
    """Whether a job trains under this lock, as far as can be said at once: elsewhere, by when it was last touched."""
    held = read_holder(path)
    if held is None or _here(held):
        return held is not None and bool(processes_here(held))
    with suppress(OSError):
        return time.time() - path.stat().st_mtime < STALE_S
    return False


def _here(held: dict[str, Any]) -> bool:
    """Whether the holder's process numbers mean something here."""
    return (held.get("host"), held.get("boot"), held.get("space")) == (socket.gethostname(), boot(), space())
