"""backend="launcher" on tensors in GPU memory: processes that share a GPU (no NCCL), and with a GPU each (both)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.torch]

Processes = Callable[..., list[Any]]


def require_gpus(gpus: int) -> None:
    if gpus < 2:
        pytest.skip(f"NCCL needs a GPU for each rank; there is {gpus}")


@pytest.mark.parametrize(("check", "size"), [("operations", 2), ("operations", 3), ("streams", 2), ("training", 2)])
def test_ranks_that_share_a_gpu(run_processes: Processes, check: str, size: int) -> None:
    for found in run_processes("torch_group.py", size, "0", check):
        assert found["wrong"] == []
        assert found["calls"]["ipc"] > 0
        assert found["bytes_up_to"]["float32"]["two_shot"] == 4 << 20


def test_groups_come_and_go(run_processes: Processes) -> None:
    assert [found["wrong"] for found in run_processes("torch_group.py", 2, "0", "life")] == [[], []]


def test_one_rank_switches_it_off_for_all(run_processes: Processes) -> None:
    for found in run_processes("torch_group.py", 2, "0", "off"):
        assert found["wrong"] == []
        assert found["calls"]["ipc"] == 0
        assert found["calls"]["engine"] > 0


@pytest.mark.parametrize("check", ["operations", "streams", "training", "life", "graphs"])
def test_ranks_with_a_gpu_each(run_processes: Processes, gpus: int, check: str) -> None:
    require_gpus(gpus)
    for found in run_processes("torch_group.py", 2, "own", check):
        assert found["wrong"] == []
        if check in ("operations", "graphs"):
            assert found["calls"]["engine"] > 0


@pytest.mark.parametrize("number", ["0", "own"])
def test_a_killed_rank_is_named(run_two: Processes, gpus: int, number: str) -> None:
    if number == "own":
        require_gpus(gpus)
    assert run_two("torch_group.py", number, "killed") == [["lost", 1], "gone"]
