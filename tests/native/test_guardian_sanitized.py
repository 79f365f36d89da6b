"""Fault tests and MPI jobs once more, with a guardian and agents built with ASan + UBSan, and with TSan."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Exits, signals, process trees and logs go through every part of the guardian. Left out: limits of memory, processes
# and descriptors, which a sanitizer's runtime does not fit in, and the tests that are slow without one.
# Two lists, which run side by side: a job waits for most of its time.
FILES = {
    "asan": (
        (
            *("faults/test_rank_exit.py", "faults/test_signals.py", "faults/test_process_tree.py"),
            *("faults/test_logs.py", "faults/test_stop.py"),
        ),
        ("mpi/test_one_host.py",),
    ),
    "tsan": (("faults/test_process_tree.py",), ("faults/test_logs.py",)),  # where its threads meet
}
UNFIT = "not rss and not memory and not flood and not bomb and not descriptors and not shm"

pytestmark = [pytest.mark.native, pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.mark.parametrize("mode", FILES)
def test_faults_with_sanitizers(mode: str, native_build: Callable[..., Path], tmp_path: Path) -> None:
    guardian = native_build(mode, "launcher_guardian", "launcher_agent") / "bin" / "_guardian"
    probe = subprocess.run([guardian], capture_output=True, text=True, check=False)
    if "unexpected memory mapping" in probe.stderr:
        pytest.skip("ThreadSanitizer does not run under this kernel's vm.mmap_rnd_bits")
    reports = tmp_path / "report"
    environment = {
        **os.environ,
        "LAUNCHER_GUARDIAN": str(guardian),
        # The guardian ends by _exit with its threads running: neither they nor what they hold is a leak.
        "ASAN_OPTIONS": f"detect_leaks=0:log_path={reports}",
        "UBSAN_OPTIONS": f"print_stacktrace=1:halt_on_error=1:log_path={reports}",
        # It sleeps a second at the end of each process, if it is not told otherwise.
        "TSAN_OPTIONS": f"halt_on_error=1:report_thread_leaks=0:atexit_sleep_ms=20:log_path={reports}",
    }

    def test(files: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
                *("-m", "not slow and not torch", "-k", UNFIT),
                *(str(ROOT / "tests" / name) for name in files),
            ],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=380,
        )

    with ThreadPoolExecutor() as pool:
        done = list(pool.map(test, FILES[mode]))
    found = "\n".join(path.read_text() for path in tmp_path.glob("report*"))
    output = "\n".join(run.stdout[-6000:] for run in done)
    assert [run.returncode for run in done] == [0, 0], f"{output}\n{found}"
    assert not found, found
