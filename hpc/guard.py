"""The guard: one process beside the ranks of a host, which notices what they cannot say themselves, and ends the job.

    gone      a rank ended without a word: killed, out of memory, a crash
    hang      a rank's pulse (`pulse.py`) has not beaten for too long, whoever holds Python's lock
    silent    nothing is heard of a host: it is lost, or the link to it is
    taken     another job has the run folder's lock; this one ends, and leaves no word in what is not its own any more

It is started by the first rank of each host (`start`), shares nothing with MPI, imports nothing but Python's own
library, and goes when the ranks it watches are gone. Guards tell each other once a second that they live, by datagrams
to and from the guard of rank 0's host; what one of them finds, all hear, and each ends the ranks of its own host. The
first to find a failure writes `failure.json`.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hpc.failure import FAILURE, write_failure
from hpc.guard_line import Line
from hpc.lock import BEAT_S, Lock
from hpc.processes import out_of_memory_kills, segments_of, state_of
from hpc.pulse import LEFT, RESTING, STACKS, Seen, Watched, pulse_name, pulses_of, stacks_name
from hpc.records import SUCCESS

if TYPE_CHECKING:
    from collectives.comm import Comm

LOOK_S = 0.1  # between looks
TELL_S = 1.0  # between what guards tell each other
GREET_S = 3.0  # that guards have, to hear each other at first
LAST_WORDS_S = 1.0  # that ranks have, to say themselves what they see and to write their stacks, before they are killed
FOLDER = "ranks"  # in the run folder: stacks
WRITE_S = 6.0  # that it may take to write down what was found, before ranks are killed
GONE_S = 10.0  # that processes which were killed may take to go
SETTLE_S = 0.3
STUCK_S = 3.0  # without a look of a rank's own thread
TIMES = 3  # that what must be heard is told, for datagrams get lost
PAUSE_S = 2.0  # between looks that take 0.1 s
TEXT = 300  # characters of a text at most, so that what is told fits into a datagram


def start(comm: Comm, run: Path, token: str, patience: float, silence: float) -> Callable[[], bool]:
    """Start the guards of a job, one a host, over ranks whose pulses are kept (collective); whether this host's lives.

    token     what the run folder's lock is known by; rank 0's guard keeps it fresh, and releases it
    patience  seconds without a beat after which a rank hangs; 0: never
    silence   seconds without a word from a host's guard after which the host is lost; 0: never
    """
    crews = comm.crews()
    mine = next(crew for crew in crews if comm.rank in crew)
    guard = None
    if comm.rank == min(mine):
        alone = len(crews) == 1
        times = {"patience": patience, "silence": silence}
        guard = _Started(run, {"ranks": mine, "host": comm.host, "hub": min(mine) == 0, "alone": alone, **times})
    addresses, secret = comm.gather([guard.addresses if guard else [], secrets.token_hex(16)])[0]
    others = {str(min(crew)): comm.hosts[min(crew)] for crew in crews}
    if guard is not None:
        guard.tell({"hub_at": addresses, "token": token, "secret": secret, "guards": others})
        for host in guard.hear()["unheard"]:
            _say(guard.host, f"nothing comes through by UDP from {host}: should that host be lost, only MPI may notice")
    comm.barrier()
    return guard.lives if guard else lambda: True


class _Started:
    """A guard's process, as the rank that started it sees it."""

    def __init__(self, run: Path, crew: dict[str, Any]):
        root = Path(__file__).parents[1]
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-P", "-m", "hpc.guard"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(root)}, start_new_session=True,
        )
        self.host = crew["host"]
        self.tell({"run": str(run.absolute()), **crew})
        self.addresses: list[Any] = self.hear()["addresses"]

    def lives(self) -> bool:
        return self._process.poll() is None

    def hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        text = self._process.stdout.readline()
        if not text:
            raise OSError(f"the guard of {self.host} did not start; the lines above say why")
        return json.loads(text)

    def tell(self, value: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(value) + "\n")
        self._process.stdin.flush()


class Found(NamedTuple):
    """What is wrong with a rank (see above), where it is, what it was doing after which step; by whom it was found."""

    kind: str
    rank: int
    error: str
    host: str
    where: str = ""
    step: int | None = None
    by: str = ""


class Guard:
    """Watches the ranks of a host.

    config  run, patience, silence, ranks (rank -> process), host; token (of the lock), secret, hub_at (addresses),
            guards (name -> host)
    """

    def __init__(self, config: dict[str, Any], line: Line):
        self.run, self.host = Path(config["run"]), config["host"]
        self.patience, self.silence = float(config["patience"]), float(config["silence"])
        self.pids = {int(rank): int(pid) for rank, pid in config["ranks"].items()}
        self.guards: dict[str, str] = config["guards"]
        self.line, line.secret, line.me = line, config["secret"], str(min(self.pids))
        if not line.hub:
            line.addresses["0"] = [(str(host), int(port)) for host, port in config["hub_at"]]
        self.lock = Lock(self.run)
        self.lock.token = config["token"]
        places = pulses_of(config["token"])
        self.pulses = {rank: Watched(places / pulse_name(rank)) for rank in self.pids}
        for rank in self.pids:
            (places / pulse_name(rank)).unlink()  # what is mapped stays
        with suppress(OSError):  # containers on one host may share its memory, and not their process numbers
            places.rmdir()
        self.poll = select.poll()
        self.poll.register(line.socket, select.POLLIN)
        self.ends: dict[int, int] = {}  # a descriptor of a process, readable once that is gone -> rank
        for rank, pid in self.pids.items():
            with suppress(OSError, AttributeError):  # an old kernel: asked one by one
                descriptor = os.pidfd_open(pid)
                self.ends[descriptor] = rank
                self.poll.register(descriptor, select.POLLIN)
        self.here = dict(self.pids)  # the ranks not gone yet
        self.segments = set().union(*(segments_of(pid) for pid in self.pids.values()))
        self._kills = [out_of_memory_kills()] * 2  # one and two words ago
        self.lost_lock = False
        self._said = 0.0
        self._began = self._looked = self._since = time.monotonic()
        self._done = threading.Event()
        if line.hub:
            self.lock.hold([*self.pids.values(), os.getpid()])
            threading.Thread(target=self._keep_lock, daemon=True).start()  # a file system may be slow

    def watch(self, ready: Callable[[list[str]], None]) -> None:
        """Until the ranks of this host have ended, of themselves or because something was found.

        ready  called once this guard hears those that it should, with the hosts of which it does not
        """
        greeting = True
        while self.here:
            self._beat(LOOK_S if greeting else TELL_S)
            ended = self._look()
            self._slept()
            found = self._told() or self._gone(ended) or self._hang() or self._silent() or self._taken()
            if found:
                return self._end(found)
            unheard = self._unheard()
            if greeting and (not unheard or time.monotonic() - self._began > GREET_S):
                greeting = False
                ready(unheard)
        for _ in range(TIMES):
            self.line.say("bye")

    def close(self) -> None:
        """Let go of the lock, once the ranks that were killed are gone; one that does not go keeps it."""
        self._done.set()
        deadline = time.monotonic() + GONE_S
        while any(state_of(pid) not in "ZX" for pid in self.here.values()) and time.monotonic() < deadline:
            time.sleep(LOOK_S)
        if self.line.hub and time.monotonic() < deadline:
            self.lock.release()

    def _beat(self, every: float) -> None:
        if time.monotonic() - self._said >= every:
            self._said = time.monotonic()
            self.line.say("beat")
            self._kills = [self._kills[1], out_of_memory_kills()]

    def _unheard(self) -> list[str]:
        """Hosts of which this guard should hear, and never has."""
        hear = self.guards if self.line.hub else {"0"}
        return [self.guards[guard] for guard in hear if guard != self.line.me and guard not in self.line.heard]

    # -- what may be wrong ------------------------------------------------------------------------------------------

    def _look(self) -> list[int]:
        """Wait a moment; the ranks whose processes have ended meanwhile, in the order in which that was seen."""
        ready = [descriptor for descriptor, _ in self.poll.poll(LOOK_S * 1000)]
        ended = [self.ends[d] for d in ready if d in self.ends]
        for descriptor in ready:
            if descriptor in self.ends:
                self.poll.unregister(descriptor)
        asked = self.here.keys() - self.ends.values()
        return ended + [rank for rank in asked if state_of(self.here[rank]) in "ZX"]

    def _told(self) -> Found | None:
        """What other guards have found; the first of it."""
        found = None
        for told in self.line.hear():
            if told["say"] == "bye":
                self.line.heard.pop(str(told["from"]), None)
            elif told["say"] == "end" and found is None:
                found = Found(**{name: told["found"][name] for name in Found._fields})
        return found

    def _slept(self) -> None:
        """After a pause of this guard's own (the job or the host was suspended) what came before counts no more."""
        now = time.monotonic()
        if now - self._looked > PAUSE_S:
            self._since = now
        self._looked = now

    def _gone(self, ended: Sequence[int]) -> Found | None:
        self.here = {r: pid for r, pid in self.here.items() if self.pulses[r].seen().state != LEFT}
        wordless = [rank for rank in ended if self.here.pop(rank, None) is not None]
        if not wordless:
            return None
        rank, more = wordless[0], wordless[1:]
        killed = out_of_memory_kills() - self._kills[0]
        why = "killed from outside (SIGKILL), or it crashed"
        if killed > 0:
            why = f"out of memory: the kernel killed {killed} of this host's processes meanwhile"
        also = f"; so are ranks {more}" if more else ""
        return self._found("gone", rank, f"its process {self.pids[rank]} is gone without a word: {why}{also}")

    def _hang(self) -> Found | None:
        now = time.monotonic()
        seen = {rank: self.pulses[rank].seen() for rank in self.here}
        late = {rank: now - max(s.beaten, self._since) for rank, s in seen.items() if s.state != RESTING}
        late = {rank: seconds for rank, seconds in late.items() if self.patience and seconds > self.patience}
        if not late:
            return None
        stopped = [rank for rank in late if state_of(self.here[rank]) in "Tt"]
        stuck = [rank for rank in late if now - max(seen[rank].asked, self._since) > STUCK_S]
        free = [rank for rank in late if not seen[rank].waits]  # others wait, for such a one
        rank = max(stopped or stuck or free or late, key=late.__getitem__)
        why = ""
        if stopped:
            why = f"; its process {self.here[rank]} is stopped (SIGSTOP, a debugger)"
        elif stuck:
            why = "; none of its threads comes to run Python"
        return self._found("hang", rank, f"no progress for {self.patience:g} s{why}")

    def _silent(self) -> Found | None:
        now = time.monotonic()
        for guard, when in self.line.heard.items():
            if self.silence and now - max(when, self._since) > self.silence and guard in self.guards:
                host = self.guards[guard]
                error = f"host {host} has been silent for {self.silence:g} s: it is lost, or the link to it is"
                return Found("silent", int(guard), error, host, by=self.host)
        return None

    def _taken(self) -> Found | None:
        return self._found("taken", 0, f"another job has taken the lock of '{self.run}'") if self.lost_lock else None

    def _found(self, kind: str, rank: int, error: str) -> Found:
        """Of a rank of this host."""
        seen = self.pulses[rank].seen()
        return Found(kind, rank, _short(error), self.host, _short(seen.said()), seen.step, self.host)

    def _keep_lock(self) -> None:
        while not self._done.wait(BEAT_S):
            self.lost_lock = not self.lock.beat()

    # -- the end ----------------------------------------------------------------------------------------------------

    def _end(self, found: Found) -> None:
        """Have it heard on all hosts, keep what was found first, and end the ranks of this host."""
        began, own = time.monotonic(), found.by == self.host
        late = threading.Timer(WRITE_S, self._kill)  # a run folder on storage that hangs cannot be written to
        late.daemon = True
        late.start()
        for _ in range(TIMES):
            self.line.say("end", found=found._asdict())
        if self.line.alone:
            self._keep(found)
        if found.kind == "hang":
            for number in (signal.SIGCONT, STACKS):  # one that is stopped writes its stacks, too
                self._send(number)
                time.sleep(SETTLE_S)  # stacks of threads that have just begun to run again cannot be read
        while time.monotonic() - began < LAST_WORDS_S:
            self._look()
            self.line.hear()
            self._beat(LOOK_S)  # this guard lives, whatever became of its ranks
        if self.line.hub:
            self._keep(self._lost(found, began) or found)
        if found.kind == "hang":
            self._show_stacks()
        self._kill()
        if own and not self.line.hub:
            time.sleep(LAST_WORDS_S)
            self._keep(found)  # unless the hub, if there still is one, has

    def _kill(self) -> None:
        self._send(signal.SIGKILL)
        for segment in self.segments:
            segment.unlink(missing_ok=True)

    def _send(self, number: int) -> None:
        """To every rank that is not gone; by its descriptor, for numbers of processes are used again."""
        descriptors = {rank: descriptor for descriptor, rank in self.ends.items()}
        for rank, pid in self.here.items():
            with suppress(ProcessLookupError):
                if rank in descriptors:
                    signal.pidfd_send_signal(descriptors[rank], number)
                else:
                    os.kill(pid, number)

    def _lost(self, found: Found, since: float) -> Found | None:
        """A host whose guard has not answered since: why a launcher has killed the ranks of others."""
        for guard, host in self.guards.items():
            if found.kind == "gone" and self.line.heard.get(guard, since) < since:
                return Found("silent", int(guard), f"host {host} does not answer: it is lost", host, by=self.host)
        return None

    def _keep(self, found: Found) -> None:
        if (self.run / SUCCESS).exists():  # a rank that was stopped went on when its stacks were asked for
            return
        first = found.kind != "taken" and write_failure(
            self.lock, found.kind, found.rank, found.host, found.where, found.error, step=found.step,
            ranks=[self._record(rank, watched.seen()) for rank, watched in self.pulses.items()],
        )
        if first or found.kind == "taken":
            where = f" ({found.where}, after step {found.step})" if found.where else ""
            said = f"rank {found.rank} on {found.host}: {found.error}{where}: ending the job; see {self.run / FAILURE}"
            _say(self.host, said)

    def _record(self, rank: int, seen: Seen) -> dict[str, Any]:
        return {
            "rank": rank, "host": self.host, "step": seen.step, "where": seen.where, "waits": seen.waits,
            "seconds_ago": round(time.monotonic() - seen.beaten, 3), "lives": rank in self.here,
        }

    def _show_stacks(self) -> None:
        for rank in self.here:
            with suppress(OSError):
                stacks = (self.run / FOLDER / stacks_name(rank)).read_text(encoding="utf-8")
                said = self.pulses[rank].seen().said()
                print(f"[rank {rank} on {self.host}] {said}; its threads:\n{stacks}", file=sys.stderr, flush=True)


def _say(host: str, text: str) -> None:
    print(f"[guard of {host}] {text}", file=sys.stderr, flush=True)


def _short(text: str) -> str:
    return text.encode("ascii", "replace")[:TEXT].decode()


def _ready(unheard: list[str]) -> None:
    print(json.dumps({"unheard": unheard}), flush=True)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    config = json.loads(sys.stdin.readline())
    line = Line(config["hub"])
    print(json.dumps({"addresses": [] if config["alone"] else line.reachable_at()}), flush=True)
    more = sys.stdin.readline()
    if not more:
        return  # the rank that started it failed, and said so
    guard = Guard(config | json.loads(more), line)
    try:
        guard.watch(_ready)
    finally:
        guard.close()


if __name__ == "__main__":
    main()
