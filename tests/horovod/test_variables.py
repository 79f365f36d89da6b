"""Horovod's variables for each rank, and what is read from a compiled library. The values here are literals."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.engines import horovod
from launcher.engines.torch import RankLaunch, Rendezvous
from launcher.errors import UsageError
from launcher.topology import RankPlace, Topology

GLOO_CLASS = "_ZTVN7horovod6common14GlooControllerE"
MPI_CLASS = "_ZTVN7horovod6common13MPIControllerE"


def topology(slots: tuple[int, ...], host_rank: int) -> Topology:
    hosts = tuple(f"algo-{number + 1}" for number in range(len(slots)))
    first = sum(slots[:host_rank])
    places = tuple(
        RankPlace(rank=first + local, local_rank=local, host=hosts[host_rank], host_rank=host_rank)
        for local in range(slots[host_rank])
    )
    return Topology(
        hosts=hosts,
        host=hosts[host_rank],
        host_rank=host_rank,
        slots=slots,
        world_size=sum(slots),
        local=places,
        threads_per_rank=1,
    )


def launch(environ: dict[str, str]) -> RankLaunch:
    return RankLaunch(
        rank=0,
        local_rank=0,
        argv=("true",),
        environ=environ,
        directory="/",
        cpus=(),
        stdout_path="",
        stderr_path="",
        error_file="",
        status_page="",
        booted=False,
    )


# slots, host rank, local rank -> rank, size, local size, cross rank, cross size
PLACES = [
    ((1,), 0, 0, (0, 1, 1, 0, 1)),
    ((2,), 0, 1, (1, 2, 2, 0, 1)),
    ((2, 2), 1, 0, (2, 4, 2, 1, 2)),
    ((2, 2), 1, 1, (3, 4, 2, 1, 2)),
    # Local rank 1 is on the first and the third host only, local rank 3 on the first alone.
    ((4, 1, 2), 0, 1, (1, 7, 4, 0, 2)),
    ((4, 1, 2), 0, 3, (3, 7, 4, 0, 1)),
    ((4, 1, 2), 1, 0, (4, 7, 1, 1, 3)),
    ((4, 1, 2), 2, 0, (5, 7, 2, 2, 3)),
    ((4, 1, 2), 2, 1, (6, 7, 2, 1, 2)),
]


@pytest.mark.parametrize(("slots", "host_rank", "local_rank", "expected"), PLACES)
def test_place(slots: tuple[int, ...], host_rank: int, local_rank: int, expected: tuple[int, ...]) -> None:
    job = topology(slots, host_rank)
    rank, size, local_size, cross_rank, cross_size = map(str, expected)
    assert horovod.place_variables(job.local[local_rank], job) == {
        "HOROVOD_HOSTNAME": f"algo-{host_rank + 1}",
        "HOROVOD_RANK": rank,
        "HOROVOD_SIZE": size,
        "HOROVOD_LOCAL_RANK": str(local_rank),
        "HOROVOD_LOCAL_SIZE": local_size,
        "HOROVOD_CROSS_RANK": cross_rank,
        "HOROVOD_CROSS_SIZE": cross_size,
    }


def test_variables_of_the_gloo_controller() -> None:
    job = topology((2, 1), 0)
    given = {"PATH": "/bin", "HOROVOD_ELASTIC": "1", "HOROVOD_RANK": "9", "HOROVOD_CPU_OPERATIONS": "mpi"}
    done = horovod.with_gloo(launch(given), job.local[1], job, Rendezvous("10.0.0.1", 4711), "eth0")
    assert done.environ == {
        "PATH": "/bin",
        "HOROVOD_HOSTNAME": "algo-1",
        "HOROVOD_RANK": "1",
        "HOROVOD_SIZE": "3",
        "HOROVOD_LOCAL_RANK": "1",
        "HOROVOD_LOCAL_SIZE": "2",
        "HOROVOD_CROSS_RANK": "0",
        "HOROVOD_CROSS_SIZE": "1",
        "HOROVOD_CONTROLLER": "gloo",
        "HOROVOD_CPU_OPERATIONS": "gloo",
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": "10.0.0.1",
        "HOROVOD_GLOO_RENDEZVOUS_PORT": "4711",
        "HOROVOD_GLOO_IFACE": "eth0",
        "HOROVOD_GLOO_TIMEOUT_SECONDS": "300",
    }
    assert given["HOROVOD_RANK"] == "9", "the caller's mapping is left alone"


def test_variables_of_the_mpi_controller() -> None:
    job = topology((1, 1), 1)
    given = {"HOROVOD_CONTROLLER": "gloo", "HOROVOD_CPU_OPERATIONS": "ccl", "HOROVOD_ELASTIC": "1"}
    assert horovod.with_mpi(launch(given), job.local[0], job).environ == {
        "HOROVOD_CONTROLLER": "mpi",
        "HOROVOD_CPU_OPERATIONS": "ccl",
        "HOROVOD_HOSTNAME": "algo-2",
        "HOROVOD_RANK": "1",
        "HOROVOD_SIZE": "2",
        "HOROVOD_LOCAL_RANK": "0",
        "HOROVOD_LOCAL_SIZE": "1",
        "HOROVOD_CROSS_RANK": "1",
        "HOROVOD_CROSS_SIZE": "2",
    }


def test_the_users_interface_and_timeout_win() -> None:
    job = topology((1,), 0)
    given = {"HOROVOD_GLOO_IFACE": "eth7", "HOROVOD_GLOO_TIMEOUT_SECONDS": "9"}
    done = horovod.with_gloo(launch(given), job.local[0], job, Rendezvous("127.0.0.1", 1), "lo")
    assert (done.environ["HOROVOD_GLOO_IFACE"], done.environ["HOROVOD_GLOO_TIMEOUT_SECONDS"]) == ("eth7", "9")


def test_without_an_interface_gloo_chooses() -> None:
    job = topology((1,), 0)
    done = horovod.with_gloo(launch({}), job.local[0], job, Rendezvous("127.0.0.1", 1), "")
    assert "HOROVOD_GLOO_IFACE" not in done.environ


BOTH = horovod.Build("lib.so", ("gloo", "mpi"), "libmpi.so.40")
ONLY_GLOO = horovod.Build("lib.so", ("gloo",), "")
ONLY_MPI = horovod.Build("lib.so", ("mpi",), "libmpi.so.40")


@pytest.mark.parametrize(
    ("asked", "build", "variable", "mpirun", "expected"),
    [
        ("auto", BOTH, "", "/usr/bin/mpirun", "mpi"),
        ("auto", BOTH, "", "", "gloo"),
        ("auto", BOTH, "GLOO", "/usr/bin/mpirun", "gloo"),
        ("mpi", BOTH, "gloo", "", "mpi"),
        ("gloo", BOTH, "", "/usr/bin/mpirun", "gloo"),
        ("auto", ONLY_GLOO, "", "/usr/bin/mpirun", "gloo"),
        ("auto", ONLY_MPI, "", "", "mpi"),  # that mpirun is missing is for the MPI engine to say
    ],
)
def test_controller(asked: str, build: horovod.Build, variable: str, mpirun: str, expected: str) -> None:
    assert horovod.choose_controller(asked, build, {"HOROVOD_CONTROLLER": variable}, mpirun) == expected


@pytest.mark.parametrize(
    ("asked", "variable", "source"), [("mpi", "", "--horovod-controller"), ("auto", "mpi", "HOROVOD_CONTROLLER")]
)
def test_controller_that_is_not_built(asked: str, variable: str, source: str) -> None:
    with pytest.raises(UsageError) as caught:
        horovod.choose_controller(asked, ONLY_GLOO, {"HOROVOD_CONTROLLER": variable}, "/usr/bin/mpirun")
    assert str(caught.value) == (
        f"{source} is 'mpi', but lib.so was built with gloo only; "
        "ask for that, or install horovod again with HOROVOD_WITH_MPI=1"
    )


# ---- reading a library


@pytest.fixture
def compiler() -> str:
    found = shutil.which("cc") or shutil.which("gcc")
    if found is None:
        pytest.skip("no C compiler: cc or gcc")
    return found


def build_package(directory: Path, compiler: str, controllers: tuple[str, ...], framework: str = "torch") -> Path:
    """A package ``horovod`` with a library that has what the real one has in its table of names."""
    package = directory / "horovod"
    (package / framework).mkdir(parents=True)
    (package / "__init__.py").touch()
    source = directory / "library.c"
    names = {"gloo": GLOO_CLASS, "mpi": MPI_CLASS}
    source.write_text("\n".join(f"void *{names[name]}[3];" for name in controllers) + "\nint horovod_size;\n")
    stem = "mpi_lib_v2" if framework == "torch" else "mpi_lib"
    library = package / framework / f"{stem}.cpython-311-x86_64-linux-gnu.so"
    options = ["-shared", "-fPIC"]
    if "mpi" in controllers:
        stub = directory / "libmpi.so.40"
        empty = directory / "empty.c"
        empty.write_text("int MPI_Init;\n")
        subprocess.run([compiler, *options, "-Wl,-soname,libmpi.so.40", "-o", stub, empty], check=True, timeout=60)
        options += ["-Wl,--no-as-needed", str(stub)]
    subprocess.run([compiler, "-o", library, source, *options], check=True, timeout=60)
    return library


@pytest.mark.native
@pytest.mark.parametrize("controllers", [("gloo",), ("mpi",), ("gloo", "mpi")])
@pytest.mark.parametrize("stripped", [False, True])
def test_build_is_read_from_the_library(
    tmp_path: Path, compiler: str, controllers: tuple[str, ...], stripped: bool
) -> None:
    library = build_package(tmp_path, compiler, controllers)
    if stripped:
        # Not even section headers are left: their number and place in the header are zero.
        image = bytearray(library.read_bytes())
        image[40:48] = bytes(8)
        image[58:64] = bytes(6)
        library.write_bytes(image)
    build = horovod.read_build(str(library))
    assert build.controllers == controllers
    assert build.mpi_library == ("libmpi.so.40" if "mpi" in controllers else "")


@pytest.mark.native
def test_library_without_a_controller(tmp_path: Path, compiler: str) -> None:
    library = build_package(tmp_path, compiler, ())
    with pytest.raises(UsageError, match=r"built with neither Gloo nor MPI; install horovod again with"):
        horovod.read_build(str(library))


@pytest.mark.native
def test_package_is_found_where_another_interpreter_looks(tmp_path: Path, compiler: str) -> None:
    library = build_package(tmp_path / "site", compiler, ("gloo",), framework="tensorflow")
    python = tmp_path / "python"  # the same program in another directory is another environment
    python.symlink_to(sys.executable)
    environ = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    assert horovod.installed(str(python), environ).library == str(library)


def test_no_horovod(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho /nowhere\n")
    python.chmod(0o755)
    with pytest.raises(UsageError, match=r"finds no package horovod; install it, or choose another --engine"):
        horovod.installed(str(python), {})


def test_interpreter_that_does_not_answer(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 3\n")
    python.chmod(0o755)
    with pytest.raises(UsageError, match=r"cannot ask .* where it looks for modules: .* exit status 3"):
        horovod.installed(str(python), {})


def test_package_without_a_library(tmp_path: Path) -> None:
    (tmp_path / "horovod" / "torch").mkdir(parents=True)
    (tmp_path / "horovod" / "__init__.py").touch()
    (tmp_path / "horovod" / "torch" / "__init__.py").touch()
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho {tmp_path}\n")
    python.chmod(0o755)
    with pytest.raises(UsageError, match=r"horovod has no compiled library"):
        horovod.installed(str(python), {})


def elf(segments: list[tuple[int, int, int, int]], body: bytes = b"", entry_size: int = 56) -> bytes:
    """A 64-bit ELF file with program headers (type, offset, address, size) right behind its header."""
    head = b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 64, 0, 0, 64, entry_size,
                                                           len(segments), 0, 0, 0)  # fmt: skip
    table = b"".join(struct.pack("<II6Q", kind, 0, at, where, 0, size, size, 1) for kind, at, where, size in segments)
    return head + table + body


HOSTILE = {
    "empty": (b"", "cut short"),
    "text": (b"#!/bin/sh\n" * 20, "not a 64-bit little-endian ELF"),
    "32 bits": (b"\x7fELF\x01\x01" + bytes(80), "not a 64-bit little-endian ELF"),
    "header entries": (elf([], entry_size=4), "program headers of 4 bytes"),
    "headers cut": (elf([(2, 0, 0, 0)])[:-1], "cut short"),
    "no dynamic section": (elf([(1, 0, 0, 64)]), "no dynamic section"),
    "dynamic beyond the end": (elf([(2, 1 << 40, 0, 64)]), "cut short"),
    "dynamic too far": (elf([(2, (1 << 64) - 1, 0, 64)]), "a table of 64 bytes at"),
    "dynamic too large": (elf([(2, 0, 0, 1 << 50)]), "a table of"),
    "no strings": (elf([(2, 120, 0, 16)], bytes(16)), "no table of names"),
    "strings nowhere": (elf([(2, 120, 0, 32)], struct.pack("<4Q", 5, 4096, 10, 16)), "in no segment"),
    "strings too large": (
        elf([(2, 176, 0, 32), (1, 0, 0, 4096)], struct.pack("<4Q", 5, 0, 10, 1 << 60)),
        "a table of",
    ),
    "needed beyond the strings": (
        elf([(2, 176, 0, 48), (1, 0, 0, 4096)], struct.pack("<6Q", 5, 0, 10, 16, 1, 1 << 63)),
        "neither Gloo nor MPI",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_file_that_is_no_library(tmp_path: Path, name: str) -> None:
    image, reason = HOSTILE[name]
    path = tmp_path / "library.so"
    path.write_bytes(image)
    with pytest.raises(UsageError, match=reason):
        horovod.read_build(str(path))


def test_library_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read .*library\.so: .*No such file"):
        horovod.read_build(str(tmp_path / "library.so"))
