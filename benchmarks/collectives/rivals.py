"""The contenders that are installed here, each in the settings that are measured."""

from __future__ import annotations

import glob
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from processes import Contender

BOTH = ("float32", "bfloat16")
# Every MPI here takes its temporaries from malloc, which gives memory above 32 MiB back to the system each time: 25,000
# page faults a call of 100 MiB. With these it keeps them.
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "4000000000", "MALLOC_MMAP_THRESHOLD_": "2000000000"}
TUNED, UNPINNED = ", malloc tuned", ", not pinned"
OURS, REGISTERED, LIMIT = "launcher, any tensor", "launcher, registered", "memory limit"
MPIS = ("Open MPI 4", "Open MPI 5", "MPICH 5", "Intel MPI")
GLOO, DEEPSPEED, ONECCL, HOROVOD = "Gloo", "DeepSpeed shm", "oneCCL", "Horovod"
PEERS = (GLOO, *MPIS, DEEPSPEED, ONECCL, HOROVOD)


class Absent(Exception):
    """A contender is not installed in any of the environments."""


def _pythons(environments: Sequence[Path]) -> list[str]:
    own = sys.executable
    return [own, *(str(path / "bin" / "python") for path in environments if (path / "bin" / "python").exists())]


def python_with(modules: str, environments: Sequence[Path]) -> str:
    """The first environment's Python that has all of these modules, the benchmark's own first; raises Absent."""
    for python in _pythons(environments):
        code = f"import importlib.util as u, sys; sys.exit(any(u.find_spec(m) is None for m in {modules.split()!r}))"
        if subprocess.run([python, "-c", code], capture_output=True, check=False).returncode == 0:
            return python
    raise Absent(f"no environment has {modules.replace(' ', ' and ')}")


def _prefix(name: str, environments: Sequence[Path]) -> Path:
    for environment in environments:
        if (found := environment / "peers" / name).is_dir():
            return found
    raise Absent(f"no --peer-env has peers/{name} (install_peers.py makes it)")


def _pair(peer: str, adapter: str, python: str, start: tuple[str, ...], environ: dict[str, str]) -> list[Contender]:
    """As shipped, and with malloc tuned."""
    return [
        Contender(peer, peer, adapter, python, start, environ),
        Contender(peer + TUNED, peer, adapter, python, start, environ | MALLOC),
    ]


def _ours(environments: Sequence[Path]) -> list[Contender]:
    found = []
    for label, registered in ((OURS, False), (REGISTERED, True)):
        options = {"registered": registered}
        found.append(Contender(label, "launcher", "ours", sys.executable, (), {}, options, BOTH))
    return found


def memory_limit(environments: Sequence[Path] = ()) -> list[Contender]:
    """What the memory gives; its ranks are those of the ping-pong, too."""
    return [Contender(LIMIT, LIMIT, "memory", sys.executable)]


def _gloo(environments: Sequence[Path]) -> list[Contender]:
    python = python_with("torch numpy", environments)
    free = {"pin": False}
    return [
        Contender(GLOO, GLOO, "gloo", python, dtypes=BOTH),
        Contender(GLOO + UNPINNED, GLOO, "gloo", python, options=free, dtypes=BOTH),
    ]


def _root() -> tuple[str, ...]:
    return ("--allow-run-as-root",) if os.geteuid() == 0 else ()


def _open_mpi(peer: str, mpirun: str, library: str, environments: Sequence[Path]) -> list[Contender]:
    python = python_with("mpi4py numpy", environments)
    start = (mpirun, *_root(), "--oversubscribe", "--bind-to", "none", "-n", "{n}")
    return _pair(peer, "mpi", python, start, {"MPI4PY_LIBMPI": library})


def _open_mpi_4(environments: Sequence[Path]) -> list[Contender]:
    for name in ("mpirun.openmpi", "mpirun"):
        mpirun = shutil.which(name)
        said = subprocess.run([mpirun, "--version"], capture_output=True, text=True, check=False) if mpirun else None
        if said is None or "(Open MPI) 4." not in said.stdout:
            continue
        real = Path(mpirun or "").resolve()
        for pattern in (str(real.parents[1] / "lib" / "libmpi.so.40"), "/usr/lib/*/libmpi.so.40"):
            if libraries := glob.glob(pattern):
                return _open_mpi(MPIS[0], str(mpirun), libraries[0], environments)
    raise Absent("no Open MPI 4 on PATH (Debian: openmpi-bin)")


def _open_mpi_5(environments: Sequence[Path]) -> list[Contender]:
    prefix = _prefix("openmpi", environments)
    return _open_mpi(MPIS[1], str(prefix / "bin" / "mpirun"), str(prefix / "lib" / "libmpi.so.40"), environments)


def _mpich(environments: Sequence[Path]) -> list[Contender]:
    prefix = _prefix("mpich", environments)
    python = python_with("mpi4py numpy", environments)
    start = (str(prefix / "bin" / "mpiexec"), "-n", "{n}")
    return _pair(MPIS[2], "mpi", python, start, {"MPI4PY_LIBMPI": str(prefix / "lib" / "libmpi.so.12")})


def intel_environment(prefix: Path) -> dict[str, str]:
    """What Intel MPI's vars.sh would set."""
    libraries = prefix / "lib"
    return {
        "I_MPI_ROOT": str(prefix),
        "I_MPI_PIN": "0",  # the ranks pin themselves, as all others do
        "FI_PROVIDER_PATH": str(libraries),
        "LD_LIBRARY_PATH": str(libraries),
    }


def _intel(environments: Sequence[Path]) -> list[Contender]:
    prefix = _prefix("intel", environments)
    python = python_with("mpi4py numpy", environments)
    start = (str(prefix / "bin" / "mpiexec.hydra"), "-n", "{n}")
    environ = {"MPI4PY_LIBMPI": str(prefix / "lib" / "libmpi.so.12"), **intel_environment(prefix)}
    return _pair(MPIS[3], "mpi", python, start, environ)


def _deepspeed(environments: Sequence[Path]) -> list[Contender]:
    folder = _prefix("deepspeed", environments)
    # Built against that environment's torch.
    options: dict[str, Any] = {
        "extension": str(folder / "deepspeed_shm_comm.so"),
        "version": (folder / "version").read_text().strip(),
    }
    return [
        Contender(
            DEEPSPEED, DEEPSPEED, "deepspeed_shm", str(folder.parents[1] / "bin" / "python"), (), {}, options, BOTH
        )
    ]


def _oneccl(environments: Sequence[Path]) -> list[Contender]:
    prefix = _prefix("oneccl", environments)
    python = python_with("numpy", environments)
    # Its worker thread wants a core of its own; without one a call takes 8 ms.
    environ = {**intel_environment(prefix), "CCL_WORKER_OFFLOAD": "0", "CCL_LOG_LEVEL": "error"}
    start = (str(prefix / "bin" / "mpiexec.hydra"), "-n", "{n}")
    options = {"shim": str(prefix / "lib" / "libshim.so")}
    return [Contender(ONECCL, ONECCL, "oneccl", python, start, environ, options, BOTH)]


def horovod_start(environments: Sequence[Path]) -> tuple[str, tuple[str, ...]]:
    """Python and start of a Horovod that was built with MPI: the mpirun of Debian, or the environment's own."""
    python = python_with("torch horovod numpy", environments)
    code = "import horovod.torch as h; print(h.mpi_built())"
    said = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    if said.returncode or "True" not in said.stdout:
        raise Absent("the Horovod that was found cannot be imported, or is built without MPI")
    mpirun = shutil.which("mpirun.openmpi") or shutil.which("mpirun") or str(Path(python).with_name("mpirun"))
    return python, (mpirun, *_root(), "--oversubscribe", "--bind-to", "none", "-n", "{n}")


def _horovod(environments: Sequence[Path]) -> list[Contender]:
    python, start = horovod_start(environments)
    free = {"pin": False}  # its thread has work of its own
    return [
        Contender(HOROVOD, HOROVOD, "horovod_ops", python, start),
        Contender(HOROVOD + UNPINNED, HOROVOD, "horovod_ops", python, start, options=free),
    ]


_MAKERS = {
    LIMIT: memory_limit,
    "launcher": _ours,
    GLOO: _gloo,
    MPIS[0]: _open_mpi_4,
    MPIS[1]: _open_mpi_5,
    MPIS[2]: _mpich,
    MPIS[3]: _intel,
    DEEPSPEED: _deepspeed,
    ONECCL: _oneccl,
    HOROVOD: _horovod,
}
NAMES = {name.lower().replace(" ", "-"): name for name in _MAKERS}  # as the command line calls them


def find(wanted: Sequence[str], environments: Sequence[Path], absent: dict[str, str]) -> Iterator[Contender]:
    """Those of ``wanted`` that are installed; ``absent`` gets the reason for each that is not."""
    for name in wanted:
        try:
            yield from _MAKERS[NAMES[name]](environments)
        except Absent as error:
            absent[NAMES[name]] = str(error)
