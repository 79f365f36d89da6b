"""The launchers that are compared: how each is started, and which version it is."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Contender:
    """One way to start a script on this host. ``{n}`` in ``argv`` stands for the number of ranks."""

    name: str
    argv: tuple[str, ...]
    version: str
    python_in_argv: bool = False

    def command(self, nproc: int, script: Path, *arguments: str, options: tuple[str, ...] = ()) -> list[str]:
        """Build the command line; ``options`` go before the script."""
        start = [part.replace("{n}", str(nproc)) for part in self.argv]
        tail = [sys.executable] if self.python_in_argv else []
        return [*start, *options, *tail, str(script), *arguments]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _launcher() -> Contender | None:
    if importlib.util.find_spec("launcher") is None:
        return None
    argv = (sys.executable, "-m", "launcher", "--nproc-per-node", "{n}")
    return Contender("launcher", argv, f"launcher {_version('launcher') or 'from a checkout'}")


def _torchrun() -> Contender | None:
    version = _version("torch")
    argv = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "{n}")
    return Contender("torchrun", argv, f"torch {version}") if version else None


def _accelerate() -> Contender | None:
    version = _version("accelerate")
    if version is None or _version("torch") is None:
        return None
    # On CPUs `--cpu --num_processes 2` starts a single process; --multi_gpu takes the path that starts one per
    # rank (torchrun's agent, in-process), with or without GPUs. The rest answers what it would ask or warn about.
    argv = (sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "{n}")
    quiet = ("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")
    return Contender("accelerate", (*argv, *quiet), f"accelerate {version}")


def open_mpi() -> tuple[str, str] | None:
    """(path, version) of Open MPI's mpirun; None when there is none."""
    beside = Path(sys.executable).parent / "mpirun"
    program = str(beside) if beside.exists() else shutil.which("mpirun")
    if program is None:
        return None
    answer = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
    if "Open MPI" not in answer:
        return None  # the options that it is given are Open MPI's
    return program, answer.splitlines()[0].replace("mpirun (", "").replace(")", "")


def _mpirun() -> Contender | None:
    found = open_mpi()
    if found is None:
        return None
    program, version = found
    root = ("--allow-run-as-root",) if os.geteuid() == 0 else ()
    argv = (program, *root, "--oversubscribe", "--bind-to", "none", "-n", "{n}")
    return Contender("mpirun", argv, version, True)


def _shell() -> Contender:
    start = 'i=0; while [ $i -lt {n} ]; do RANK=$i "$@" & i=$((i+1)); done; wait'
    return Contender("shell", ("/bin/sh", "-c", start, "sh"), "/bin/sh, no supervision: the floor", True)


def find_contenders(wanted: list[str]) -> list[Contender]:
    """Return those of ``wanted`` that are installed, in that order; a line on stderr names each that is not."""
    found = []
    for name in wanted:
        contender = MAKERS[name]()
        if contender is None:
            print(f"{name}: not installed, left out", file=sys.stderr)
        else:
            found.append(contender)
    return found


MAKERS: dict[str, Callable[[], Contender | None]] = {
    "launcher": _launcher,
    "torchrun": _torchrun,
    "accelerate": _accelerate,
    "mpirun": _mpirun,
    "shell": _shell,
}
