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
    assert pages._COLLECTIVE_PHASES == status.COLLECTIVE_PHASE_NAMES
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
        assert pages.read_page(page) == pages.Page(phase, 41, 0, 0, 0, "", 0, -1, 0)
    assert mapped.enter_collective("allreduce", 64) == 1
    entered_ns = mapped.snapshot()["collective_enter_ns"]
    assert pages.read_page(page) == pages.Page(4, 41, 1, entered_ns, 64, "allreduce", status.ENTERING, -1, 0)
    mapped.set_collective_phase(status.WAITING)
    mapped.set_waiting_for(3)
    mapped.add_collective_wait(1000)
    mapped.add_collective_wait(5)
    seen = pages.read_page(page)
    assert seen is not None
    assert (seen.collective_phase, seen.waiting_for, seen.collective_waits_ns) == (status.WAITING, 3, 1005)
    assert seen.doing == "waiting for others"
    mapped.leave_collective()
    assert pages.read_page(page) == pages.Page(4, 41, 1, 0, 64, "allreduce", status.OUTSIDE, -1, 1005)
    last = pages.read_page(page)
    assert last is not None and last.doing == ""


def test_a_collective_goes_by_its_number_in_the_group(page: str) -> None:
    """That is the number in the errors of its group: a rank that is in several groups has entered more in all."""
    mapped = StatusPage.open(page, writable=True)
    mapped.enter_collective("broadcast", 8, 7)
    mapped.leave_collective()
    mapped.enter_collective("reduce", 8, group_sequence=812)
    seen = pages.read_page(page)
    assert seen is not None
    assert (seen.collective_seq, seen.number, mapped.snapshot()["group_sequence"]) == (2, 812, 812)
    mapped.enter_collective("reduce", 8)
    seen = pages.read_page(page)
    assert seen is not None
    assert (seen.collective_seq, seen.number) == (3, 3)


def test_what_a_page_cannot_hold_is_refused(page: str) -> None:
    mapped = StatusPage.open(page, writable=True)
    with pytest.raises(ValueError, match="collective phase 7 is not in"):
        mapped.set_collective_phase(7)
    with pytest.raises(ValueError, match="cannot wait for rank -2"):
        mapped.set_waiting_for(-2)
    mapped.set_waiting_for(-1)
    assert mapped.snapshot()["waiting_for"] == -1


def test_a_name_that_was_cut_in_a_character_is_readable(page: str) -> None:
    mapped = StatusPage.open(page, writable=True)
    mapped.enter_collective("o" * 30 + "\N{DEGREE SIGN}", 0)
    seen = pages.read_page(page)
    assert seen is not None
    assert seen.operation == mapped.snapshot()["operation"] == "o" * 30 + "\N{REPLACEMENT CHARACTER}"


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
        "bytes": pages._BYTES_OFFSET,
        "collective_enter_ns": pages._COLLECTIVE_ENTER_OFFSET,
        "operation": pages._OPERATION_OFFSET,
        "collective_phase": pages._COLLECTIVE_PHASE_OFFSET,
        "waiting_for": pages._WAITING_FOR_OFFSET,
        "collective_waits_ns": pages._WAITS_OFFSET,
        "group_sequence": pages._GROUP_SEQUENCE_OFFSET,
    }
    assert {name: int(found[name]) for name in used} == used
    listed = re.search(r"enum class CollectivePhase [^{]*\{([^}]*)\}", header.read_text())
    assert listed is not None
    names = [name.replace("_", " ") for name in re.findall(r"(\w+) = \d", listed[1])]
    assert [name.partition(" for ")[0] for name in status.COLLECTIVE_PHASE_NAMES] == names


@pytest.mark.parametrize("content", [b"", b"LNCHPAGE", b"\0" * 4096, b"NOTAPAGE" + b"\0" * 4088])
def test_a_torn_page_is_no_page(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "status").write_bytes(content)
    assert pages.read_page(str(tmp_path / "status")) is None
    assert pages.read_page(str(tmp_path / "gone")) is None


def test_whatever_stands_in_a_page_can_be_told_to_other_hosts(tmp_path: Path) -> None:
    """A rank may write anything there; what hosts send each other has 64 bits with a sign, and is text."""
    (tmp_path / "status").write_bytes(b"LNCHPAGE" + b"\xff" * 4088)
    seen = pages.read_page(str(tmp_path / "status"))
    assert seen is not None
    most = (1 << 63) - 1
    assert seen.step == seen.collective_seq == seen.number == seen.collective_waits_ns == most
    assert seen.operation == "\N{REPLACEMENT CHARACTER}" * 32
    assert seen.doing == "inside" and 0 <= seen.waiting_for <= most


def test_layout_is_little_endian(page: str) -> None:
    assert struct.unpack_from("<8sII", Path(page).read_bytes()) == (b"LNCHPAGE", 1, 7)
