"""Collectives where a container denies things: little or read-only /dev/shm, and seccomp profiles."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAMS = Path(__file__).parent / "programs"
LIMITED = PROGRAMS / "limited.py"

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


def short(directory: Path, *cases: dict[str, Any], wrapper: tuple[str, ...] = ()) -> list[list[Any]]:
    """What the ranks of programs/short.py have seen, by case. Its groups wait for 60 s, this test for less."""
    done = subprocess.run(
        [*wrapper, sys.executable, "-W", "error", str(PROGRAMS / "short.py"), str(directory)],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        timeout=40,
    )
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    for case, outcome in zip(cases, outcomes, strict=True):
        assert outcome["codes"] == [0] * case["size"] and outcome["left"] == [], (case, outcome, done.stderr)
    return [outcome["seen"] for outcome in outcomes]


def test_64_ranks_and_few_descriptors(tmp_path: Path) -> None:
    """It works, or all hear at once whose limit is too low, and what it should be."""
    works, all_short, one_short = short(
        tmp_path,
        {"do": "join", "size": 64, "all_files": 256},
        {"do": "join", "size": 64, "all_files": 128},
        {"do": "join", "size": 64, "files": {"5": 100}},
    )
    assert works == [64 * 65 / 2] * 64
    for seen, culprit, limit, needed in ((all_short, 0, 128, 194), (one_short, 5, 100, 131)):
        for error in seen:
            assert (error["reason"], error["rank"], error["host"]) == ("system", culprit, "algo-3"), error
            assert f"rank {culprit} on algo-3 has no descriptors left" in error["text"], error
            assert f"needs {needed}" in error["text"] and f"limit is {limit} (RLIMIT_NOFILE)" in error["text"], error


def test_a_rank_that_runs_out_in_the_middle_of_a_call(tmp_path: Path) -> None:
    """Of descriptors, address space or memory: it gets its own error, all others one that names it, at once."""
    cases = {"no_descriptors": "Too many open files", "no_address_space": "Cannot allocate", "no_memory": "bad_alloc"}
    for seen, (name, words) in zip(
        short(tmp_path, *({"do": name, "size": 3} for name in cases)), cases.items(), strict=True
    ):
        if isinstance(seen[1], str):
            assert name == "no_memory" and seen == seen[:1] * 3
            continue
        first, own, last = seen
        assert words in own["text"] and own["own"] in ("OSError", "MemoryError"), seen
        for error in (first, last):
            assert (error["reason"], error["rank"], error["host"]) == ("system", 1, "algo-3"), seen
            assert error["text"].startswith("allreduce #2 of 160,000 B: rank 1 on algo-3 could not finish"), seen


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the seccomp profiles are written for x86-64")
def test_who_can_not_see_the_others_takes_none_for_dead(tmp_path: Path) -> None:
    """Without pidfd_open() it takes a descriptor to look at a process; there is none left."""
    wrapper = (sys.executable, str(LIMITED), "pidfd")
    assert short(tmp_path, {"do": "blind", "size": 2}, wrapper=wrapper) == [[3.0, 3.0]]


def test_a_fork_gives_back_what_its_parent_goes_on_with(tmp_path: Path) -> None:
    ((parent, other),) = short(tmp_path, {"do": "fork", "size": 2})
    assert parent == [3.0, 0, 3.0, 3.0, 3, 3.0]  # the second: how the fork ended; the fifth: calls without a copy
    assert other == [3.0, 3.0, 3.0, 3, 3.0]


def test_counts_that_can_not_be(tmp_path: Path) -> None:
    """Negative, too large, or too large together: refused before anything is entered, so the next call goes well."""
    (seen,) = short(tmp_path, {"do": "bad_counts", "size": 3})
    before, total, refused = seen[1]
    assert (before, total) == (0, 6.0) and len(refused) == 73
    assert [text for text in refused if "expected" not in text and "ends beyond" not in text] == []
    assert [one[:2] for one in seen] == [[0, 6.0]] * 3


def test_shapes_that_can_not_be(ranks: Any) -> None:
    (refused,) = ranks.run(
        1,
        """
        refused = []
        with Communicator() as comm:
            for shape in (-1, (2, -3), (2**62, 4), 2**80):
                try:
                    comm.empty(shape)
                except ValueError as error:
                    refused.append(str(error))
            comm.allreduce(comm.empty(3))
        show(refused)
        """,
    )
    assert len(refused) == 4 and all(text.startswith("shape is ") for text in refused)
