"""Rows of the fault table that one host has tests for already, again with the fault on the second of two hosts: the
same culprit is named on both, both end with the same code, and nothing is left running on either."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..faults.test_environment import _children
from ..faults.test_logs import _rss_kib
from ..faults.test_memory import CHILD, MIB, Group, memory_group
from ..faults.test_process_tree import _v1_cgroup
from ..faults.test_signals import FILL

pytestmark = pytest.mark.root

STACK = "(most recent call first)"

# ---- rows 7, 9: memory


@pytest.fixture
def limited(as_root, wait_until) -> Iterator[Group]:
    """A memory cgroup of 200 MiB; removed when the test is over."""
    yield from memory_group("other-host", 200 * MIB, wait_until)


@pytest.mark.slow
def test_oom_kill_of_a_child_on_the_other_host(limited, make_hosts):
    """Row 7: only a helper of rank 2 is killed; both hosts blame rank 2 through it, with its pid and its command."""
    hosts = make_hosts(2)
    hosts.script(CHILD.replace("METHOD", "fork").replace("DELAY", "2.5"))
    hosts[0].start("-n", "2", "train.py")
    hosts[1].start("-n", "2", "train.py", wrapper=limited.wrapper)
    detail = hosts.assert_all_say(1, "rank 2 on algo-2 failed after its child process ")
    child = (hosts[1].base / "code" / "child").read_text()
    headline = hosts[0].failure.splitlines()[0]
    assert f"its child process {child} (python" in headline
    assert "was OOM-killed, cgroup oom_kill +1" in headline
    assert "my worker ended with -9" in headline
    assert set(detail["victims"]) == {"0", "1", "3"}


@pytest.mark.parametrize("unlink", [False, True], ids=["full", "free again"])
def test_sigbus_on_the_other_hosts_shared_memory(make_hosts, unlink):
    """Row 9: /dev/shm of the second host is small and gets full; its size and the advice are on both hosts."""
    hosts = make_hosts(2)
    hosts[1].machine.run("mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", "/dev/shm")
    hosts.script(FILL.replace('"RANK"] == "0"', '"RANK"] == "3"').replace("UNLINK", str(unlink)))
    hosts.start_all("-n", "2", "train.py")
    hosts.assert_all_say(135, "rank 3 on algo-2 was killed by SIGBUS")
    head = hosts[0].failure[:1024]
    assert ("/dev/shm is full" in head) == (not unlink)
    assert "/dev/shm" in head
    assert "of 8.0 MiB free" in head or "8.0 MiB of 8.0 MiB" in head
    assert "num_workers=0" in head
    assert "Fatal Python error: Bus error" in hosts[0].failure
    assert "in fill" in hosts[0].failure


# ---- rows 10, 11: texts of libraries


def test_watchdogs_of_all_ranks_but_one(make_hosts):
    """Row 10: the watchdogs of three ranks give up and abort them; rank 3, on the other host, never came to that
    collective and says nothing. It is the culprit, the others are victims."""
    hosts = make_hosts(2)
    hosts.script("""
        import signal, sys, time
        from together import *
        up()
        if rank == 3:
            time.sleep(600)
        print(f"[rank{rank}]:[E ProcessGroupNCCL.cpp:629] [Rank {rank}] Watchdog caught collective operation timeout: "
              "WorkNCCL(SeqNum=17, OpType=ALLREDUCE, NumelIn=4096, NumelOut=4096, Timeout(ms)=600000) ran for 600021 "
              "milliseconds before timing out.", file=sys.stderr, flush=True)
        tell(f"gave up {rank}")
        wait_for("gave up 0", "gave up 1", "gave up 2")
        os.kill(os.getpid(), signal.SIGABRT)
    """)
    hosts.start_all("-n", "2", "train.py")
    detail = hosts.assert_all_say(134, "rank 3 on algo-2 did not reach collective 17 (ALLREDUCE)")
    assert (detail["culprit"]["rank"], detail["culprit"]["host"]) == (3, "algo-2")
    assert set(detail["victims"]) == {"0", "1", "2"}


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        (
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB",
            "the GPU's memory is full",
        ),
        ("CUDA error: device-side assert triggered", "CUDA_LAUNCH_BLOCKING=1"),
        ("NVRM: Xid (PCI:0000:10:1c): 79, pid=4242, GPU has fallen off the bus.", "replace the host"),
    ],
    ids=["out of memory", "device assert", "xid"],
)
def test_class_of_a_gpus_error_on_the_other_host(make_hosts, text, advice):
    """Row 11: what it is and what to do is on both hosts, whatever rank 0 says and however soon it ends after that."""
    hosts = make_hosts(2)
    hosts.script(f"""
        import atexit, signal, time
        from together import *
        up()
        if rank == 3:
            atexit.register(wait_for_end, int((shared / "up0-0").read_text()))
            atexit.register(tell, "raised")  # runs first: the exception has left the script by now
            raise RuntimeError({text!r})
        if rank == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            wait_for("raised")
            raise RuntimeError("NCCL error: remote process exited or there was a network error")
        time.sleep(600)
    """)
    hosts.start_all("-n", "2", "train.py")
    detail = hosts.assert_all_say(1, "rank 3 on algo-2 failed: RuntimeError: " + text)
    assert advice in hosts[0].failure[:1024]
    assert set(detail["victims"]) == {"0", "1", "2"}
    assert "rank 0: lost its connection to another rank" in hosts[1].failure


# ---- rows 23, 25: processes that cannot be killed, and that multiply


@pytest.mark.slow
def test_rank_of_the_other_host_that_cannot_be_killed(make_hosts, wait_until):
    """Row 23: a frozen rank does not die of SIGKILL (state D). Both hosts end all the same and name its process."""
    hosts = make_hosts(2)
    hosts.script("""
        import sys, time
        from together import *
        up()
        if rank == 2:
            wait_for("go")
            sys.exit(3)
        time.sleep(600)
    """)
    with _v1_cgroup("freezer", wait_until) as group:
        hosts.start_all("-n", "2", "--grace", "0.5", "train.py")
        frozen = hosts.wait_for_ranks(3, *range(4))[0]
        (group / "cgroup.procs").write_text(str(frozen))
        (group / "freezer.state").write_text("FROZEN")
        wait_until(lambda: (group / "freezer.state").read_text() == "FROZEN\n", "a frozen rank")
        hosts.tell("go")
        assert hosts.wait_all() == [3, 3], hosts.output()
        assert hosts[0].failure.startswith("rank 2 on algo-2 exited with code 3")
        assert hosts.failures() == [hosts[0].failure] * 2
        line = next(line for line in hosts[1].stderr.splitlines() if "unkillable" in line)
        assert f"pid {frozen} " in line
        assert "state D" in line
        assert f"did not end on SIGKILL: {frozen} D" in hosts[0].failure
        left = [host.machine.processes() for host in hosts]
        assert not left[0]
        assert list(left[1]) == [frozen]
    hosts.assert_nothing_left()


@pytest.mark.slow
def test_fork_bomb_on_the_other_host(make_hosts, wait_until):
    """Row 25: rank 3 forks without end, up to the limit of its host's pids cgroup; rank 2 fails beside it."""
    hosts = make_hosts(2)
    hosts.script("""
        import sys, time
        from together import *
        up()
        while rank == 3:
            try:
                os.fork()
            except OSError:
                time.sleep(0.01)
        if rank == 2:
            wait_for("go")
            sys.exit(3)
        time.sleep(600)
    """)
    with _v1_cgroup("pids", wait_until) as group:
        (group / "pids.max").write_text("200")
        join = ("sh", "-c", f'echo $$ > "{group}/cgroup.procs"; exec "$@"', "sh")
        hosts[0].start("-n", "2", "--grace", "1", "train.py")
        hosts[1].start("-n", "2", "--grace", "1", "train.py", wrapper=join)
        hosts.wait_until(lambda: int((group / "pids.current").read_text()) >= 195, "the bomb has filled its cgroup")
        hosts.tell("go")
        hosts.assert_all_say(3, "rank 2 on algo-2 exited with code 3")
        assert (group / "cgroup.procs").read_text() == ""


# ---- rows 27, 28: hangs, and what is none


@pytest.mark.slow
def test_hang_before_the_first_step(make_hosts):
    """Row 27: rank 3 sticks in an import, and the others wait for it at rank 0's port: a hang, said to be before the
    first step, with every rank's stack."""
    hosts = make_hosts(2)
    hosts[1].script(
        """
        import threading
        lock = threading.Lock()
        lock.acquire()
        lock.acquire()
        """,
        "stuck_import.py",
    )
    hosts.script("""
        import launcher
        from together import *

        def wait_for_all():
            meet()

        context = launcher.init()
        up()
        if rank == 3:
            import stuck_import
        wait_for_all()
        context.step()
    """)
    hosts.start_all("-n", "2", "--hang-timeout", "2", "train.py")
    hosts.assert_all_say(75, "hang: no log, no step and no I/O in any rank for 2 s; no rank has reported a step yet")
    for rank in range(4):
        stacks = hosts[rank // 2].rank_file(rank % 2, "stderr.log").read_text()
        assert STACK in stacks
        assert ("stuck_import.py" if rank == 3 else "in wait_for_all") in stacks


@pytest.mark.slow
def test_slow_checkpoint_on_either_host_is_no_hang(make_hosts):
    """Row 28: one rank writes for longer than the limit, while the others wait for it and print nothing; first on the
    second host, then on the first."""
    hosts = make_hosts(2)
    for rank in range(4):
        os.mkfifo(hosts.shared / f"wake{rank}")
    hosts.script("""
        import time
        from together import *

        def write():
            end = time.monotonic() + 4
            with open(f"/opt/ml/checkpoints/rank{rank}", "ab", buffering=0) as file:
                while time.monotonic() < end:
                    file.write(bytes(4096))
                    time.sleep(0.3)

        def sleep_until_woken():  # polls nothing: to its host it is as still as a rank that hangs
            (shared / f"wake{rank}").read_bytes()

        def wake(*ranks):
            for other in ranks:
                (shared / f"wake{other}").write_bytes(b"x")

        up()
        if rank == 3:
            write()
            wake(0)
            sleep_until_woken()
        else:
            sleep_until_woken()
        if rank == 0:
            write()
            wake(1, 2, 3)
    """)
    assert hosts.run_all("-n", "2", "--hang-timeout", "2", "train.py") == [0, 0], hosts.output()
    assert hosts.failures() == ["", ""]
    assert "hang" not in hosts.output()


# ---- rows 29, 30: logs


@pytest.mark.slow
def test_flood_on_the_other_host(make_hosts):
    """Row 29: rank 2 writes as fast as it can. The first host's lines come one by one meanwhile, those of rank 3 are
    all there, the second host needs little memory for it, and the failure that ends it is on both."""
    hosts = make_hosts(2)
    hosts.script(r"""
        import sys, time
        from together import *

        def put(data):
            view = memoryview(data)
            while view:
                view = view[os.write(1, view):]
            return len(data)

        up()
        if rank == 0:
            for number in range(20):
                wait_for(f"next{number}")
                put(b"line %d of rank 0\n" % number)
        elif rank == 2:
            binary = bytes(byte for byte in range(256) if byte != 10) * 40 + b"\n"
            bars = b"".join(b"\r%3d%%" % percent for percent in range(100)) + b"\n"
            written = put(b"\xc3\xa4" * 5_000_000 + b"\n")
            tell("floods")
            while written < 50_000_000 or not (shared / "seen").exists():
                written += put((binary + bars + b"\xe2\x82" * 500 + b"\xff\n") * 80)
            put(b"the end\n")
            tell("flooded")
        elif rank == 3:
            number = 0
            while not (shared / "flooded").exists():
                put(b"line %06d of rank 3, in one piece\n" % number)
                number += 1
                time.sleep(0.001)
            tell("count", str(number))
            sys.exit(3)
        time.sleep(600)
    """)
    hosts.start_all("-n", "2", "--log-max-mb", "8", "train.py")
    hosts.wait_for_file("floods")
    launcher = hosts[1].process.pid
    peak = 0
    for number in range(20):
        hosts.tell(f"next{number}")
        hosts[0].wait_for_line(f"line {number} of rank 0")
        guardians = [pid for pid in _children(launcher) if "guard" in Path(f"/proc/{pid}/comm").read_text()]
        assert guardians
        peak = max(peak, sum(_rss_kib(pid) for pid in (launcher, *guardians)))
    hosts.tell("seen")
    hosts.assert_all_say(3, "rank 3 on algo-2 exited with code 3")
    assert 0 < peak < 100 * 1024, f"{peak} KiB"
    shown = hosts[1].stdout_path.read_bytes().splitlines(keepends=True)
    start = re.compile(rb"\[algo-2 r[23] l[01]\] |\[launcher\] ")
    assert not [line[:200] for line in shown if not start.match(line)][:3]
    expected = [b"line %06d of rank 3, in one piece\n" % number for number in range(int(hosts.wait_for_file("count")))]
    assert [line.partition(b"] ")[2] for line in shown if line.startswith(b"[algo-2 r3 l1] ")] == expected
    parts = list(hosts[1].rank_file(0, "stdout.log").parent.glob("stdout.log*"))
    assert 4 << 20 < sum(path.stat().st_size for path in parts) <= 9 << 20


@pytest.mark.parametrize("comes_back", [True, False], ids=["reader comes back", "nobody reads"])
def test_blocked_reader_on_the_other_host(make_hosts, comes_back):
    """Row 30: nobody reads the second host's console: its ranks work on, the first host's lines come as ever, and the
    job ends with its code on both. A reader that comes back is told what it missed."""
    hosts = make_hosts(2)
    hosts.script(r"""
        import sys, time
        from together import *
        up()
        for number in range(40_000 if rank > 1 else 10):
            os.write(1, b"line %06d ................................................................\n" % number)
        tell(f"written{rank}")
        wait_for("go")
        if rank == 3:
            sys.exit(3)
        time.sleep(600)
    """)
    reading, writing = os.pipe()
    seen: list[bytes] = []
    with os.fdopen(reading, "rb") as console:
        hosts[0].start("-n", "2", "train.py")
        hosts[1].start("-n", "2", "train.py", stdout=writing)
        os.close(writing)
        for rank in range(4):
            hosts.wait_for_file(f"written{rank}")
        for rank in (0, 1):
            hosts[0].wait_for_line(f"[algo-1 r{rank} l{rank}] line 000009")
        reader = threading.Thread(target=lambda: seen.extend(console), daemon=True)
        if comes_back:
            reader.start()
        hosts.tell("go")
        hosts.assert_all_say(3, "rank 3 on algo-2 exited with code 3")
        if comes_back:
            reader.join(30)
            assert not reader.is_alive()
    dropped = []
    for local_rank in (0, 1):
        assert len(hosts[1].rank_file(local_rank, "stdout.log").read_bytes().splitlines()) == 40_000
        if comes_back:
            shown = sum(line.startswith(b"[algo-2 r%d " % (local_rank + 2)) for line in seen)
            notes = [line for line in seen if line.startswith(b"[launcher] local rank %d: " % local_rank)]
            dropped.append(
                sum(int(re.search(rb": (\d+) lines \(\d+ bytes\) were not shown", note)[1]) for note in notes)
            )
            assert shown + dropped[-1] == 40_000
    assert any(dropped) == comes_back  # which of the two ranks is the first to find no room is a matter of chance
