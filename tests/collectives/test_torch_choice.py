"""Who carries an allreduce of GPU memory: launcher.collectives.torch_choice. Needs no GPU, and no torch."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from launcher.collectives.cuda_ipc import Crossover
from launcher.collectives.elements import DType, ReduceOp
from launcher.collectives.torch_choice import (
    CONNECT,
    ENGINE,
    IPC,
    MEASURE,
    MOST_BYTES,
    Layout,
    Link,
    Place,
    decide,
    find_layout,
)
from launcher.errors import UsageError

F32, SUM = DType.float32, ReduceOp.SUM
APART, SHARED = Layout(), Layout("", "ranks 0 and 1 of the group share a GPU, which NCCL refuses", True)
FLAGS, HOST = Link("", True), Link("", False)
UP_TO = Crossover(1 << 14, 1 << 19, ())


def place(bus: str, **fields: Any) -> Place:
    return Place(**{"on": True, "nccl": True, "shares": False, "bus": bus, **fields})


@pytest.mark.parametrize(
    ("nbytes", "layout", "expected"),
    [
        (1, APART, IPC),
        (1 << 19, APART, IPC),
        ((1 << 19) + 1, APART, ENGINE),  # what was measured says so
        (25 << 20, APART, ENGINE),  # a bucket of DDP
        (25 << 20, SHARED, IPC),  # NCCL is no choice
        (0, APART, ENGINE),
    ],
)
def test_sizes(nbytes: int, layout: Layout, expected: str) -> None:
    assert decide(layout, FLAGS, UP_TO, F32, SUM, nbytes) == expected


def test_nothing_is_made_before_it_is_needed() -> None:
    assert decide(APART, None, None, F32, SUM, 1024) == CONNECT
    assert decide(APART, FLAGS, None, F32, SUM, 1024) == MEASURE
    assert decide(APART, None, None, F32, SUM, MOST_BYTES) == CONNECT
    assert decide(APART, None, None, F32, SUM, MOST_BYTES + 1) == ENGINE
    assert decide(SHARED, None, None, F32, SUM, MOST_BYTES + 1) == CONNECT
    assert decide(SHARED, HOST, None, F32, SUM, MOST_BYTES + 1) == MEASURE
    nothing_wins = Crossover(0, 0, ())
    assert decide(APART, FLAGS, nothing_wins, F32, SUM, 4) == ENGINE
    assert decide(SHARED, HOST, nothing_wins, F32, SUM, 4) == IPC


@pytest.mark.parametrize(
    ("dtype", "op", "expected"),
    [
        *((dtype, SUM, IPC) for dtype in (F32, DType.float64, DType.float16, DType.bfloat16, DType.int32, DType.int64)),
        *((dtype, SUM, ENGINE) for dtype in (DType.int8, DType.uint8, DType.bool, DType.int16, None)),
        *((F32, op, IPC) for op in (ReduceOp.AVERAGE, ReduceOp.MIN, ReduceOp.MAX)),
        (DType.int32, ReduceOp.MIN, IPC),
        (DType.int32, ReduceOp.AVERAGE, ENGINE),
        *((F32, op, ENGINE) for op in (ReduceOp.PRODUCT, ReduceOp.BIT_AND, None)),
    ],
)
def test_types_and_operations(dtype: DType | None, op: ReduceOp | None, expected: str) -> None:
    assert decide(APART, FLAGS, UP_TO, dtype, op, 64) == expected
    # Neither connects anything for what it could not carry.
    assert decide(APART, None, None, dtype, op, 64) == (CONNECT if expected == IPC else ENGINE)


def test_captures() -> None:
    assert decide(APART, FLAGS, UP_TO, F32, SUM, 64, capturing=True) == IPC
    assert decide(APART, FLAGS, None, F32, SUM, 64, capturing=True) == ENGINE
    assert decide(APART, None, None, F32, SUM, 64, capturing=True) == ENGINE
    assert decide(APART, Link("", False), UP_TO, F32, SUM, 64, capturing=True) == ENGINE


def test_what_is_off_stays_off() -> None:
    assert decide(Layout("the ranks are on several hosts"), None, None, F32, SUM, 64) == ENGINE
    assert decide(APART, Link("rank 1 can not reach the memory of rank 0"), UP_TO, F32, SUM, 64) == ENGINE
    assert decide(APART, FLAGS, UP_TO, F32, SUM, 64, together=True) == ENGINE


def test_a_gpu_each() -> None:
    assert find_layout([place("0"), place("1")], 8) == Layout()


@pytest.mark.parametrize(
    ("places", "off", "no_nccl", "shared"),
    [
        ([place("0"), place("1"), place("1")], "", "ranks 1 and 2 of the group share a GPU, which NCCL refuses", True),
        ([place("0", shares=True), place("0", shares=True)], "", "", True),
        ([place("0", shares=True), place("0")], "", "ranks 0 and 1 of the group share a GPU, which NCCL refuses", True),
        ([place("0"), place("1", nccl=False)], "", "torch of rank 1 of the group was built without NCCL", False),
        ([place("0"), place("1", on=False)], "rank 1 of the group has LAUNCHER_CUDA_IPC=0", "", False),
        (
            [place("", reason="no CUDA library"), place("", reason="no CUDA library")],
            "rank 0 of the group can not take part: no CUDA library",
            "",
            False,
        ),
        ([place(str(rank)) for rank in range(9)], "9 ranks, and it takes up to 8", "", False),
    ],
)
def test_layouts(places: list[Place], off: str, no_nccl: str, shared: bool) -> None:
    told = [Place.unpack(place.pack()) for place in places]
    assert told == places
    assert len({len(place.pack()) for place in places}) == 1
    assert find_layout(told, 8) == Layout(off, no_nccl, shared)


def test_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    from launcher.collectives.torch_choice import switched_on

    monkeypatch.delenv("LAUNCHER_CUDA_IPC", raising=False)
    assert switched_on()
    monkeypatch.setenv("LAUNCHER_CUDA_IPC", "0")
    assert not switched_on()
    monkeypatch.setenv("LAUNCHER_CUDA_IPC", "no")
    with pytest.raises(UsageError, match="LAUNCHER_CUDA_IPC is 'no'; expected 0"):
        switched_on()


def test_it_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import launcher.collectives.torch_choice"
    subprocess.run([sys.executable, "-c", code], env={**os.environ}, timeout=60, check=True)
