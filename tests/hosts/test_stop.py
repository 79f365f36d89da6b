"""Fault table, rows 19-22 over several hosts: who is told to stop, how often, and what happens when it does not."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

pytestmark = pytest.mark.root

# Reports SIGTERM and stays.
STUBBORN = """
    import signal, sys, time
    from together import *
    signal.signal(signal.SIGTERM, lambda *_: tell(f"told{rank}", "TERM"))
    signal.signal(signal.SIGINT, lambda *_: tell(f"told{rank}", "INT"))
    up()
    BODY
    while True:
        time.sleep(600)
"""


def _handles(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


@pytest.mark.parametrize("told", [0, 1], ids=["leader", "member"])
def test_checkpoints_are_written_on_all_hosts(make_hosts, told):
    """Row 19: the platform stops one host; every rank of every host gets SIGTERM once, its helpers none, with the
    deadline told before; all write their checkpoint, and the job ends with 0."""
    hosts = make_hosts(2)
    hosts.script("""
        import signal, time
        import launcher
        from together import *

        got = []
        signal.signal(signal.SIGTERM, lambda *_: got.append(1))
        helper = os.fork()
        if helper == 0:
            signal.signal(signal.SIGTERM, lambda *_: tell(f"helper{rank}"))
            tell(f"helping{rank}")
            while True:
                signal.pause()
        context = launcher.init()
        wait_for(f"helping{rank}")
        up()
        while context.stop_deadline is None:
            context.step()
            time.sleep(0.01)
        assert 0 < context.stop_seconds_left <= 60, context.stop_seconds_left
        while not got:
            time.sleep(0.01)
        end = time.monotonic() + 0.5  # room for a second signal, or one to the helper
        while time.monotonic() < end:
            time.sleep(0.05)
        os.kill(helper, signal.SIGKILL)
        Path(context.checkpoint_dir, f"rank{rank}.txt").write_text(str(len(got)))
    """)
    hosts.start_all("-n", "2", "--grace", "60", "train.py")
    hosts.wait_for_ranks(*range(4))
    hosts[told].signal(signal.SIGTERM)
    assert hosts.wait_all() == [0, 0], hosts.output()
    assert hosts.failures() == ["", ""]
    for rank in range(4):
        assert (hosts[rank // 2].base / "checkpoints" / f"rank{rank}.txt").read_text() == "1"
        assert not (hosts.shared / f"helper{rank}").exists()


@pytest.mark.parametrize("told", [(0,), (1,), (0, 1)], ids=["leader", "member", "both"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stop_of_ranks_that_do_nothing_about_it(make_hosts, told, number, code):
    """Row 19: ranks without a handler end on all hosts; code and text say that the job was stopped, and by what."""
    hosts = make_hosts(2)
    hosts.script("""
        import signal, time
        from together import *
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        up()
        time.sleep(600)
    """)
    hosts.start_all("-n", "2", "--grace", "600", "train.py")
    hosts.wait_for_ranks(*range(4))
    for index in told:
        hosts[index].signal(number)
    hosts.assert_all_say(code, f"stopped by {signal.Signals(number).name}")


@pytest.mark.parametrize("told", [0, 1], ids=["leader", "member"])
def test_stop_before_all_hosts_are_there(make_hosts, told):
    """Row 19: a host that waits for another one ends at once when it is stopped, and no rank was started."""
    hosts = make_hosts(2)
    hosts.script("raise SystemExit(1)")
    host = hosts[told]
    host.start("-n", "2", "train.py")
    hosts.wait_until(lambda: _handles(host.process.pid, signal.SIGTERM), "a launcher that listens to signals")
    host.signal(signal.SIGTERM)
    assert host.wait() == 143, hosts.output()
    hosts.assert_nothing_left()


def test_grace_holds_on_the_other_host_after_a_failure(make_hosts):
    """Row 20: rank 0 fails; ranks of the other host that ignore SIGTERM are killed when --grace is over, no sooner."""
    hosts = make_hosts(2)
    hosts.script(
        STUBBORN.replace(
            "BODY",
            """
    if rank == 0:
        tell("failed", str(time.monotonic_ns()))
        sys.exit(3)
    """,
        )
    )
    hosts.start_all("-n", "2", "--grace", "1.5", "train.py")
    detail = hosts.assert_all_say(3, "rank 0 on algo-1 exited with code 3")
    failed_ns = int(hosts.wait_for_file("failed"))
    for record in detail["records"][1:]:
        assert (record["how"], record["value"]) == ("signal", 9)
        assert record["ended_ns"] - failed_ns > 1_400_000_000, "less what the clocks' offset is uncertain by"
        assert hosts.wait_for_file(f"told{record['rank']}") == "TERM"
    assert "grace period over: killing rank 2, 3" in hosts[1].stderr


@pytest.mark.parametrize("second", [0, 1], ids=["leader", "member"])
def test_second_signal_kills_on_all_hosts_at_once(make_hosts, second):
    """Row 21: SIGTERM twice, to the same host or to two, does not wait for the grace of ten minutes."""
    hosts = make_hosts(2)
    hosts.script(STUBBORN.replace("BODY", ""))
    hosts.start_all("-n", "2", "--grace", "600", "train.py")
    hosts.wait_for_ranks(*range(4))
    hosts[second].signal(signal.SIGTERM)
    for rank in range(4):
        assert hosts.wait_for_file(f"told{rank}") == "TERM"
    hosts[second].signal(signal.SIGTERM)
    detail = hosts.assert_all_say(143, "stopped by SIGTERM; killed by a second signal: rank 0, 1, 2, 3")
    assert detail["exit_code"] == 143


def test_the_platforms_stop_to_every_host_is_no_second_signal(make_hosts):
    """Row 21: each host gets SIGTERM once, as a platform does it, and the ranks have their grace."""
    hosts = make_hosts(2)
    hosts.script("""
        import signal, sys
        from together import *
        signal.signal(signal.SIGTERM, lambda *_: tell(f"told{rank}"))
        up()
        wait_for("go")
    """)
    hosts.start_all("-n", "2", "--grace", "600", "train.py")
    hosts.wait_for_ranks(*range(4))
    hosts[0].signal(signal.SIGTERM)
    for rank in range(4):
        hosts.wait_for_file(f"told{rank}")
    hosts[1].signal(signal.SIGTERM)
    hosts[1].wait_for_line("SIGTERM: ", stream="stderr")
    hosts.tell("go")
    assert hosts.wait_all() == [0, 0], hosts.output()


def test_stopped_rank_of_the_other_host_is_continued_and_ended(make_hosts):
    """Row 22: rank 3 is held by SIGSTOP; when rank 0 fails it is ended without waiting for the end of the grace."""
    hosts = make_hosts(2)
    hosts.script("""
        import signal, sys, time
        from together import *
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(4))
        up()
        if rank == 0:
            wait_for("go")
            sys.exit(3)
        time.sleep(600)
    """)
    hosts.start_all("-n", "2", "--grace", "600", "train.py")
    pid = hosts.wait_for_ranks(3, *range(4))[0]
    os.kill(pid, signal.SIGSTOP)
    hosts.wait_until(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T", "state T")
    hosts.tell("go")
    detail = hosts.assert_all_say(3, "rank 0 on algo-1 exited with code 3")
    assert [record["was_stopped"] for record in detail["records"]] == [False, False, False, True]
    assert "SIGSTOP had held it" in hosts[0].failure
