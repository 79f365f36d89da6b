"""The status page has four writers and readers that share no code, for the sake of start-up time: they must agree."""

from __future__ import annotations

import importlib.util
import os
import re
import struct
from pathlib import Path
from types import ModuleType

import pytest

import launcher
from launcher._native import StatusPage
from launcher.rank import status
from launcher.supervisor import pages, watch

PACKAGE = Path(launcher.__file__).parent


@pytest.fixture(scope="module")
def shim() -> ModuleType:
    """The boot shim; it lies beside boot.py and is not imported as part of the package."""
    spec = importlib.util.spec_from_file_location("shim_under_test", PACKAGE / "rank" / "_launcher_shim.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def page(tmp_path: Path) -> str:
    path = str(tmp_path / "status")
    pages.make_status_page(path, 7)
    return path


def test_constants_agree(shim: ModuleType) -> None:
    assert (shim.PID_OFFSET, shim.PHASE_OFFSET, shim.STARTED_NS_OFFSET) == (
        status.PID_OFFSET,
        status.PHASE_OFFSET,
        status.STARTED_NS_OFFSET,
    )
    assert (shim.RUNNING, shim.FINISHED, shim.FAILED) == (status.RUNNING, status.FINISHED, status.FAILED)
    assert pages._PHASE_OFFSET == status.PHASE_OFFSET
    assert pages._PAGE_BYTES == status.PAGE_SIZE
    assert watch._RUNNING_PHASE == status.RUNNING
    from launcher import evidence

    assert evidence.FINISHED_PHASE == status.FINISHED
    assert shim.STACK_SIGNAL == watch._STACK_SIGNAL


def test_native_takes_the_supervisors_page(page: str) -> None:
    mapped = StatusPage.open(page)
    assert (mapped.rank, mapped.pid, mapped.phase) == (7, 0, status.CREATED)
    snapshot = mapped.snapshot()
    assert snapshot["consistent"]
    assert (snapshot["step"], snapshot["collective_seq"], snapshot["operation"]) == (0, 0, "")
    assert os.stat(page).st_mode & 0o777 == 0o600


def test_native_and_supervisor_make_the_same_page(page: str, tmp_path: Path) -> None:
    StatusPage.create(str(tmp_path / "native"), 7).close()
    assert Path(page).read_bytes() == (tmp_path / "native").read_bytes()


def test_supervisor_reads_what_native_writes(page: str) -> None:
    mapped = StatusPage.open(page, writable=True)
    mapped.step(41, 1000)
    for phase in range(5):
        mapped.phase = phase
        assert pages.read_page(page) == pages.Page(phase, 41, 0, 0)
    assert mapped.enter_collective("allreduce", 64) == 1
    seen = pages.read_page(page)
    assert seen is not None
    assert (seen.collective_seq, seen.collective_entered_ns) == (1, mapped.snapshot()["collective_enter_ns"])
    mapped.leave_collective()
    assert pages.read_page(page) == pages.Page(4, 41, 1, 0)


def test_native_reads_what_the_shim_writes(shim: ModuleType, page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shim, "_page", page)
    monkeypatch.setattr(shim, "_pid", os.getpid())
    shim._mark(shim.RUNNING, 123456789)
    snapshot = StatusPage.open(page).snapshot()
    assert (snapshot["pid"], snapshot["phase"], snapshot["started_ns"]) == (os.getpid(), status.RUNNING, 123456789)
    shim._mark(shim.FINISHED)
    assert StatusPage.open(page).phase == status.FINISHED
    monkeypatch.setattr(shim, "_pid", os.getpid() + 1)  # as in a child that the script forked
    shim._mark(shim.FAILED)
    assert StatusPage.open(page).phase == status.FINISHED


def test_python_and_native_agree_on_boot(page: str) -> None:
    fd = os.open(page, os.O_WRONLY)
    try:
        status.write_boot(fd, 99, 5)
    finally:
        os.close(fd)
    snapshot = StatusPage.open(page).snapshot()
    assert (snapshot["pid"], snapshot["started_ns"], snapshot["phase"]) == (99, 5, status.BOOTING)


def test_header_documents_the_offsets_that_are_used() -> None:
    header = Path(__file__).parents[1] / "native" / "include" / "launcher" / "status_page.h"
    found = dict(re.findall(r"offsetof\(StatusLayout, (\w+)\) == (\d+)", header.read_text()))
    used = {
        "rank": pages._RANK_OFFSET,
        "pid": status.PID_OFFSET,
        "phase": pages._PHASE_OFFSET,
        "started_ns": status.STARTED_NS_OFFSET,
        "step": pages._STEP_OFFSET,
        "collective_seq": pages._COLLECTIVE_SEQ_OFFSET,
        "collective_enter_ns": pages._COLLECTIVE_ENTER_OFFSET,
    }
    assert {name: int(found[name]) for name in used} == used


@pytest.mark.parametrize("content", [b"", b"LNCHPAGE", b"\0" * 4096, b"NOTAPAGE" + b"\0" * 4088])
def test_a_torn_page_is_no_page(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "status").write_bytes(content)
    assert pages.read_page(str(tmp_path / "status")) is None
    assert pages.read_page(str(tmp_path / "gone")) is None


def test_layout_is_little_endian(page: str) -> None:
    assert struct.unpack_from("<8sII", Path(page).read_bytes()) == (b"LNCHPAGE", 1, 7)
