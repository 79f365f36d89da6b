"""Horovod's API, used by real ranks: each job runs all the checks of ranks_*.py, each check is a test here."""

from __future__ import annotations

import ast
import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
RANKS = HERE / "ranks.py"

pytestmark = [
    pytest.mark.torch,
    pytest.mark.timeout(240),
    pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="not installed: torch"),
]


def checks() -> list[str]:
    """Names of the functions in ranks_*.py that are checks."""
    trees = [ast.parse(path.read_text()) for path in sorted(HERE.glob("ranks_*.py"))]
    functions = [node for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)]
    marked = {"check", "ours"}
    return [
        function.name
        for function in functions
        if any(isinstance(mark, ast.Name) and mark.id in marked for mark in function.decorator_list)
    ]


class Outcome:
    """A job of ``size`` ranks, and what each rank found."""

    def __init__(self, size: int, code: int, output: str, found: list[dict[str, str]]) -> None:
        self.size, self.code, self.output, self.found = size, code, output, found


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Outcome]]:
    """The job with so many ranks; run at its first use."""
    from ..conftest import Job

    done: dict[int, Outcome] = {}
    jobs: list[Job] = []

    def run(size: int) -> Outcome:
        if size not in done:
            directory = tmp_path_factory.mktemp(f"ranks{size}")
            job = Job(directory)
            jobs.append(job)
            # A check that ends on some ranks only would leave the others waiting.
            limits = {"HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "30", "HOROVOD_STALL_CHECK_TIME_SECONDS": "10"}
            options = ("-n", str(size), "--horovod-compat", "--hang-timeout", "100")
            code = job.run(*options, RANKS, directory, env=limits, deadline_s=200)
            files = [directory / f"rank{rank}.json" for rank in range(size)]
            found = [json.loads(path.read_text()) if path.exists() else {} for path in files]
            done[size] = Outcome(size, code, job.output(), found)
        return done[size]

    yield run
    for job in jobs:
        job.kill()


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", checks())
def test_check(outcomes: Callable[[int], Any], size: int, name: str) -> None:
    outcome = outcomes(size)
    for rank, found in enumerate(outcome.found):
        assert name in found, f"rank {rank} did not come to it\n{outcome.output}"
        assert not found[name], f"rank {rank}: {found[name]}"


@pytest.mark.parametrize("size", [2, 3])
def test_job_ends_well(outcomes: Callable[[int], Any], size: int) -> None:
    assert outcomes(size).code == 0, outcomes(size).output
