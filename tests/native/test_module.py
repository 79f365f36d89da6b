"""The extension module and its Python face."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher import _native
from launcher.rank import status

pytestmark = pytest.mark.native


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_rank_and_supervisor_share_a_page(tmp_path: Path) -> None:
    path = str(tmp_path / "rank-3.page")
    supervisor = status.create_page(path, 3)
    rank = status.open_page(path, writable=True)
    assert (rank.path, rank.rank, rank.writable, rank.closed) == (path, 3, True, False)
    before = time.monotonic_ns()
    rank.attach()
    rank.phase = status.RUNNING
    rank.step(12, 384)
    assert rank.enter_collective("allreduce", 4096) == 1
    seen = supervisor.snapshot()
    assert seen["pid"] == os.getpid()
    assert status.phase_name(seen["phase"]) == "running"
    assert (seen["step"], seen["samples"]) == (12, 384)
    assert (seen["operation"], seen["bytes"], seen["collective_seq"]) == ("allreduce", 4096, 1)
    assert before <= seen["started_ns"] <= seen["step_ns"] <= seen["collective_enter_ns"] <= time.monotonic_ns()
    assert seen["heartbeat_ns"] == seen["collective_enter_ns"]
    assert seen["consistent"] is True
    rank.leave_collective()
    assert supervisor.snapshot()["collective_enter_ns"] == 0

    assert not rank.stop_requested
    supervisor.request_stop(before + 10**9)
    assert rank.stop_requested
    assert rank.stop_deadline_ns == before + 10**9


def test_boot_writes_without_the_module(tmp_path: Path) -> None:
    path = str(tmp_path / "boot.page")
    page = status.create_page(path, 0)
    code = (
        "import os, sys\n"
        "from launcher.rank import status\n"
        "fd = os.open(sys.argv[1], os.O_WRONLY)\n"
        "status.write_boot(fd, os.getpid(), 1234567890123)\n"
        "status.write_phase(fd, status.FAILED)\n"
        "print(os.getpid(), 'launcher._native' in sys.modules, 'typing' in sys.modules)\n"
    )
    out = subprocess.run([sys.executable, "-S", "-c", code, path], capture_output=True, text=True, env=child_env())
    assert out.returncode == 0, out.stderr
    seen = page.snapshot()
    assert out.stdout.split() == [str(seen["pid"]), "False", "False"]
    assert (seen["phase"], seen["started_ns"]) == (status.FAILED, 1234567890123)
    assert os.path.getsize(path) == status.PAGE_SIZE


def child_env() -> dict[str, str]:
    """-S leaves site-packages out, and with it what .pth files import there; the package itself is still needed."""
    package = Path(status.__file__).parents[2]
    return {**os.environ, "PYTHONPATH": str(package)}


def test_python_offsets_are_the_native_ones(tmp_path: Path) -> None:
    path = tmp_path / "offsets.page"
    page = status.create_page(str(path), 5)
    page.attach()
    page.phase = status.FINISHED
    raw = path.read_bytes()
    seen = page.snapshot()
    assert int.from_bytes(raw[status.PID_OFFSET :][:4], "little") == seen["pid"] == os.getpid()
    assert int.from_bytes(raw[status.PHASE_OFFSET :][:4], "little") == seen["phase"] == status.FINISHED
    assert int.from_bytes(raw[status.STARTED_NS_OFFSET :][:8], "little") == seen["started_ns"]


def test_operation_cut_inside_a_character(tmp_path: Path) -> None:
    page = status.create_page(str(tmp_path / "utf8.page"), 0)
    page.enter_collective("é" * 20, 0)
    assert page.snapshot()["operation"] == "é" * 15 + "�"


def test_errors_are_pythons_own(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.page")
    with pytest.raises(FileNotFoundError) as error:
        status.open_page(missing)
    assert error.value.filename == missing
    assert "open" in str(error.value)

    path = str(tmp_path / "a.page")
    page = status.create_page(path, 0)
    with pytest.raises(FileExistsError):
        status.create_page(path, 0)
    with pytest.raises(ValueError, match=r"a\.page: phase 9 is not in 0\.\.4"):
        page.phase = 9
    with pytest.raises(ValueError, match=r"a\.page: opened for reading only"):
        status.open_page(path).step(1, 1)
    page.close()
    page.close()
    assert page.closed
    with pytest.raises(ValueError, match=r"a\.page: already closed"):
        page.snapshot()

    (tmp_path / "text.page").write_bytes(b"x" * 4096)
    with pytest.raises(ValueError, match="bad magic"):
        status.open_page(str(tmp_path / "text.page"))
    (tmp_path / "short.page").write_bytes(b"LNCHPAGE")
    with pytest.raises(ValueError, match="8 bytes"):
        status.open_page(str(tmp_path / "short.page"))
    with pytest.raises(TypeError):
        status.create_page(str(tmp_path / "negative.page"), -1)


def test_unknown_phase_is_shown_as_it_is() -> None:
    assert status.phase_name(0) == "created"
    assert status.phase_name(77) == "unknown (77)"


def test_nothing_leaks(tmp_path: Path) -> None:
    def mappings() -> int:
        return Path("/proc/self/maps").read_text().count(str(tmp_path))

    descriptors = open_descriptors()
    for number in range(200):
        path = str(tmp_path / f"{number}.page")
        page = status.create_page(path, number)
        with pytest.raises(FileExistsError):
            status.create_page(path, number)
        page.snapshot()
        if number % 2:
            page.close()
    del page
    gc.collect()
    assert mappings() == 0
    assert open_descriptors() == descriptors


def test_step_is_cheap(tmp_path: Path) -> None:
    """It is called once a training step, so the bound is generous: it is to catch a system call, not a nanosecond."""
    page = status.create_page(str(tmp_path / "speed.page"), 0)
    started = time.perf_counter()
    for number in range(20_000):
        page.step(number, number)
    assert (time.perf_counter() - started) / 20_000 < 20e-6


def test_child_subreaper() -> None:
    code = (
        "import os\n"
        "from launcher import _native\n"
        "_native.set_child_subreaper(True)\n"
        "read, write = os.pipe()\n"
        "if os.fork() == 0:\n"
        "    if os.fork() == 0:\n"
        "        os.read(read, 1)\n"
        "        os._exit(7)\n"
        "    os._exit(3)\n"
        "codes = [os.waitstatus_to_exitcode(os.wait()[1])]\n"
        "os.write(write, b'x')\n"
        "codes.append(os.waitstatus_to_exitcode(os.wait()[1]))\n"
        "print(codes)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert (out.stdout.strip(), out.stderr) == ("[3, 7]", "")


def test_parent_death_signal() -> None:
    code = (
        "import os, signal\n"
        "from launcher import _native\n"
        "parent = os.getpid()\n"
        "if os.fork() == 0:\n"
        "    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])\n"
        "    _native.set_parent_death_signal(signal.SIGTERM)\n"
        "    assert os.getppid() == parent\n"
        "    os.write(1, b'ready\\n')\n"
        "    told = signal.sigtimedwait([signal.SIGTERM], 30)\n"
        "    os.write(1, b'told\\n' if told else b'not told\\n')\n"
        "    os._exit(0)\n"
        "signal.pause()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process:
        assert process.stdout.readline() == b"ready\n"
        process.kill()
        assert process.stdout.read() == b"told\n"
    with pytest.raises(OSError, match="Invalid argument"):
        _native.set_parent_death_signal(signal.NSIG + 1000)


def test_cuda_devices_or_the_reason() -> None:
    """In a process of its own: asking starts the CUDA driver, after which a process must not fork workers."""
    code = "import json; from launcher import _native; print(json.dumps(_native.cuda_devices()))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    devices, reason = json.loads(out.stdout)
    if not devices:
        assert reason
        return
    assert reason == ""
    for index, device in enumerate(devices):
        assert device["index"] == index
        assert device["name"]
        assert device["pci_bus_id"].count(":") == 2
        assert device["total_bytes"] > 0
        assert device["free_bytes"] is None
