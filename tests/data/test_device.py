"""What of batches on a GPU needs none: arguments, and what a GPU is told of an order. The rest is in tests/gpu."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from launcher import _data
from launcher.data.device_cache import check_cache
from launcher.data.fields import Field
from launcher.errors import UsageError

numpy = pytest.importorskip("numpy")

MASK = 2**32 - 1


def test_spans_are_the_rows() -> None:
    """The positions that a GPU is given have the records that rows_of() says."""
    for records, base, world, batch, tail in itertools.product((1, 10, 23), (0, 7), (1, 3), (1, 4, 30), (0, 1, 2)):
        order = _data.Order(1, 3, 5, records)
        agreed = _data.steps(records, base, world, batch, tail) + 1  # another host has more
        for step, rank in itertools.product(range(agreed), range(world)):
            begin, padding, rows, valid = _data.span_of(records, step, base, world, rank, batch, tail, agreed)
            positions = [begin + row if row < valid else (padding + row - valid) % records for row in range(rows)]
            wanted = _data.rows_of(order, step, base, world, rank, batch, tail, agreed)
            assert ([order.at(position) for position in positions], valid) == wanted
    with pytest.raises(IndexError, match="step 3 of 3"):
        _data.span_of(10, 3, 0, 1, 0, 4, 1)


def walk(network: list[int], index: int) -> int:
    n, low_bits, low_mask, high_mask = network[:4]
    while True:
        low, high = index & low_mask, index >> low_bits
        for number, (first, second) in enumerate(zip(network[4::2], network[5::2], strict=True)):
            word = high if number % 2 else low
            word = (word ^ first) * 0x7FEB352D & MASK
            word = ((word ^ word >> 15) + second) * 0x846CA68B & MASK
            word ^= word >> 16
            if number % 2:
                low ^= word & low_mask
            else:
                high ^= word & high_mask
        index = high << low_bits | low
        if index < n:
            return index


def test_an_order_in_numbers() -> None:
    few, many = _data.Order(1, 3, 5, 1000), _data.Order(1, 3, 5, 70_001)
    assert list(memoryview(few.table).cast("H")) == few.fill(0, 1000)
    assert few.network == []
    assert many.table == b""
    assert [walk(many.network, position) for position in range(500)] == many.fill(0, 500)
    for other in (_data.Order(0, 3, 5, 1000), _data.Order(2, 3, 5, 1000, 10, 2), _data.Order(1, 0, 0, 0)):
        assert (other.table, other.network) == (b"", [])


def test_what_can_not_be_asked_of_a_gpu() -> None:
    """Refused before any GPU is looked for."""
    from launcher._native import CudaGather

    gather = CudaGather(70_001, [0], [8], 0)
    with pytest.raises(ValueError, match="70001 records"):
        gather.set_order(_data.Order(1, 3, 5, 70_002).network, 0)
    with pytest.raises(ValueError, match="as many numbers"):
        gather.set_order([70_001, 1], 0)
    for begin, padding, rows, valid in ((70_000, 0, 2, 2), (0, 70_001, 2, 1), (0, 0, 1, 2), (2**64 - 1, 0, 2, 2)):
        with pytest.raises(ValueError, match="not in an order of 70001 records"):
            gather.number(0, begin, padding, rows, valid, 0)
    with pytest.raises(ValueError, match="one for each field"):
        gather.gather([], 0, 1, 0)
    with pytest.raises(ValueError, match="one of each for each field"):
        CudaGather(1, [0], [], 0)


def test_fields_that_no_gpu_holds() -> None:
    check_cache([Field("values", "fixed", "float32", (784,)), Field("label", "fixed", "int64")])
    with pytest.raises(UsageError, match="'data' is ragged"):
        check_cache([Field("data", "ragged", "uint8")])
    with pytest.raises(UsageError, match="'values' is sparse"):
        check_cache([Field("values", "sparse", "float32", (10,))])
    with pytest.raises(UsageError, match="4294967296 bytes in each record"):
        check_cache([Field("volume", "fixed", "float32", (1024, 1024, 1024))])


@pytest.mark.torch
def test_a_loader_without_a_gpu_says_so(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from launcher.data import Loader

    with pytest.raises(UsageError, match="device_cache is True without a device"):
        Loader(tmp_path, 4, device_cache=True)
    for device in ("gpu", "cuda:x", 1.5):
        with pytest.raises(UsageError, match="expected 'cuda', 'cuda:N' or 'cpu'"):
            Loader(tmp_path, 4, device=device)
    with pytest.raises(UsageError, match="device is 'meta'; expected 'cuda' or 'cuda:N'"):
        Loader(tmp_path, 4, device="meta")
    with pytest.raises(UsageError, match="device_cache is True, which needs a GPU"):
        Loader(tmp_path, 4, device="cpu", device_cache=True)
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: what is said without one can not be seen")
    for cache in (False, True):
        with pytest.raises(UsageError, match="finds no CUDA device"):
            Loader(tmp_path, 4, device="cuda", device_cache=cache)


@pytest.mark.torch
def test_on_the_cpu_nothing_is_copied(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from launcher.data import Loader

    numpy.save(tmp_path / "a.npy", numpy.arange(8, dtype=numpy.float32))
    for device in ("cpu", torch.device("cpu")):
        with Loader(tmp_path, 4, device=device, shuffle="none") as loader:
            assert [batch["values"].tolist() for batch in loader] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_the_benchmark_says_that_there_is_no_gpu() -> None:
    """In a process that can see none, whatever this machine has."""
    program = Path(__file__).resolve().parents[2] / "benchmarks" / "data" / "gpu.py"
    code = f"""
import os, runpy, sys
os.environ["CUDA_VISIBLE_DEVICES"] = ""
sys.argv = ["gpu.py"]
runpy.run_path({str(program)!r}, run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("no GPU on this machine: ")
