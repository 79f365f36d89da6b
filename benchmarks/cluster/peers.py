"""The launchers that are compared on two hosts: what is started on which host, and which version it is."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from contenders import open_mpi

# For mpirun, in place of ssh: enters the host that it is asked for. Costs nothing of what ssh costs.
AGENT = """#!/bin/sh
# Arguments: options, the host, the command.
while [ "${1#-}" != "$1" ]; do shift; done
holder=$(cat "$CLUSTER_BENCH_DIR/holder.$1")
shift
exec nsenter -t "$holder" --net --mount --uts env --chdir=/opt/ml/code sh -c "$*"
"""


@dataclass(frozen=True)
class Request:
    """What a run needs of a launcher: ranks of ``script`` on all ``hosts``; ``port`` is free on the first."""

    hosts: tuple[str, ...]
    ranks: int
    port: int
    agent: Path
    script: Path
    arguments: tuple[str, ...] = ()

    @property
    def program(self) -> tuple[str, ...]:
        """The script with its arguments."""
        return (str(self.script), *self.arguments)


@dataclass(frozen=True)
class Peer:
    """A way to run a job: ``commands`` gives a command for each host on which something is to be started."""

    name: str
    version: str
    commands: Callable[[Request], list[list[str]]]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _launcher() -> Peer | None:
    def commands(request: Request) -> list[list[str]]:
        words = [sys.executable, "-m", "launcher", "--nproc-per-node", str(request.ranks), *request.program]
        return [words for _ in request.hosts]

    version = _version("launcher")
    return Peer("launcher", f"launcher {version}", commands) if version else None


def _launcher_mpi() -> Peer | None:
    def commands(request: Request) -> list[list[str]]:
        words = [sys.executable, "-m", "launcher", "--engine", "mpi", "--nproc-per-node", str(request.ranks)]
        return [[*words, *request.program] for _ in request.hosts]

    version, found = _version("mpi4py"), open_mpi()
    return Peer("launcher --engine mpi", f"mpi4py {version}, {found[1]}", commands) if version and found else None


def _torchrun(name: str, rendezvous: Callable[[Request, int], list[str]]) -> Peer | None:
    def commands(request: Request) -> list[list[str]]:
        start = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(len(request.hosts))]
        return [
            [*start, "--nproc-per-node", str(request.ranks), *rendezvous(request, number), *request.program]
            for number in range(len(request.hosts))
        ]

    version = _version("torch")
    return Peer(name, f"torch {version}", commands) if version else None


def _static(request: Request, number: int) -> list[str]:
    return ["--node-rank", str(number), "--master-addr", request.hosts[0], "--master-port", str(request.port)]


def _c10d(request: Request, number: int) -> list[str]:
    return ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{request.hosts[0]}:{request.port}", "--rdzv-id", "bench"]


def _mpirun() -> Peer | None:
    found = open_mpi()
    if found is None:
        return None
    program, version = found
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []

    def commands(request: Request) -> list[list[str]]:
        hosts = ",".join(f"{host}:{request.ranks}" for host in request.hosts)
        agent = ["--mca", "plm_rsh_agent", str(request.agent)]
        count = str(len(request.hosts) * request.ranks)
        start = [program, *root, *agent, "--bind-to", "none", "--host", hosts, "-n", count]
        return [[*start, sys.executable, *request.program]]

    return Peer("mpirun", f"{version}, with an agent that enters the other host at once in place of ssh", commands)


MAKERS: dict[str, Callable[[], Peer | None]] = {
    "launcher": _launcher,
    "torchrun-static": lambda: _torchrun("torchrun-static", _static),
    "torchrun-c10d": lambda: _torchrun("torchrun-c10d", _c10d),
    "mpirun": _mpirun,
    "launcher-mpi": _launcher_mpi,
}


def find_peers(wanted: list[str]) -> dict[str, Peer]:
    """Those of ``wanted`` that are installed, in that order; a line on stderr names each that is not."""
    found = {}
    for name in wanted:
        peer = MAKERS[name]()
        if peer is None:
            print(f"{name}: not installed, left out", file=sys.stderr)
        else:
            found[name] = peer
    return found
