"""Builds of the native part for the tests of this folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
# Type of build, and sanitizers.
MODES = {
    "plain": ("Release", ""),
    "asan": ("Debug", "address,undefined"),
    "tsan": ("Debug", "thread"),
}


def tool(name: str) -> str:
    path = shutil.which(name, path=TOOLS)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


@pytest.fixture
def native_build(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Path]:
    """Builds in one of the MODES: all targets, or those named; gives the folder of the build."""

    def build_in(mode: str, *targets: str) -> Path:
        if not (os.environ.get("CXX") or shutil.which("c++")):
            pytest.skip("no C++ compiler")
        cmake, ninja = tool("cmake"), tool("ninja")
        build_type, sanitize = MODES[mode]
        # In pytest's cache: a second run builds what changed only. Without one (-p no:cacheprovider), a fresh folder.
        cache = getattr(request.config, "cache", None)
        build = Path(cache.mkdir(f"native-{mode}")) if cache else tmp_path / "build"
        configure = [cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        configure += [f"-DCMAKE_BUILD_TYPE={build_type}", f"-DLAUNCHER_SANITIZE={sanitize}"]
        configure += ["-DLAUNCHER_TESTS=ON", "-DLAUNCHER_WERROR=ON", "-DLAUNCHER_PYTHON=OFF", "-DLAUNCHER_CUDA=OFF"]
        for command in (configure, [cmake, "--build", str(build), *(["--target", *targets] if targets else [])]):
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=280
            )
            assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}"
        return build

    return build_in
