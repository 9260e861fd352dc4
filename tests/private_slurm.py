"""A private Slurm on this machine: munge, slurmctld and slurmd of Debian's packages, in a folder of their own.

On this host, or with a node on each of some pretend hosts (`hpc.hosts`) and the controller on the first. Of its two
partitions jobs in "high" preempt those in "low". Clients need nothing but SLURM_CONF in their environment.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "sinfo", "scancel")
PATH = f"{os.environ['PATH']}{os.pathsep}/usr/sbin"
START_S = 30.0
CONF = """
ClusterName=trireme
SlurmctldHost={names[0]}{address}
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
FirstJobId={first}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
TmpFS={folder}/tmp-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SwitchType=switch/none
ReturnToService=2
JobRequeue=1
KillWait=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=30 State=UP
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF State=UP
"""


def missing() -> str:
    """Why no private Slurm can be started here; empty if it can."""
    absent = [tool for tool in TOOLS if shutil.which(tool, path=PATH) is None]
    if absent:
        return f"no {', '.join(absent)}: apt-get install slurmctld slurmd slurm-client munge"
    return "" if os.geteuid() == 0 else "a private Slurm is started as root only"


class PrivateSlurm:
    """A context manager: a cluster that is idle when entered and gone after.

    folder  an empty folder that all nodes see; its path must be short (a Unix socket's is limited)
    cpus    what every node claims to have
    hosts   pretend hosts that are up, a node each; None: this host
    """

    def __init__(self, folder: Path, environment: dict[str, str], cpus: int = 4, hosts=None):
        self.folder, self.cpus, self.hosts = folder, cpus, hosts
        self.names = [socket.gethostname().split(".")[0]] if hosts is None else hosts.names
        self.environment = environment | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": PATH}
        self._daemons: list[subprocess.Popen] = []

    def __enter__(self) -> PrivateSlurm:
        (self.folder / "state").mkdir()
        for name in self.names:
            (self.folder / f"spool-{name}").mkdir()
            (self.folder / f"tmp-{name}").mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        node = f"CPUs={self.cpus} SocketsPerBoard=1 CoresPerSocket={self.cpus} ThreadsPerCore=1 RealMemory=4000"
        addresses = [""] if self.hosts is None else self.hosts.addresses
        nodes = [
            f"NodeName={name} {f'NodeAddr={address} ' if address else ''}{node}"
            for name, address in zip(self.names, addresses, strict=True)
        ]
        (self.folder / "slurm.conf").write_text(CONF.format(
            names=self.names, folder=self.folder, nodes="\n".join(nodes), ports=_free_ports(2),
            first=secrets.randbelow(10**6) + 1000,  # two clusters' jobs have nothing in common
            address=f"({addresses[0]})" if addresses[0] else "",
        ))
        try:
            self._start(0, "munged", "-F", "--key-file", str(key), "--socket", f"{self.folder}/munge.socket", "--force",
                        "--pid-file", f"{self.folder}/munge.pid", "--log-file", f"{self.folder}/munge.log",
                        "--seed-file", f"{self.folder}/munge.seed")
            self._until((self.folder / "munge.socket").exists)
            self._start(0, "slurmctld", "-D", "-c")
            for index, name in enumerate(self.names):
                self._start(index, "slurmd", "-D", "-N", name)
            self._until(lambda: self.run("sinfo", "-h", "-o", "%T %D", check=False).split()[:2] == [
                "idle", str(len(self.names))
            ])
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        with suppress(OSError):
            self.run("scancel", "--state=RUNNING", check=False)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def run(self, *words, check=True, cwd=None) -> str:
        """What a client command prints, on the first node."""
        words = [shutil.which(words[0], path=PATH) or words[0], *map(str, words[1:])]
        command = words if self.hosts is None else self.hosts.command(0, words)
        done = subprocess.run(command, env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=120)
        assert not check or done.returncode == 0, f"{words}: {done.stdout}\n{done.stderr}"
        return done.stdout

    def state(self, job) -> str:
        """A job's state, "RUNNING" say."""
        return next(word for word in self.run("scontrol", "show", "job", job).split() if word.startswith("JobState=")
                    ).partition("=")[2]

    def wait(self, job, states=("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"), seconds=120.0) -> str:
        """The state a job ends in."""
        deadline = time.monotonic() + seconds
        while (state := self.state(job)) not in states:
            assert time.monotonic() < deadline, self.run("scontrol", "show", "job", job)
            time.sleep(0.2)
        return state

    def _start(self, index: int, *words: str) -> None:
        words = (shutil.which(words[0], path=PATH), *words[1:])
        command = words if self.hosts is None else self.hosts.command(index, words)
        with open(self.folder / f"{Path(words[0]).name}-{index}.out", "wb") as out:
            self._daemons.append(subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            ))

    def _until(self, true) -> None:
        deadline = time.monotonic() + START_S
        while not true():
            if time.monotonic() > deadline:
                logs = "\n".join(path.read_text(errors="replace")[-2000:] for path in self.folder.glob("*.log"))
                raise TimeoutError(f"a private Slurm did not come up in {START_S:g} s: {logs}")
            time.sleep(0.05)


def _free_ports(count: int) -> list[int]:
    held = [socket.socket() for _ in range(count)]
    for one in held:
        one.bind(("", 0))
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports
