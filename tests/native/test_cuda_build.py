"""The CUDA library, compiled: for which GPUs, without spilled registers, with one symbol. Needs nvcc, and no GPU."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])

pytestmark = [pytest.mark.native, pytest.mark.slow, pytest.mark.timeout(300)]

ARCHITECTURES = ("sm_80", "sm_90")
PACK_KERNELS = 2 * 3 * 3  # tables x types of tensors x types of buckets
COMPRESS_KERNELS = 2
ALLREDUCE_KERNELS = 6 * 3  # types x algorithms


def tool(name: str) -> str:
    path = shutil.which(name, path=TOOLS)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def run(*command: str) -> str:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


@pytest.fixture(scope="module")
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The library, and what the assembler said of each kernel when it was compiled."""
    compiler = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if not compiler:
        pytest.skip("no nvcc: the CUDA library is left out of the package then")
    cmake, ninja = tool("cmake"), tool("ninja")
    # In pytest's cache: what has not changed is not compiled again, and was told before.
    cache = getattr(request.config, "cache", None)
    build = Path(cache.mkdir("native-cuda")) if cache else tmp_path_factory.mktemp("cuda")
    run(
        *(cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"),
        *("-DLAUNCHER_CUDA=ON", "-DLAUNCHER_PYTHON=OFF", "-DCMAKE_BUILD_TYPE=Release"),
        f"-DCMAKE_CUDA_COMPILER={compiler}",
        "-DCMAKE_CUDA_FLAGS=-Xptxas=-v -Werror=all-warnings",
    )
    told = build / "told"
    said = run(cmake, "--build", str(build), "--target", "launcher_cuda")
    if "Compiling entry function" in said:
        # Only a build of everything tells of everything.
        said += run(cmake, "--build", str(build), "--target", "launcher_cuda", "--clean-first") if told.exists() else ""
        told.write_text(said)
    (library,) = build.glob("**/liblauncher_cuda.so")
    return library, told.read_text()


def kernels(said: str) -> dict[tuple[str, str], tuple[int, int, int]]:
    """(kernel, architecture) -> bytes of stack, bytes of spilled stores, bytes of spilled loads."""
    found = {}
    pattern = re.compile(
        r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads",
        re.DOTALL,
    )
    for name, architecture, stack, stores, loads in pattern.findall(said):
        found[name, architecture] = int(stack), int(stores), int(loads)
    return found


def test_all_kernels_are_there_and_none_spills(built: tuple[Path, str]) -> None:
    found = kernels(built[1])
    for architecture in ARCHITECTURES:
        names = [name for name, other in found if other == architecture]
        assert len([name for name in names if "11pack_kernel" in name]) == PACK_KERNELS
        assert len([name for name in names if "15compress_kernel" in name]) == COMPRESS_KERNELS
        assert len([name for name in names if "17decompress_kernel" in name]) == COMPRESS_KERNELS
        assert len([name for name in names if "16allreduce_kernel" in name]) == ALLREDUCE_KERNELS
    assert {key: numbers for key, numbers in found.items() if numbers != (0, 0, 0)} == {}


def fat_entries(library: bytes) -> set[tuple[str, int]]:
    """("ptx" or "elf", compute capability) of all that is embedded, from the headers of the fat binaries.

    A fat binary begins with 0xBA55ED50, a version, the header's length (16 bits each) and the length of what follows
    (64); each entry with its kind (1: PTX, 2: machine code), a version, the header's length (32), the length of what
    follows (64) and, at byte 28, the capability (32).
    """
    found = set()
    for match in re.finditer(re.escape(struct.pack("<I", 0xBA55ED50)), library):
        _, _, header, length = struct.unpack_from("<IHHQ", library, match.start())
        if header != 16 or match.start() + header + length > len(library):
            continue
        at, end = match.start() + header, match.start() + header + length
        while at + 32 <= end:
            kind, _, size, data = struct.unpack_from("<HHIQ", library, at)
            (capability,) = struct.unpack_from("<I", library, at + 28)
            found.add(({1: "ptx", 2: "elf"}.get(kind, str(kind)), capability))
            at += size + data
    return found


def test_architectures(built: tuple[Path, str]) -> None:
    assert {("elf", 80), ("elf", 90), ("ptx", 90)} <= fat_entries(built[0].read_bytes())


def test_one_symbol_is_exported(built: tuple[Path, str]) -> None:
    symbols = [line.split()[-1] for line in run(tool("nm"), "-D", "--defined-only", str(built[0])).splitlines()]
    assert symbols == ["launcher_cuda_table"]
