"""The contenders that are installed here, each in the settings that are measured."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from processes import Contender

HERE = Path(__file__).resolve().parent
OURS, OURS_THREAD = "launcher", "launcher, 1 thread"
GATHER, COPY = "floor: gather", "floor: memcpy"
TORCH, BATCHED, DALI, SPDL = "DataLoader", "DataLoader, fancy index", "DALI", "SPDL"
LITDATA, WEBDATASET, MDS, GRAIN = "litdata", "webdataset", "MDS", "Grain"
FRAMING, UPB, CONTAINER, LIBPROTOBUF = (
    "recordio.py, frames only",
    "recordio.py + upb",
    "XGBoost container",
    "libprotobuf",
)
DRAIN, WALK, RGLOB = "floor: read()", "os.walk, os.stat", "Path.rglob, Path.stat"
PANDAS, PYARROW, LOADTXT = "pandas", "pyarrow", "loadtxt"
LOADERS = (TORCH, BATCHED, DALI, SPDL, LITDATA, WEBDATASET, MDS, GRAIN)
CXX = ("-O3", "-march=native", "-std=c++20", "-shared", "-fPIC")


class Absent(Exception):
    """A contender is not installed in any of the environments."""


def python_with(modules: str, environments: Sequence[Path]) -> str:
    """The first environment's Python that has all of these modules, the benchmark's own first; raises Absent."""
    pythons = [sys.executable]
    pythons += [str(path / "bin" / "python") for path in environments if (path / "bin" / "python").exists()]
    for python in pythons:
        code = f"import importlib.util as u, sys; sys.exit(any(u.find_spec(m) is None for m in {modules.split()!r}))"
        if subprocess.run([python, "-c", code], capture_output=True, check=False).returncode == 0:
            return python
    raise Absent(f"no environment has {modules.replace(' ', ' and ')}")


def _compiler() -> str:
    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return found
    raise Absent("no C++ compiler (c++)")


def compile_floors(scratch: Path) -> Path:
    """Builds floors.cpp for this machine."""
    out = scratch / "floors.so"
    subprocess.run([_compiler(), *CXX, "-o", str(out), str(HERE / "floors.cpp")], check=True)
    return out


def compile_libprotobuf(scratch: Path) -> tuple[Path, str]:
    """Builds the reader over libprotobuf, and its version.

    Raises:
        Absent: there is no protoc or no libprotobuf to build with.
    """
    protoc = shutil.which("protoc")
    if protoc is None:
        raise Absent("no protoc (Debian: protobuf-compiler, libprotobuf-dev)")
    version = subprocess.run([protoc, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    out = scratch / "libprotobuf.so"
    made = (
        [protoc, f"--proto_path={HERE}", f"--cpp_out={scratch}", str(HERE / "record.proto")],
        [_compiler(), *CXX, f"-I{scratch}", "-o", str(out), str(HERE / "libprotobuf.cpp"), f"{scratch}/record.pb.cc"],
    )
    for command in (made[0], [*made[1], "-lprotobuf"]):
        said = subprocess.run(command, capture_output=True, text=True, check=False)
        if said.returncode:
            raise Absent(f"{Path(command[0]).name}: {(said.stderr.strip() or 'failed').splitlines()[-1]}")
    return out, version


def _workers(
    label: str, adapter: str, python: str, counts: Sequence[int], options: Mapping[str, Any] | None = None
) -> Iterator[Contender]:
    for count in counts:
        yield Contender(f"{label}, nw {count}", label, adapter, python, {"workers": count, **(options or {})})


class Finder:
    """Finds contenders by name.

    Args:
        environments: of the peers.
        scratch: folder that what is compiled goes to.
        absent: gets the reason for each that is not there.
    """

    def __init__(self, environments: Sequence[Path], scratch: Path, absent: dict[str, str]) -> None:
        self._environments, self._absent = environments, absent
        self._scratch = scratch
        self._floors = compile_floors(scratch)

    def _python(self, modules: str) -> str:
        return python_with(modules, self._environments)

    def _ours(self) -> Iterator[Contender]:
        python = python_with("launcher torch", ())
        yield Contender(OURS, OURS, "ours", python)
        yield Contender(OURS_THREAD, OURS, "ours", python, {"threads": 1})

    def _torch(self) -> Iterator[Contender]:
        yield from _workers(TORCH, "torch_loader", self._python("torch numpy"), (0, 1, 2))

    def _batched(self) -> Iterator[Contender]:
        yield from _workers(BATCHED, "torch_loader", self._python("torch numpy"), (0, 1), {"batched": True})

    def _dali(self) -> Iterator[Contender]:
        yield Contender(DALI, DALI, "dali", self._python("nvidia.dali torch numpy"))

    def _spdl(self) -> Iterator[Contender]:
        yield Contender(SPDL, SPDL, "spdl_pipeline", self._python("spdl.pipeline torch numpy"))

    def _litdata(self) -> Iterator[Contender]:
        yield from _workers(LITDATA, "lit", self._python("litdata torch numpy"), (0, 1))

    def _webdataset(self) -> Iterator[Contender]:
        yield from _workers(WEBDATASET, "web", self._python("webdataset torch numpy"), (0, 1))

    def _mds(self) -> Iterator[Contender]:
        yield from _workers(MDS, "mds", self._python("streaming torch numpy"), (0, 1))

    def _grain(self) -> Iterator[Contender]:
        python = self._python("grain array_record torch numpy")
        for threads in (2, 16):
            yield Contender(f"{GRAIN}, {threads} threads", GRAIN, "grain_records", python, {"threads": threads})

    def _floor(self, label: str, walk: str) -> Contender:
        options = {"library": str(self._floors), "walk": walk, "torch": False}
        return Contender(label, label, "floor", sys.executable, options)

    def _try(self, name: str, make: Any) -> list[Contender]:
        try:
            return list(make())
        except Absent as error:
            self._absent[name] = str(error)
            return []

    def loaders(self, wanted: Sequence[str]) -> list[Contender]:
        """Loaders of shuffled batches, with the floors."""
        makers = {
            OURS: self._ours,
            TORCH: self._torch,
            BATCHED: self._batched,
            DALI: self._dali,
            SPDL: self._spdl,
            LITDATA: self._litdata,
            WEBDATASET: self._webdataset,
            MDS: self._mds,
            GRAIN: self._grain,
        }
        found = [self._floor(GATHER, "gather"), self._floor(COPY, "copy")]
        for name in wanted:
            found += self._try(name, makers[name])
        return found

    def parsers(self) -> list[Contender]:
        """Readers of RecordIO-protobuf, with the floor."""
        plain = {"torch": False}

        def python_ones() -> Iterator[Contender]:
            python = self._python("google.protobuf numpy")
            for label, way in ((FRAMING, "framing"), (UPB, "upb"), (CONTAINER, "container")):
                yield Contender(label, label, "recordio_python", python, {"way": way, **plain})

        def cpp_one() -> Iterator[Contender]:
            library, version = compile_libprotobuf(self._scratch)
            options = {"library": str(library), "version": version, **plain}
            yield Contender(LIBPROTOBUF, LIBPROTOBUF, "recordio_cpp", sys.executable, options)

        return [
            self._floor(COPY, "copy"),
            *self._try(OURS, lambda: [next(self._ours())]),
            *self._try("recordio.py", python_ones),
            *self._try(LIBPROTOBUF, cpp_one),
        ]

    def csv_readers(self) -> list[Contender]:
        """Readers of CSV."""
        found = self._try(OURS, lambda: [next(self._ours())])
        for label, reader in ((PANDAS, "pandas"), (PYARROW, "pyarrow"), (LOADTXT, "numpy")):

            def one(label: str = label, reader: str = reader) -> list[Contender]:
                python = self._python(f"{reader} numpy")
                return [Contender(label, label, "csv_peers", python, {"reader": reader, "torch": False})]

            found += self._try(label, one)
        return found

    def ours(self, name: str) -> list[Contender]:
        """This project's, as it decides by itself, for a set of this name alone."""
        return self._try(OURS, lambda: [replace(next(self._ours()), label=f"{OURS}, {name}")])

    def pipe_readers(self) -> list[Contender]:
        """Readers of a FIFO: ours, recordio.py, and one that does not look at what it reads."""

        def framing() -> list[Contender]:
            options = {"way": "framing", "torch": False}
            return [Contender(FRAMING, FRAMING, "recordio_python", self._python("google.protobuf numpy"), options)]

        floor = replace(self._floor(DRAIN, "copy"), label=DRAIN, peer=DRAIN)
        own = self._try(OURS, lambda: [next(self._ours())])
        own += [replace(one, label=f"{OURS}, shuffled", options={"shuffle": "window"}) for one in own]
        return [*own, floor, *self._try(FRAMING, framing)]

    def listers(self) -> list[Contender]:
        """Ours, and the two ways that Python has."""
        found = self._try(OURS, lambda: [next(self._ours())])
        for label, way in ((WALK, "walk"), (RGLOB, "rglob")):
            found.append(Contender(label, label, "listing", sys.executable, {"way": way, "torch": False}))
        return found
