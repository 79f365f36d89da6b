"""Fault table, rows 23-25: processes that cannot be killed, that hide, and that multiply."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

CGROUP = Path("/sys/fs/cgroup")

# Starts two grandchildren in sessions of their own that ignore every polite signal and keep stdout open. The second
# has nothing left in its environment either.
ESCAPES = """
    import os, signal, sys, time
    from pathlib import Path

    def escape(name, bare):
        if os.fork():
            os.wait()
            return
        os.setsid()
        if os.fork():
            os._exit(0)
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        if bare:
            command = f"echo $$ > {name}.part; mv {name}.part {name}; while :; do sleep 600; done"
            os.execve("/bin/sh", ["sh", "-c", command], {})
        Path(name + ".part").write_text(str(os.getpid()))
        os.rename(name + ".part", name)
        while True:
            time.sleep(600)

    rank = os.environ["RANK"]
    escape(f"plain{rank}", False)
    escape(f"bare{rank}", True)
    names = [f"{kind}{number}" for kind in ("plain", "bare") for number in (0, 1)]
    while not all(os.path.exists(name) for name in names):
        time.sleep(0.01)
    print("ready", flush=True)
"""
NAMES = ("plain0", "plain1", "bare0", "bare1")


def _pids(job) -> list[int]:
    return [int(job.wait_for_file(name).read_text()) for name in NAMES]


def _guardian(launcher: int) -> int:
    """The launcher's child that is the parent of all ranks."""
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        with contextlib.suppress(OSError):
            if os.path.basename(os.readlink(f"/proc/{child}/exe")) == "_guardian":
                return int(child)
    pytest.fail(f"process {launcher} has no guardian")


@contextlib.contextmanager
def _v1_cgroup(controller: str, wait_until) -> Iterator[Path]:
    """A cgroup (version 1) of ``controller``; at the end its processes are thawed and killed, and it is removed."""
    if not (CGROUP / controller / "cgroup.procs").exists():
        pytest.skip(f"needs the {controller} controller of cgroup version 1")
    group = CGROUP / controller / f"launcher-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"cannot make a cgroup: {error}")

    def removed() -> bool:
        if (group / "freezer.state").exists():
            (group / "freezer.state").write_text("THAWED")
        for pid in (group / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        with contextlib.suppress(OSError):
            group.rmdir()
        return not group.exists()

    try:
        yield group
    finally:
        wait_until(removed, f"{group} is empty")


@pytest.mark.root
@pytest.mark.slow
def test_rank_that_cannot_be_killed_is_named_and_left(job, as_root, wait_until):
    """Row 23: a frozen rank does not die of SIGKILL (state D). The job ends all the same and names it."""
    with _v1_cgroup("freezer", wait_until) as group:
        job.script("""
            import os, time
            from pathlib import Path
            Path("up" + os.environ["RANK"]).write_text(str(os.getpid()))
            time.sleep(600)
        """)
        job.start("-n", "2", "--grace", "0.5", "train.py")
        frozen = int(job.wait_for_file("up1").read_text())
        job.wait_for_file("up0")
        (group / "cgroup.procs").write_text(str(frozen))
        (group / "freezer.state").write_text("FROZEN")
        wait_until(lambda: (group / "freezer.state").read_text() == "FROZEN\n", "a frozen rank")
        job.process.send_signal(signal.SIGTERM)
        assert job.wait(60) == 143, job.output()
        line = next(line for line in job.stderr.splitlines() if "unkillable" in line)
        assert f"pid {frozen} " in line
        assert "state D" in line
        assert Path(f"/proc/{frozen}").exists()
        assert str(frozen) in job.failure, "the failure text does not name the process"
        assert "grace period: rank 0" not in job.failure


@pytest.mark.parametrize("code", [0, 3])
def test_hidden_grandchildren_are_gone_at_the_end(job, alive, code):
    """Row 24: setsid, double fork, ignored signals, an open stdout pipe, an empty environment: none of it helps."""
    job.script(ESCAPES + f"    sys.exit({code} if rank == '0' else 0)\n")
    job.start("-n", "2", "--grace", "1", "train.py")
    pids = _pids(job)
    assert job.wait() == code, job.output()
    assert not [pid for pid in pids if alive(pid)]
    assert "left behind" in job.stderr
    assert all(str(pid) in job.stderr for pid in pids)


def test_hidden_grandchildren_are_gone_after_a_stop(job, alive):
    """Row 24: the same on the platform's stop."""
    job.script(ESCAPES + "    time.sleep(600)\n")
    job.start("-n", "2", "--grace", "1", "train.py")
    pids = _pids(job)
    job.wait_for_line("ready")
    job.process.send_signal(signal.SIGTERM)
    assert job.wait() == 143, job.output()
    assert not [pid for pid in pids if alive(pid)]


def test_nothing_outlives_a_launcher_that_was_killed(job, alive, wait_until):
    """Row 24: after SIGKILL of the launcher its ranks and all their grandchildren are gone."""
    job.script(ESCAPES + "    Path(f'rank{rank}').write_text(str(os.getpid()))\n    time.sleep(600)\n")
    job.start("-n", "2", "train.py")
    pids = [*_pids(job), *(int(job.wait_for_file(f"rank{rank}").read_text()) for rank in (0, 1))]
    pids.append(_guardian(job.process.pid))
    job.process.kill()
    assert job.wait() == -signal.SIGKILL
    wait_until(lambda: not [pid for pid in pids if alive(pid)], "nothing left")


def test_nothing_outlives_a_guardian_that_was_killed(job, alive):
    """Row 24: after SIGKILL of the guardian everything is gone, and the launcher tells a fault of its own."""
    job.script(ESCAPES + "    Path(f'rank{rank}').write_text(str(os.getpid()))\n    time.sleep(600)\n")
    job.start("-n", "2", "train.py")
    pids = [*_pids(job), *(int(job.wait_for_file(f"rank{rank}").read_text()) for rank in (0, 1))]
    os.kill(_guardian(job.process.pid), signal.SIGKILL)
    assert job.wait() == 70, job.output()
    assert not [pid for pid in pids if alive(pid)]
    assert "guardian" in job.failure
    assert "signal 9" in job.failure
    assert "Traceback" not in job.stderr


def test_daemon_that_ends_politely_has_time_to(job):
    """Row 24: what a successful job leaves behind gets SIGTERM before SIGKILL."""
    job.script("""
        import os, signal, time
        from pathlib import Path
        if os.fork() == 0:
            os.setsid()
            def finish(*_):
                Path("uploaded").write_text("all of it")
                os._exit(0)
            signal.signal(signal.SIGTERM, finish)
            Path("up").write_text("up")
            time.sleep(600)
        while not os.path.exists("up"):
            time.sleep(0.01)
    """)
    assert job.run("train.py") == 0, job.output()
    assert (job.directory / "uploaded").read_text() == "all of it"


@pytest.mark.root
@pytest.mark.slow
def test_fork_bomb_ends(job, as_root, wait_until):
    """Row 25: a rank that forks without end, up to the limit of its pids cgroup, is ended with all its copies."""
    with _v1_cgroup("pids", wait_until) as group:
        (group / "pids.max").write_text("200")
        join = ("sh", "-c", f'echo $$ > "{group}/cgroup.procs"; exec "$@"', "sh")
        job.script("""
            import os, sys, time
            if os.environ["RANK"] == "0":
                while True:
                    try:
                        os.fork()
                    except OSError:
                        time.sleep(0.01)
            while not os.path.exists("go"):
                time.sleep(0.01)
            sys.exit(3)
        """)
        job.start("-n", "2", "--grace", "1", "train.py", wrapper=join)
        wait_until(lambda: int((group / "pids.current").read_text()) >= 195, "the bomb has filled its cgroup")
        (job.directory / "go").write_text("go")
        assert job.wait(60) == 3, job.output()
        assert job.failure.startswith("rank 1 on algo-1 exited with code 3")
        assert (group / "cgroup.procs").read_text() == ""
