"""What the launcher gathers while a job runs: limits of the host, stacks of ranks that hang."""

from __future__ import annotations

import pytest


def test_few_open_files_are_said_at_the_start(job):
    """Row 41: a limit that jobs run into later is named while the job starts; the job is not affected."""
    job.script("print('fine')")
    few = ("sh", "-c", 'ulimit -n 256; exec "$@"', "sh")
    assert job.run("train.py", wrapper=few) == 0
    assert "WARNING: only 256 open files are allowed" in job.stderr


@pytest.mark.root
def test_a_full_disk_is_said_at_the_start(job, as_root):
    """Row 31: little space where the job writes."""
    job.script("print('fine')")
    job.base.mkdir()
    small = ("unshare", "-m", "sh", "-c", f'mount -t tmpfs -o size=4m tmpfs {job.base}; exec "$@"', "sh")
    assert job.run("train.py", wrapper=small) == 0
    assert "MiB are free under" in job.stderr


def test_who_holds_gpu_memory_is_said_at_the_start(job):
    """Row 47: a process of an earlier job that still holds memory is named with what it holds."""
    tool = job.script(
        """#!/bin/sh
        case "$*" in *--query-compute-apps=pid,process_name,used_memory*) echo "4242, python3, 7168" ;; esac
    """,
        "bin/nvidia-smi",
    )
    tool.chmod(0o755)
    job.script("""
        import os, time
        while "7168" not in open("stderr").read():
            time.sleep(0.01)
    """)
    assert job.run("train.py", env={"PATH": f"{tool.parent}:/usr/bin:/bin"}) == 0
    assert "WARNING: GPU memory is held already: pid 4242 (python3), 7168 MiB" in job.stderr


def test_a_driver_that_does_not_answer_delays_nothing(job):
    """Row 47: nor is the question left behind when the job ends."""
    tool = job.script("#!/bin/sh\nexec sleep 600\n", "bin/nvidia-smi")
    tool.chmod(0o755)
    job.script("print('fine')")
    assert job.run("train.py", env={"PATH": f"{tool.parent}:/usr/bin:/bin"}) == 0
    assert job.stdout == "fine\n"


@pytest.mark.slow
def test_a_debugger_that_is_there_is_asked_in_a_hang(job):
    """Row 26: ranks that are no Python programs cannot write their stacks; py-spy or gdb can."""
    tool = job.script('#!/bin/sh\necho stacks by "$@"\n', "bin/py-spy")
    tool.chmod(0o755)
    job.script("#!/bin/sh\nexec sleep 600\n", "train.sh").chmod(0o755)
    path = f"{tool.parent}:/usr/bin:/bin"
    assert job.run("-n", "2", "--hang-timeout", "2", "train.sh", env={"PATH": path}) == 75
    for local_rank in range(2):
        text = job.rank_file(local_rank, "stacks.txt").read_text()
        assert text.startswith("stacks by dump --native --pid ")


@pytest.mark.slow
def test_a_debugger_that_hangs_is_ended(job):
    """Row 23: a debugger that waits for a stuck rank must not keep the launcher."""
    tool = job.script("#!/bin/sh\nexec sleep 600\n", "bin/py-spy")
    tool.chmod(0o755)
    job.script("import time; time.sleep(600)")
    path = f"{tool.parent}:/usr/bin:/bin"
    assert job.run("-n", "1", "--hang-timeout", "2", "train.py", env={"PATH": path}, deadline_s=60) == 75
    assert "hang: " in job.failure
