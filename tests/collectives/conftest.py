"""Ranks of a job without its launcher: plain processes that are given what the launcher gives its ranks.

A rank costs the start of an interpreter, so a test puts many cases into one program. The launcher itself is under test
in the other folders, and here where a test says so.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from launcher.rank.status import create_page, open_page

DEADLINE_S = 30.0
PROGRAMS = Path(__file__).parent / "programs"

PRELUDE = """\
import json, os, select, signal, sys, time
import numpy as np
import launcher
from launcher import CollectiveError, Communicator
from launcher.collectives.elements import DType, ReduceOp
from launcher.collectives.group import join
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background has it ignored

RANK, SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

def show(value):
    with open(os.environ["SHOWN"], "w") as file:
        json.dump(value, file, default=lambda number: number.item())

def wait_for(condition, limit_s=25.0):
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "waited too long"
        select.select([], [], [], 0.005)  # between two looks

def mark(name):
    with open(os.path.join(os.environ["MARKS"], f"{name}.{RANK}"), "w"):
        pass

def told(error):
    return [error.reason, error.rank, error.host, error.operation, error.sequence, str(error)]

"""


class Outcome:
    """How a rank ended. ``shown``: what it gave to ``show()``, None when nothing."""

    def __init__(self, rank: int, code: int, shown: Any, output: str) -> None:
        self.rank, self.code, self.shown, self.output = rank, code, shown, output

    def __repr__(self) -> str:
        return f"rank {self.rank}: exit code {self.code}, shown {self.shown}\n{textwrap.indent(self.output, '    ')}"


class Ranks:
    """One job of plain processes, in ``directory``. ``run_dir`` is its LAUNCHER_RUN_DIR."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.run_dir = directory / "run"
        self.marks = directory / "marks"
        self.processes: dict[int, subprocess.Popen[bytes]] = {}

    def environ(self, rank: int, size: int, attempt: int = 0) -> dict[str, str]:
        """What the launcher would give this rank, all of them being on one host."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("LAUNCHER_", "SM_"))}
        return {
            **clean,
            "RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(size),
            "GROUP_RANK": "0",
            "SM_CURRENT_HOST": "algo-1",
            "LAUNCHER_RUN_DIR": str(self.run_dir),
            "LAUNCHER_ATTEMPT": str(attempt),
            "LAUNCHER_STATUS_PAGE": str(self._rank_directory(rank, attempt) / "status"),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "PYTHONWARNINGS": "error",
            "PYTHONFAULTHANDLER": "1",
            "SHOWN": str(self._rank_directory(rank, attempt) / "shown"),
            "MARKS": str(self.marks),
        }

    def start(
        self,
        size: int,
        program: str | Path,
        *words: str,
        only: Sequence[int] | None = None,
        attempt: int = 0,
        env: dict[str, str] | Callable[[int], dict[str, str]] | None = None,
        wrapper: Sequence[str] = (),
    ) -> Ranks:
        """Starts the ranks (``only`` some of them) of a job of ``size``.

        program: a file of ``programs/``, or source, which finds the names of PRELUDE.
        """
        self.run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.marks.mkdir(exist_ok=True)
        if isinstance(program, str):
            path = self.directory / "program.py"
            path.write_text(PRELUDE + textwrap.dedent(program))
        else:
            path = program
        for rank in range(size) if only is None else only:
            place = self._rank_directory(rank, attempt)
            if not place.exists():
                place.mkdir(mode=0o700, parents=True)
                create_page(str(place / "status"), rank).close()
            extra = env(rank) if callable(env) else env or {}
            with (place / "output").open("wb") as output:
                self.processes[rank] = subprocess.Popen(
                    [*wrapper, sys.executable, str(path), *words],
                    cwd=self.directory,
                    env={**self.environ(rank, size, attempt), **extra},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            self._attempt = attempt
        return self

    def wait(self, deadline_s: float = DEADLINE_S) -> list[Outcome]:
        """The outcomes, by rank, once all have ended; fails the test when they do not."""
        end = time.monotonic() + deadline_s
        for rank, process in self.processes.items():
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                for other in self.processes.values():
                    if other.poll() is None:
                        other.send_signal(signal.SIGABRT)  # faulthandler shows where it is
                        other.wait()
                pytest.fail(f"rank {rank} did not end in {deadline_s} s\n{self.outcomes()}")
        return self.outcomes()

    def run(
        self, size: int, program: str | Path, *words: str, deadline_s: float = DEADLINE_S, **options: Any
    ) -> list[Any]:
        """What the ranks showed; fails the test unless all of them ended well."""
        outcomes = self.start(size, program, *words, **options).wait(deadline_s)
        assert all(outcome.code == 0 for outcome in outcomes), outcomes
        return [outcome.shown for outcome in outcomes]

    def outcomes(self) -> list[Outcome]:
        found = []
        for rank, process in sorted(self.processes.items()):
            place = self._rank_directory(rank, self._attempt)
            shown = json.loads((place / "shown").read_text()) if (place / "shown").exists() else None
            code = process.returncode if process.returncode is not None else -1
            found.append(Outcome(rank, code, shown, (place / "output").read_text(errors="backslashreplace")))
        return found

    def page(self, rank: int) -> Any:
        """A copy of the rank's status page."""
        page = open_page(str(self._rank_directory(rank, self._attempt) / "status"))
        try:
            return page.snapshot()
        finally:
            page.close()

    def marked(self, name: str, rank: int) -> bool:
        """Whether the rank has called ``mark(name)``."""
        return (self.marks / f"{name}.{rank}").exists()

    def left(self) -> list[str]:
        """Files of groups that are still in the run directory."""
        return sorted(path.name for path in self.run_dir.iterdir() if not path.name.startswith("attempt_"))

    def kill(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
                process.wait()

    def _rank_directory(self, rank: int, attempt: int) -> Path:
        return self.run_dir / f"attempt_{attempt}" / str(rank)


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    """A job of plain processes; none of them outlives the test."""
    one = Ranks(tmp_path)
    try:
        yield one
    finally:
        one.kill()


@pytest.fixture
def make_ranks(tmp_path: Path) -> Iterator[Callable[[str], Ranks]]:
    """Several jobs in one test: ``make_ranks("a")``."""
    made: list[Ranks] = []

    def make(name: str) -> Ranks:
        directory = tmp_path / name
        directory.mkdir()
        made.append(Ranks(directory))
        return made[-1]

    try:
        yield make
    finally:
        for one in made:
            one.kill()
