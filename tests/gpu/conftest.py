"""Tests that need an NVIDIA GPU are marked gpu, and skip with the reason where there is none."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PROGRAMS = Path(__file__).parent / "programs"

# Ranks that are threads wait for each other's kernels: two of their streams in one queue of the driver would not meet.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")


@functools.cache
def visible_gpus() -> tuple[int, str]:
    """How many GPUs there are, and why none. Asked in a process of its own: it starts the CUDA driver."""
    code = "import json; from launcher import _native; d, r = _native.cuda_devices(); print(json.dumps([len(d), r]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    if done.returncode != 0:
        return 0, done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"
    count, reason = json.loads(done.stdout)
    return count, reason


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is None:
        return
    count, reason = visible_gpus()
    if count == 0:
        pytest.skip(f"no GPU: {reason}")
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed: it holds the arrays of these tests")
    import torch

    if not torch.cuda.is_available():
        pytest.skip(f"this torch ({torch.__version__}) does not see the GPU: install one that is built for CUDA")


@pytest.fixture
def run_two(tmp_path: Path) -> Callable[..., list[Any]]:
    """Runs a program of ``programs/`` as two ranks, one of which may be killed; what each has printed last."""
    tmp_path.chmod(0o700)

    def run(program: str, *words: str) -> list[Any]:
        ranks = [
            subprocess.Popen(
                [sys.executable, str(PROGRAMS / program), str(tmp_path), str(rank), "2", *words],
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        try:
            return [json.loads(rank.communicate(timeout=100)[0].splitlines()[-1]) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
                rank.communicate()

    return run


@pytest.fixture
def run_matrix() -> Callable[..., dict[str, Any]]:
    """programs/cases.py's."""
    spec = importlib.util.spec_from_file_location("gpu_cases", PROGRAMS / "cases.py")
    assert spec is not None
    assert spec.loader is not None
    cases = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cases)
    run: Callable[..., dict[str, Any]] = cases.run_matrix
    return run


@pytest.fixture
def gpus() -> int:
    """Number of visible GPUs."""
    return visible_gpus()[0]


def _run_threads(directory: Path, size: int, work: Callable[[int, Any], Any]) -> list[Any]:
    from launcher._native import LocalGroup

    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        group = LocalGroup(str(directory), "threads", rank, size, timeout_s=60.0)
        try:
            results[rank] = work(rank, group)
        except BaseException as error:  # shown by the test
            errors.append(error)
            group.abort(str(error))
        finally:
            group.close()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
        assert not thread.is_alive(), "a rank did not come back"
    if errors:
        raise errors[0]
    return results


@pytest.fixture
def run_threads(tmp_path: Path) -> Callable[[int, Callable[[int, Any], Any]], list[Any]]:
    """``run_threads(size, work)``: work(rank, group) of each rank, as threads of this process; their results."""
    tmp_path.chmod(0o700)
    return lambda size, work: _run_threads(tmp_path, size, work)


@pytest.fixture
def run_processes(tmp_path: Path) -> Callable[..., list[Any]]:
    """``run_processes(program, size, *arguments)``: what each rank's program printed, a process each."""
    tmp_path.chmod(0o700)

    def run(program: str, size: int, *arguments: str) -> list[Any]:
        processes = [
            subprocess.Popen(
                [sys.executable, str(PROGRAMS / program), str(tmp_path), str(rank), str(size), *arguments],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(size)
        ]
        shown = []
        try:
            for rank, process in enumerate(processes):
                out, err = process.communicate(timeout=100)
                assert process.returncode == 0, f"rank {rank}: exit code {process.returncode}\n{err}"
                shown.append(json.loads(out.splitlines()[-1]))
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                    process.communicate()
        return shown

    return run
