"""Fault table, rows 14-18: a host, its launcher or the network between two hosts goes away while ranks are at work."""

from __future__ import annotations

import signal

import pytest

pytestmark = pytest.mark.root

SLEEPER = """
    import time
    from together import *
    up()
    time.sleep(600)
"""


def _started(make_hosts, count: int, *options: str):
    """``count`` hosts with two ranks each, all at work."""
    hosts = make_hosts(count)
    hosts.script(SLEEPER)
    hosts.start_all("-n", "2", *options, "train.py")
    hosts.wait_for_ranks(*range(2 * count))
    return hosts


def test_launcher_of_a_member_is_killed(make_hosts):
    """Row 14: SIGKILL to the launcher of one of three hosts: its ranks end with it, and the others name the host."""
    hosts = _started(make_hosts, 3)
    hosts[1].signal(signal.SIGKILL)
    assert hosts.wait_all() == [69, -9, 69], hosts.output()
    assert hosts[0].failure.startswith("algo-2 (rank 2, 3) is lost: its launcher ended without a word")
    assert hosts[2].failure == hosts[0].failure
    hosts.assert_nothing_left()


def test_launcher_of_the_leader_is_killed(make_hosts):
    """Row 15: SIGKILL to the first host's launcher: the others stop by themselves, and each writes what it knows."""
    hosts = _started(make_hosts, 3)
    hosts[0].signal(signal.SIGKILL)
    assert hosts.wait_all() == [-9, 69, 69], hosts.output()
    assert hosts[0].failure == ""
    for host in hosts[1:]:
        assert host.failure.startswith("algo-1 "), hosts.output()
        assert "is lost" in host.failure.splitlines()[0]
    hosts.assert_nothing_left()


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1, 2])
def test_host_vanishes_without_a_word(make_hosts, lost):
    """Row 16: packets of one host are dropped, with no FIN: the others end, naming it, and so does the host itself."""
    hosts = _started(make_hosts, 3)
    hosts[lost].machine.cut()
    assert hosts.wait_all() == [69, 69, 69], hosts.output()
    for host in hosts:
        headline = host.failure.splitlines()[0]
        assert "is unreachable" in headline, hosts.output()
        if host is not hosts[lost]:
            assert headline.startswith(f"{hosts[lost].name} ")
        else:
            assert not headline.startswith(f"{host.name} "), "it cannot be the others' fault alone that it is cut off"
    if lost:
        assert hosts[0].failure == hosts[3 - lost].failure
    hosts.assert_nothing_left()


@pytest.mark.slow
def test_host_vanishes_while_data_is_on_its_way(make_hosts):
    """Row 16: the ranks of the other hosts fail on their connections to the lost host: the host is the cause."""
    hosts = make_hosts(2)
    hosts.script("""
        import socket, time
        from together import *
        if rank == 0:
            server = socket.create_server(("", 6000))
            tell("listening")
            link = server.accept()[0]
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 3000)
        elif rank == 1:
            wait_for("listening")
            link = socket.create_connection(("algo-1", 6000))
        up()
        while True:
            if rank == 0:
                link.sendall(bytes(1000))
                time.sleep(0.01)
            else:
                assert link.recv(1000)
    """)
    hosts.start_all("-n", "1", "train.py")
    hosts.wait_for_ranks(0, 1)
    hosts[1].machine.cut()
    assert hosts.wait_all() == [69, 69], hosts.output()
    assert hosts[0].failure.startswith("algo-2 (rank 1) is unreachable"), hosts.output()


@pytest.mark.slow
@pytest.mark.parametrize("paused", [0, 1], ids=["leader", "member"])
def test_launcher_that_stands_still_for_three_seconds(make_hosts, paused):
    """Row 17: a launcher is stopped and goes on before the limit of 5 s: a warning, and no alarm."""
    hosts = make_hosts(2)
    hosts.script("""
        from together import *
        up()
        wait_for("go")
    """)
    hosts.start_all("-n", "2", "train.py")
    hosts.wait_for_ranks(*range(4))
    hosts[paused].signal(signal.SIGSTOP)
    hosts[1 - paused].wait_for_line(f"{hosts[paused].name} has been silent for", stream="stderr")
    hosts[paused].signal(signal.SIGCONT)
    hosts[1 - paused].wait_for_line(f"{hosts[paused].name} is back", stream="stderr")
    hosts.tell("go")
    assert hosts.wait_all() == [0, 0], hosts.output()
    assert "given up" not in hosts[paused].stderr, "who slept cannot blame the other for the silence"


@pytest.mark.slow
@pytest.mark.parametrize("paused", [0, 1], ids=["leader", "member"])
def test_launcher_that_stands_still_for_good(make_hosts, paused):
    """Row 17: beyond --host-timeout the host is lost; when its launcher wakes up, it ends its ranks and itself."""
    hosts = _started(make_hosts, 2, "--host-timeout", "3")
    hosts[paused].signal(signal.SIGSTOP)
    other = hosts[1 - paused]
    hosts.wait_until(lambda: other.process.poll() is not None, f"the end of {other.name}")
    assert other.process.returncode == 69, hosts.output()
    assert other.failure.startswith(f"{hosts[paused].name} "), hosts.output()
    assert "is unreachable" in other.failure.splitlines()[0]
    hosts[paused].signal(signal.SIGCONT)
    assert hosts.wait_all()[paused] == 69, hosts.output()
    hosts.assert_nothing_left()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["hangs", "fails"])
def test_two_members_cannot_reach_each_other(make_hosts, how):
    """Row 18: both reach the leader, so no host is lost; the ranks hang, or fail of the silence. The pair is named."""
    hosts = make_hosts(3)
    hosts.script(f"""
        import socket, time
        from together import *
        if rank == 1:
            server = socket.create_server(("", 6000))
            tell("listening")
            link = server.accept()[0]
        elif rank == 2:
            wait_for("listening")
            link = socket.create_connection(("algo-2", 6000))
        up()
        wait_for("cut")
        if rank == 1:
            if {how == "fails"}:
                link.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000)
            link.sendall(b"gradient")
        link.recv(1) if rank else time.sleep(600)
    """)
    hosts.start_all("-n", "1", "--hang-timeout", "3", "train.py")
    hosts.wait_for_ranks(0, 1, 2)
    hosts.partition(hosts[1], hosts[2])
    hosts.tell("cut")
    detail = hosts.assert_all_say(69, "the network is cut: algo-2 and algo-3 cannot reach each other")
    assert detail["evidence"]["cut_links"] == [["algo-2", "algo-3"]]


@pytest.mark.slow
def test_a_slow_network_is_no_fault(make_hosts):
    """Rows 16, 17: all that the launchers say to each other goes through a relay that takes its time, at 1 Mbit/s."""
    hosts = make_hosts(2)
    relay = hosts.network.relay(hosts[0].machine.address, 7780, delay_s=0.3)
    hosts[1].machine.limit_rate(1)
    hosts.script("""
        import sys
        from together import *
        if rank == 1:
            for _ in range(2000):
                print("x" * 100)
            sys.exit(3)
        wait_for("go")
    """)
    hosts[0].start("-n", "1", "train.py", env={"LAUNCHER_SECRET": "of both hosts"})
    address = ("--host-addresses", f"algo-1={hosts.network.address}")
    hosts[1].start("-n", "1", *address, "train.py", env={"LAUNCHER_SECRET": "of both hosts"})
    hosts.assert_all_say(3, "rank 1 on algo-2 exited with code 3")
    relay.close()
