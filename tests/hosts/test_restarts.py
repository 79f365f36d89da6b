"""Fault table, row 46 over several hosts: the whole group is started again, with all hosts or with those left."""

from __future__ import annotations

import signal

import pytest

pytestmark = pytest.mark.root


def _log(hosts, rank: int, attempt: int, per_host: int = 2) -> str:
    return hosts[rank // per_host].rank_file(rank % per_host, "stdout.log", attempt).read_text()


@pytest.mark.parametrize("culprit", [0, 3])
def test_second_attempt_succeeds(make_hosts, culprit):
    """Row 46: a rank of either host fails; all ranks of all hosts are started once more, told so, and meet again."""
    hosts = make_hosts(2)
    hosts.script(f"""
        import sys, time
        from together import *
        names = ("TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS", "LAUNCHER_ATTEMPT", "RANK", "WORLD_SIZE")
        print("seen", *(os.environ.get(name) for name in names), flush=True)
        up()
        if attempt == 0:
            if rank == {culprit}:
                sys.exit(1)
            time.sleep(600)
        print(*meet(), sep=", ")
    """)
    assert hosts.run_all("-n", "2", "--max-restarts", "3", "train.py") == [0, 0], hosts.output()
    assert hosts.failures() == ["", ""]
    for attempt in (0, 1):
        for rank in range(4):
            assert _log(hosts, rank, attempt).startswith(f"seen {attempt} 3 {attempt} {rank} 4\n")
    assert _log(hosts, 0, 1).endswith("\n0/4 0/2 algo-1, 1/4 1/2 algo-1, 2/4 0/2 algo-2, 3/4 1/2 algo-2\n")
    for host in hosts:
        assert f"attempt 0 failed: rank {culprit} on algo-{1 + culprit // 2} exited with code 1" in host.stderr
        assert "restarting the group (1 of 3)" in host.stderr
        assert not list(host.base.glob("run/*/attempt_2"))


def test_crash_loop(make_hosts):
    """Row 46: rank 3 fails at step 0 three times: the fourth attempt is made on no host, and all say why."""
    hosts = make_hosts(2)
    hosts.script("""
        import time
        from together import *
        up()
        if rank == 3:
            raise ValueError("always")
        time.sleep(600)
    """)
    hosts.start_all("-n", "2", "--max-restarts", "10", "train.py")
    hosts.assert_all_say(1, "crash loop: code 1 x3 in ")
    assert "rank 3 on algo-2 failed: ValueError: always" in hosts[0].failure[:1024]
    for host in hosts:
        assert len(list(host.base.glob("run/*/attempt_*"))) == 3


def test_restarts_used_up(make_hosts):
    """Row 46: two failures with one restart: the last attempt's verdict is the job's, on every host."""
    hosts = make_hosts(2)
    hosts.script("""
        import sys, time
        from together import *
        up()
        if rank == 2 - attempt:
            sys.exit(3 + attempt)
        time.sleep(600)
    """)
    hosts.start_all("-n", "2", "--max-restarts", "1", "train.py")
    detail = hosts.assert_all_say(4, "rank 1 on algo-1 exited with code 4")
    assert detail["attempt"] == 1


def test_no_restart_after_a_stop(make_hosts):
    """Row 46: a job that was asked to stop, on whichever host, is not started again."""
    hosts = make_hosts(2)
    hosts.script("import time\nfrom together import *\nup()\ntime.sleep(600)\n")
    hosts.start_all("-n", "2", "--max-restarts", "5", "train.py")
    hosts.wait_for_ranks(*range(4))
    hosts[1].signal(signal.SIGTERM)
    hosts.assert_all_say(143, "stopped by SIGTERM")
    assert not list(hosts[0].base.glob("run/*/attempt_1"))


def test_nothing_of_an_attempt_outlives_it_on_any_host(make_hosts):
    """Row 46: the second attempt starts when nothing of the first is left on any host."""
    hosts = make_hosts(2)
    hosts.script("""
        import subprocess, sys, time
        from together import *
        if attempt == 0:
            stubborn = ["sh", "-c", "trap '' TERM; while :; do sleep 1; done"]
            tell(f"left{rank}", str(subprocess.Popen(stubborn, start_new_session=True).pid))
            up()
            if rank == 0:
                sys.exit(1)
            time.sleep(600)
        pids = [(shared / f"left{other}").read_text() for other in range(world)]
        sys.exit(f"still there: {pids}" if any(os.path.exists(f"/proc/{pid}") for pid in pids) else 0)
    """)
    assert hosts.run_all("-n", "2", "--max-restarts", "1", "--grace", "1", "train.py") == [0, 0], hosts.output()


SHRINKING = """
    import time
    from together import *
    up()
    if attempt == 0:
        time.sleep(600)
    print(os.environ["TORCHELASTIC_RESTART_COUNT"], *meet(), sep=", ")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("lost", "how"), [(1, "killed"), (2, "killed"), (2, "cut off")])
def test_goes_on_with_the_hosts_that_are_left(make_hosts, lost, how):
    """Row 46: one of three hosts is lost and two are enough: ranks are planned anew, dense, and told of the attempt."""
    hosts = make_hosts(3)
    hosts.script(SHRINKING)
    hosts.start_all("-n", "2", "--min-hosts", "2", "--grace", "2", "train.py")
    hosts.wait_for_ranks(*range(6))
    if how == "killed":
        hosts[lost].signal(signal.SIGKILL)
    else:
        hosts[lost].machine.cut()
    codes = hosts.wait_all()
    left = [host for index, host in enumerate(hosts) if index != lost]
    assert [code for index, code in enumerate(codes) if index != lost] == [0, 0], hosts.output()
    assert codes[lost] == (-9 if how == "killed" else 69), hosts.output()
    other = left[1].name
    said = left[0].rank_file(0, "stdout.log", 1).read_text()
    assert said == f"1, 0/4 0/2 algo-1, 1/4 1/2 algo-1, 2/4 0/2 {other}, 3/4 1/2 {other}\n"
    for host in left:
        assert f"attempt 0 failed: algo-{lost + 1} (rank {2 * lost}, {2 * lost + 1}) is " in host.stderr
        assert "restarting the group with the 2 hosts that are left" in host.stderr
        assert host.failure == ""
    hosts.assert_nothing_left()


def test_too_few_hosts_are_left(make_hosts):
    """Row 46: two of three hosts are lost where two are needed: the one that is left names the last one, code 69."""
    hosts = make_hosts(3)
    hosts.script(SHRINKING.replace("attempt == 0", "attempt < 2"))
    hosts.start_all("-n", "1", "--min-hosts", "2", "train.py")
    hosts.wait_for_ranks(0, 1, 2)
    hosts[1].signal(signal.SIGKILL)
    hosts.wait_for_ranks(0, 1, attempt=1)
    hosts[2].signal(signal.SIGKILL)
    assert hosts.wait_all() == [69, -9, -9], hosts.output()
    assert hosts[0].failure.startswith("algo-3 (rank 1) is lost")


def test_all_hosts_are_needed_unless_said_otherwise(make_hosts):
    """Row 46: restarts are for ranks that fail; a lost host ends the job when --min-hosts does not allow for it."""
    hosts = make_hosts(3)
    hosts.script(SHRINKING)
    hosts.start_all("-n", "1", "--max-restarts", "3", "train.py")
    hosts.wait_for_ranks(0, 1, 2)
    hosts[1].signal(signal.SIGKILL)
    assert hosts.wait_all() == [69, -9, 69], hosts.output()
    assert hosts[0].failure == hosts[2].failure
    assert hosts[0].failure.startswith("algo-2 (rank 1) is lost")
