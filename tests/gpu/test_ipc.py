"""Allreduce by CUDA IPC: ranks as threads (flags) and as processes (host) on one GPU, and on several where there are.

Threads make their tensors before the first call: loading one of torch's kernels may wait for those that run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from launcher import CollectiveError
from launcher.collectives.elements import DType

pytestmark = [pytest.mark.gpu, pytest.mark.torch]

Threads = Callable[[int, Callable[[int, Any], Any]], list[Any]]
Processes = Callable[..., list[Any]]
Matrix = Callable[..., dict[str, Any]]


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("order", ["flags", "host"])
def test_threads_on_one_gpu(run_threads: Threads, run_matrix: Matrix, size: int, order: str) -> None:
    for found in run_threads(size, lambda rank, group: run_matrix(group, 0, order)):
        assert found["order"] == order
        assert found["per_device"] == size
        assert found["done"] > 300
        assert found["wrong"] == []


@pytest.mark.parametrize("size", [2, 3])
def test_processes_on_one_gpu(run_processes: Callable[..., list[Any]], size: int) -> None:
    for found in run_processes("matrix.py", size, "0", "auto"):
        assert found["order"] == "host"
        assert found["done"] > 300
        assert found["wrong"] == []


def test_processes_with_a_gpu_each(run_processes: Callable[..., list[Any]], gpus: int) -> None:
    if gpus < 2:
        pytest.skip(f"needs two GPUs, there is {gpus}")
    for found in run_processes("matrix.py", min(gpus, 8), "own", "auto"):
        assert found["order"] == "flags"
        assert found["wrong"] == []


def test_a_killed_peer_is_named(run_two: Processes) -> None:
    assert run_two("killed.py") == [["lost", 1], "gone"]


def test_a_missing_rank_ends_the_wait_of_all(run_threads: Threads) -> None:
    import torch

    from launcher.collectives.cuda_ipc import IpcAllreduce

    def work(rank: int, group: Any) -> tuple[str, int]:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            tensor = torch.ones(100, device="cuda:0")
            ipc = IpcAllreduce(group, 0, staging_bytes=1 << 16, timeout_s=0.5 if rank == 0 else 60.0)
            ipc.allreduce(tensor, algorithm="two_shot")
            ipc.synchronize()
            told = ("", -1)
            if rank != 2:
                with pytest.raises(CollectiveError) as raised:
                    ipc.allreduce(tensor, algorithm="two_shot")
                    ipc.synchronize()
                told = (raised.value.reason, raised.value.rank)
                with pytest.raises(CollectiveError):
                    ipc.allreduce(tensor, algorithm="two_shot")
            group.barrier()
            if rank != 2:
                ipc.close()
        return told

    assert run_threads(3, work) == [("timeout", 2), ("left", 0), ("", -1)]


def test_abort_ends_a_wait(run_threads: Threads) -> None:
    import torch

    from launcher.collectives.cuda_ipc import IpcAllreduce

    def work(rank: int, group: Any) -> str:
        with torch.cuda.stream(torch.cuda.Stream()):
            tensor = torch.ones(100, device="cuda:0")
            ipc = IpcAllreduce(group, 0, staging_bytes=1 << 16, timeout_s=60.0)
            reason = ""
            if rank == 0:
                ipc.allreduce(tensor, algorithm="one_shot")
                ipc.abort()
                with pytest.raises(CollectiveError) as raised:
                    ipc.synchronize()
                reason = raised.value.reason
            group.barrier()
        return reason

    assert run_threads(2, work) == ["interrupted", ""]


def test_graph_replays(run_threads: Threads) -> None:
    import threading

    import torch

    from launcher.collectives.cuda_ipc import IpcAllreduce

    capture = threading.Lock()

    def work(rank: int, group: Any) -> list[float]:
        with torch.cuda.stream(torch.cuda.Stream()):
            tensor = torch.ones(1000, device="cuda:0")
            other = torch.full((10,), float(rank), device="cuda:0")
            ipc = IpcAllreduce(group, 0, staging_bytes=1 << 16, timeout_s=20.0)
            graph = torch.cuda.CUDAGraph()
            with capture:
                stream = torch.cuda.Stream()
                torch.cuda.synchronize()
                with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                    ipc.allreduce(tensor, algorithm="one_shot")
                    ipc.allreduce(other, algorithm="two_shot")
            group.barrier()
            for _ in range(5):
                graph.replay()
            ipc.synchronize()
            group.barrier()
            ipc.allreduce(tensor, algorithm="one_shot")
            ipc.synchronize()
            found = [tensor[0].item(), tensor[-1].item(), other[3].item()]
            ipc.close()
        return found

    assert run_threads(2, work) == [[64.0, 64.0, 16.0]] * 2


def test_tune_chooses(run_threads: Threads) -> None:
    import torch

    from launcher.collectives.cuda_ipc import IpcAllreduce

    def work(rank: int, group: Any) -> Any:
        with torch.cuda.stream(torch.cuda.Stream()):
            ipc = IpcAllreduce(group, 0, staging_bytes=1 << 18)
            found = ipc.tune(DType.bfloat16, sizes=[1024, 65536, 1 << 18])
            chosen = [ipc.choose(nbytes, DType.bfloat16) for nbytes in (64, 65536, 1 << 18, 1 << 20)]
            ipc.close()
        return found, chosen

    first, second = run_threads(2, work)
    assert first == second
    crossover, chosen = first
    assert [timing.nbytes for timing in crossover.timings] == [1024, 65536, 1 << 18]
    assert all(timing.one_shot > 0 and timing.two_shot > 0 for timing in crossover.timings)
    assert chosen[-1] is None
    assert None not in chosen[:-1]
