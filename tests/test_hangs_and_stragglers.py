"""Who waits for whom, in words: literals in, sentences out. Real ranks are in tests/faults and tests/collectives."""

from __future__ import annotations

import json
from typing import Any

import pytest

from launcher.cluster import messages
from launcher.evidence import Evidence, ExitRecord, HostReport, RankProgress, Verdict, from_dict
from launcher.record import as_dict
from launcher.supervisor.coordinator import Coordinator, Policy
from launcher.supervisor.hangs import hang_text, number_runs
from launcher.supervisor.stragglers import Stragglers, Waits, over_the_attempt, slowest

MIB25 = 25 << 20
SECOND = 10**9


def waits(
    rank: int, number: int = 1284, operation: str = "allreduce", waiting_for: int = -1, **more: Any
) -> RankProgress:
    more = {"doing": "waiting for others", "inside_s": 61.0, "bytes": MIB25, "host": f"algo-{rank // 2 + 1}", **more}
    return RankProgress(rank, number, 7, operation, number, waiting_for=waiting_for, **more)


def outside(rank: int, last: int = 1283, operation: str = "broadcast") -> RankProgress:
    return RankProgress(rank, None, 7, operation, last, host=f"algo-{rank // 2 + 1}")


def found(*ranks: RankProgress) -> tuple[str, int | None]:
    text, suspect = hang_text(ranks, 1800.0)
    head, tail = (
        "hang: no log, no step and no I/O in any rank for 1800 s; ",
        "; the stacks of all ranks are on their stderr",
    )
    assert text.startswith(head) and text.endswith(tail)
    return text[len(head) : -len(tail)], suspect


# ---- hangs


@pytest.mark.parametrize("waiting_for", [-1, 3])
def test_the_rank_that_never_came_is_named_with_what_the_others_wait_in(waiting_for: int) -> None:
    ranks = [waits(rank, waiting_for=waiting_for) for rank in range(3)]
    assert found(*ranks, outside(3)) == (
        "rank 3 on algo-2 never entered allreduce #1284 (last: broadcast #1283); "
        "ranks 0-2 wait in allreduce #1284 of 25 MiB since 61 s",
        3,
    )


def test_whom_the_others_wait_for_counts_more_than_numbers() -> None:
    """Ranks 0 and 1 wait in one group, rank 2 has done all that it has to do there; rank 3 uses none of ours."""
    text, suspect = found(waits(0, 40, waiting_for=1), outside(1, 39), outside(2, 90), RankProgress(3, None, 7))
    assert suspect == 1
    assert text.startswith(
        "rank 1 on algo-1 never entered allreduce #40 (last: broadcast #39); rank 0 waits in allreduce"
    )


def test_the_end_of_a_chain_is_to_blame() -> None:
    chain = (waits(0, waiting_for=1), waits(1, waiting_for=2), waits(2, doing="reducing"), waits(3, waiting_for=2))
    text, suspect = found(*chain)
    assert suspect == 2
    assert text == (
        "rank 2 on algo-2 is stuck in allreduce #1284 (reducing); "
        "ranks 0-1, 3 wait in allreduce #1284 of 25 MiB since 61 s"
    )


def test_who_waits_in_a_circle_is_not_to_blame() -> None:
    """Two groups, entered in another order."""
    circle = (waits(1, 5, waiting_for=2), waits(2, 9, "broadcast", 1))
    for ranks in (circle, (waits(0, 5, waiting_for=1), *circle)):
        text, suspect = found(*ranks)
        assert suspect is None
        assert sorted(text.split("; ")) == [
            "rank 1 on algo-1 is in allreduce #5 and waits for rank 2",
            "rank 2 on algo-2 is in broadcast #9 and waits for rank 1",
        ]


def test_the_rank_that_is_behind_is_named_when_nobody_tells_for_whom_it_waits() -> None:
    text, suspect = found(waits(0), waits(1, 1283, "broadcast"), waits(2))
    assert suspect == 1
    assert text == (
        "rank 1 on algo-1 is still in broadcast #1283 (waiting for others); "
        "ranks 0, 2 wait in allreduce #1284 of 25 MiB since 61 s"
    )


def test_all_alike_names_nobody() -> None:
    assert found(waits(0), waits(1)) == ("ranks 0-1 wait in allreduce #1284 of 25 MiB since 61 s", None)
    assert found(RankProgress(0, None, 0), RankProgress(1, None, 0)) == ("no rank has reported a step yet", None)
    assert found(RankProgress(0, None, 5), RankProgress(1, None, 4)) == ("rank 1 is behind, at step 4", 1)


def test_many_that_never_came() -> None:
    text, suspect = found(waits(0, bytes=0, inside_s=0.5), outside(2), outside(3), outside(5))
    assert suspect == 2
    assert text == "rank 2-3, 5 never entered allreduce #1284; rank 0 waits in allreduce #1284"


def test_thousands_of_ranks_are_judged_at_once() -> None:
    """Each waits for its neighbour, as in a ring; and all of them for one."""
    size = 10_000
    ring = [waits(rank, waiting_for=rank + 1, host="") for rank in range(size - 1)]
    assert found(*ring, RankProgress(size - 1, None, 7))[1] == size - 1
    circle = [waits(rank, waiting_for=(rank + 1) % size) for rank in range(size)]
    assert found(*circle)[1] is None


def test_number_runs() -> None:
    assert number_runs([]) == ""
    assert number_runs([5, 0, 1, 2, 8, 9]) == "0-2, 5, 8-9"
    assert number_runs(range(0, 100, 2)).endswith("28, 30, ...")


# ---- stragglers


@pytest.mark.parametrize(
    ("shares", "slow", "lost"),
    [
        ({}, (), 0.0),
        ({0: 0.9}, (), 0.0),
        ({0: 0.41, 1: 0.0}, (1,), 0.41),
        ({0: 0.45, 1: 0.43, 2: 0.44, 3: 0.03}, (3,), 0.41),
        ({0: 0.19, 1: 0.18, 2: 0.0}, (), 0.0),  # the usual difference
        ({0: 0.5, 1: 0.5, 2: 0.5}, (), 0.0),  # all wait for something else: the wires
        ({0: 0.5, 1: 0.5, 2: 0.0, 3: 0.0}, (), 0.0),  # half of them: the way the work is divided
        ({rank: 0.0 if rank in (2, 6) else 0.5 for rank in range(8)}, (2, 6), 0.5),
    ],
)
def test_slowest(shares: dict[int, float], slow: tuple[int, ...], lost: float) -> None:
    assert slowest(shares) == (slow, pytest.approx(lost))


def test_a_straggler_that_stays_is_told_at_growing_intervals() -> None:
    told = Stragglers(60.0)
    hosts = {0: "algo-1", 1: "algo-1", 2: "algo-2", 3: "algo-2"}
    slow = {0: 0.41, 1: 0.41, 2: 0.41, 3: 0.0}
    lines = [told.take(slow, hosts) for _ in range(9)]
    assert lines[0] == "rank 3 on algo-2 is the straggler: others waited 41 % of the last 60 s for it"
    assert [bool(line) for line in lines] == [True, True, False, True, False, False, False, True, False]
    assert told.take({0: 0.0, 1: 0.3, 2: 0.3, 3: 0.3}, hosts).startswith("rank 0 on algo-1 is the straggler: others")
    assert told.take({0: 0.1, 1: 0.1, 2: 0.1, 3: 0.1}, hosts) == ""
    assert told.take(slow, hosts)  # again, after it was none


def test_windows_are_shares_of_their_own_time() -> None:
    windows = Waits(10.0, now_s=100.0)
    windows.note(0, 2 * SECOND)
    assert windows.window(109.0) is None
    assert windows.window(110.0) == {0: 0.2}
    assert windows.window(121.0) is None  # no rank is left that uses collectives
    windows.note(0, 5 * SECOND)
    windows.note(1, 40 * SECOND)  # one long wait, begun before the window
    assert windows.window(132.0) == {0: pytest.approx(5 / 11), 1: 1.0}
    assert Waits(0.0, 0.0).window(1e9) is None


def test_the_whole_attempt() -> None:
    waited = [(0, "algo-1", 30 * SECOND), (1, "algo-1", 0)]
    assert over_the_attempt(waited, 100.0, 60.0) == (
        "rank 1 on algo-1 was the straggler: others waited 30 % of 100 s for it"
    )
    assert over_the_attempt(waited, 50.0, 60.0) == over_the_attempt(waited, 100.0, 0.0) == ""


class Hosts:
    """What all hosts were told: lines only."""

    def __init__(self, *hosts: str) -> None:
        self.lines: list[str] = []
        policy = Policy(0, 60.0, "wait", 5.0, straggler_window_s=60.0)
        self.coordinator = Coordinator(policy, "train.py", self)
        self.coordinator.begin(0, hosts)
        self.verdict: Verdict | None = None

    def say(self, line: str) -> None:
        self.lines.append(line)

    def stop(self, number: int, failure: bool, line: str) -> None:
        self.lines.append(line)

    def sweep(self, line: str) -> None:
        raise AssertionError("nobody asked for it")

    def stacks(self) -> None:
        raise AssertionError("nothing hangs")

    def restart(self, attempt: int, hosts: tuple[str, ...], line: str) -> None:
        raise AssertionError("no restarts were asked for")

    def finish(self, verdict: Verdict) -> None:
        self.verdict = verdict


def test_hosts_of_one_rank_are_compared_with_each_other() -> None:
    hosts = Hosts("algo-1", "algo-2", "algo-3")
    hosts.coordinator.waited("algo-1", {0: 0.5})
    hosts.coordinator.waited("algo-3", {2: 0.52})
    assert hosts.lines == []
    hosts.coordinator.waited("algo-2", {1: 0.01})
    assert hosts.lines == ["rank 1 on algo-2 is the straggler: others waited 50 % of the last 60 s for it"]
    for rank, host in enumerate(("algo-1", "algo-2", "algo-3")):
        record = ExitRecord(
            host,
            rank,
            0,
            9,
            "exit",
            0,
            1,
            1,
            phase=3,
            operation="barrier",
            sequence=4,
            waited_ns=SECOND * (rank != 1) * 50,
        )
        hosts.coordinator.attempt_over(HostReport(host, 0, (record,), Evidence(), 100.0, False))
    assert hosts.verdict is not None and hosts.verdict.ok
    assert hosts.verdict.evidence.straggler == "rank 1 on algo-2 was the straggler: others waited 50 % of 100 s for it"


# ---- what hosts send each other


def test_progress_and_shares_come_through() -> None:
    progress = waits(1, waiting_for=0)
    assert from_dict(RankProgress, json.loads(json.dumps(as_dict(progress)))) == progress
    shares = json.loads(json.dumps({"kind": "waited", "shares": [[2, 0.25], [3, 1]]}))
    assert messages.read_waited(shares, range(2, 4)) == {2: 0.25, 3: 1}


@pytest.mark.parametrize(
    "shares",
    [
        *(None, {}, [1], [[1]], [[1, 2, 3]], [["1", 0.5]], [[True, 0.5]], [[1, -0.1]], [[1, 1.1]]),
        *([[1, float("nan")]], [[1, "0.5"]], [[1, True]], [[2, 0.5]], [[-1, 0.5]], [[1 << 70, 0.5]]),
    ],
)
def test_shares_that_are_none_are_refused(shares: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        messages.read_waited({"kind": "waited", "shares": shares}, range(0, 2))
