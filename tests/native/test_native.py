"""The native tests, each built and run plain, under ASan + UBSan, and under TSan."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

TOOLS = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
RUNTIME_OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=1:abort_on_error=0:halt_on_error=1",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    "TSAN_OPTIONS": "halt_on_error=1:second_deadlock_stack=1",
}
# gcc 12's TSan can not place its shadow where a newer kernel randomises mappings with more than 28 bits.
TSAN_UNUSABLE = "ThreadSanitizer: unexpected memory mapping"

pytestmark = [pytest.mark.native, pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.mark.parametrize("mode", ["plain", "asan", "tsan"])
def test_native(mode: str, native_build: Callable[..., Path]) -> None:
    ctest = shutil.which("ctest", path=TOOLS)
    if ctest is None:
        pytest.skip("ctest is not installed")
    build = native_build(mode)
    # Two at a time: the ranks of one test wait for each other for most of it.
    done = subprocess.run(
        [ctest, "--test-dir", str(build), "--output-on-failure", "--no-tests=error", "--parallel", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **RUNTIME_OPTIONS},
        check=False,
        timeout=280,
    )
    if TSAN_UNUSABLE in done.stdout:
        pytest.skip("ThreadSanitizer does not run under this kernel's vm.mmap_rnd_bits")
    assert done.returncode == 0, f"ctest ended with {done.returncode}:\n{done.stdout}"
    assert "100% tests passed" in done.stdout
    assert all(os.access(build / "bin" / name, os.X_OK) for name in ("_guardian", "_agent"))
