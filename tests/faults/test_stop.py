"""Fault table, rows 19-22: the platform's stop, the grace period, the second signal, ranks that are stopped or hang."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

# Reports SIGTERM and stays.
STUBBORN = """
    import os, signal, sys, time
    from pathlib import Path
    rank = os.environ["RANK"]
    signal.signal(signal.SIGTERM, lambda *_: Path(f"told{rank}").write_text("TERM"))
    signal.signal(signal.SIGINT, lambda *_: Path(f"told{rank}").write_text("INT"))
    Path(f"up{rank}").write_text(str(os.getpid()))
    BODY
    while True:
        time.sleep(600)
"""
STACK = "(most recent call first)"


def _start_stubborn(job, *options: str, body: str = "") -> None:
    job.script(STUBBORN.replace("BODY", body or "pass"))
    job.start("-n", "2", *options, "train.py")
    for rank in (0, 1):
        job.wait_for_file(f"up{rank}")


def _cpu_s(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_leaders_get_sigterm_once_and_their_children_none(job, wait_until):
    """Row 19: a stop reaches each rank's leader exactly once, not its helpers; the deadline is told before it."""
    job.script(
        """
        import signal, sys
        from pathlib import Path
        signal.signal(signal.SIGTERM, lambda *_: Path(sys.argv[1]).write_text("TERM"))
        Path(sys.argv[2]).write_text("up")
        while True:
            signal.pause()
        """,
        "helper.py",
    )
    job.script(
        """
        import multiprocessing, os, shutil, signal, subprocess, sys, time
        from pathlib import Path

        rank = os.environ["RANK"]
        got = []

        def on_term(*_):
            got.append(1)
            shutil.copy(os.environ["LAUNCHER_STOP_DEADLINE"], f"deadline{rank}")

        def worker(name):
            signal.signal(signal.SIGTERM, lambda *_: Path(f"forked{name}").write_text("TERM"))
            Path(f"up_forked{name}").write_text("up")
            while True:
                signal.pause()

        if __name__ == "__main__":
            forked = multiprocessing.get_context("fork").Process(target=worker, args=(rank,))
            forked.start()
            signal.signal(signal.SIGTERM, on_term)
            helper = subprocess.Popen([sys.executable, "helper.py", f"spawned{rank}", f"up_spawned{rank}"])
            while not got:
                time.sleep(0.01)
            end = time.monotonic() + 0.5  # room for a second signal, or one to the helpers
            while time.monotonic() < end:
                time.sleep(0.05)
            forked.kill()
            helper.kill()
            Path(f"count{rank}").write_text(str(len(got)))
        """
    )
    job.start("-n", "2", "--grace", "60", "train.py")
    for rank in (0, 1):
        job.wait_for_file(f"up_forked{rank}")
        job.wait_for_file(f"up_spawned{rank}")
    before = time.monotonic_ns()
    job.process.send_signal(signal.SIGTERM)
    assert job.wait() == 0, job.output()
    for rank in (0, 1):
        assert (job.directory / f"count{rank}").read_text() == "1"
        assert not (job.directory / f"spawned{rank}").exists()
        assert not (job.directory / f"forked{rank}").exists()
        assert int((job.directory / f"deadline{rank}").read_text()) >= before + 60 * 10**9


def test_checkpoint_is_written_after_sigterm(job):
    """Row 19: a script that asks ``stop_requested`` writes its checkpoint, ends with 0, and so does the job."""
    job.script(
        """
        import os, time
        from pathlib import Path
        import launcher
        context = launcher.init()
        while not context.stop_requested:
            Path(f"up{context.rank}").write_text("up")
            context.step()
            time.sleep(0.01)
        left = context.stop_seconds_left
        assert 0 < left <= 60, left
        Path(context.checkpoint_dir, f"rank{context.rank}.txt").write_text("weights")
        """
    )
    job.tree()
    job.start("--grace", "60", "-n", "2", "train.py")
    for rank in (0, 1):
        job.wait_for_file(f"up{rank}")
    job.process.send_signal(signal.SIGTERM)
    assert job.wait() == 0, job.output()
    for rank in (0, 1):
        assert (job.base / "checkpoints" / f"rank{rank}.txt").read_text() == "weights"
    assert job.failure == ""


@pytest.mark.parametrize(("number", "code", "name"), [(signal.SIGTERM, 143, "SIGTERM"), (signal.SIGINT, 130, "SIGINT")])
def test_stop_of_ranks_that_do_nothing_about_it(job, number, code, name):
    """Row 19: ranks without a handler end; the job's code and text say that it was stopped, and by what."""
    job.script("""
        import os, time
        from pathlib import Path
        Path("up" + os.environ["RANK"]).write_text("up")
        time.sleep(600)
    """)
    job.start("-n", "2", "--grace", "600", "train.py")
    for rank in (0, 1):
        job.wait_for_file(f"up{rank}")
    job.process.send_signal(number)
    assert job.wait() == code, job.output()
    assert job.failure.startswith(f"stopped by {name}")
    assert f"stopped by {name}" in job.stderr


def test_grace_is_kept_on_a_stop(job, wait_until):
    """Row 20: a rank that ignores SIGTERM is killed when --grace is over, no sooner; waiting for it costs no CPU."""
    _start_stubborn(job, "--grace", "2")
    sent, used = time.monotonic(), _cpu_s(job.process.pid)
    job.process.send_signal(signal.SIGTERM)
    seen = [used]

    def ended() -> bool:
        seen.append(max(seen[-1], _cpu_s(job.process.pid)))
        return job.process.poll() is not None

    wait_until(ended, "the end of the job", 20)
    assert time.monotonic() - sent >= 2
    assert job.process.returncode == 143
    assert (job.directory / "told0").read_text() == (job.directory / "told1").read_text() == "TERM"
    assert "killed at the end of the grace period: rank 0, 1" in job.failure
    assert seen[-1] - used < 1, "the launcher was busy while it had nothing to do but wait"


def test_grace_is_kept_after_a_failure(job):
    """Row 20: the same grace holds when another rank has failed; the culprit's code stays the job's."""
    _start_stubborn(
        job,
        "--grace",
        "1.5",
        body="""
    if rank == "0":
        while not Path("up1").exists():
            time.sleep(0.01)
        Path("failed").write_text(str(time.monotonic_ns()))
        sys.exit(3)
    """,
    )
    assert job.wait(20) == 3, job.output()
    ended = time.monotonic_ns()
    assert ended - int((job.directory / "failed").read_text()) >= 1_500_000_000
    assert (job.directory / "told1").read_text() == "TERM"
    assert job.failure.startswith("rank 0 on algo-1 exited with code 3")
    assert "grace period over: killing rank 1" in job.stderr


def test_culprit_that_is_cut_short_in_its_teardown_keeps_its_failure(job):
    """Row 20: a rank whose exception is on record hangs in its teardown until the launcher ends it, on account of
    another rank that failed later. Exit code and text are those of its exception, not of the launcher's signal."""
    job.script("""
        import atexit, os, time
        from pathlib import Path
        def hang():
            Path("raised").write_text("first")
            time.sleep(600)
        if os.environ["RANK"] == "1":
            atexit.register(hang)
            raise ValueError("first")
        while not os.path.exists("raised"):
            time.sleep(0.01)
        raise RuntimeError("second")
    """)
    assert job.run("-n", "2", "train.py") == 1, job.output()
    assert job.failure.startswith("rank 1 on algo-1 failed: ValueError: first")


@pytest.mark.parametrize(("number", "code", "word"), [(signal.SIGTERM, 143, "TERM"), (signal.SIGINT, 130, "INT")])
def test_second_signal_kills_at_once(job, number, code, word):
    """Row 21: SIGTERM or Ctrl-C twice does not wait for the grace of ten minutes, and the failure is still written."""
    _start_stubborn(job, "--grace", "600")
    job.process.send_signal(number)
    for rank in (0, 1):
        assert job.wait_for_file(f"told{rank}").read_text() == word
    job.process.send_signal(number)
    assert job.wait() == code, job.output()
    assert "second signal: killing all ranks now" in job.stderr
    assert job.failure.startswith(f"stopped by SIG{word}")
    assert "end of the grace period" not in job.failure, "they were killed by the second signal, long before"
    assert job.failure_json["detail"]["exit_code"] == code


def test_stop_during_a_failure_does_not_hide_the_failure(job):
    """Row 21: the platform's stop arrives while a failure is being dealt with; the failure was first."""
    _start_stubborn(
        job,
        "--grace",
        "600",
        body="""
    if rank == "0":
        while not Path("up1").exists():
            time.sleep(0.01)
        sys.exit(3)
    """,
    )
    job.wait_for_file("told1")
    job.process.send_signal(signal.SIGTERM)
    job.wait_for_line("SIGTERM: ", "stderr")
    job.process.send_signal(signal.SIGTERM)
    assert job.wait() == 3, job.output()
    assert job.failure.startswith("rank 0 on algo-1 exited with code 3")


def test_stopped_rank_is_continued_and_ended_by_a_stop(job, wait_until):
    """Row 22: a rank in state T gets SIGCONT with its SIGTERM, so it can end by itself; the report tells."""
    job.script("""
        import os, signal, sys, time
        from pathlib import Path
        rank = os.environ["RANK"]
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(4))
        Path(f"up{rank}").write_text(str(os.getpid()))
        time.sleep(600)
    """)
    job.start("-n", "2", "--grace", "600", "train.py")
    pids = [int(job.wait_for_file(f"up{rank}").read_text()) for rank in (0, 1)]
    os.kill(pids[1], signal.SIGSTOP)
    wait_until(lambda: Path(f"/proc/{pids[1]}/stat").read_text().rpartition(")")[2].split()[0] == "T", "state T")
    job.process.send_signal(signal.SIGTERM)
    assert job.wait() == 143, job.output()
    records = job.failure_json["detail"]["records"]
    assert [record["was_stopped"] for record in records] == [False, True]
    assert [record["value"] for record in records] == [4, 4]
    assert "rank 1" in job.failure
    assert "SIGSTOP" in job.failure, "the text does not say that the rank had been stopped"


def test_stopped_rank_is_ended_after_a_failure(job, wait_until):
    """Row 22: with another rank failed, a rank in state T does not keep the job until the end of the grace."""
    job.script("""
        import os, signal, sys, time
        from pathlib import Path
        rank = os.environ["RANK"]
        if rank == "1":
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(600)
        Path("up").write_text("up")
        while not Path("go").exists():
            time.sleep(0.01)
        sys.exit(3)
    """)
    job.start("-n", "2", "--grace", "600", "train.py")
    job.wait_for_file("up")

    def stopped() -> bool:
        states = (Path(f"/proc/{pid}/stat") for pid in job.ranks())
        return any(path.exists() and path.read_text().rpartition(")")[2].split()[0] == "T" for path in states)

    wait_until(stopped, "a rank in state T")
    (job.directory / "go").write_text("go")
    assert job.wait() == 3, job.output()
    assert job.failure.startswith("rank 0 on algo-1 exited with code 3")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["sleeping", "stopped"])
def test_hang_is_found_and_all_stacks_are_kept(job, how):
    """Row 22: ranks that sleep for ever, or one that is stopped, are a hang: code 75 and the stacks of all ranks."""
    job.script(f"""
        import os, signal, time
        def train_for_ever():
            if os.environ["RANK"] == "1" and {how == "stopped"}:
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(600)
        train_for_ever()
    """)
    assert job.run("-n", "2", "--hang-timeout", "2", "train.py") == 75, job.output()
    assert job.failure.startswith("hang: ")
    assert "hang: " in job.stderr
    for rank in (0, 1):
        stacks = job.rank_file(rank, "stderr.log").read_text()
        assert STACK in stacks
        assert "in train_for_ever" in stacks


@pytest.mark.slow
def test_work_of_any_kind_is_no_hang(make_job):
    """Row 22 (28): a rank that only writes to a disk, only computes, or only logs is left alone."""
    bodies = {
        "disk": 'with open("checkpoint", "ab", buffering=0) as file:\n'
        "                while time.monotonic() < end:\n"
        "                    file.write(bytes(4096)); time.sleep(0.3)",
        "cpu": "while time.monotonic() < end:\n                pass",
        "log": "while time.monotonic() < end:\n                print('step', flush=True); time.sleep(0.5)",
    }
    jobs = {name: make_job(name) for name in bodies}
    for name, body in bodies.items():
        jobs[name].script(f"""
        import os, time
        end = time.monotonic() + 5
        if os.environ["RANK"] == "0":
            {body}
        else:
            time.sleep(5)
        """)
        jobs[name].start("-n", "2", "--hang-timeout", "2", "train.py")
    for name, one in jobs.items():
        assert one.wait() == 0, f"{name}\n{one.output()}"
        assert "hang" not in one.stderr
