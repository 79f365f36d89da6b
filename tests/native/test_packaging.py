"""What ``pip install`` makes of the sdist: a wheel twice in one tree, and an editable install.

Built without isolation, with the tools of this environment, so that nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("launcher", "native", "setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "README.md", "LICENSE")
# Not optimised: these tests look at what is in a wheel.
BUILD = "-DLAUNCHER_CUDA=OFF -DCMAKE_CXX_FLAGS_RELEASE=-O0"

pytestmark = [pytest.mark.native, pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist of a clean copy of what the package is built from."""
    for module in ("setuptools", "cmake", "ninja", "nanobind"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    if not (os.environ.get("CXX") or shutil.which("c++")):
        pytest.skip("no C++ compiler")
    copy, made = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("sdist")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(
                source, copy / name, ignore=shutil.ignore_patterns("*.so", "_guardian", "_agent", "__pycache__")
            )
        elif source.exists():
            shutil.copy2(source, copy / name)
    code = "import sys, setuptools.build_meta as backend; backend.build_sdist(sys.argv[1])"
    python("-c", code, str(made), cwd=copy)
    (sdist,) = made.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        # The filter is younger than some patch releases of the Pythons that are supported; the archive is our own.
        archive.extractall(made / "out", **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (tree,) = (made / "out").iterdir()
    return tree


def python(*arguments: str, cwd: Path, executable: str = sys.executable) -> str:
    done = subprocess.run(
        [executable, *arguments],
        cwd=cwd,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "CMAKE_ARGS": BUILD, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        timeout=380,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def build_wheel(tree: Path, target: Path) -> Path:
    python("-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", str(target), str(tree), cwd=target)
    (wheel,) = target.glob("*.whl")
    assert "-cp310-abi3-linux_" in wheel.name
    return wheel


def names_and_modes(wheel: Path) -> dict[str, int]:
    with zipfile.ZipFile(wheel) as archive:
        return {entry.filename: entry.external_attr >> 16 for entry in archive.infolist()}


def check_contents(wheel: Path) -> None:
    files = names_and_modes(wheel)
    assert {"launcher/_native.abi3.so", "launcher/_data.abi3.so"} <= files.keys()
    assert files["launcher/_guardian"] & files["launcher/_agent"] & 0o111 == 0o111
    assert {"launcher/py.typed", "launcher/_native.pyi", "launcher/_data.pyi"} <= files.keys()
    assert "launcher/rank/status.py" in files
    assert not [name for name in files if name.startswith(("native/", "tests/")) or "liblauncher_cuda" in name]


def test_the_sdist_has_sources_only(tree: Path) -> None:
    names = [str(path.relative_to(tree)) for path in tree.rglob("*")]
    assert "native/python/module.cpp" in names
    assert not [name for name in names if name.endswith((".so", "_guardian", "_agent")) or name.startswith("tests")]


def test_wheel_twice_in_one_tree_then_without_a_module(tree: Path, tmp_path: Path) -> None:
    extra = tree / "launcher" / "removed_later.py"
    extra.touch()
    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()
    first = build_wheel(tree, tmp_path / "1")
    assert "launcher/removed_later.py" in names_and_modes(first)
    extra.unlink()
    second = build_wheel(tree, tmp_path / "2")
    check_contents(second)
    assert "launcher/removed_later.py" not in names_and_modes(second)


def test_editable(tree: Path, tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=False, symlinks=True)
    # The tools and the run-time dependencies of this environment; --ignore-installed leaves its own package alone.
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(environment)}))
    (packages / "tools.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    executable = str(environment / "bin" / "python")
    install = ("-m", "pip", "install", "--no-build-isolation", "--no-deps", "--ignore-installed", "-e", str(tree))
    for _ in range(2):
        python(*install, cwd=tmp_path, executable=executable)
    assert all(os.access(tree / "launcher" / name, os.X_OK) for name in ("_guardian", "_agent"))
    where = python("-c", "from launcher import _native; print(_native.__file__)", cwd=tree, executable=executable)
    assert Path(where.strip()) == tree / "launcher" / "_native.abi3.so"
