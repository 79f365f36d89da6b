"""Collectives where a container denies things: little or read-only /dev/shm, and seccomp profiles."""

from __future__ import annotations

import platform
import sys
from pathlib import Path
from typing import Any

import pytest

LIMITED = Path(__file__).parent / "programs" / "limited.py"

# Each path with more than 64 MB in flight, and a rank that dies at the end.
SCRIPT = """
import ctypes, os, signal, sys
import numpy as np
from launcher import CollectiveError
from launcher.collectives.elements import DType
from launcher.collectives.group import join
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
group = join("limits", rank, size)
COUNT = 10_000_000
mine, result = np.zeros(COUNT, np.float32), np.zeros(COUNT, np.float32)
shared = np.frombuffer((ctypes.c_char * (4 * COUNT)).from_address(group.allocate(4 * COUNT)), np.float32)
pattern = np.arange(COUNT, dtype=np.float32) % 1000
for path in ("small", "pipelined", "pulled", "shared", "automatic"):
    group.set_path(path)
    for count in (100, 300_000, COUNT):
        source, target = (shared, shared) if path == "shared" else (mine, result)
        source[:count] = pattern[:count] + rank
        group.allreduce(source.ctypes.data, target.ctypes.data, count, DType.float32)
        assert np.array_equal(target[:count], size * pattern[:count] + sum(range(size))), (path, count)
print("calls", group.statistics()["calls"], "can pull:", group.statistics()["can_pull"], flush=True)
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher's, which may be faster
group.barrier()
if rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
try:
    group.barrier()
except CollectiveError as error:
    print("TOLD", error.reason, error.rank, flush=True)
    sys.exit(5)
"""


def expect(job: Any, pulls: bool | None = None) -> None:
    assert job.wait(60) == 137, job.output()
    assert "TOLD lost 1" in job.stdout, job.output()
    assert job.failure.startswith("rank 1 on ") and "was killed by SIGKILL" in job.failure, job.failure
    if pulls is not None:
        assert f"can pull: {pulls}" in job.stdout, job.output()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the seccomp profiles are written for x86-64")
def test_under_seccomp_profiles(make_job: Any) -> None:
    """Row 41 of the fault matrix: the launcher and its ranks, as they would be in a container."""
    pulls = {"docker": None, "docker-before-4.8": False, "pidfd": None, "vm": False}
    jobs = {profile: make_job(profile) for profile in pulls}
    for profile, job in jobs.items():
        job.script(SCRIPT)
        job.start("-n", "2", "train.py", wrapper=(sys.executable, LIMITED, profile))
    for profile, job in jobs.items():
        expect(job, pulls[profile])


@pytest.mark.root
def test_with_little_or_read_only_shared_memory(make_job: Any, as_root: None) -> None:
    """A container's /dev/shm has 64 MB; some have it read-only."""
    for options in ("size=64m", "size=64m,ro"):
        job = make_job(options)
        job.script(SCRIPT)
        mount = f'mount -t tmpfs -o {options} tmpfs /dev/shm && exec "$@"'
        job.start("-n", "2", "train.py", wrapper=("unshare", "-m", "sh", "-c", mount, "sh"))
        expect(job)
