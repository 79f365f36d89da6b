"""Rows 39-42 of the fault table with the fault on the second host: process 1, odd parents, tight limits, and a wall
clock that jumps. Both hosts say the same and end with the same code, and nothing is left running on either."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
from pathlib import Path

import pytest

from ..faults.test_environment import (
    AS_PID_1,
    _children,
    _clock_environment,
    _compile,
    _handles_sigterm,
    _state,
    _zombies_of,
)

pytestmark = pytest.mark.root

# ---- rows 39, 40: process 1, and odd parents


@pytest.mark.parametrize("ending", ["failure", "stop"])
def test_launcher_of_the_other_host_is_process_1(make_hosts, ending):
    """Row 39: the second host's launcher is process 1, and has 1000 orphans of a rank to reap: no zombie stays while
    the job runs, and it ends as on any host, after a failure and by SIGTERM to process 1."""
    hosts = make_hosts(2)
    hosts.script("""
        import sys, time
        from together import *
        for number in range(1000 if rank == 3 else 0):
            pid = os.fork()
            if pid == 0:
                if os.fork() == 0:
                    time.sleep(0.001)
                os._exit(0)
            os.waitpid(pid, 0)
        up()
        if rank == 3:
            wait_for("go")
            sys.exit(3)
        time.sleep(600)
    """)
    hosts[0].start("-n", "2", "--grace", "600", "train.py")
    hosts[1].start("-n", "2", "--grace", "600", "train.py", wrapper=AS_PID_1)
    launcher = hosts.wait_until(lambda: next(iter(_children(hosts[1].process.pid)), 0), "the launcher's process")
    hosts.wait_for_ranks(*range(4))
    parents = {launcher, *_children(launcher)}
    assert len(parents) > 1

    def only_the_job() -> bool:
        return not _zombies_of(parents) and len(_children(launcher)) == 1

    hosts.wait_until(only_the_job, "no zombie and no orphan")
    if ending == "stop":
        os.kill(launcher, signal.SIGTERM)
        hosts.assert_all_say(143, "stopped by SIGTERM")
    else:
        hosts.tell("go")
        hosts.assert_all_say(3, "rank 3 on algo-2 exited with code 3")


WITH_ORPHANS = """
    import signal, time
    from together import *
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    middle = os.fork()
    if middle == 0:
        if os.fork() == 0:
            tell(f"orphan{rank}", str(os.getpid()))
            time.sleep(600)
        os._exit(0)
    os.waitpid(middle, 0)
    wait_for(f"orphan{rank}")
    up()
    time.sleep(600)
"""


def test_shell_that_ignores_sigterm_on_the_other_host(make_hosts):
    """Row 40: the second host's launcher was started with SIGTERM ignored, and handles it all the same; orphans are
    its own, not the shell's."""
    hosts = make_hosts(2)
    hosts.script(WITH_ORPHANS)
    shell = ("sh", "-c", "trap '' TERM; \"$@\" & echo $! > pid; wait $!; exit $?", "sh")
    hosts[0].start("-n", "2", "--grace", "600", "train.py")
    hosts[1].start("-n", "2", "--grace", "600", "train.py", wrapper=shell)
    hosts.wait_for_ranks(*range(4))
    launcher = int((hosts[1].base / "code" / "pid").read_text())
    ours = {launcher, *_children(launcher)}
    assert all(_state(int(hosts.wait_for_file(f"orphan{rank}")))[1] in ours for rank in (2, 3))
    hosts.wait_until(lambda: _handles_sigterm(launcher), "a handler of SIGTERM")
    os.kill(launcher, signal.SIGTERM)
    hosts.assert_all_say(143, "stopped by SIGTERM")


def test_job_follows_the_parent_of_the_other_hosts_launcher(make_hosts):
    """Row 40: with --follow-parent on, the end of what had started the second host's launcher ends the whole job."""
    hosts = make_hosts(2)
    hosts.script(WITH_ORPHANS)
    shell = ("sh", "-c", '"$@" & echo $! > pid; wait', "sh")
    options = ("-n", "2", "--follow-parent", "on", "--grace", "600", "train.py")
    hosts[0].start(*options)
    hosts[1].start(*options, wrapper=shell)
    hosts.wait_for_ranks(*range(4))
    launcher = int((hosts[1].base / "code" / "pid").read_text())
    hosts.wait_until(lambda: _handles_sigterm(launcher) and _state(launcher)[0] == "S", "a launcher that waits")
    hosts[1].process.kill()
    assert hosts.wait_all() == [143, -signal.SIGKILL], hosts.output()
    hosts.assert_nothing_left()
    assert hosts[0].failure.startswith("stopped by SIGTERM")
    assert hosts.failures() == [hosts[0].failure] * 2


# ---- row 41: tight limits


def test_few_descriptors_on_the_other_host(make_hosts):
    """Row 41: ulimit -n 256 is enough, and the host that has it warns."""
    hosts = make_hosts(2)
    hosts.script("""
        import sys, time
        from together import *
        up()
        if rank == 3:
            sys.exit(3)
        time.sleep(600)
    """)
    few = ("sh", "-c", 'ulimit -n 256; exec "$@"', "sh")
    hosts[0].start("-n", "2", "train.py")
    hosts[1].start("-n", "2", "train.py", wrapper=few)
    hosts.assert_all_say(3, "rank 3 on algo-2 exited with code 3")
    assert "WARNING: only 256 open files are allowed" in hosts[1].stderr


@pytest.mark.parametrize("limit", [16, 32])
def test_too_few_descriptors_on_the_other_host(make_hosts, limit):
    """Row 41: too few to start all its ranks: both hosts name one of them, the host and the limit."""
    hosts = make_hosts(2)
    hosts.script("import time; time.sleep(600)")
    few = ("sh", "-c", f'ulimit -n {limit}; exec "$@"', "sh")
    hosts[0].start("-n", "12", "train.py")
    hosts[1].start("-n", "12", "train.py", wrapper=few)
    detail = hosts.assert_all_say(126, "rank ")
    assert " on algo-2 failed: cannot be started: " in hosts[0].failure.splitlines()[0]
    assert "the limit of open files is reached: ulimit -n" in hosts[0].failure.splitlines()[0]
    assert set(map(int, detail["victims"])) >= set(range(12))
    assert "Traceback" not in hosts.output()


def test_descriptors_of_a_member_run_out(make_hosts):
    """Row 41: no descriptor is left when a host that has joined is to start its ranks: all say which host it was."""
    hosts = make_hosts(3)
    hosts.script("import time; time.sleep(600)")
    for host in hosts[:2]:
        host.start("-n", "1", "train.py")
    member = hosts[1].process.pid

    def joined() -> bool:
        # Fields 2 and 3 of a line are the peer's address and port, and the state: established.
        lines = [line.split() for line in Path(f"/proc/{member}/net/tcp").read_text().splitlines()[1:]]
        return any(line[2].endswith(f":{7780:04X}") and line[3] == "01" for line in lines)

    hosts.wait_until(joined, "the connection of algo-2")
    used = {int(entry.name) for entry in Path(f"/proc/{member}/fd").iterdir()}
    resource.prlimit(member, resource.RLIMIT_NOFILE, (min(set(range(len(used) + 1)) - used), 1024))
    hosts[2].start("-n", "1", "train.py")
    assert hosts.wait_all() == [74, 74, 74], hosts.output()
    hosts.assert_nothing_left()
    assert all("algo-2: Too many open files" in host.failure for host in (hosts[0], hosts[2]))
    assert "Too many open files" in hosts[1].failure
    assert "Traceback" not in hosts.output()


@pytest.mark.parametrize("limit", [2, 4, 6, 9])
def test_too_few_processes_on_the_other_host(make_hosts, limit):
    """Row 41: wherever its limit of processes strikes, that host names it, and the job ends on both: with the rank
    that could not be started, or without the host that could not join."""
    if not (shutil.which("setpriv") and shutil.which("prlimit")):
        pytest.skip("needs setpriv and prlimit")
    hosts = make_hosts(2)
    hosts.script("import time; time.sleep(600)")
    # The limit does not hold for root. The other user may read and write everything, so that it finds its interpreter.
    capabilities = "-all,+dac_read_search,+dac_override"
    user = ("--reuid", "54322", "--regid", "54322", "--clear-groups")
    other = ("setpriv", *user, f"--inh-caps={capabilities}", f"--ambient-caps={capabilities}")
    options = ("-n", "6", "--join-timeout", "2", "train.py")
    hosts[0].start(*options)
    hosts[1].start(*options, wrapper=(*other, "prlimit", f"--nproc={limit}"))
    codes = hosts.wait_all()
    hosts.assert_nothing_left()
    assert re.search("limit of processes|Resource temporarily unavailable", hosts[1].stderr), hosts.output()
    for word in ("Traceback", "terminate called", "please report it"):
        assert word not in hosts.output()
    if codes[1] == 126:
        assert codes[0] == 126
        assert " on algo-2 failed: cannot be started: " in hosts[0].failure.splitlines()[0]
        assert hosts.failures() == [hosts[0].failure] * 2
    else:
        assert codes == [69, 70], hosts.output()
        assert "1 of 2 hosts did not come after 2 s (--join-timeout): algo-2" in hosts[0].failure


def test_no_shared_memory_on_the_other_host(make_hosts):
    """Row 41: no /dev/shm, /proc/sys not writable: nothing of ours needs them, and a SIGBUS is told on both hosts."""
    hosts = make_hosts(2)
    hosts.script("""
        import signal, time
        from together import *
        up()
        if rank == 3:
            assert not os.path.exists("/dev/shm")
            os.kill(os.getpid(), signal.SIGBUS)
        time.sleep(600)
    """)
    bare = hosts[1].directory / "dev"
    bare.mkdir()
    mounts = (
        f"mount -t tmpfs tmpfs '{bare}'",
        f"for name in null zero random urandom; do : >'{bare}'/$name; mount --bind /dev/$name '{bare}'/$name; done",
        f"mount --rbind '{bare}' /dev",
        "mount --bind /proc/sys /proc/sys",
        "mount -o remount,bind,ro /proc/sys",
    )
    hosts[1].machine.run("sh", "-ec", "; ".join(mounts))
    hosts.start_all("-n", "2", "train.py")
    hosts.assert_all_say(135, "rank 3 on algo-2 was killed by SIGBUS")
    assert "Traceback" not in hosts[0].stderr + hosts[1].stderr


def test_sandbox_without_pidfd_on_the_other_host(make_hosts):
    """Row 41: pidfd_open is refused there: said once, and ends, stops and sweeps work as ever."""
    hosts = make_hosts(2)
    sandbox = _compile("without_pidfd.c", hosts[1].directory)
    hosts.script("""
        import signal, sys, time
        from together import *
        if os.fork() == 0:
            os.setsid()
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            tell(f"away{rank}", str(os.getpid()))
            time.sleep(600)
        wait_for(f"away{rank}")
        up()
        if rank == 3:
            try:
                os.pidfd_open(os.getpid())
            except PermissionError:
                sys.exit(3)
        time.sleep(600)
    """)
    hosts[0].start("-n", "2", "train.py")
    hosts[1].start("-n", "2", "train.py", wrapper=(sandbox,))
    hosts.assert_all_say(3, "rank 3 on algo-2 exited with code 3")
    assert [host.stderr.count("pidfd_open") for host in hosts] == [0, 1]


# ---- row 42: a wall clock that steps back


def test_order_when_the_other_hosts_wall_clock_steps_back(make_hosts):
    """Row 42: rank 3 fails first, and its host's wall clock goes back an hour; rank 0 fails next, and ends first."""
    hosts = make_hosts(2)
    environment = _clock_environment(hosts[1].job)
    hosts.script("""
        import atexit, signal, time
        from together import *

        def slow_teardown():  # runs after the failure has been recorded
            Path(os.environ["SHIFT_CLOCK_TRIGGER"]).write_text("now")
            assert time.time() < Path(os.environ["SHIFT_CLOCK_TRIGGER"]).stat().st_mtime - 3000
            tell("stepped")
            wait_for_end(int((shared / "up0-0").read_text()))

        up()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if rank == 3:
            atexit.register(slow_teardown)
            raise ValueError("first")
        if rank == 0:
            wait_for("stepped")
            raise RuntimeError("second")
        wait_for_end(int((shared / "up0-3").read_text()))
    """)
    hosts[0].start("-n", "2", "train.py")
    hosts[1].start("-n", "2", "train.py", env=environment)
    detail = hosts.assert_all_say(1, "rank 3 on algo-2 failed: ValueError: first")
    (clock,) = detail["evidence"]["clocks"]
    assert abs(clock["offset_ns"]) <= clock["uncertainty_ns"] + 1_000_000


def test_grace_when_the_other_hosts_wall_clock_steps_back(make_hosts):
    """Row 42: ranks of that host that do not end get their grace, no less and no more, and no host is given up."""
    hosts = make_hosts(2)
    environment = _clock_environment(hosts[1].job)
    hosts.script("""
        import signal, time
        from together import *

        def on_term(*_):
            trigger = os.environ.get("SHIFT_CLOCK_TRIGGER")
            if trigger:
                Path(trigger).write_text("now")
            deadline_ns = int(Path(os.environ["LAUNCHER_STOP_DEADLINE"]).read_text())
            tell(f"told{rank}", str(deadline_ns))

        signal.signal(signal.SIGTERM, on_term)
        up()
        while True:
            time.sleep(600)
    """)
    hosts[0].start("-n", "2", "--grace", "1", "train.py")
    hosts[1].start("-n", "2", "--grace", "1", "train.py", env=environment)
    hosts.wait_for_ranks(*range(4))
    hosts[0].signal(signal.SIGTERM)
    detail = hosts.assert_all_say(143, "stopped by SIGTERM; killed at the end of the grace period: rank 0, 1, 2, 3")
    for record in detail["records"]:
        assert record["ended_ns"] >= int(hosts.wait_for_file(f"told{record['rank']}")) - 1_000_000
