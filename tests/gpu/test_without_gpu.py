"""What needs no GPU: how sizes are cut, and what is said where there is none."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.collectives.cuda_ipc import Crossover, Timing, _Watch, find_crossover


def cut(*rows: tuple[int, float, float, float]) -> tuple[int, int]:
    found: Crossover = find_crossover([Timing(*row) for row in rows])
    assert len(found.timings) == len(rows)
    return found.one_shot_bytes, found.two_shot_bytes


def test_crossover() -> None:
    assert cut((1, 1.0, 2.0, 3.0), (2, 1.0, 2.0, 3.0), (4, 3.0, 2.0, 3.0), (8, 5.0, 4.0, 3.0)) == (2, 4)
    assert cut((1, 1.0, 2.0, 0.0), (2, 3.0, 2.0, 0.0)) == (1, 2)  # the other engine was not measured
    assert cut((1, 5.0, 5.0, 3.0), (2, 1.0, 1.0, 3.0)) == (0, 0)  # a gap at the begin is not jumped
    assert cut((1, 3.0, 2.0, 9.0), (2, 1.0, 2.0, 9.0)) == (0, 2)
    assert cut((1, 1.0, 2.0, 9.0), (2, 1.0, 2.0, 9.0)) == (2, 2)
    assert cut() == (0, 0)


def test_arrays_that_are_not_on_a_gpu() -> None:
    numpy = pytest.importorskip("numpy", reason="numpy is not installed")
    from launcher.collectives.cuda import Compressor, GradientBucket, memory_of

    with pytest.raises(TypeError, match="source: ndarray; expected a CUDA tensor or __cuda_array_interface__"):
        memory_of(numpy.zeros(3), "source")
    with pytest.raises(ValueError, match="tensors: none"):
        GradientBucket([])
    with pytest.raises(TypeError, match="wire: float32; expected float16 or bfloat16"):
        Compressor(wire=0)  # type: ignore[arg-type]


class Stub:
    """Says what an array of another library says of itself."""

    def __init__(self, shape: tuple[int, ...], strides: tuple[int, ...] | None, typestr: str = "<f4") -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": shape,
            "strides": strides,
            "typestr": typestr,
            "data": (4096, False),
            "version": 3,
        }


def test_arrays_say_what_they_are() -> None:
    from launcher.collectives.cuda import GpuArray, memory_of
    from launcher.collectives.elements import DType

    memory = memory_of(Stub((2, 3), (12, 4)), "a")
    assert (memory.pointer, memory.count, memory.dtype, memory.nbytes) == (4096, 6, DType.float32, 24)
    assert memory_of(Stub((2, 3), None), "a").count == 6
    assert memory_of(Stub((), None), "a").count == 1
    with pytest.raises(ValueError, match=r"strides \(4, 8\)"):
        memory_of(Stub((2, 3), (4, 8)), "a")
    with pytest.raises(TypeError, match="<c8"):
        memory_of(Stub((2,), None, "<c8"), "a")
    array = GpuArray(memory, None)
    assert array.as_bytes().__cuda_array_interface__["shape"] == (24,)
    assert memory_of(array, "a") == memory


def test_a_machine_without_a_gpu_says_so() -> None:
    """In a process that can see none, whatever this machine has."""
    code = """
import os
os.environ["CUDA_VISIBLE_DEVICES"] = ""
from launcher.errors import UsageError
from launcher.collectives.cuda import find_devices, require_device
assert find_devices()[0] == []
try:
    require_device(0)
except UsageError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith("no GPU is visible to this process: ")
    assert "CUDA_VISIBLE_DEVICES" in done.stdout


def test_the_end_of_a_peer_is_seen() -> None:
    peers = [subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) for _ in range(2)]
    lost: list[int] = []
    aborted = threading.Event()
    watch = _Watch({peers[0].pid: 4, peers[1].pid: 7}, lost, aborted.set)
    peers[1].kill()
    assert aborted.wait(20)
    assert lost == [7]
    watch.stop()
    quiet = _Watch({peers[0].pid: 4}, lost, aborted.set)
    quiet.stop()
    peers[0].communicate(b"\n")
    peers[1].communicate()
    assert lost == [7]


def test_no_rank_is_left_waiting_when_there_is_no_gpu(
    run_threads: Callable[[int, Callable[[int, Any], Any]], list[Any]],
) -> None:
    from launcher.collectives.cuda_ipc import IpcAllreduce
    from launcher.errors import LauncherError

    def work(rank: int, group: Any) -> str:
        with pytest.raises(LauncherError) as raised:
            IpcAllreduce(group, 99)
        group.barrier()  # the group itself is as good as before
        with pytest.raises(ValueError, match="order: 'random'"):
            IpcAllreduce(group, 99, order="random")
        return str(raised.value)

    for said in run_threads(2, work):
        assert "visible to this process" in said


def test_the_benchmark_says_that_there_is_no_gpu() -> None:
    program = Path(__file__).resolve().parents[2] / "benchmarks" / "collectives" / "gpu.py"
    code = f"""
import os, runpy, sys
os.environ["CUDA_VISIBLE_DEVICES"] = ""
sys.argv = ["gpu.py"]
runpy.run_path({str(program)!r}, run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("no GPU on this machine: ")
