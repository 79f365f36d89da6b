"""The leader is lost: the hosts that are left go on without it when they are enough, and more than half."""

from __future__ import annotations

import signal

import pytest

pytestmark = pytest.mark.root

SHRINKING = """
    import sys
    import time
    from together import *
    up()
    if attempt < int(sys.argv[1]):
        time.sleep(600)
    print(os.environ["LAUNCHER_ATTEMPT"], *meet(), sep=", ")
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "cut off"])
def test_next_host_leads(make_hosts, how):
    """Row 15: with --min-hosts the second host takes the leader's place, and ranks are planned anew."""
    hosts = make_hosts(3)
    hosts.script(SHRINKING)
    hosts.start_all("-n", "2", "--min-hosts", "2", "--grace", "2", "train.py", "1")
    hosts.wait_for_ranks(*range(6))
    if how == "killed":
        hosts[0].signal(signal.SIGKILL)
    else:
        hosts[0].machine.cut()
    codes = hosts.wait_all()
    assert codes == [-9 if how == "killed" else 69, 0, 0], hosts.output()
    said = hosts[1].rank_file(0, "stdout.log", 1).read_text()
    assert said == "1, 0/4 0/2 algo-2, 1/4 1/2 algo-2, 2/4 0/2 algo-3, 3/4 1/2 algo-3\n"
    for host in hosts[1:]:
        assert "going on with 2 hosts: algo-2 leads" in host.stderr
        assert host.failure == ""
    if how == "cut off":
        # Alone it is less than half: the others may have gone on, and have.
        assert hosts[0].failure.startswith("algo-"), hosts[0].failure
    hosts.assert_nothing_left()


def test_two_hosts_have_no_majority(make_hosts):
    """Row 15: of two hosts, one is no majority: it cannot know whether the leader is lost or the network is."""
    hosts = make_hosts(2)
    hosts.script(SHRINKING)
    hosts.start_all("-n", "1", "--min-hosts", "1", "train.py", "1")
    hosts.wait_for_ranks(0, 1)
    hosts[0].signal(signal.SIGKILL)
    assert hosts.wait_all() == [-9, 69], hosts.output()
    assert hosts[1].failure.startswith("algo-1 (rank 0) is lost")


@pytest.mark.slow
def test_leader_after_leader(make_hosts):
    """Row 15: four hosts, of which the first two are lost one after the other."""
    hosts = make_hosts(4)
    hosts.script(SHRINKING)
    hosts.start_all("-n", "1", "--min-hosts", "2", "train.py", "2")
    hosts.wait_for_ranks(0, 1, 2, 3)
    hosts[0].signal(signal.SIGKILL)
    hosts.wait_for_ranks(0, 1, 2, attempt=1)
    hosts[1].signal(signal.SIGKILL)
    assert hosts.wait_all() == [-9, -9, 0, 0], hosts.output()
    assert hosts[2].rank_file(0, "stdout.log", 2).read_text() == "2, 0/2 0/1 algo-3, 1/2 0/1 algo-4\n"
    hosts.assert_nothing_left()
