"""Fault table, with the fault on the other host: the same culprit is named everywhere, with the same code."""

from __future__ import annotations

import os
import re
import signal

import pytest

from ..faults.test_memory import memory_group

pytestmark = pytest.mark.root

STACK = "(most recent call first)"


def test_exit_code_is_kept_and_the_culprit_named_on_every_host(make_hosts):
    """Row 1: rank 3, on the second host, calls sys.exit(3) while the others work."""
    hosts = make_hosts(2)
    hosts.script("""
        import sys, time
        from together import *
        up()
        if rank == 3:
            print("about to give up", file=sys.stderr)
            sys.exit(3)
        time.sleep(600)
    """)
    hosts.start_all("-n", "2", "train.py")
    detail = hosts.assert_all_say(3, "rank 3 on algo-2 exited with code 3: about to give up")
    assert "last lines of stderr of rank 3:\nabout to give up" in hosts[0].failure
    assert (detail["culprit"]["rank"], detail["culprit"]["host"]) == (3, "algo-2")
    assert set(detail["victims"]) == {"0", "1", "2"}
    assert [record["host"] for record in detail["records"]] == ["algo-1", "algo-1", "algo-2", "algo-2"]
    assert hosts[1].failure_json["detail"]["culprit"] == detail["culprit"]


def test_a_rank_of_the_leader_fails(make_hosts):
    """Row 1: the same with the fault on the first host of three, seen from the others."""
    hosts = make_hosts(3)
    hosts.script("""
        import sys, time
        from together import *
        up()
        if rank == 0:
            sys.exit(9)
        time.sleep(600)
    """)
    hosts.start_all("-n", "1", "train.py")
    hosts.assert_all_say(9, "rank 0 on algo-1 exited with code 9")


def test_exception_is_in_every_hosts_failure_file(make_hosts):
    """Row 2: rank 2 raises without any decorator; its traceback travels, its error file stays where it ran."""
    hosts = make_hosts(2)
    hosts.script("""
        import time
        from together import *

        def train():
            raise ValueError("loss is nan at step 7")

        up()
        if rank == 2:
            train()
        time.sleep(600)
    """)
    hosts.start_all("-n", "2", "train.py")
    hosts.assert_all_say(1, "rank 2 on algo-2 failed: ValueError: loss is nan at step 7 (exit code 1)")
    assert 'train.py", line 6, in train' in hosts[0].failure
    assert hosts[1].rank_file(0, "error.json").exists()
    assert not hosts[0].rank_file(0, "error.json").exists()


# Rank 3 raises and is slow to end; rank 0 meets the broken connection 50 ms later, and ends first.
SLOW_CULPRIT = """
    import atexit, socket, time
    from together import *

    tell(f"pid{rank}", str(os.getpid()))
    if rank == 0:
        with socket.create_server(("", 6000)) as server:
            tell("listening")
            link = server.accept()[0]
        link.recv(1)
        time.sleep(0.05)
        while True:  # the first send only makes the peer answer with a reset
            link.sendall(b"gradient")
    elif rank == 3:
        wait_for("listening", *(f"pid{other}" for other in range(world)))
        link = socket.create_connection(("algo-1", 6000))
        atexit.register(wait_for_end, int((shared / "pid0").read_text()))
        atexit.register(link.close)  # runs first: the exception has left the script by now
        raise ValueError("the root cause")
    time.sleep(600)
"""


@pytest.mark.parametrize("clocks_s", [(0, 0), (0, 5), (5, 0)], ids=["one clock", "culprit ahead", "culprit behind"])
def test_first_exception_wins_over_the_first_exit(make_hosts, clocks_s):
    """Rows 3, 4: rank 3 is the root cause, also when the two hosts' clocks are 5 s apart, one way or the other."""
    hosts = make_hosts(2, clocks_s=clocks_s)
    hosts.script(SLOW_CULPRIT)
    hosts.start_all("-n", "2", "train.py")
    detail = hosts.assert_all_say(1, "rank 3 on algo-2 failed: ValueError: the root cause")
    assert set(detail["victims"]) == {"0", "1", "2"}
    assert "rank 0: lost its connection to another rank" in hosts[1].failure
    clock = next(clock for clock in detail["evidence"]["clocks"] if clock["host"] == "algo-2")
    true_ns = (clocks_s[1] - clocks_s[0]) * 10**9
    assert 0 < clock["uncertainty_ns"] < 10**9
    assert abs(clock["offset_ns"] - true_ns) <= clock["uncertainty_ns"] + 1_000_000
    line = next(line for line in hosts[0].failure.splitlines() if line.startswith("clock of algo-2: "))
    told = re.search(r": ([-+][0-9.]+) s against the first host's, known to ([0-9.]+) ms", line)
    assert abs(float(told[1]) - true_ns / 1e9) <= (float(told[2]) + 1) / 1e3


def test_times_of_the_other_clock_are_on_the_leaders(make_hosts):
    """Row 4: two unrelated failures; the later one, on a host whose clock is 5 s behind, is not taken for the first."""
    hosts = make_hosts(2, clocks_s=(5, 0))
    hosts.script("""
        import signal, sys, time
        from together import *
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        up()
        if rank == 0:
            tell("first")
            sys.exit(3)
        if rank == 3:
            wait_for("first")
            wait_for_end(int((shared / "up0-0").read_text()))
            sys.exit(4)
        time.sleep(600)
    """)
    hosts.start_all("-n", "2", "--grace", "1", "train.py")
    hosts.assert_all_say(3, "rank 0 on algo-1 exited with code 3")


def _kill_rank(hosts, number: int, rank: int) -> None:
    hosts.script("import time\nfrom together import *\nup()\ntime.sleep(600)\n")
    hosts.start_all("-n", "2", "train.py")
    os.kill(hosts.wait_for_ranks(rank, *range(4))[0], number)


def test_sigkill_from_outside(make_hosts):
    """Row 5: a rank of the other host is killed with SIGKILL by somebody else."""
    hosts = make_hosts(2)
    _kill_rank(hosts, signal.SIGKILL, 2)
    hosts.assert_all_say(137, "rank 2 on algo-2 was killed by SIGKILL")
    assert "SIGKILL not sent by launcher, no OOM record" in hosts[0].failure[:1024]


@pytest.fixture
def small_host(as_root, wait_until):
    """A memory cgroup; removed when the test is over."""
    yield from memory_group("hosts", 150 << 20, wait_until)


def test_oom_kill_on_the_other_host(small_host, make_hosts):
    """Row 6: rank 3 grows beyond its host's limit; the leader, which has no limit, names it and its numbers."""
    hosts = make_hosts(2)
    hosts.script("""
        import time
        from together import *
        up()
        taken = []
        while rank == 3:
            taken.append(b"x" * (1 << 20))
        time.sleep(600)
    """)
    hosts[0].start("-n", "2", "train.py")
    hosts[1].start("-n", "2", "train.py", wrapper=small_host.wrapper)
    hosts.assert_all_say(137, "rank 3 on algo-2 was OOM-killed: peak RSS ")
    assert "of limit 150.0 MiB" in hosts[0].failure[:1024]
    assert "cgroup oom_kill +1" in hosts[0].failure[:1024]


def test_crash_in_native_code(make_hosts):
    """Row 8: code, signal name and the Python stack at the crash, on every host."""
    hosts = make_hosts(2)
    hosts.script("""
        import ctypes, time
        from together import *

        def crash():
            ctypes.string_at(0)

        up()
        if rank == 3:
            crash()
        time.sleep(600)
    """)
    hosts.start_all("-n", "2", "train.py")
    hosts.assert_all_say(139, "rank 3 on algo-2 was killed by SIGSEGV")
    assert 'train.py", line 6 in crash' in hosts[0].failure


LEAVER = """
    from together import *
    up()
    if rank == 2:
        os._exit(0)
    wait_for("go")
    print("finished")
"""


def test_early_exit_is_no_success(make_hosts):
    """Row 12: rank 2 leaves by os._exit(0); the others may finish, and the job has failed on every host."""
    hosts = make_hosts(2)
    hosts.script(LEAVER)
    hosts.start_all("-n", "2", "train.py")
    hosts[1].wait_for_line("rank 2 ended early with 0", stream="stderr")
    hosts.tell("go")
    hosts.assert_all_say(1, "rank 2 on algo-2 ended early with 0")
    assert [host.stdout.count("finished") for host in hosts] == [2, 1]


def test_early_exit_abort_stops_the_others(make_hosts):
    """Row 12: policy abort ends all ranks of all hosts, and blames the one that left."""
    hosts = make_hosts(2)
    hosts.script(LEAVER)
    hosts.start_all("-n", "2", "--early-exit", "abort", "train.py")
    detail = hosts.assert_all_say(1, "rank 2 on algo-2 ended early with 0")
    assert set(detail["victims"]) == {"0", "1", "3"}


@pytest.mark.parametrize("early", [0, 1], ids=["the leader is early", "a member is early"])
def test_hosts_that_end_apart(make_hosts, early):
    """Row 13: one host's ranks end long before the other's: it says what it waits for, and all end with 0."""
    hosts = make_hosts(2)
    hosts.script(f"""
        from together import *
        up()
        if os.environ["GROUP_RANK"] != "{early}":
            wait_for("go")
    """)
    hosts.start_all("-n", "2", "train.py")
    hosts[early].wait_for_line(
        "waiting for the other hosts" if early else "1 of 2 hosts are done; waiting for algo-2", stream="stderr"
    )
    assert all(host.process.poll() is None for host in hosts)
    hosts.tell("go")
    assert hosts.wait_all() == [0, 0]
    assert hosts.failures() == ["", ""]
    assert all((host.base / "output" / "success").exists() for host in hosts)


def test_what_escapes_on_the_other_host_is_gone(make_hosts):
    """Row 24: new sessions, double forks, an empty environment and an open stdout pipe, on a host without fault."""
    hosts = make_hosts(2)
    hosts.script("""
        import signal, sys, time
        from together import *
        if rank in (1, 3):
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    signal.signal(signal.SIGTERM, signal.SIG_IGN)
                    command = f"echo $$ >{shared}/part{rank}; mv {shared}/part{rank} {shared}/away{rank}"
                    os.execve("/bin/sh", ["sh", "-c", command + "; while :; do sleep 600; done"], {"PATH": os.defpath})
                os._exit(0)
            os.wait()
        wait_for("away1", "away3")
        up()
        if rank == 3:
            sys.exit(5)
        time.sleep(600)
    """)
    hosts.start_all("-n", "2", "train.py")
    hosts.assert_all_say(5, "rank 3 on algo-2 exited with code 5")
    for rank in (1, 3):
        assert not os.path.exists(f"/proc/{int(hosts.wait_for_file(f'away{rank}'))}")


@pytest.mark.slow
def test_hang_is_found_and_the_stacks_of_all_hosts_are_kept(make_hosts):
    """Row 26: nothing moves on any host: code 75 everywhere, and every rank of every host has left its stack."""
    hosts = make_hosts(2)
    hosts.script("""
        import time
        from together import *
        def train_for_ever():
            time.sleep(600)
        up()
        train_for_ever()
    """)
    hosts.start_all("-n", "2", "--hang-timeout", "2", "train.py")
    hosts.assert_all_say(75, "hang: ")
    for host in hosts:
        for local_rank in (0, 1):
            stacks = host.rank_file(local_rank, "stderr.log").read_text()
            assert STACK in stacks
            assert "in train_for_ever" in stacks


@pytest.mark.slow
def test_one_host_at_work_is_reason_enough_to_wait(make_hosts):
    """Row 26: a host whose ranks wait for those of another is no hang while that one computes."""
    hosts = make_hosts(2)
    hosts.script("""
        import time
        from together import *
        up()
        end = time.monotonic() + 5
        if rank == 3:
            while time.monotonic() < end:
                pass
            tell("computed")
        wait_for_quietly = not rank == 3
        if wait_for_quietly:
            import socket
            server = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            server.bind(f"\\0quiet{rank}")
            server.settimeout(7)
            try:
                server.recv(1)
            except TimeoutError:
                pass
    """)
    assert hosts.run_all("-n", "2", "--hang-timeout", "2", "train.py") == [0, 0], hosts.output()
    assert "hang" not in hosts.output()


def test_the_rank_that_never_entered_the_collective_is_on_the_other_host(make_hosts):
    """Row 26: the suspect of a hang is looked for among the ranks of all hosts: the one that made fewer steps."""
    hosts = make_hosts(2)
    hosts.script("""
        import time
        import launcher
        from together import *
        context = launcher.init()
        up()
        for _ in range(2 if rank == 3 else 5):
            context.step()
        time.sleep(600)
    """)
    hosts.start_all("-n", "2", "--hang-timeout", "2", "train.py")
    detail = hosts.assert_all_say(75, "hang: ")
    assert "rank 3 on algo-2 is behind, at step 2" in hosts[0].failure.splitlines()[0]
    assert (detail["culprit"]["rank"], detail["culprit"]["host"]) == (3, "algo-2")


@pytest.mark.slow
def test_hosts_of_one_rank_each_know_for_whom_they_wait(make_hosts):
    """Row 26, and stragglers: first rank 1 is slow, then it does not come to a collective at all."""
    hosts = make_hosts(2)
    hosts.script("""
        import os, time
        from launcher.rank import status
        from together import *
        page = status.open_page(os.environ["LAUNCHER_STATUS_PAGE"], writable=True)
        up()
        end = time.monotonic() + 3
        while time.monotonic() < end:
            time.sleep(0.05)
            page.enter_collective("allreduce", 64)
            if rank == 0:
                page.add_collective_wait(25_000_000)
            page.leave_collective()
        page.enter_collective("broadcast", 8, 1283)
        if rank == 0:
            page.enter_collective("allreduce", 25 << 20, 1284)
            page.set_collective_phase(status.WAITING)
            page.set_waiting_for(1)
        else:
            page.leave_collective()
        time.sleep(600)
    """)
    hosts.start_all("-n", "1", "--hang-timeout", "2", "--straggler-window", "1", "train.py")
    detail = hosts.assert_all_say(75, "hang: ")
    told = "rank 1 on algo-2 never entered allreduce #1284 (last: broadcast #1283); rank 0 waits in allreduce #1284 of "
    assert told in hosts[0].failure.splitlines()[0]
    assert (detail["culprit"]["rank"], detail["culprit"]["host"]) == (1, "algo-2")
    assert "rank 1 on algo-2 is the straggler: others waited " in hosts[0].stderr


@pytest.mark.parametrize("full", [0, 1], ids=["leader", "member"])
def test_full_disk_on_one_host(make_hosts, full):
    """Row 31: output/ of one host cannot be written: its stderr has the failure; the code is right on both hosts."""
    hosts = make_hosts(2)
    hosts.script("""
        import sys, time
        from together import *
        up()
        if rank == 3:
            sys.exit(6)
        time.sleep(600)
    """)
    host = hosts[full]
    host.machine.run("mount", "-t", "tmpfs", "-o", "size=4k,nr_inodes=1", "tmpfs", "/opt/ml/output")
    # The mount lives in the namespace of the machine's holder, which every command of this machine enters.
    hosts.start_all("-n", "2", "train.py")
    assert hosts.wait_all() == [6, 6], hosts.output()
    assert "rank 3 on algo-2 exited with code 6" in host.stderr
    assert hosts[1 - full].failure.startswith("rank 3 on algo-2 exited with code 6")
    assert "Traceback" not in host.stderr


@pytest.mark.parametrize(
    "statement",
    [
        'Path(path).write_text(\'{"message": {"mess\')',
        "os.mkfifo(path)",
        "os.symlink('/dev/zero', path)",
        "os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 1 << 30)",
    ],
    ids=["half", "fifo", "link", "huge"],
)
def test_hostile_error_file_on_the_other_host(make_hosts, statement):
    """Row 32: it is passed over, and neither host's launcher is held up or ended by it."""
    hosts = make_hosts(2)
    hosts.script(f"""
        import time
        from together import *
        path = os.environ["TORCHELASTIC_ERROR_FILE"]
        up()
        if rank == 3:
            {statement}
            os._exit(3)
        time.sleep(600)
    """)
    hosts.start_all("-n", "2", "train.py")
    hosts.assert_all_say(3, "rank 3 on algo-2 exited with code 3")
    assert "Traceback" not in hosts[0].stderr + hosts[1].stderr
