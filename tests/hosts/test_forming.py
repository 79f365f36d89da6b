"""Fault table, rows 33-37: what can be wrong with names, ports, files and programs while hosts become one job."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.root

MEET = """
    from together import *
    said = meet()
    print("met", os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], flush=True)
    if rank == 0:
        print(*said, sep=", ")
"""
ALL_FOUR = "0/4 0/2 algo-1, 1/4 1/2 algo-1, 2/4 0/2 algo-2, 3/4 1/2 algo-2"
HOLD = """
import socket, sys, time
held = [socket.create_server(("", int(port))) for port in sys.argv[1:]]
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def hold():
    """``hold(machine, *ports)``: somebody else listens on these ports of a host until the test is over."""
    holders = []

    def take(machine, *ports: int) -> None:
        command = [*machine.wrapper("/"), sys.executable, "-S", "-c", HOLD, *map(str, ports)]
        holders.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        assert holders[-1].stdout.readline() == "held\n"

    def release() -> None:
        while holders:
            holder = holders.pop()
            holder.stdin.close()
            holder.stdout.close()
            holder.wait(20)

    take.release = release
    yield take
    release()


def _met(hosts, per_host: int = 2) -> set[tuple[str, str]]:
    """(MASTER_ADDR, MASTER_PORT) of all ranks; one pair when they agree."""
    found = set()
    for host in hosts:
        for local_rank in range(per_host):
            words = host.rank_file(local_rank, "stdout.log").read_text().split()
            found.add((words[1], words[2]))
    return found


# ---- it works at all


def test_two_hosts_become_one_job(make_hosts):
    """Row 33: the same command on each host; ranks are dense in the order of the file, and meet at MASTER_ADDR."""
    hosts = make_hosts(2)
    hosts.script(MEET)
    assert hosts.run_all("-n", "2", "train.py") == [0, 0], hosts.output()
    assert ALL_FOUR in hosts[0].stdout
    assert {address for address, _ in _met(hosts)} == {hosts[0].machine.address}
    assert len(_met(hosts)) == 1


@pytest.mark.parametrize("order", [(2, 0, 1), (1, 2, 0)])
def test_hosts_start_in_any_order(make_hosts, order):
    """Row 34: members that are there before the leader keep trying, and lose no time over it."""
    hosts = make_hosts(3)
    hosts.script(MEET)
    for index in order:
        hosts[index].start("-n", "1", "train.py")
        hosts.wait_until(lambda host=hosts[index]: host.ranks() or host.process.poll() is not None, "its guardian")
    assert hosts.wait_all() == [0, 0, 0], hosts.output()


# ---- row 33: ports


def test_master_port_is_taken(make_hosts, hold):
    """Row 33: somebody listens on MASTER_PORT of the leader: another port is taken, said, and known to all ranks."""
    hosts = make_hosts(2)
    hosts.script(MEET)
    hold(hosts[0].machine, 29500)
    assert hosts.run_all("-n", "2", "--master-port", "29500", "train.py") == [0, 0], hosts.output()
    ((_, port),) = _met(hosts)
    assert port != "29500"
    assert f"MASTER_PORT 29500 cannot be had (Address already in use); using {port}" in hosts[0].stderr


def test_default_master_port_is_taken(make_hosts, hold):
    """Row 33: the same when no port was asked for: the default one is nothing to insist on."""
    hosts = make_hosts(2)
    hosts.script(MEET)
    hold(hosts[0].machine, 29500, 7777)
    assert hosts.run_all("-n", "2", "train.py") == [0, 0], hosts.output()
    assert len(_met(hosts)) == 1


@pytest.mark.parametrize("taken", [1, 3])
def test_leader_port_is_taken(make_hosts, hold, taken):
    """Row 33: somebody who is no launcher listens on the leader's port, or on more of them: the next one serves."""
    hosts = make_hosts(2)
    hosts.script(MEET)
    hold(hosts[0].machine, *range(7780, 7780 + taken))
    assert hosts.run_all("-n", "2", "train.py") == [0, 0], hosts.output()


def test_no_leader_port_is_free(make_hosts, hold):
    """Row 33: all of them are taken: the leader says which, and what to do; nobody waits for it for long."""
    hosts = make_hosts(2)
    hosts.script(MEET)
    hold(hosts[0].machine, *range(7780, 7784))
    assert hosts.run_all("-n", "2", "--join-timeout", "3", "train.py") == [69, 69], hosts.output()
    assert "7780" in hosts[0].failure
    assert "--leader-port" in hosts[0].failure
    assert "algo-1" in hosts[1].failure


def test_two_jobs_on_the_same_hosts(make_hosts):
    """Row 33: at the same time, with the same settings but for the run id: each finds its own hosts and port."""
    first = make_hosts(2)
    second = make_hosts(2, on=first)
    for name, hosts in (("first", first), ("second", second)):
        hosts.script(MEET.replace("said = meet()", "up()\n    wait_for('go')\n    said = meet()"))
        hosts.start_all("-n", "2", "--rdzv-id", name, "train.py")
    for hosts in (first, second):
        hosts.wait_for_ranks(*range(4))  # both jobs have all their ranks now
        hosts.tell("go")
    for hosts in (first, second):
        assert hosts.wait_all() == [0, 0], first.output() + second.output()
        assert ALL_FOUR in hosts[0].stdout
    assert not _met(first) & _met(second)


# ---- row 34: names


def _unknown_to_each_other(hosts) -> None:
    hosts[0].machine.rename_dns(algo_2="")
    hosts[1].machine.rename_dns(algo_1="")


@pytest.mark.slow
def test_dns_comes_late(make_hosts):
    """Row 34: a host that cannot be resolved yet is waited for, with a line that names it and why."""
    hosts = make_hosts(2)
    hosts.script(MEET)
    _unknown_to_each_other(hosts)
    hosts.start_all("-n", "2", "train.py")
    for host, other in ((hosts[0], "algo-2"), (hosts[1], "algo-1")):
        hosts.wait_until(
            lambda host=host, other=other: re.search(rf"{other}.*not known", host.stderr),
            f"a line of {host.name} that says that {other} is not known",
        )
    for host in hosts:
        host.machine.rename_dns()
    assert hosts.wait_all() == [0, 0], hosts.output()
    assert ALL_FOUR in hosts[0].stdout


def _connects_to(host, address: str) -> bool:
    """Whether a connection of this host's to ``address`` (IPv4) is being made."""
    remote = "".join(f"{int(byte):02X}" for byte in reversed(address.split(".")))
    lines = Path(f"/proc/{host.machine.pid}/net/tcp").read_text().splitlines()[1:]
    return any(line.split()[2].startswith(remote) and line.split()[3] == "02" for line in lines)


def test_wrong_address_of_the_leader_is_corrected(make_hosts):
    """Row 34: the member's /etc/hosts sends it to nobody; it asks again, and comes when the file is right."""
    hosts = make_hosts(2)
    hosts.script(MEET)
    hosts[1].machine.rename_dns(algo_1="10.77.0.99")
    hosts.start_all("-n", "2", "train.py")
    hosts.wait_until(lambda: _connects_to(hosts[1], "10.77.0.99"), "a connection that is tried to the wrong address")
    hosts[1].machine.rename_dns()
    assert hosts.wait_all() == [0, 0], hosts.output()


@pytest.mark.parametrize("own", ["127.0.0.1", "127.0.1.1"])
def test_own_name_is_a_loopback_address(make_hosts, own):
    """Row 34: /etc/hosts of each host gives its own name a loopback address, as installers do: no rank is told it."""
    hosts = make_hosts(2)
    hosts.script(MEET)
    hosts[0].machine.rename_dns(algo_1=own)
    hosts[1].machine.rename_dns(algo_2=own)
    assert hosts.run_all("-n", "2", "train.py") == [0, 0], hosts.output()
    assert {address for address, _ in _met(hosts)} == {hosts[0].machine.address}


def test_ipv6_only(make_hosts):
    """Row 34: there is no IPv4 address but the loopback's."""
    hosts = make_hosts(2, family=6)
    hosts.script(MEET)
    assert hosts.run_all("-n", "2", "train.py") == [0, 0], hosts.output()
    assert {address for address, _ in _met(hosts)} == {hosts[0].machine.address}
    assert ALL_FOUR in hosts[0].stdout


def test_host_that_never_comes(make_hosts):
    """Row 34: after --join-timeout the hosts that came end with 69 and the name of the one that did not, and why."""
    hosts = make_hosts(3)
    hosts.script(MEET)
    for host in hosts[:2]:
        host.machine.rename_dns(algo_3="")
        host.start("-n", "1", "--join-timeout", "2", "train.py")
    assert [host.wait() for host in hosts[:2]] == [69, 69], hosts[0].output()
    for host in hosts[:2]:
        assert re.search(r"algo-3.*not known", host.failure), host.output()
        assert "--join-timeout" in host.failure
        assert "algo-2" not in host.failure.splitlines()[0]
    hosts.assert_nothing_left()


def test_leader_that_never_comes(make_hosts):
    """Row 34: a member alone gives up as well, naming the leader."""
    hosts = make_hosts(2)
    hosts.script(MEET)
    assert hosts[1].start("-n", "1", "--join-timeout", "2", "train.py").wait() == 69, hosts[1].output()
    assert "algo-1" in hosts[1].failure


def test_starts_with_as_many_hosts_as_are_needed(make_hosts):
    """Row 34: with --min-hosts the ones that came go on alone when the time to join is over."""
    hosts = make_hosts(3)
    hosts.script(MEET)
    for host in hosts[:2]:
        host.start("-n", "2", "--join-timeout", "2", "--min-hosts", "2", "train.py")
    assert [host.wait() for host in hosts[:2]] == [0, 0], hosts[0].output() + hosts[1].output()
    assert ALL_FOUR in hosts[0].stdout
    assert "going on without algo-3" in hosts[0].stderr


# ---- row 35: resourceconfig.json

BAD = {
    "no hosts": ({"hosts": None}, "hosts"),
    "no current_host": ({"current_host": None}, "current_host"),
    "current_host of another job": ({"current_host": "algo-9"}, "current_host"),
    "a host twice": ({"hosts": ["algo-1", "algo-2", "algo-2"]}, "hosts"),
    "a number": ({"hosts": ["algo-1", 2]}, "hosts"),
    "a group of other hosts": (
        {"instance_groups": [{"instance_group_name": "extra", "instance_type": "ml.m5.large", "hosts": ["algo-7"]}]},
        "instance_groups[0].hosts[0]",
    ),
    "half": ({}, "resourceconfig.json"),
}


@pytest.mark.parametrize("bad", [0, 1], ids=["leader", "member"])
@pytest.mark.parametrize("kind", BAD)
def test_bad_resource_config_on_one_host(make_hosts, kind, bad):
    """Row 35: that host ends with 65, naming file and field; the other one with 69, naming the host that is missing."""
    changes, field = BAD[kind]
    hosts = make_hosts(2)
    hosts.script(MEET)
    hosts[bad].resources(**changes)
    if kind == "half":
        path = hosts[bad].base / "input" / "config" / "resourceconfig.json"
        path.write_text(path.read_text()[:-10])
    hosts.start_all("-n", "2", "--join-timeout", "2", "train.py")
    codes = hosts.wait_all()
    assert codes[bad] == 65, hosts.output()
    assert codes[1 - bad] == 69, hosts.output()
    assert "resourceconfig.json" in hosts[bad].failure
    assert field in hosts[bad].failure
    assert hosts[bad].name in hosts[1 - bad].failure


@pytest.mark.parametrize("bad", [0, 1], ids=["leader", "member"])
def test_another_host_list_on_one_host(make_hosts, bad):
    """Row 35: one host's file has a host more: refused with the difference, code 77 on both."""
    hosts = make_hosts(2)
    hosts.script(MEET)
    hosts[bad].resources(hosts=["algo-1", "algo-2", "algo-3"])
    hosts.start_all("-n", "2", "--join-timeout", "20", "train.py")
    assert hosts.wait_all() == [77, 77], hosts.output()
    for host in hosts:
        assert "algo-3" in host.failure


def test_interface_that_is_not_there(make_hosts):
    """Row 35: local mode names an interface that no container has: a line, and the job runs."""
    hosts = make_hosts(2)
    hosts.script(MEET)
    for host in hosts:
        host.resources(network_interface_name="ethwe")
    assert hosts.run_all("-n", "2", "train.py") == [0, 0], hosts.output()
    assert "ethwe" in hosts[0].stderr


# ---- row 36: not the same program


def test_other_code_on_one_host(make_hosts):
    """Row 36: the script differs: refused with the file's name, code 77 on both hosts, and no rank was started."""
    hosts = make_hosts(2)
    hosts.script(MEET)
    hosts[1].script(MEET + "\n    tell('started')\n")
    hosts.start_all("-n", "2", "train.py")
    assert hosts.wait_all() == [77, 77], hosts.output()
    for host in hosts:
        assert re.search(r"train\.py.*algo-2|algo-2.*train\.py", host.failure), hosts.output()
        assert "--peer-check" in host.failure
    assert not (hosts.shared / "started").exists()
    hosts.assert_nothing_left()


def test_other_package_on_one_host(make_hosts):
    """Row 36: a package's version differs: both versions are named, each with its host."""
    hosts = make_hosts(2)
    hosts.script(MEET)
    for host, version in zip(hosts, ("1.0", "2.0"), strict=True):
        (host.base / "code" / f"some_package-{version}.dist-info").mkdir()
    hosts.start_all("-n", "2", "train.py")
    assert hosts.wait_all() == [77, 77], hosts.output()
    for host in hosts:
        assert re.search(r"some-package.*1\.0 on algo-1.*2\.0 on algo-2", host.failure), hosts.output()


def test_other_arguments_on_one_host(make_hosts):
    """Row 36: the script's arguments differ, and would make another model of each host's."""
    hosts = make_hosts(2)
    hosts.script(MEET)
    hosts[0].start("-n", "2", "train.py", "--lr", "0.1")
    hosts[1].start("-n", "2", "train.py", "--lr", "0.2")
    assert hosts.wait_all() == [77, 77], hosts.output()


@pytest.mark.parametrize("policy", ["warn", "off"])
def test_differences_that_are_allowed(make_hosts, policy):
    """Row 36: --peer-check warn prints the differences and goes on; off says nothing."""
    hosts = make_hosts(2)
    hosts.script(MEET)
    hosts[1].script(MEET + "\n    # another version\n")
    assert hosts.run_all("-n", "2", "--peer-check", policy, "train.py") == [0, 0], hosts.output()
    for host in hosts:
        assert ("WARNING: " in host.stderr and "train.py" in host.stderr) == (policy == "warn"), hosts.output()


# ---- row 37: unequal slots

UNEQUAL = MEET.replace(
    "said = meet()",
    """said = meet()
    names = ("GROUP_RANK", "GROUP_WORLD_SIZE", "LOCAL_WORLD_SIZE")
    tell(f"place{rank}", " ".join(os.environ[name] for name in names))""",
)


@pytest.mark.parametrize("how", ["each host counts its own", "the host list says"])
def test_unequal_slots(make_hosts, how):
    """Row 37: three ranks here and one there: ranks are dense, in the order of hosts and devices."""
    hosts = make_hosts(2)
    hosts.script(UNEQUAL)
    if how == "the host list says":
        hosts.start_all("--hosts", "algo-1:3,algo-2:1", "train.py")
    else:
        hosts[0].start("-n", "3", "train.py")
        hosts[1].start("-n", "1", "train.py")
    assert hosts.wait_all() == [0, 0], hosts.output()
    assert "0/4 0/3 algo-1, 1/4 1/3 algo-1, 2/4 2/3 algo-1, 3/4 0/1 algo-2" in hosts[0].stdout
    assert [hosts.wait_for_file(f"place{rank}") for rank in range(4)] == ["0 2 3", "0 2 3", "0 2 3", "1 2 1"]


# ---- who may join


def test_without_a_secret_a_line_says_so(make_hosts):
    """Row 38: addresses of the host list are all that is asked for then, which people should know."""
    hosts = make_hosts(2)
    hosts.script(MEET)
    assert hosts.run_all("-n", "2", "train.py") == [0, 0], hosts.output()
    assert "LAUNCHER_SECRET" in hosts[0].stderr or "--secret-file" in hosts[0].stderr


def test_with_a_secret_no_line_says_so(make_hosts):
    """Row 38: a secret that all hosts have; ranks are not given it."""
    hosts = make_hosts(2)
    hosts.script(MEET + "\n    assert 'LAUNCHER_SECRET' not in os.environ\n")
    assert hosts.run_all("-n", "2", "train.py", env={"LAUNCHER_SECRET": "of both hosts"}) == [0, 0], hosts.output()
    assert "secret" not in hosts.output().lower()


def test_host_that_is_not_in_the_leaders_list(make_hosts):
    """Row 36: it is told so at once by a leader that knows the secret; the job of the others is not touched."""
    hosts = make_hosts(3)
    hosts.script("print('trained')")
    for host in hosts[:2]:
        host.resources(hosts=["algo-1", "algo-2"])
    secret = {"LAUNCHER_SECRET": "0f9a7c"}
    hosts[0].start("-n", "1", "train.py", env=secret)
    hosts[2].start("-n", "1", "train.py", env=secret)
    assert hosts[2].wait() == 77, hosts[2].output()
    assert "algo-3 is not in the host list of algo-1" in hosts[2].failure
    hosts[1].start("-n", "1", "train.py", env=secret)
    assert [host.wait() for host in hosts[:2]] == [0, 0], hosts.output()
