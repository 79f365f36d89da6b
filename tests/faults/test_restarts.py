"""Fault table: the whole group is started again after a failure, and not for ever."""

from __future__ import annotations

import signal

import pytest

COUNT = """
    import os, sys, time
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if os.environ["RANK"] == "0":
        with open("attempts", "a") as file:
            file.write(f"{attempt}\\n")
"""


def attempts(job):
    return [int(line) for line in (job.directory / "attempts").read_text().split()]


def test_crash_loop(job):
    """Row 46: a rank fails at step 0 three times: the fourth of eleven attempts is not made."""
    job.script(COUNT + '\n    raise ValueError("always")\n')
    assert job.run("-n", "1", "--max-restarts", "10", "train.py") == 1
    assert attempts(job) == [0, 1, 2]
    assert "crash loop: code 1 x3 in " in job.failure.splitlines()[0]
    assert "ValueError: always" in job.failure[:1024]
    assert "crash loop: code 1 x3 in " in job.stderr


def test_crash_loop_of_several_ranks_and_another_code(job):
    """Row 46: the rule counts the group's failures, with the culprit's code."""
    job.script(COUNT + '\n    if os.environ["RANK"] == "1":\n        sys.exit(9)\n    time.sleep(600)\n')
    job.tree()
    assert job.run("-n", "2", "--max-restarts", "10", "train.py") == 9
    assert "crash loop: code 9 x3 in " in job.failure.splitlines()[0]
    assert "rank 1 on algo-1 exited with code 9" in job.failure[:1024]


def test_crash_loop_by_signal(job):
    """Row 46: a signal's code is 128 and its number."""
    job.script(COUNT + "\n    os.kill(os.getpid(), 9)\n")
    assert job.run("-n", "1", "--max-restarts", "10", "train.py") == 137
    assert attempts(job) == [0, 1, 2]
    assert "crash loop: code 137 x3 in " in job.failure.splitlines()[0]


def test_no_crash_loop_when_the_codes_differ(job):
    """Row 46: failures that are not alike use up the restarts."""
    job.script(COUNT + "\n    sys.exit(10 + attempt)\n")
    assert job.run("-n", "1", "--max-restarts", "4", "train.py") == 14
    assert attempts(job) == [0, 1, 2, 3, 4]
    assert "crash loop" not in job.failure
    assert job.failure.startswith("rank 0 on algo-1 exited with code 14")


def test_no_crash_loop_when_the_rank_makes_progress(job):
    """Row 46: a rank that has made a step is no crash loop, however soon it fails."""
    job.script(
        COUNT
        + """
    import launcher
    launcher.init().step()
    sys.exit(1 if attempt < 4 else 0)
    """
    )
    assert job.run("-n", "1", "--max-restarts", "10", "train.py") == 0
    assert attempts(job) == [0, 1, 2, 3, 4]
    assert job.failure == ""


def test_crash_loop_rule_switched_off(job):
    """Row 46: no failure is sooner than 0 s, so every restart is used."""
    job.script(COUNT + "\n    sys.exit(1)\n")
    assert job.run("-n", "1", "--max-restarts", "4", "--crash-loop-s", "0", "train.py") == 1
    assert attempts(job) == [0, 1, 2, 3, 4]
    assert "crash loop" not in job.failure


def test_restarts_used_up(job):
    """Row 46: two failures with one restart: the last attempt's verdict is the job's, and no loop is claimed."""
    job.script(COUNT + '\n    print(f"attempt {attempt} gives up", file=sys.stderr)\n    sys.exit(3)\n')
    assert job.run("-n", "1", "--max-restarts", "1", "train.py") == 3
    assert attempts(job) == [0, 1]
    assert job.failure.startswith("rank 0 on algo-1 exited with code 3: attempt 1 gives up")
    assert "crash loop" not in job.failure
    assert "restarting the group (1 of 1)" in job.stderr


def test_no_restart_without_being_asked(job):
    """Row 46: restarts are off by default."""
    job.script(COUNT + "\n    sys.exit(3)\n")
    assert job.run("-n", "1", "train.py") == 3
    assert attempts(job) == [0]


def test_second_attempt_succeeds(job):
    """Row 46: what a rank is told about its attempt, and where each attempt's logs are."""
    job.script("""
        import os, sys
        names = ("TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS", "LAUNCHER_ATTEMPT")
        line = " ".join(["seen", *(str(os.environ.get(name)) for name in names)])
        sys.stdout.write(line + chr(10))  # at once: the other rank's end may stop this one between two writes
        sys.exit(1 if os.environ["LAUNCHER_ATTEMPT"] == "0" else 0)
    """)
    assert job.run("-n", "2", "--max-restarts", "3", "train.py") == 0
    assert job.failure == ""
    for attempt in (0, 1):
        for rank in (0, 1):
            log = job.rank_file(rank, "stdout.log", attempt).read_text()
            if attempt or log:  # in the first attempt one rank may be stopped before its line
                assert log == f"seen {attempt} 3 {attempt}\n"
    assert not list(job.base.glob("run/*/attempt_2"))
    assert "attempt 0 failed: rank " in job.stderr
    assert "restarting the group (1 of 3)" in job.stderr


def test_an_error_file_of_an_earlier_attempt_is_not_taken_for_the_last_ones(job):
    """Row 46: attempt 0 raises, attempt 1 ends with a code: the verdict speaks of the code."""
    job.script(COUNT + '\n    if attempt == 0:\n        raise ValueError("first attempt")\n    sys.exit(4)\n')
    assert job.run("-n", "1", "--max-restarts", "1", "train.py") == 4
    assert job.failure.startswith("rank 0 on algo-1 exited with code 4")
    assert "first attempt" not in job.failure


def test_nothing_of_an_attempt_outlives_it(job):
    """Row 46: a grandchild in a session of its own is gone before the next attempt starts."""
    job.script("""
        import os, subprocess, sys
        if os.environ["LAUNCHER_ATTEMPT"] == "0":
            left = subprocess.Popen(
                ["sh", "-c", "trap '' TERM; while :; do sleep 1; done"], start_new_session=True
            )
            with open("left", "w") as file:
                file.write(str(left.pid))
            sys.exit(1)
        pid = open("left").read()
        sys.exit(f"{pid} is still there" if os.path.exists(f"/proc/{pid}") else 0)
    """)
    assert job.run("-n", "1", "--max-restarts", "1", "train.py") == 0


def test_no_restart_after_a_stop(job):
    """Row 46: a job that was asked to stop is not started again."""
    job.script(COUNT + '\n    open("ready", "w").write("x")\n    time.sleep(600)\n')
    job.start("-n", "1", "--max-restarts", "5", "train.py")
    job.wait_for_file("ready")
    job.process.send_signal(signal.SIGTERM)
    assert job.wait() == 143
    assert attempts(job) == [0]


@pytest.mark.torch
@pytest.mark.slow
def test_restarted_ranks_meet_again(job):
    """Row 46: the process group of the second attempt does not meet what the first has left at the same address."""
    pytest.importorskip("torch")
    job.script("""
        import os, sys
        import torch
        import torch.distributed as dist
        dist.init_process_group("gloo")
        value = torch.ones(1)
        dist.all_reduce(value)
        assert value.item() == 2
        if os.environ["LAUNCHER_ATTEMPT"] == "0" and os.environ["RANK"] == "1":
            os._exit(1)
        dist.barrier()
        dist.destroy_process_group()
    """)
    assert job.run("-n", "2", "--max-restarts", "1", "train.py", deadline_s=60) == 0
