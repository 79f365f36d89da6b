"""The hosts that the other tests here run on: they are what they claim to be, and nothing stays behind."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.root

# Answers every line with itself; the first word it prints says that it listens.
ECHO = """
import socket, sys
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
server = socket.create_server((sys.argv[1], 7000), family=family)
print("up", flush=True)
while True:
    link = server.accept()[0]
    for line in link.makefile("rb"):
        link.sendall(line)
"""
# Connects to a name; then sends each line of stdin, and prints what comes back or "nothing" when 0.5 s bring nothing.
ASK = """
import socket, sys
link = socket.create_connection((sys.argv[1], 7000), 5)
link.settimeout(0.5)
print("connected", flush=True)
for line in sys.stdin:
    link.sendall(line.encode())
    try:
        print(link.recv(100).decode().strip(), flush=True)
    except TimeoutError:
        print("nothing", flush=True)
"""


class Talk:
    """A process on a host that is spoken to line by line."""

    def __init__(self, machine, program: str, *args: str) -> None:
        self.process = subprocess.Popen(
            [*machine.wrapper("/"), sys.executable, "-S", "-c", program, *args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def answer(self) -> str:
        assert select.select([self.process.stdout], [], [], 20)[0], "no answer in 20 s"
        return self.process.stdout.readline().strip()

    def ask(self, line: str) -> str:
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.answer()

    def ask_until_answered(self) -> str:
        """What comes first after a silence."""
        for _ in range(60):
            answer = self.ask("again")
            if answer != "nothing":
                return answer
        pytest.fail("nothing came in 30 s")

    def close(self) -> None:
        self.process.kill()
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


@pytest.fixture
def talk():
    """``talk(machine, program, *args)``: a process to speak to, ended with the test."""
    made: list[Talk] = []

    def start(machine, program: str, *args: str) -> Talk:
        made.append(Talk(machine, program, *args))
        return made[-1]

    yield start
    for one in made:
        one.close()


def connection(talk, client, server, name: str = "") -> Talk:
    """A client that has a connection to an echo on ``server``."""
    assert talk(server, ECHO, server.address).answer() == "up"
    asking = talk(client, ASK, name or server.name)
    assert asking.answer() == "connected"
    return asking


@pytest.mark.parametrize("family", [4, 6])
def test_hosts_reach_each_other_by_name(make_network, talk, family):
    network = make_network(2, family=family)
    first, second = network.machines
    assert first.run("hostname").stdout == "algo-1\n"
    assert second.run("hostname").stdout == "algo-2\n"
    assert connection(talk, first, second).ask("hello") == "hello"
    assert connection(talk, second, first).ask("hello") == "hello"
    addresses = first.run("ip", "-o", "addr", "show", "dev", "eth0").stdout
    assert ("inet " in addresses) == (family == 4)
    assert ("inet6 " in addresses) == (family == 6)
    assert sorted(os.path.basename(path) for path in first.run("ls", "/sys/class/net").stdout.split()) == ["eth0", "lo"]


def test_each_host_has_an_opt_ml_of_its_own(make_network):
    network = make_network(2)
    before = os.path.isdir("/opt/ml"), sorted(os.listdir("/opt"))
    for machine in network.machines:
        (machine.base / "mark").write_text(machine.name)
    for machine in network.machines:
        assert machine.run("cat", "/opt/ml/mark").stdout == machine.name
        seen = set(machine.run("ls", "-A", "/opt").stdout.split())
        assert seen == {*os.listdir("/opt"), "ml"}
        assert machine.run("pwd", cwd="/opt/ml/code").stdout == "/opt/ml/code\n"
    assert before == (os.path.isdir("/opt/ml"), sorted(os.listdir("/opt")))


def test_names_come_and_go_while_the_host_runs(make_network):
    network = make_network(2)
    machine = network[0]
    look = ("python3", "-c", "import socket; print(socket.getaddrinfo('algo-2', None)[0][4][0])")
    assert machine.run(*look).stdout.strip() == network[1].address
    machine.rename_dns(algo_2="")
    gone = machine.run(*look, check=False)
    assert gone.returncode == 1
    assert "Name or service not known" in gone.stderr, "it fails at once and asks nobody"
    machine.rename_dns(algo_2="10.77.0.99")
    assert machine.run(*look).stdout == "10.77.0.99\n"


def test_cut_loses_everything_silently_and_heal_brings_it_back(make_network, talk):
    network = make_network(3)
    first, second, third = network.machines
    lost, kept = connection(talk, first, second), connection(talk, first, third)
    second.cut()
    assert lost.ask("a") == "nothing"
    assert kept.ask("b") == "b"
    assert second.run("cat", "/sys/class/net/eth0/carrier").stdout == "1\n"
    second.heal()
    assert lost.ask_until_answered().startswith("a"), "the connection lives, and what was lost is sent again"


@pytest.mark.parametrize("family", [4, 6])
def test_partition_is_between_two_hosts_only(make_network, talk, family):
    network = make_network(3, family=family)
    first, second, third = network.machines
    lost = connection(talk, second, third)
    both = [connection(talk, first, second), connection(talk, third, first)]
    network.partition(second, third)
    assert lost.ask("a") == "nothing"
    assert [one.ask("b") for one in both] == ["b", "b"]
    network.rejoin(second, third)
    assert lost.ask_until_answered().startswith("a")


def test_rate_is_limited(make_network, talk):
    network = make_network(2)
    first, second = network.machines
    second.limit_rate(8)
    assert "rate 8Mbit" in second.run("tc", "qdisc", "show", "dev", "eth0").stdout
    assert "rate 8Mbit" in network.run("tc", "qdisc", "show", "dev", "port2").stdout
    began = time.monotonic()
    asking = connection(talk, first, second)
    for _ in range(2):
        asking.process.stdin.write("x" * 200_000 + "\n")
    asking.process.stdin.flush()
    # 400 kB at 8 Mbit/s are 400 ms, less what the bucket lets through at once
    assert asking.answer() and time.monotonic() - began > 0.1
    second.limit_rate(0)
    assert "tbf" not in second.run("tc", "qdisc", "show", "dev", "eth0").stdout


def test_a_host_may_have_another_clock(make_network):
    network = make_network(3, clocks_s=(0, 5, 1000))
    look = (sys.executable, "-S", "-c", "import time; print(time.monotonic_ns())")
    before = time.monotonic_ns()
    seen = [int(machine.run(*look).stdout) for machine in network.machines]
    took_s = (time.monotonic_ns() - before) / 1e9
    for shift_s, at_ns in zip((0, 5, 1000), seen, strict=True):
        assert shift_s <= (at_ns - before) / 1e9 <= shift_s + took_s


def test_relay_delays_stalls_and_drops(make_network, talk):
    network = make_network(2)
    first, second = network.machines
    relay = network.relay(second.address, 7000, delay_s=0.1)
    asking = connection(talk, first, second, name=network.address)
    began = time.monotonic()
    assert asking.ask("a") == "a"
    assert time.monotonic() - began >= 0.2, "there and back"
    relay.tell("stall")
    assert asking.ask("b") == "nothing"
    relay.tell("go")
    assert asking.ask_until_answered().startswith("b")
    relay.tell("drop")
    asking.process.stdin.write("d\n")
    asking.process.stdin.flush()
    assert asking.process.wait(20) == 1, "a reset ends it with an exception"


def test_entering_keeps_the_process(make_network, wait_until):
    """A signal to the process that was started is a signal to the command itself."""
    machine = make_network(1)[0]
    process = subprocess.Popen([*machine.wrapper("/"), "sleep", "600"])
    try:
        wait_until(lambda: "sleep 600" in machine.processes().get(process.pid, ""), "the command")
        machine.signal(process.pid, 9)
        assert process.wait(20) == -9
        with pytest.raises(ProcessLookupError):
            machine.signal(os.getpid(), 9)
    finally:
        process.kill()
        process.wait()


def _children() -> set[str]:
    return set(Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split())


def _processes_in(namespaces: set[str]) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        for kind in ("net", "mnt", "uts"):
            try:
                if os.readlink(entry / "ns" / kind) in namespaces:
                    found.append(entry.name)
            except OSError:
                continue
    return found


def test_nothing_is_left(make_network, wait_until):
    """Neither processes nor namespaces, and with them no interface and no mount; whatever ran on the hosts."""

    def own() -> tuple[object, ...]:
        mounts = Path("/proc/self/mountinfo").read_text()
        return _children(), sorted(name for _, name in socket.if_nameindex()), mounts, sorted(os.listdir("/opt"))

    before = own()
    network = make_network(2, clocks_s=(0, 5))
    network.relay(network[0].address, 7000)
    pids = [machine.pid for machine in network.machines]
    namespaces = {os.readlink(f"/proc/{pid}/ns/{kind}") for pid in pids for kind in ("net", "mnt", "uts")}
    assert len(namespaces) == 6
    # a daemon that has left its session, its parent and its environment
    for machine in network.machines:
        machine.run("sh", "-c", "trap '' TERM HUP; env -i setsid sleep 600 </dev/null >/dev/null 2>&1 &")
    wait_until(lambda: all(machine.processes() for machine in network.machines), "a daemon on each host")
    during = own()
    assert during[1:] == before[1:], "something of the hosts shows in the namespaces of the test"
    network.close()
    wait_until(lambda: not _processes_in(namespaces), "the end of all processes in the hosts' namespaces")
    assert own() == before


def test_two_networks_do_not_meet(make_network, talk):
    """Same names, same addresses, same ports, and neither knows of the other."""
    networks = [make_network(2), make_network(2)]
    talks = [connection(talk, *network.machines) for network in networks]
    networks[0][1].cut()
    assert talks[1].ask("a") == "a"
    assert talks[0].ask("a") == "nothing"


def test_hosts_go_when_their_maker_is_killed(tmp_path, as_root, make_network, wait_until):
    """SIGKILL to the process that made them: no fixture runs, and still nothing stays."""
    make_network(1)  # skips where there are no namespaces
    program = """
        import sys, time
        from pathlib import Path
        sys.path.insert(0, sys.argv[1])
        from netns import Network
        network = Network(Path(sys.argv[2]), 2)
        print(*(machine.pid for machine in network.machines), flush=True)
        time.sleep(600)
    """
    lines = "\n".join(line.strip() for line in program.splitlines())
    command = [sys.executable, "-c", lines, str(Path(__file__).parent), str(tmp_path / "killed")]
    maker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        pids = maker.stdout.readline().split()
        assert len(pids) == 2
    finally:
        maker.kill()
        maker.stdout.close()
        maker.wait()
    wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids), "the end of the hosts")
