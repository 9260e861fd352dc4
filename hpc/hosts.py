"""Hosts on one machine: network namespaces with throttled links.

For tests and benchmarks on one machine; no cluster is made of this. A pretend host is a shell in namespaces of its own
for the network, the host name, the mounts and System V memory, with its own /dev/shm, so that MPI takes it for another
machine. A switch (one more such shell, where the launcher runs too, as on a login node) holds the other ends of their
cables. All kernel objects have their names inside these namespaces, and no file is made outside of them: nothing can
collide, and nothing stays. Each host has an equal part of the cores, if there are enough. A shell obeys its standard
input; at its end (this process is gone, in whatever way) the shell kills what runs in its namespace, and the last
process takes the namespace with it.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from hpc.bench_crew import mpiexec

TOOLS = ("unshare", "nsenter", "taskset", "mount", "ip", "tc")
UNSHARE = ("unshare", "--net", "--uts", "--mount", "--ipc", "sh")
MOST = 64  # hosts
CLOSE_S = 10.0
SWITCH, SWITCH_ADDRESS = "switch", "10.77.0.254"
AGENT_AT = "/dev/shm/agent"  # on the switch

# The scripts below are for shells inside a namespace. First: at the end of input, nothing that runs here stays.
OBEY = """trap 'for again in 1 2 3; do for p in /proc/[0-9]*; do
  [ $p/ns/net -ef /proc/$$/ns/net ] && [ $p != /proc/$$ ] && kill -9 ${p#/proc/}; done; done 2>/dev/null' EXIT"""
BASE = """mount -t tmpfs tmpfs /dev/shm && echo %s >/proc/sys/kernel/hostname && printf '%%b' '%s' >/dev/shm/known &&
mount --bind /dev/shm/known /etc/hosts && rm /dev/shm/known && ip link set lo up"""
# Packets below any burst: tbf cuts what is larger into frames, one by one, with the cores that compute.
PACKETS = "gso_max_size 30000"
PLUG = f"""ip link add %s {PACKETS} type veth peer name eth0 netns %d && ip link set %s master eth0 up &&
echo %d >/dev/shm/%s.pid && echo %s >/dev/shm/%s.cores"""
UP = f"ip address add %s/24 dev eth0 && ip link set eth0 {PACKETS} up"
THROTTLE = "tc qdisc replace dev %s root tbf rate %s burst %dkb latency 50ms"
BURST_KIB = 256
# What `ssh` is to a cluster: options, host, words for a shell. From a host that is cut off, no end is heard of.
AGENT = """#!/bin/sh
while [ "${1#-}" != "$1" ]; do shift; done
name=$1; shift
pid=$(cat /dev/shm/$name.pid)
taskset -c "$(cat /dev/shm/$name.cores)" nsenter -t "$pid" -n -u -m -i -- env --chdir="$PWD" sh -c "$*"
code=$?
while [ -e /dev/shm/$name.cut ]; do sleep 0.1; done
exit $code
"""
CABLE = f"ip link add eth0 {PACKETS} type veth peer name other"
TRIAL = f"{BASE % ('trial', '')} && {CABLE} && {THROTTLE % ('eth0', '1mbit', BURST_KIB)}"

# Allowed as root, and over the only network there is: without these, Open MPI looks for others for a second.
OPEN_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_pml": "ob1", "OMPI_MCA_btl": "self,sm,tcp", "OMPI_MCA_btl_tcp_if_include": "eth0",
    "OMPI_MCA_mtl": "^ofi", "OMPI_MCA_osc": "^ucx",
}


def missing_rights() -> str:
    """Why no pretend hosts can be made here, one sentence, found by trying; empty if they can."""
    absent = [tool for tool in TOOLS if shutil.which(tool) is None]
    if absent:
        return f"pretend hosts need {', '.join(absent)}: install util-linux and iproute2"
    done = subprocess.run([*UNSHARE, "-c", TRIAL], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return f"pretend hosts need root's right to make namespaces, links and mounts: {said}"
    return ""


def crossed(interface: str = "eth0") -> tuple[int, int]:
    """Bytes that this process's host has sent and received by an interface so far, headers counted; 0, 0: it has none.

    Of what the kernel hands to a pretend link in one piece, up to 30 kB, the header counts once.
    """
    for line in Path("/proc/self/net/dev").read_text(encoding="ascii").splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == interface:
            received, sent = (int(numbers.split()[column]) for column in (0, 8))
            return sent, received
    return 0, 0


class Namespace:
    """A shell in namespaces of its own that does what it is told, and ends with this process.

    name   its host name
    cores  the numbers of the cores that its processes run on
    """

    def __init__(self, name: str, cores: Sequence[int]):
        self.name, self.cores = name, ",".join(map(str, cores))
        self.shell = subprocess.Popen(
            UNSHARE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )
        self._pin = -1

    def begin(self, known: str) -> None:
        """Give the host its name, folders, and the names of others (/etc/hosts); and hold on to its namespace."""
        self.tell(f"{OBEY} && {BASE % (self.name, known)}")
        self._pin = os.open(f"/proc/{self.shell.pid}/ns/net", os.O_RDONLY)  # no other gets its number meanwhile

    def tell(self, script: str) -> None:
        """Have the shell run commands joined by &&. Raises OSError, with what was said, if one fails."""
        assert self.shell.stdin is not None and self.shell.stdout is not None
        said: list[str] = []
        with suppress(BrokenPipeError):  # the end of its output says so below
            self.shell.stdin.write(f"{{ {script}\n}} </dev/null; echo = $?\n")
            self.shell.stdin.flush()
        for line in self.shell.stdout:
            if line == "= 0\n":
                return
            if line.startswith("= "):
                break
            said.append(line.strip())
        raise OSError(f"pretend host '{self.name}': {' '.join(said) or 'its shell is gone'}; it was told: {script}")

    def words(self, words: Sequence[str]) -> list[str]:
        """A command line that runs `words` here, in the current folder. Raises OSError if the shell is gone."""
        if self.shell.poll() is not None:
            raise OSError(f"pretend host '{self.name}' is gone: its shell ended with code {self.shell.returncode}")
        enter = ["nsenter", "-t", str(self.shell.pid), "-n", "-u", "-m", "-i", "--"]
        return [*enter, "taskset", "-c", self.cores, "env", f"--chdir={os.getcwd()}", *words]

    def processes(self) -> list[int]:
        """The processes in this namespace, without its shell."""
        found = []
        for entry in filter(str.isdigit, os.listdir("/proc")):
            with suppress(OSError):  # it has ended meanwhile
                if os.path.samestat(os.fstat(self._pin), os.stat(f"/proc/{entry}/ns/net")):
                    found.append(int(entry))
        return [process for process in found if process != self.shell.pid]

    def kill(self) -> None:
        """SIGKILL all of them, and return when they are gone. Raises TimeoutError if some stay."""
        deadline = time.monotonic() + CLOSE_S
        while found := self.processes():
            for process in found:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            if time.monotonic() > deadline:
                raise TimeoutError(f"processes {found} on '{self.name}' have not ended {CLOSE_S:g} s after SIGKILL")
            time.sleep(0.002)

    def close(self) -> None:
        """End the shell and all that runs here."""
        self.shell.kill()
        self.shell.communicate()
        if self._pin >= 0:
            self.kill()
            os.close(self._pin)


class Hosts:
    """Pretend hosts vh0, vh1, ... on one switch, up when entered and gone after; a context manager.

    count  how many, 1 to 64
    link   the rate of every host's link, in each direction, in tc's words: "1gbit" or "100mbit"; None: as fast as
           this machine copies
    burst  KiB that pass a throttle unhindered after a pause

    Raises ValueError for another count; on entering, OSError with what the tools said if a host cannot be made.
    """

    def __init__(self, count: int, link: str | None = None, burst: int = BURST_KIB):
        if not 1 <= count <= MOST:
            raise ValueError(f"{count} pretend hosts are asked for; make 1 to {MOST}")
        self.link, self.burst = link, burst
        self.names = [f"vh{index}" for index in range(count)]
        self.addresses = [f"10.77.0.{index + 1}" for index in range(count)]
        self._spaces: dict[str, Namespace] = {}

    def __enter__(self) -> Hosts:
        try:
            for index, name in enumerate(self.names):
                self._spaces[name] = Namespace(name, self._cores_of(index))
            self._spaces[SWITCH] = Namespace(SWITCH, sorted(os.sched_getaffinity(0)))
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        with ExitStack() as closing:  # the last one first, for the launcher runs on the switch; and all of them
            for space in self._spaces.values():
                closing.callback(space.close)
            self._spaces = {}

    def command(self, host_index: int, words: Sequence[str]) -> list[str]:
        """The command line that runs `words` on that host, in the current folder and in any environment."""
        return self._space(self.names[host_index]).words(words)

    def mpiexec(self, ranks_by_host: Sequence[int], words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
        """The command line that starts `words` as ranks on the hosts, in their order, and additions to the environment.

        ranks_by_host  how many ranks on vh0, vh1, ...: [2, 1, 1]; hosts left out get none
        words          what each rank runs; an absolute path first

        The launcher is this Python's own, or the first on PATH, and runs on the switch: no host's end is its own.
        Raises ValueError if these ranks cannot be placed, OSError if there is no launcher.
        """
        if len(ranks_by_host) > len(self.names) or min(ranks_by_host, default=0) < 0 or not any(ranks_by_host):
            raise ValueError(f"cannot place {list(ranks_by_host)} ranks on the hosts {self.names}; give one count each")
        launcher = mpiexec()
        version = subprocess.run([launcher, "--version"], capture_output=True, text=True, stdin=subprocess.DEVNULL)
        places = ",".join(f"{name}:{n}" for name, n in zip(self.names, ranks_by_host, strict=False) if n)
        if "HYDRA" in version.stdout:
            options, variables = ["-launcher", "ssh", "-launcher-exec", AGENT_AT, "-hosts", places], {}
        else:
            agent = ["--prtemca", "plm_ssh_agent", AGENT_AT, "--prtemca", "plm_ssh_no_tree_spawn", "1"]
            options = [*agent, "--host", places, "--bind-to", "none"]
            variables = dict(OPEN_MPI)
        return self._space(SWITCH).words([launcher, *options, "-n", str(sum(ranks_by_host)), *words]), variables

    def throttle(self, link: str | None, burst: int = BURST_KIB) -> None:
        """Give every host's link this rate from now on (None: none); what runs goes on, and keeps its connections."""
        self.link, self.burst = link, burst
        for name in self.names:
            for space, port in ((SWITCH, name), (name, "eth0")):
                free = f"{{ tc qdisc del dev {port} root || true; }}"  # it may have had none
                self._space(space).tell(self._throttle(port) if link else free)

    def cut(self, host_index: int) -> None:
        """Pull that host's cable: nothing goes in or out and nobody is told, while all that runs there goes on."""
        name = self.names[host_index]
        self._space(SWITCH).tell(f"touch /dev/shm/{name}.cut && ip link set {name} down")

    def mend(self, host_index: int) -> None:
        """Plug that host's cable in again."""
        name = self.names[host_index]
        self._space(SWITCH).tell(f"ip link set {name} up && rm -f /dev/shm/{name}.cut")

    def kill(self, host_index: int) -> None:
        """SIGKILL all that runs on that host, the launcher's proxy too; its connections are closed, as by a shutdown.

        A host that loses its power is `cut`, then `kill`: its connections fall silent, and the launcher hears nothing.
        """
        self._space(self.names[host_index]).kill()

    def _start(self) -> None:
        """Each shell its name and folders; then, from the switch, all cables; then each host its address and rate."""
        switch, hosts = self._space(SWITCH), [self._space(name) for name in self.names]
        known = [*zip(self.addresses, self.names, strict=True), (SWITCH_ADDRESS, SWITCH), ("127.0.0.1", "localhost")]
        for space in (switch, *hosts):
            space.begin("".join(f"{address} {name}\\n" for address, name in known))
        steps = [f"printf %s {shlex.quote(AGENT)} >{AGENT_AT} && chmod +x {AGENT_AT} && ip link add eth0 type bridge"]
        for host in hosts:
            pid, name = host.shell.pid, host.name
            steps += [PLUG % (name, pid, name, pid, name, host.cores, name), self._throttle(name)]
        switch.tell(" && ".join([*steps, UP % SWITCH_ADDRESS]))
        for host, address in zip(hosts, self.addresses, strict=True):
            host.tell(f"{UP % address} && {self._throttle('eth0')}")

    def _cores_of(self, index: int) -> list[int]:
        """The cores of a host, which no other has; all cores, where there are fewer than hosts."""
        cores = sorted(os.sched_getaffinity(0))
        share = len(cores) // len(self.names)
        return cores[index * share : (index + 1) * share] or cores

    def _throttle(self, port: str) -> str:
        """What limits the rate of all that leaves by a port: both ends of a cable have it."""
        return THROTTLE % (port, shlex.quote(self.link), self.burst) if self.link else "true"

    def _space(self, name: str) -> Namespace:
        if name not in self._spaces:
            raise OSError("the pretend hosts are not up; use them inside 'with Hosts(...) as hosts:'")
        return self._spaces[name]
