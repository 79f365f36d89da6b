"""What is decided for all hosts of a job: literals in, decisions out. Real hosts are in tests/hosts."""

from __future__ import annotations

import json
from typing import Any

import pytest

from launcher.evidence import (
    ClockOffset,
    Evidence,
    ExitRecord,
    HostReport,
    LostHost,
    RankProgress,
    Verdict,
    from_dict,
    on_one_clock,
    together,
)
from launcher.record import as_dict, replace
from launcher.supervisor.coordinator import Coordinator, Policy

POLICY = Policy(max_restarts=0, crash_loop_s=60.0, early_exit="wait", hang_timeout_s=5.0)
SECOND = 10**9


def end(rank: int, host: str, at: int = 100, code: int = 0, **more: Any) -> ExitRecord:
    """A rank's end at ``at`` (ns)."""
    return ExitRecord(
        host=host, rank=rank, local_rank=0, pid=1, how="exit", value=code, ended_ns=at, failed_ns=at, **more
    )


def report(host: str, *records: ExitRecord, attempt: int = 0, **evidence: Any) -> HostReport:
    return HostReport(host, attempt, records, Evidence(**evidence), 1.0, False)


class Told:
    """What all hosts were told, in order."""

    def __init__(self, hosts: tuple[str, ...], policy: Policy = POLICY) -> None:
        self.said: list[tuple[Any, ...]] = []
        self.coordinator = Coordinator(policy, "train.py", self)
        self.coordinator.begin(0, hosts)

    def stop(self, number: int, failure: bool, line: str) -> None:
        self.said.append(("stop", number, failure))

    def sweep(self, line: str) -> None:
        self.said.append(("sweep",))

    def say(self, line: str) -> None:
        self.said.append(("say", line))

    def stacks(self) -> None:
        self.said.append(("stacks",))

    def restart(self, attempt: int, hosts: tuple[str, ...], line: str) -> None:
        self.said.append(("restart", attempt, hosts))
        self.coordinator.begin(attempt, hosts)

    def finish(self, verdict: Verdict) -> None:
        self.said.append(("finish", verdict.kind, verdict.exit_code))
        self.verdict = verdict

    def report(self, *reports: HostReport) -> None:
        for one in reports:
            self.coordinator.attempt_over(one)


def test_first_failure_stops_all_once() -> None:
    told = Told(("a", "b"))
    told.coordinator.rank_ended("b", end(1, "b", code=3))
    told.coordinator.rank_ended("a", end(0, "a", code=1))
    assert told.said == [("stop", 15, True)]
    told.report(report("a", end(0, "a", at=200, code=1)), report("b", end(1, "b", at=150, code=3)))
    assert told.said[1:] == [("finish", "rank", 3)]
    assert told.verdict.headline.startswith("rank 1 on b")


def test_clocks_decide_who_was_first() -> None:
    """Row 4: host b's clock is 5 s ahead; by its own numbers its rank failed later, in truth it was first."""
    told = Told(("a", "b"))
    told.coordinator.clocks["b"] = ClockOffset("b", 5 * SECOND, 1000)
    told.report(
        report("a", end(0, "a", at=10 * SECOND + 50_000_000, code=1)), report("b", end(1, "b", at=15 * SECOND, code=4))
    )
    assert told.verdict.exit_code == 4
    assert "clock of b: +5.000000 s against the first host's, known to 0.001 ms" in told.verdict.text


def test_failures_that_clocks_cannot_tell_apart_are_both_named() -> None:
    told = Told(("a", "b"))
    told.coordinator.clocks["b"] = ClockOffset("b", 0, 2_000_000)
    told.report(report("a", end(0, "a", at=SECOND, code=1)), report("b", end(1, "b", at=SECOND + 1_000_000, code=4)))
    assert told.verdict.culprit is not None and told.verdict.culprit.rank == 0
    assert "rank 1 on b failed at the same time, as far as clocks tell" in told.verdict.text


def test_a_hang_is_one_when_all_hosts_are_quiet() -> None:
    told = Told(("a", "b", "c"))
    told.coordinator.quiet("a", True)
    told.coordinator.quiet("b", True)
    told.coordinator.quiet("b", False)
    assert told.said == []
    told.report(report("c", end(2, "c")))  # done hosts do not count
    told.coordinator.quiet("b", True)
    assert told.said == [("stacks",)]
    told.coordinator.stacked("a", (RankProgress(0, 7, 3),))
    assert told.said == [("stacks",)]
    told.coordinator.stacked("b", (RankProgress(1, None, 3),))
    assert told.said[-1] == ("stop", 15, True)
    told.report(
        report("a", end(0, "a", at=300, code=1, told_ns=200)), report("b", end(1, "b", at=300, code=1, told_ns=200))
    )
    assert told.said[-1] == ("finish", "hang", 75)
    assert "rank 1 on b never entered collective #7; rank 0 waits in collective #7" in told.verdict.headline


def test_a_hang_is_seen_when_the_last_host_at_work_ends() -> None:
    told = Told(("a", "b"))
    told.coordinator.quiet("a", True)
    told.report(report("b", end(1, "b")))
    assert told.said == [("stacks",)]


def test_lost_host_is_named_with_its_ranks() -> None:
    told = Told(("a", "b"))
    told.coordinator.host_lost(LostHost("b", "is lost: its launcher ended without a word", 100, False, (2, 3)))
    assert told.said == [("stop", 15, True)]
    told.report(report("a", end(0, "a", at=150, code=1, message="RuntimeError: Connection reset by peer")))
    assert told.said[-1] == ("finish", "host", 69)
    assert told.verdict.headline == "b (rank 2, 3) is lost: its launcher ended without a word"


@pytest.mark.parametrize(
    ("silent", "failed_s", "kind"),
    [(False, 99, "rank"), (False, 101, "host"), (True, 100.5, "rank"), (True, 103, "host")],
    ids=["before its end", "after its end", "within a heartbeat of the last sign", "long after the last sign"],
)
def test_rank_or_lost_host(silent: bool, failed_s: float, kind: str) -> None:
    told = Told(("a", "b"))
    told.coordinator.rank_ended("a", end(0, "a", at=int(failed_s * SECOND), code=5))
    told.coordinator.host_lost(LostHost("b", "is gone", 100 * SECOND, silent))
    told.report(report("a", end(0, "a", at=int(failed_s * SECOND), code=5)))
    assert told.verdict.kind == kind


def test_host_that_is_lost_after_its_part_changes_nothing() -> None:
    told = Told(("a", "b"))
    told.report(report("b", end(1, "b")))
    told.coordinator.host_lost(LostHost("b", "is gone", 500))
    assert told.said == []
    told.report(report("a", end(0, "a", at=600)))
    assert told.said == [("finish", "success", 0)]


def test_restart_with_the_hosts_that_are_left() -> None:
    told = Told(("a", "b", "c"), replace(POLICY, min_hosts=2))
    told.coordinator.host_lost(LostHost("b", "is gone", 100))
    told.report(report("a", end(0, "a", at=150, code=1, told_ns=120)), report("c", end(2, "c", at=150, told_ns=120)))
    assert told.said[-1] == ("restart", 1, ("a", "c"))
    # A report of the attempt before is none of this one's.
    told.report(report("c", end(2, "c", code=9)))
    told.report(report("a", end(0, "a"), attempt=1), report("c", end(1, "c"), attempt=1))
    assert told.said[-1] == ("finish", "success", 0)


def test_no_restart_with_less_than_half() -> None:
    """The others may have met again without this host."""
    told = Told(("a", "b", "c"), replace(POLICY, min_hosts=1))
    told.coordinator.host_lost(LostHost("b", "is gone", 100))
    told.coordinator.host_lost(LostHost("c", "is gone", 100))
    told.report(report("a", end(0, "a", at=150, code=1, told_ns=120)))
    assert told.said[-1] == ("finish", "host", 69)


def test_lost_hosts_use_up_no_restarts() -> None:
    told = Told(("a", "b", "c"), replace(POLICY, min_hosts=2, max_restarts=1))
    told.coordinator.host_lost(LostHost("c", "is gone", 100))
    told.report(report("a", end(0, "a", at=150, code=1, told_ns=120)), report("b", end(1, "b", at=150, told_ns=120)))
    told.report(report("a", end(0, "a", code=2), attempt=1), report("b", end(1, "b"), attempt=1))
    assert told.said[-1] == ("restart", 2, ("a", "b"))
    told.report(report("a", end(0, "a", code=2), attempt=2), report("b", end(1, "b"), attempt=2))
    assert told.said[-1] == ("finish", "rank", 2)


@pytest.mark.parametrize(("policy", "stops"), [("wait", False), ("abort", True), ("ok", False)])
def test_early_exit_on_one_host_of_several(policy: str, stops: bool) -> None:
    told = Told(("a", "b"), replace(POLICY, early_exit=policy))
    told.coordinator.rank_ended("b", end(1, "b", phase=2))
    assert bool(told.said) == stops


def test_stop_signal_on_any_host_is_for_all() -> None:
    told = Told(("a", "b"), replace(POLICY, max_restarts=3))
    told.coordinator.stopping("b", 15, False)
    told.coordinator.stopping("b", 15, True)
    told.coordinator.stopping("a", 15, True)
    assert told.said == [("stop", 15, False), ("sweep",)]
    told.report(
        report("a", end(0, "a", at=300, code=1, told_ns=200)),
        report("b", end(1, "b", at=300, code=1, told_ns=200), stop_signal=15),
    )
    assert told.said[-1] == ("finish", "stopped", 143)


def test_cut_links_are_named_when_no_rank_is_to_blame() -> None:
    told = Told(("a", "b", "c"))
    told.coordinator.cut_links = (("b", "c"),)
    lost = end(1, "b", at=200, code=1, message="RuntimeError: Connection timed out")
    told.report(report("a", end(0, "a")), report("b", lost), report("c", end(2, "c")))
    assert told.said[-1] == ("finish", "network", 69)
    assert told.verdict.headline == "the network is cut: b and c cannot reach each other"
    blamed = Told(("a", "b", "c"))
    blamed.coordinator.cut_links = (("b", "c"),)
    blamed.report(report("a", end(0, "a", code=7)), report("b", lost), report("c", end(2, "c")))
    assert blamed.verdict.exit_code == 7


def test_mpi_abort_names_its_rank_whatever_ended_first() -> None:
    told = Told(("a", "b"))
    told.report(
        report("a", end(0, "a", at=100, code=1), aborted_rank=1, aborted_code=7),
        report("b", end(1, "b", at=300, code=15)),
    )
    assert (told.verdict.exit_code, told.verdict.headline) == (7, "rank 1 on b called MPI_Abort(7)")


def test_memory_is_that_of_the_culprits_host() -> None:
    told = Told(("a", "b"))
    killed = replace(end(1, "b", at=100), how="signal", value=9, max_rss_kib=1024)
    told.report(
        report("a", end(0, "a", at=300, code=1, told_ns=200)), report("b", killed, oom_kills=1, memory_limit=1 << 30)
    )
    assert "rank 1 on b was OOM-killed: peak RSS 1.0 MiB of limit 1.00 GiB" in told.verdict.headline
    other = Told(("a", "b"))
    other.report(report("a", end(0, "a", at=300, code=1), oom_kills=1), report("b", killed))
    assert "OOM-killed" not in other.verdict.headline


def test_records_survive_the_way_to_another_host() -> None:
    one = report(
        "b",
        end(1, "b", code=3, message="x", phase=2),
        lost_hosts=(LostHost("c", "is gone", 5, True, (2, 3)),),
        clocks=(ClockOffset("c", -5, 7),),
        memory_trends={1: "grew"},
        cut_links=(("a", "b"),),
    )
    assert from_dict(HostReport, json.loads(json.dumps(as_dict(one)))) == one
    told = Told(("b",))
    told.report(replace(one, evidence=Evidence()))
    assert from_dict(Verdict, json.loads(json.dumps(as_dict(told.verdict)))) == told.verdict


GOOD = as_dict(report("b", end(1, "b")))


@pytest.mark.parametrize(
    "change",
    [
        {"nothing": 1},
        {"records": 3},
        {"records": [3]},
        {"records": None},
        {"evidence": [1]},
        {"host": 1},
        {"attempt": "0"},
        {"attempt": True},
        {"lasted_s": "x"},
        {"evidence": {"memory_trends": {"x": "y"}}},
        {"evidence": {"memory_trends": [1]}},
        {"evidence": {"lost_hosts": [{"host": "c", "how": "", "heard_ns": 1.5}]}},
        {"evidence": {"cut_links": [["a"]]}},
        {"records": [{**GOOD["records"][0], "rank": "1"}]},
        {"records": [{**GOOD["records"][0], "phase": "running"}]},
    ],
    ids=str,
)
def test_what_is_no_record_is_refused(change: dict[str, Any]) -> None:
    assert from_dict(HostReport, GOOD) == report("b", end(1, "b"))
    with pytest.raises((TypeError, ValueError)):
        from_dict(HostReport, {**GOOD, **change})
    with pytest.raises(TypeError):
        from_dict(HostReport, [GOOD])


def test_one_clock() -> None:
    moved = on_one_clock(end(0, "a", at=100, told_ns=0), 40)
    assert (moved.ended_ns, moved.failed_ns, moved.told_ns) == (60, 60, 0)
    assert on_one_clock(end(0, "a", at=100, told_ns=90), 40).told_ns == 50


def test_together_names_the_host_of_a_fault() -> None:
    both = together([report("a"), report("b", launcher_error="the disk is full", launcher_code=74)])
    assert (both.launcher_error, both.launcher_code) == ("b: the disk is full", 74)
