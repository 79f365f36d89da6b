"""Fault tests and MPI jobs once more, with a guardian and agents built with ASan + UBSan, and with TSan."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
# Exits, signals, process trees and logs go through every part of the guardian. Left out: limits of memory, processes
# and descriptors, which a sanitizer's runtime does not fit in, and the tests that are slow without one.
FILES = {
    "asan": (
        *("faults/test_rank_exit.py", "faults/test_signals.py", "faults/test_process_tree.py", "faults/test_logs.py"),
        *("faults/test_stop.py", "mpi/test_one_host.py"),
    ),
    # where its threads meet; its start alone takes a second
    "tsan": ("faults/test_process_tree.py", "faults/test_logs.py"),
}
UNFIT = "not rss and not memory and not flood and not bomb and not descriptors and not shm"

pytestmark = [pytest.mark.native, pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.mark.parametrize(("mode", "sanitize"), [("asan", "address,undefined"), ("tsan", "thread")])
def test_faults_with_sanitizers(mode: str, sanitize: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    cmake, ninja = (shutil.which(name, path=TOOLS) for name in ("cmake", "ninja"))
    if cmake is None or ninja is None or not (os.environ.get("CXX") or shutil.which("c++")):
        pytest.skip("needs cmake, ninja and a C++ compiler")
    cache = getattr(request.config, "cache", None)
    build = Path(cache.mkdir(f"native-{mode}")) if cache else tmp_path / "build"
    options = [f"-DLAUNCHER_SANITIZE={sanitize}", "-DLAUNCHER_TESTS=ON", "-DLAUNCHER_WERROR=ON"]
    options += [f"-DCMAKE_MAKE_PROGRAM={ninja}", "-DCMAKE_BUILD_TYPE=Debug"]
    options += ["-DLAUNCHER_PYTHON=OFF", "-DLAUNCHER_CUDA=OFF"]
    for command in ([cmake, "-S", ROOT, "-B", build, "-G", "Ninja", *options], [cmake, "--build", build]):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=300)
    guardian = build / "bin" / "_guardian"
    probe = subprocess.run([guardian], capture_output=True, text=True, check=False)
    if "unexpected memory mapping" in probe.stderr:
        pytest.skip("ThreadSanitizer does not run under this kernel's vm.mmap_rnd_bits")
    reports = tmp_path / "report"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
            *("-m", "not slow and not torch", "-k", UNFIT),
            *(str(ROOT / "tests" / name) for name in FILES[mode]),
        ],
        cwd=ROOT,
        env={
            **os.environ,
            "LAUNCHER_GUARDIAN": str(guardian),
            # The guardian ends by _exit with its threads running: neither they nor what they hold is a leak.
            "ASAN_OPTIONS": f"detect_leaks=0:log_path={reports}",
            "UBSAN_OPTIONS": f"print_stacktrace=1:halt_on_error=1:log_path={reports}",
            "TSAN_OPTIONS": f"halt_on_error=1:report_thread_leaks=0:log_path={reports}",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=380,
    )
    found = "\n".join(path.read_text() for path in tmp_path.glob("report*"))
    assert done.returncode == 0 and not found, f"{done.stdout[-6000:]}\n{found}"
