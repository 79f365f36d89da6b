"""The native half of the build: setuptools calls CMake, CMake builds, the wheel takes what it installs.

Everything declarative is in pyproject.toml, everything about compilers in CMakeLists.txt. CMake options come in
CMAKE_ARGS, for example ``CMAKE_ARGS=-DLAUNCHER_CUDA=OFF pip install .``
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import nanobind
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
# In a build without isolation the tools may be installed beside an interpreter whose folder is not on PATH.
TOOLS = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])


def find_tool(name: str) -> str:
    path = shutil.which(name, path=TOOLS)
    if path is None:
        raise SystemExit(f"launcher: {name} not found; 'pip install {name}', or build with isolation")
    return path


class BuildPython(build_py):
    def run(self):
        # setuptools never removes from its build folder what is gone from the source, and would ship it for ever.
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib, "launcher"), ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        build_dir = self._build_dir()
        ninja, nanobind_dir = find_tool("ninja"), nanobind.cmake_dir()
        configure = [
            *(find_tool("cmake"), "-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dnanobind_DIR={nanobind_dir}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        if self._made_with_other_tools(build_dir, ninja, nanobind_dir):
            configure.append("--fresh")
        subprocess.run(configure, check=True)
        subprocess.run([configure[0], "--build", str(build_dir)], check=True)
        # The wheel takes all that lands in build_lib: the guardian and the CUDA library too.
        self._install(Path(self.build_lib).resolve())

    def copy_extensions_to_source(self):
        """In-place and editable builds: setuptools would look for the module in build_lib, where it is not."""
        self._install(ROOT)

    def get_ext_filename(self, fullname):
        return fullname.replace(".", os.sep) + ".abi3.so"

    def _build_dir(self):
        return ROOT / "build" / f"{sys.implementation.cache_tag}-{'debug' if self.debug else 'release'}"

    @staticmethod
    def _made_with_other_tools(build_dir, ninja, nanobind_dir):
        """pip builds in an environment that it deletes afterwards: the cache then names tools that are no more."""
        try:
            cache = (build_dir / "CMakeCache.txt").read_text()
        except FileNotFoundError:
            return False
        entries = dict(line.split("=", 1) for line in cache.splitlines() if "=" in line and line[0] not in "#/")
        values = {key.split(":")[0]: value for key, value in entries.items()}
        return values.get("CMAKE_MAKE_PROGRAM") != ninja or values.get("nanobind_DIR") != nanobind_dir

    def _install(self, prefix):
        # INSTALL_ALWAYS: cmake otherwise skips a file that is less than a second newer than the installed one.
        subprocess.run(
            [find_tool("cmake"), "--install", str(self._build_dir()), "--prefix", str(prefix), "--strip"],
            check=True,
            env={**os.environ, "CMAKE_INSTALL_ALWAYS": "1"},
        )


setup(
    ext_modules=[Extension("launcher._native", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": CMakeBuild, "build_py": BuildPython},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
