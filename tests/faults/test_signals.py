"""Fault table: a rank is ended by a signal that the launcher did not send."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest

SLEEPER = """
    import os, time
    with open("part-" + os.environ["RANK"], "w") as file:
        file.write(str(os.getpid()))
    os.rename("part-" + os.environ["RANK"], "pid-" + os.environ["RANK"])
    time.sleep(600)
"""


def kill_rank(job, number, rank=1):
    """Starts two sleeping ranks, sends ``number`` to one, and returns the launcher's exit code."""
    job.script(SLEEPER)
    job.start("-n", "2", "train.py")
    job.wait_for_file("pid-0")
    os.kill(int(job.wait_for_file(f"pid-{rank}").read_text()), number)
    return job.wait()


# ---- row 5


def test_sigkill_from_outside(job):
    """Row 5: one rank is killed with SIGKILL by somebody else."""
    assert kill_rank(job, signal.SIGKILL) == 137
    assert job.failure.startswith("rank 1 on algo-1 was killed by SIGKILL")
    assert "SIGKILL not sent by launcher, no OOM record" in job.failure[:1024]
    detail = job.failure_json["detail"]
    assert (detail["culprit"]["how"], detail["culprit"]["value"]) == ("signal", 9)
    assert list(detail["victims"]) == ["0"]


def test_sigterm_from_outside(job):
    """Row 5: a rank that somebody else ends with SIGTERM is not taken for one that the launcher stopped."""
    assert kill_rank(job, signal.SIGTERM) == 143
    assert job.failure.startswith("rank 1 on algo-1 was killed by SIGTERM")
    assert "not sent by the launcher" in job.failure[:1024]


def test_real_time_signal_from_outside(job):
    """Row 5: a signal without a name of its own."""
    assert kill_rank(job, signal.SIGRTMIN + 3) == 128 + signal.SIGRTMIN + 3
    assert job.failure.startswith("rank 1 on algo-1 was killed by ")
    assert str(signal.SIGRTMIN + 3) in job.failure.splitlines()[0]


# ---- row 8

CRASHES = {
    "SIGSEGV": ("import ctypes; ctypes.string_at(0)", 139, "Segmentation fault"),
    "SIGABRT": ("import os; os.abort()", 134, "Aborted"),
    "SIGILL": ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", 132, "Illegal instruction"),
    "SIGFPE": ("import os, signal; os.kill(os.getpid(), signal.SIGFPE)", 136, "Floating"),
}


@pytest.mark.parametrize("name", CRASHES)
def test_crash_in_native_code(job, name):
    """Row 8: code, signal name, likely reason, and the Python stack at the crash."""
    statement, code, words = CRASHES[name]
    job.script(f"""
        import os, time

        def crash():
            {statement}
            time.sleep(600)

        if os.environ["RANK"] == "0":
            crash()
        time.sleep(600)
    """)
    assert job.run("-n", "2", "train.py") == code
    assert job.failure.startswith(f"rank 0 on algo-1 was killed by {name}")
    assert f"Fatal Python error: {words}" in job.failure
    assert 'train.py", line 5 in crash' in job.failure
    assert list(job.failure_json["detail"]["victims"]) == ["1"]


def test_crash_among_many_threads(job):
    """Row 8: the stack of the thread that crashed is in the file, however many others there are."""
    job.script("""
        import ctypes, threading

        def idle(depth=6):
            return idle(depth - 1) if depth else threading.Event().wait()

        def crash():
            ctypes.string_at(0)

        for _ in range(16):
            threading.Thread(target=idle, daemon=True).start()
        crash()
    """)
    assert job.run("-n", "1", "train.py") == 139
    assert "Fatal Python error: Segmentation fault" in job.failure
    assert 'train.py", line 8 in crash' in job.failure


def test_crash_of_a_program_that_is_not_python(job):
    """Row 8: code and name need no help of the rank."""
    job.script('#!/bin/sh\n[ "$RANK" = 1 ] && kill -SEGV $$\nexec sleep 600\n', "train.sh").chmod(0o755)
    assert job.run("-n", "2", "train.sh") == 139
    assert job.failure.startswith("rank 1 on algo-1 was killed by SIGSEGV")


def test_crash_after_an_exception_was_handled(job):
    """Row 8: output before the crash does not turn the signal into an exception."""
    job.script("""
        import os, sys, traceback
        try:
            raise ConnectionResetError("retried, and all was well")
        except ConnectionResetError:
            traceback.print_exc()
        sys.stderr.flush()
        os.abort()
    """)
    assert job.run("-n", "1", "train.py") == 134
    assert job.failure.startswith("rank 0 on algo-1 was killed by SIGABRT")


def test_a_native_thread_that_outlives_the_interpreter(job):
    """Row 8: what libstdc++ says then is explained; torch's Gloo dies so when its group is still open."""
    job.script("""
        import ctypes
        ctypes.CDLL("libstdc++.so.6")._ZSt9terminatev()  # std::terminate()
    """)
    assert job.run("-n", "1", "train.py") == 134
    assert job.failure.startswith("rank 0 on algo-1 was killed by SIGABRT")
    assert "destroy_process_group() at the end of the script" in job.failure


# ---- row 9


@pytest.fixture
def small_shm(as_root):
    """A wrapper command that gives the launcher an 8 MiB /dev/shm of its own."""
    wrapper = ("unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=8m tmpfs /dev/shm && exec "$@"', "sh")
    probe = subprocess.run([*wrapper, "true"], capture_output=True, text=True, check=False)
    if probe.returncode:
        pytest.skip(f"no mount namespace here: {probe.stderr.strip()}")
    return wrapper


FILL = """
    import mmap, os, time

    def fill(unlink):
        with open("/dev/shm/segment", "wb+") as file:
            file.truncate(64 << 20)
            view = mmap.mmap(file.fileno(), 64 << 20)
        if unlink:
            os.unlink("/dev/shm/segment")
        for offset in range(0, 64 << 20, 4096):
            view[offset] = 1

    if os.environ["RANK"] == "0":
        fill(UNLINK)
    time.sleep(600)
"""


@pytest.mark.root
def test_sigbus_on_a_full_shared_memory(job, small_shm):
    """Row 9: a rank maps more of /dev/shm than there is and touches it."""
    job.script(FILL.replace("UNLINK", "False"))
    assert job.run("-n", "2", "train.py", wrapper=small_shm) == 135
    assert job.failure.startswith("rank 0 on algo-1 was killed by SIGBUS")
    assert "/dev/shm is full" in job.failure[:1024]
    assert "8.0 MiB" in job.failure[:1024]
    assert "num_workers=0" in job.failure[:1024]
    assert "Fatal Python error: Bus error" in job.failure
    assert "in fill" in job.failure


@pytest.mark.root
def test_sigbus_on_shared_memory_that_is_free_again(job, small_shm):
    """Row 9: loaders remove a segment's name at once, so the space is free again when the rank is dead.

    Nobody can prove it then, but where /dev/shm is small it is named, with its size and the advice.
    """
    job.script(FILL.replace("UNLINK", "True"))
    assert job.run("-n", "2", "train.py", wrapper=small_shm) == 135
    assert job.failure.startswith("rank 0 on algo-1 was killed by SIGBUS")
    assert "/dev/shm" in job.failure[:1024]
    assert "8.0 MiB" in job.failure[:1024]
    assert "num_workers=0" in job.failure[:1024]


@pytest.mark.root
def test_shared_memory_is_looked_at_in_every_attempt(job, small_shm):
    """Row 9: it had room when the first attempt failed, and has none when the second does."""
    first = '\n    if os.environ["LAUNCHER_ATTEMPT"] == "0":\n        raise SystemExit(1)\n'
    job.script(FILL.replace("UNLINK", "False").replace("    if os", first + "    if os", 1))
    assert job.run("-n", "1", "--max-restarts", "1", "train.py", wrapper=small_shm) == 135
    assert "/dev/shm is full" in job.failure[:1024]


def test_sigbus_on_a_file_cut_short(job):
    """Row 9: a SIGBUS that has nothing to do with /dev/shm is not blamed on it."""
    job.script("""
        import mmap
        with open("shard", "wb+") as file:
            file.truncate(1 << 20)
            view = mmap.mmap(file.fileno(), 1 << 20)
            file.truncate(0)
        print(view[4096])
    """)
    assert job.run("-n", "1", "train.py") == 135
    assert "was killed by SIGBUS" in job.failure.splitlines()[0]
    assert "/dev/shm is full" not in job.failure
    assert "the file was cut short" in job.failure[:1024]
