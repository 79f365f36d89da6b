"""Groups on several hosts: here processes of one machine that do not share memory with those of another "host"."""

from __future__ import annotations

import importlib.util
import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from launcher.ports import reserve

from .conftest import PROGRAMS, Outcome

pytestmark = [pytest.mark.torch]
if importlib.util.find_spec("torch") is None:
    pytest.skip("not installed: torch (the Gloo leg)", allow_module_level=True)

DEADLINE_S = 70.0


class Fleet:
    """One process that forks the ranks of all cases."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._cases = 0
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("LAUNCHER_", "SM_"))}
        environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}
        with (directory / "stderr").open("wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, str(PROGRAMS / "hierarchy.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=environ,
            )

    def start(
        self, hosts: Sequence[int], what: str, environ: dict[str, str] | None = None, **options: Any
    ) -> list[Any]:
        """The outcomes of the ranks of one case."""
        self._cases += 1
        case = self.directory / f"case{self._cases}"
        case.mkdir()
        words = {"hosts": hosts, "what": what, "options": options, "directory": str(case), "environ": environ or {}}
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(words).encode() + b"\n")
        self._process.stdin.flush()
        ready, _, _ = select.select([self._process.stdout], [], [], DEADLINE_S)
        line = self._process.stdout.readline() if ready else b""
        if not line:
            pytest.fail(f"no answer to {words}\n{(self.directory / 'stderr').read_text()}")
        for host in range(len(hosts)):
            assert list((case / f"host{host}").iterdir()) == []
        return [Outcome(**one) for one in json.loads(line)]

    def run(self, hosts: Sequence[int], what: str, **options: Any) -> list[Any]:
        """What each rank returned."""
        outcomes = self.start(hosts, what, **options)
        assert all(outcome.code == 0 for outcome in outcomes), outcomes
        return [outcome.shown for outcome in outcomes]

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.kill()
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    made = Fleet(tmp_path_factory.mktemp("fleet"))
    try:
        yield made
    finally:
        made.close()


@pytest.mark.parametrize(
    ("hosts", "leg"),
    [((1, 1), "sockets"), ((2, 2), "sockets"), ((2, 1, 1), "sockets"), ((1, 1, 1), "sockets"), ((1, 2), "gloo")],
    ids=lambda value: value if isinstance(value, str) else "x".join(map(str, value)),
)
def test_every_operation(fleet: Fleet, hosts: tuple[int, ...], leg: str) -> None:
    # Without a wish it is the sockets that are taken.
    outcomes = fleet.start(hosts, "matrix", leg="auto" if leg == "sockets" else leg)
    assert all(outcome.code == 0 for outcome in outcomes), outcomes
    shown = [outcome.shown for outcome in outcomes]
    for rank, one in enumerate(shown):
        assert one["wrong"] == [], f"rank {rank}"
        assert one["kind"] == "HierarchicalGroup" and one["cases"] > 250
        assert one["between"]["leg"] == leg
        assert one["between"]["why"].startswith("no MPI: " if leg == "sockets" else "asked for")
    assert len({one["digest"] for one in shown}) == 1  # the same bits on every rank
    said = [line for outcome in outcomes for line in outcome.output.splitlines() if "between the hosts" in line]
    assert len(said) == 1 and said[0].startswith(
        f"[launcher] collectives: {'TCP sockets' if leg == 'sockets' else 'Gloo'} between the hosts ("
    )


def test_raw_contributions_in_every_operation(fleet: Fleet) -> None:
    shown = fleet.run((1, 2), "matrix", independent=True)
    assert [one["wrong"] for one in shown] == [[], [], []]
    assert len({one["digest"] for one in shown}) == 1


def test_independent_of_the_ranks_per_host(fleet: Fleet) -> None:
    """Four ranks on one host, on two and on three: the same bits."""
    found = set()
    for hosts in ((4,), (2, 2), (1, 3), (2, 1, 1)):
        for one in fleet.run(hosts, "independent"):
            found.add(tuple(one["digests"]))
    assert len(found) == 1


@pytest.mark.parametrize(("wire", "epsilon", "hosts"), [("bf16", 2**-8, (1, 1)), ("fp16", 2**-11, (2, 1, 1))])
def test_sums_in_16_bits(fleet: Fleet, wire: str, epsilon: float, hosts: tuple[int, ...]) -> None:
    shown = fleet.run(hosts, "rounded", wire=wire)
    assert len({one["digest"] for one in shown}) == 1
    for rank, one in enumerate(shown):
        # Each host's part is rounded once: half a unit in the last place of the largest part.
        assert epsilon / 8 < one["first"] <= epsilon * 1.01 * 2
        # What a step loses the next one brings: after 40 steps the loss is that of one, not of 40.
        assert one["drift"] <= 2 * epsilon * 1.5 * len(hosts)
        assert one["short"] == pytest.approx(1.0 + 2**-20, abs=2**-23)
        if hosts == (1, 1):
            assert 2 * 50_000 * 40 <= one["sent"] < 2.2 * 50_000 * 40, rank


@pytest.mark.parametrize("count", [256, 400_000])
@pytest.mark.parametrize(
    ("leg", "hosts", "victim"),
    [("sockets", (1, 1), 1), ("sockets", (2, 2), 3), ("sockets", (1, 1, 1), 2), ("gloo", (1, 2), 2)],
)
def test_a_rank_of_another_host_dies(fleet: Fleet, leg: str, hosts: tuple[int, ...], victim: int, count: int) -> None:
    for outcome in fleet.start(hosts, "fails", how="killed", count=count, victim=victim, leg=leg):
        if outcome.rank == victim:
            assert outcome.code == -9
            continue
        assert outcome.code == 0, outcome
        one = outcome.shown
        assert (one["reason"], one["rank"], one["host"]) == ("lost", victim, f"algo-{len(hosts)}"), outcome
        assert one["operation"] == "allreduce" and one["sequence"] == 27
        assert one["again"]["reason"] == "closed" and one["again"]["rank"] == victim
        assert one["after_s"] < 10


@pytest.mark.parametrize("leg", ["sockets", "gloo"])
def test_a_rank_closes_aborts_or_calls_something_else(fleet: Fleet, leg: str) -> None:
    for how, reason, text in (
        ("closed", "left", "closed its end of the group"),
        ("aborted", "left", "no more data"),
        ("other", "mismatch", "calls broadcast #27"),
    ):
        first, second = fleet.start((1, 1), "fails", how=how, count=400_000, victim=1, leg=leg)
        assert (first.shown["reason"], first.shown["rank"], first.shown["host"]) == (reason, 1, "algo-2"), first
        assert text in first.shown["text"], first
        if how == "other":
            assert second.shown["reason"] == "mismatch" and second.shown["rank"] in (0, 1), second


def test_a_rank_of_another_host_stands_still(fleet: Fleet) -> None:
    """Its process is stopped: the others give up at the deadline and name it."""
    for outcome in fleet.start((2, 1), "fails", how="stopped", count=400_000, victim=2)[:2]:
        assert outcome.code == 0, outcome
        assert (outcome.shown["reason"], outcome.shown["rank"]) == ("timeout", 2), outcome


def test_a_call_that_another_thread_ends(fleet: Fleet) -> None:
    first, second = fleet.start((1, 1), "fails", how="thread", count=256, victim=1)
    assert (first.shown["reason"], first.shown["rank"]) == ("left", 1) and "no more data" in first.shown["text"], first
    assert second.code == 0 and second.shown["after_s"] < 10, second


def test_connections_of_others_are_dropped(fleet: Fleet) -> None:
    shown = fleet.run((1, 1, 1), "strangers")
    assert [one["ends"] for one in shown] == [[9.0, 9.0]] * 3
    assert len(shown[2]["seen"]) == 8 and all(text.endswith(": b''") for text in shown[2]["seen"]), shown


def test_a_rank_that_cannot_be_reached(fleet: Fleet) -> None:
    first, second = fleet.run((1, 1), "unreachable")
    # Nobody tells it: it sees that nobody listens there any more.
    assert first.startswith("lost: join of group 'world': rank 1 on algo-2 has not connected and no longer listens at")
    assert second.startswith("lost: join of group 'world': rank 0 on algo-1 could not be reached at 127.0.0.1 port")
    assert "Connection refused" in second


def test_a_rank_that_cannot_be_reached_by_one_of_two(fleet: Fleet) -> None:
    """The one that is connected to both is told, and tells the other one."""
    first, second, third = fleet.run((1, 1, 1), "unreachable")
    for text in (first, second):
        assert text.startswith("lost: ") and ("could not be reached" in text or "has not connected" in text)
    assert third.startswith("lost: join of group 'world': rank 0 on algo-1 could not be reached at 127.0.0.1 port")


def test_no_descriptors_are_left(fleet: Fleet) -> None:
    for rank, one in enumerate(fleet.run((1, 1), "exhausted")):
        assert (one["reason"], one["rank"], one["host"]) == ("system", rank, f"algo-{rank + 1}"), one
        assert f"rank {rank} on algo-{rank + 1}: it could not make a connection: Too many open files" in one["text"]
        assert "RLIMIT_NOFILE is " in one["text"] and "ulimit -n" in one["text"]


def test_a_fork_leaves_the_connections_to_its_parent(fleet: Fleet) -> None:
    first, second = fleet.run((1, 1), "forks")
    assert first["text"].startswith("closed: ") and "fork" in first["text"]
    assert first["bells"] and not any(first["bells"])  # one that is rung would keep every wait from sleeping
    assert (first["sum"], second["sum"]) == (4.0, 4.0)
    assert second["text"].startswith("lost: "), second


def test_arguments(fleet: Fleet) -> None:
    for one in fleet.run((1, 1), "refuses"):
        assert "nothing" not in one["texts"], one
        assert one["sum"] == 2.0 and one["timeout_s"] == 30.0


def test_options_that_differ_or_make_no_sense(fleet: Fleet) -> None:
    for differ, wire, leg, mpi, both in fleet.run((1, 1), "differs"):
        assert "all members must be given the same options" in differ
        assert "wire is 'int4'" in wire and "leg is 'pigeon'" in leg
        assert "to be mpi, but the ranks were not started by mpirun" in mpi
        assert "independent takes no wire" in both


def test_without_a_store(fleet: Fleet) -> None:
    port = reserve(0)
    try:
        master = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port.port)}
        shown = fleet.run((1, 1), "meets", environ=master)
    finally:
        port.release()
    assert [one["ends"] for one in shown] == [[4.0, 4.0]] * 2
