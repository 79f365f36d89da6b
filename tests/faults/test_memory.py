"""Fault table: the kernel kills at the memory limit of the container."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path

import pytest

ROOT = Path("/sys/fs/cgroup")
MIB = 1 << 20


class Group:
    """A memory cgroup of version 1 or 2, made for one test."""

    def __init__(self, name: str, limit: int) -> None:
        self.limit = limit
        if (ROOT / "cgroup.controllers").exists():
            if "memory" not in (ROOT / "cgroup.subtree_control").read_text().split():
                (ROOT / "cgroup.subtree_control").write_text("+memory")
            self.path = ROOT / name
            names = {"memory.max": limit, "memory.swap.max": 0}
            required = "memory.max"
        else:
            self.path = ROOT / "memory" / name
            names = {"memory.limit_in_bytes": limit, "memory.memsw.limit_in_bytes": limit}
            required = "memory.limit_in_bytes"
        self.path.mkdir()
        for file, value in names.items():
            try:
                # "r+": a file that the kernel does not offer must not be made
                with (self.path / file).open("r+") as handle:
                    handle.write(str(value))
            except OSError:
                if file == required:  # the other one is missing where swap is not accounted for
                    self.path.rmdir()
                    raise

    @property
    def wrapper(self) -> tuple[str, ...]:
        """A command that runs its arguments inside this cgroup."""
        return ("sh", "-c", 'echo $$ >"$0" && exec "$@"', str(self.path / "cgroup.procs"))

    def empty(self) -> bool:
        return not (self.path / "cgroup.procs").read_text().strip()


def memory_group(name, limit, wait_until):
    """For a fixture to yield from: one group, whose processes are gone and which is removed when the test is over."""
    try:
        group = Group(f"launcher-{name}-{os.getpid()}", limit)
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here, neither version 1 nor 2: {error}")
    yield group
    for pid in (group.path / "cgroup.procs").read_text().split():
        os.kill(int(pid), signal.SIGKILL)  # the test failed half-way
    wait_until(group.empty, f"the end of all processes in {group.path}")
    group.path.rmdir()


@pytest.fixture
def group(as_root, job, wait_until):
    """Makes memory cgroups for ``job``: ``group(limit)``. They are removed when the test is over."""
    made: list[Group] = []

    def make(limit: int) -> Group:
        try:
            made.append(Group(f"launcher-test-{os.getpid()}-{len(made)}", limit))
        except OSError as error:
            pytest.skip(f"no memory cgroup can be made here, neither version 1 nor 2: {error}")
        return made[-1]

    yield make
    if job.process is not None and job.process.poll() is None:
        job.kill()  # the test failed half-way
    for one in made:
        wait_until(one.empty, f"the end of all processes in {one.path}")
        with contextlib.suppress(FileNotFoundError):
            one.path.rmdir()


GROW = """
    import os, sys, time

    def grow():
        taken = []
        while True:
            taken.append(b"x" * (1 << 20))
"""


@pytest.mark.root
def test_oom_kill_of_a_rank(job, group):
    """Row 6: rank 3 grows beyond the limit of the cgroup, and the kernel kills it."""
    limited = group(150 * MIB)
    job.script(GROW + '\n    if os.environ["RANK"] == "3":\n        grow()\n    time.sleep(600)\n')
    assert job.run("-n", "4", "train.py", wrapper=limited.wrapper) == 137
    head = job.failure[:1024]
    assert head.startswith("rank 3 on algo-1 was OOM-killed: peak RSS ")
    assert "of limit 150.0 MiB" in head
    assert "cgroup oom_kill +1" in head
    assert "memory limit" in head
    detail = job.failure_json["detail"]
    assert detail["culprit"]["rank"] == 3
    assert 50 * 1024 < detail["culprit"]["max_rss_kib"] <= 150 * 1024
    assert set(detail["victims"]) == {"0", "1", "2"}


@pytest.mark.root
def test_oom_kill_of_the_only_rank(job, group):
    """Row 6: one rank alone."""
    limited = group(100 * MIB)
    job.script(GROW + "\n    grow()\n")
    assert job.run("-n", "1", "train.py", wrapper=limited.wrapper) == 137
    assert job.failure.startswith("rank 0 on algo-1 was OOM-killed: peak RSS ")
    assert "of limit 100.0 MiB" in job.failure[:1024]


@pytest.mark.root
@pytest.mark.slow
def test_growth_of_memory_is_told(job, group):
    """Row 6: a rank that leaks for some seconds: its text says how the memory grew."""
    limited = group(150 * MIB)
    job.script("""
        import time
        taken = []
        while True:
            taken.append(b"x" * (2 << 20))
            time.sleep(0.1)
    """)
    assert job.run("-n", "1", "train.py", wrapper=limited.wrapper, deadline_s=60) == 137
    assert "was OOM-killed" in job.failure
    assert "memory of the rank and its helpers: " in job.failure[:1024]
    assert " MiB when last seen" in job.failure[:1024]


@pytest.mark.root
def test_sigkill_under_a_limit_that_was_not_reached(job, group):
    """Row 6: a kill from outside is not called an OOM kill because there is a limit."""
    limited = group(200 * MIB)
    job.script("import os; os.kill(os.getpid(), 9)")
    assert job.run("-n", "1", "train.py", wrapper=limited.wrapper) == 137
    assert "SIGKILL not sent by launcher, no OOM record" in job.failure[:1024]


@pytest.mark.root
def test_memory_error_is_not_an_oom_kill(job, group):
    """Row 6: a limit on address space (ulimit -v) ends in an exception, which says so."""
    job.script("""
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (400 << 20, 400 << 20))
        bytearray(1 << 30)
    """)
    assert job.run("-n", "1", "train.py", wrapper=group(200 * MIB).wrapper) == 1
    assert "MemoryError" in job.failure.splitlines()[0]
    assert "host memory is exhausted, or a limit on it was reached" in job.failure[:1024]
    assert "OOM-killed" not in job.failure


CHILD = (
    GROW
    + """
    import multiprocessing

    def work(delay):
        with open("child.part", "w") as file:
            file.write(str(os.getpid()))
        os.rename("child.part", "child")
        time.sleep(delay)
        grow()

    if __name__ == "__main__":
        if os.environ["RANK"] == "2":
            child = multiprocessing.get_context("METHOD").Process(target=work, args=(DELAY,))
            child.start()
            child.join()
            raise RuntimeError(f"my worker ended with {child.exitcode}")
        time.sleep(600)
"""
)


@pytest.mark.root
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_oom_kill_of_a_ranks_child(job, group, method):
    """Row 7: only a worker of rank 2 is killed; rank 2 is blamed through it, its pid and command are named."""
    limited = group(200 * MIB)
    job.script(CHILD.replace("METHOD", method).replace("DELAY", "2.5"))
    assert job.run("-n", "3", "train.py", wrapper=limited.wrapper) == 1
    child = (job.directory / "child").read_text()
    headline = job.failure.splitlines()[0]
    assert headline.startswith(f"rank 2 on algo-1 failed after its child process {child} (")
    assert "python" in headline.partition(f"process {child} (")[2]
    assert "was OOM-killed, cgroup oom_kill +1" in headline
    assert "my worker ended with -9" in headline
    assert job.failure_json["detail"]["culprit"]["rank"] == 2
    assert set(job.failure_json["detail"]["victims"]) == {"0", "1"}


@pytest.mark.root
def test_oom_kill_of_a_child_that_lived_for_an_instant(job, group):
    """Row 7: a child that nobody has seen alive: the kill is still proven, and told."""
    limited = group(100 * MIB)
    job.script(CHILD.replace("METHOD", "fork").replace("DELAY", "0"))
    assert job.run("-n", "3", "train.py", wrapper=limited.wrapper) == 1
    head = job.failure[:1024]
    assert head.startswith("rank 2 on algo-1 failed")
    assert "my worker ended with -9" in head
    assert "oom_kill +1" in head


@pytest.mark.root
@pytest.mark.torch
@pytest.mark.slow
def test_oom_kill_of_a_loader_worker(job, group):
    """Row 7: the worker process of a torch DataLoader in rank 2."""
    pytest.importorskip("torch")
    limited = group(1000 * MIB)
    job.script(
        GROW
        + """
    if os.environ["RANK"] != "2":
        time.sleep(600)

    from torch.utils.data import DataLoader, Dataset

    class Images(Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            with open("child", "w") as file:
                file.write(str(os.getpid()))
            time.sleep(2.5)
            grow()

    if __name__ == "__main__":
        for batch in DataLoader(Images(), num_workers=1):
            pass
    """
    )
    assert job.run("-n", "3", "train.py", wrapper=limited.wrapper) == 1
    child = (job.directory / "child").read_text()
    head = job.failure[:1024]
    assert head.startswith(f"rank 2 on algo-1 failed after its child process {child} (")
    assert "was OOM-killed, cgroup oom_kill +1" in head
    assert "DataLoader worker" in head


@pytest.mark.root
def test_no_cgroup_file_system(job, as_root):
    """Row 6: where the kernel shows no cgroups, nothing is claimed about them."""
    wrapper = ("unshare", "-m", "sh", "-c", 'mount -t tmpfs tmpfs /sys/fs/cgroup && exec "$@"', "sh")
    probe = subprocess.run([*wrapper, "true"], capture_output=True, text=True, check=False)
    if probe.returncode:
        pytest.skip(f"no mount namespace here: {probe.stderr.strip()}")
    job.script("import os; os.kill(os.getpid(), 9)")
    assert job.run("-n", "2", "train.py", wrapper=wrapper) == 137
    assert "was killed by SIGKILL" in job.failure.splitlines()[0]
    assert "OOM-killed" not in job.failure
