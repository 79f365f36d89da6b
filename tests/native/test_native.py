"""The native tests, each built and run plain, under ASan + UBSan, and under TSan."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])

MODES = {
    "plain": ("Release", ""),
    "asan": ("Debug", "address,undefined"),
    "tsan": ("Debug", "thread"),
}
RUNTIME_OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=1:abort_on_error=0:halt_on_error=1",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    "TSAN_OPTIONS": "halt_on_error=1:second_deadlock_stack=1",
}

pytestmark = [pytest.mark.native, pytest.mark.slow, pytest.mark.timeout(300)]


def tool(name: str) -> str:
    path = shutil.which(name, path=TOOLS)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


# gcc 12's TSan can not place its shadow where a newer kernel randomises mappings with more than 28 bits.
TSAN_UNUSABLE = "ThreadSanitizer: unexpected memory mapping"


def run(*command: str) -> str:
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **RUNTIME_OPTIONS},
        check=False,
        timeout=280,
    )
    if TSAN_UNUSABLE in done.stdout:
        pytest.skip("ThreadSanitizer does not run under this kernel's vm.mmap_rnd_bits")
    assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


@pytest.mark.parametrize("mode", MODES)
def test_native(mode: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    if not (os.environ.get("CXX") or shutil.which("c++")):
        pytest.skip("no C++ compiler")
    build_type, sanitize = MODES[mode]
    # In pytest's cache: a second run builds what changed only. Without a cache (-p no:cacheprovider), a fresh folder.
    cache = getattr(request.config, "cache", None)
    build = Path(cache.mkdir(f"native-{mode}")) if cache else tmp_path
    cmake, ninja, ctest = tool("cmake"), tool("ninja"), tool("ctest")
    run(
        *(cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"),
        f"-DCMAKE_BUILD_TYPE={build_type}",
        f"-DLAUNCHER_SANITIZE={sanitize}",
        *("-DLAUNCHER_TESTS=ON", "-DLAUNCHER_WERROR=ON", "-DLAUNCHER_PYTHON=OFF", "-DLAUNCHER_CUDA=OFF"),
    )
    run(cmake, "--build", str(build))
    output = run(ctest, "--test-dir", str(build), "--output-on-failure", "--no-tests=error")
    assert "100% tests passed" in output
    assert all(os.access(build / "bin" / name, os.X_OK) for name in ("_guardian", "_agent"))
