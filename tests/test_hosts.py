"""Pretend hosts: separate, as fast as their links, breakable, and gone without a trace."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpc.hosts import AGENT_AT, Hosts, crossed, missing_rights

RECEIVE = """
import socket, sys, time
streams, total, block = int(sys.argv[1]), 0, bytearray(1 << 20)
with socket.create_server(("", 5000)) as server:
    print("ready", flush=True)
    taken = [server.accept()[0] for _ in range(streams)]
for stream in taken:
    stream.recv(1, socket.MSG_WAITALL)
began = time.monotonic()
while time.monotonic() < began + 1:
    for stream in taken:
        stream.settimeout(0.01)
        try:
            total += stream.recv_into(block)
        except TimeoutError:
            pass
print(total * 8e-6 / (time.monotonic() - began))
"""
SEND = """
import socket, sys
with socket.create_connection((sys.argv[1], 5000)) as stream:
    try:
        while True:
            stream.sendall(bytes(1 << 16))
    except ConnectionError:
        pass
"""
RANK = """
import json, os, socket
from mpi4py import MPI
world = MPI.COMM_WORLD
near = world.Split_type(MPI.COMM_TYPE_SHARED)
window = MPI.Win.Allocate_shared(8 if near.rank == 0 else 0, 1, comm=near)
memory = window.Shared_query(0)[0]
if near.rank == 0:
    memory[0] = world.rank + 1
near.Barrier()
facts = world.gather([world.rank, world.size, socket.gethostname(), near.size, memory[0], os.getcwd()])
if world.rank == 0:
    print(json.dumps(facts))
window.Free()
"""
EXCHANGE = """
from mpi4py import MPI
world = MPI.COMM_WORLD
world.Barrier()
if world.rank == 0:
    print("ready", flush=True)
while True:
    world.allreduce(1)
"""
OWNER = """
import os, subprocess, time
from hpc.hosts import Hosts
with Hosts(2) as hosts:
    for index in (0, 1):
        sleeper = subprocess.Popen(hosts.command(index, ["sh", "-c", "echo up >&2; exec sleep 60"]), stderr=-1)
        sleeper.stderr.readline()
        print(os.stat(f"/proc/{sleeper.pid}/ns/net").st_ino)
    print("ready", flush=True)
    time.sleep(60)
"""


def shells(hosts):
    """The processes that hold the hosts, and their network namespaces' numbers."""
    pids = [int(hosts.command(index, ["true"])[2]) for index in range(len(hosts.names))]
    return pids, {os.stat(f"/proc/{pid}/ns/net").st_ino for pid in pids}


def inside(namespaces):
    """All processes of this machine in these network namespaces."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.stat(f"/proc/{entry}/ns/net").st_ino in namespaces:
                found.append(int(entry))
        except OSError:
            continue
    return found


def start(hosts, index, *words):
    """Start a command on a host; its output is a pipe."""
    return subprocess.Popen(hosts.command(index, words), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def mbit_per_second(hosts, senders):
    """What streams from some hosts bring to host 0 together."""
    receiver = start(hosts, 0, sys.executable, "-c", RECEIVE, str(len(senders)))
    assert receiver.stdout.readline() == "ready\n"
    sending = [start(hosts, index, sys.executable, "-c", SEND, hosts.addresses[0]) for index in senders]
    answer = receiver.communicate(timeout=30)[0]
    for process in sending:
        process.communicate(timeout=30)
    return float(answer)


def launch(hosts, plain_environment, ranks_by_host, program):
    words, variables = hosts.mpiexec(ranks_by_host, [sys.executable, "-m", "mpi4py", "-c", program])
    return subprocess.Popen(
        words, env=plain_environment | variables, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )


def test_hosts_have_names_addresses_and_memory_of_their_own(hosts):
    pair, other = hosts(2), hosts(2)  # two at once: nothing of theirs has the same name in one place
    assert pair.names == ["vh0", "vh1"] and len(set(pair.addresses)) == 2
    file = f"/dev/shm/test-{os.getpid()}"
    look = f"hostname; ls -A /dev/shm; ip -o -4 address show eth0; getent hosts vh0; pwd; touch {file}"
    for group in (pair, other):
        for index in (0, 1):
            name, mine, peer, folder = start(group, index, "sh", "-c", look).communicate()[0].splitlines()
            assert name == group.names[index] and f" {group.addresses[index]}/" in mine
            assert peer.split() == [group.addresses[0], "vh0"] and folder == os.getcwd()
    assert not os.path.exists(file)
    assert len(shells(pair)[1] | shells(other)[1] | {os.stat("/proc/self/ns/net").st_ino}) == 5


def test_hosts_have_cores_of_their_own_where_there_are_enough(hosts):
    look = "import os; print(*sorted(os.sched_getaffinity(0)))"
    here = os.sched_getaffinity(0)
    for count in (2, 3):
        group = hosts(count)
        told = [start(group, index, sys.executable, "-c", look).communicate()[0].split() for index in range(count)]
        cores = [set(map(int, words)) for words in told]
        if count <= len(here):
            assert all(cores) and sum(map(len, cores)) == len(set.union(*cores)) and set.union(*cores) <= here
        else:
            assert all(own == here for own in cores)


@pytest.mark.parametrize("senders", [[1], [1, 2]], ids=["one stream", "two hosts to one"])
def test_a_link_carries_its_rate(hosts, senders):
    assert 80 < mbit_per_second(hosts(3, "100mbit"), senders) < 102


def test_a_link_without_a_limit_is_much_faster(hosts):
    assert mbit_per_second(hosts(2), [1]) > 1000


def test_a_link_gets_another_rate(hosts):
    pair = hosts(2, "100mbit")
    for link, low, high in (("20mbit", 16, 24), (None, 1000, 1e6), ("100mbit", 80, 102)):
        pair.throttle(link)
        assert low < mbit_per_second(pair, [1]) < high, link


def test_bytes_that_crossed_a_link_are_counted(hosts):
    pair = hosts(2, "100mbit")
    look = ("-c", "from hpc.hosts import crossed; print(*crossed())")

    def counts():
        said = [start(pair, index, sys.executable, *look).communicate()[0] for index in (0, 1)]
        return [int(word) for text in said for word in text.split()]

    before = counts()
    carried = mbit_per_second(pair, [1]) * 1e6 / 8  # in a second, of a little more
    _, received, sent, _ = (b - a for a, b in zip(before, counts(), strict=True))
    assert 0.9 * carried < received < 4 * carried and sent == pytest.approx(received, rel=0.1)
    assert crossed("none such") == (0, 0)


def test_mpiexec_starts_ranks_in_the_order_of_hosts_with_windows_inside_each(hosts, plain_environment):
    trio = hosts(3, "1gbit")
    process = launch(trio, plain_environment, [2, 1], RANK)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    here = os.getcwd()
    expected = [[0, 3, "vh0", 2, 1, here], [1, 3, "vh0", 2, 1, here], [2, 3, "vh1", 1, 3, here]]
    assert json.loads(output.splitlines()[-1]) == expected, output


def test_a_killed_host_ends_the_job_and_nothing_of_it_stays(hosts, plain_environment):
    trio = hosts(3)
    process = launch(trio, plain_environment, [1, 1, 1], EXCHANGE)
    assert process.stdout.readline() == "ready\n", process.communicate()
    aside = start(trio, 2, "sleep", "60")
    trio.kill(1)
    assert len(inside({os.stat(f"/proc/{shells(trio)[0][1]}/ns/net").st_ino})) == 1  # the shell that is the host
    assert process.wait(20) != 0
    assert aside.poll() is None
    assert start(trio, 1, "hostname").communicate()[0] == "vh1\n"  # it can be used again
    process.stdout.close()


@pytest.mark.parametrize("powerless", [False, True], ids=["link", "power"])
def test_of_a_host_that_is_cut_off_nobody_hears(hosts, plain_environment, powerless):
    pair = hosts(2)
    process = launch(pair, plain_environment, [1, 1], EXCHANGE)
    assert process.stdout.readline() == "ready\n", process.communicate()
    pair.cut(1)
    if powerless:
        pair.kill(1)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1.5)
    pair.mend(1)
    if powerless:  # the wait is over, and the launcher hears that the proxy was killed
        assert process.wait(20) != 0
    process.kill()
    process.wait()
    process.stdout.close()


def test_the_launch_agent_ends_with_its_command_unless_the_host_is_cut_off(hosts):
    pair = hosts(2)
    words, _ = pair.mpiexec([1, 1], ["true"])
    on_switch = words[: words.index(f"--chdir={os.getcwd()}") + 1]
    agent = [*on_switch, AGENT_AT, "-x", "vh1", "echo", "$(hostname);", "exec", "sleep", "60"]
    for cut in (False, True):
        process = subprocess.Popen(agent, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert process.stdout.readline() == "vh1\n"
        if cut:
            pair.cut(1)
        pair.kill(1)
        if cut:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.5)
            pair.mend(1)
        assert process.wait(10) == 137
        process.stdout.close()


def test_a_mended_link_carries_again(hosts):
    pair = hosts(2)
    ping = ("timeout", "1.5", "bash", "-c", f"exec 3<>/dev/tcp/{pair.addresses[0]}/5000")
    listener = start(pair, 0, sys.executable, "-c", RECEIVE, "9")
    assert listener.stdout.readline() == "ready\n"
    reached = []
    for change in (lambda _: None, pair.cut, pair.mend):
        change(1)
        reached.append(subprocess.run(pair.command(1, ping), capture_output=True).returncode == 0)
    assert reached == [True, False, True]


def test_nothing_is_left_after_an_error(hosts):
    mounts = Path("/proc/self/mounts")
    before = mounts.read_text()
    with pytest.raises(KeyError), Hosts(2, "1gbit") as pair:
        pids, namespaces = shells(pair)
        start(pair, 0, "sleep", "60")
        start(pair, 1, "sh", "-c", "trap '' TERM HUP; setsid sleep 60 & sleep 60")
        assert mounts.read_text() == before
        while len(inside(namespaces)) < 5:
            time.sleep(0.01)
        raise KeyError("in the middle")
    assert not inside(namespaces) and not any(os.path.exists(f"/proc/{pid}") for pid in pids)
    with pytest.raises(OSError, match="not up"):
        pair.command(0, ["true"])


def test_nothing_is_left_of_a_host_whose_shell_was_killed(hosts):
    with Hosts(2) as pair:
        pids, namespaces = shells(pair)
        sleeper = start(pair, 1, "sleep", "60")
        while len(inside(namespaces)) < 3:
            time.sleep(0.01)
        os.kill(pids[1], signal.SIGKILL)
        while pids[1] in inside(namespaces):
            time.sleep(0.01)
        with pytest.raises(OSError, match="'vh1' is gone"):
            pair.command(1, ["true"])
        assert sleeper.poll() is None  # it still runs, and is found all the same
    assert sleeper.wait(5) == -signal.SIGKILL and not inside(namespaces)


def test_nothing_is_left_when_the_process_is_killed(hosts):
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True)
    namespaces = {int(owner.stdout.readline()), int(owner.stdout.readline())}
    assert owner.stdout.readline() == "ready\n" and len(inside(namespaces)) >= 4
    owner.kill()
    owner.wait()
    owner.stdout.close()
    deadline = time.monotonic() + 10
    while inside(namespaces) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not inside(namespaces)


def test_what_cannot_be_made_is_said(hosts):
    with pytest.raises(ValueError, match="1 to 64"):
        Hosts(0)
    with pytest.raises(OSError, match=r"(?s)tbf.*fast"), Hosts(1, "fast"):
        pass
    with pytest.raises(ValueError, match="cannot place"):
        hosts(2).mpiexec([1, 1, 1], ["true"])


def test_missing_rights_and_tools_are_reasons(hosts, monkeypatch):
    assert missing_rights() == ""
    if shutil.which("setpriv"):
        ask = [sys.executable, "-c", "from hpc.hosts import missing_rights; print(missing_rights())"]
        done = subprocess.run(["setpriv", "--bounding-set=-sys_admin", *ask], capture_output=True, text=True)
        assert "need root's right" in done.stdout and "not permitted" in done.stdout, done.stderr
    monkeypatch.setenv("PATH", "/nowhere")
    assert "iproute2" in missing_rights()
