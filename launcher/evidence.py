"""What is known when a job has ended: how every rank ended, what the hosts saw beside it, and the verdict on it.

Plain data: a supervisor makes it, the hosts of a job send it to each other, :mod:`launcher.verdict` judges it. Times
are CLOCK_MONOTONIC nanoseconds; of one host, or of the first host's clock once :func:`on_one_clock` has mapped them.
"""

from __future__ import annotations

from launcher import errors
from launcher.record import Record, replace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

EXIT, SIGNAL = "exit", "signal"
FINISHED_PHASE = 3


class ExitRecord(Record):
    """How one rank ended.

    Attributes:
        how, value: ``exit`` and the code, or ``signal`` and its number.
        ended_ns: when its process ended; failed_ns: when its exception was recorded, else ended_ns.
        told_ns: when the launcher first signalled it; 0: never.
        message, where, traceback, thread: from its error file; "" without one.
        waited_for: the collective that its watchdog gave up waiting in, in words; "" for none.
        phase: of its status page; None for ranks that keep none (binaries, shell scripts).
        operation, sequence: its last collective, "" and 0 for none; of those that tell (launcher's own do).
        collective_phase: what it did in that when it ended, in words; "": it had left it.
        waited_ns: time it has waited for other ranks in collectives.
        max_rss_kib: peak resident memory of the rank itself, KiB.
    """

    host: str
    rank: int
    local_rank: int
    pid: int
    how: str
    value: int
    ended_ns: int
    failed_ns: int
    told_ns: int = 0
    was_stopped: bool = False
    message: str = ""
    where: str = ""
    traceback: str = ""
    thread: str = ""
    waited_for: str = ""
    timestamp: int = 0
    phase: int | None = None
    steps: int = 0
    max_rss_kib: int = 0
    cpu_s: float = 0.0
    stdout_tail: str = ""
    stderr_tail: str = ""
    error_file: str = ""
    note: str = ""
    operation: str = ""
    sequence: int = 0
    collective_phase: str = ""
    waited_ns: int = 0

    @property
    def failed(self) -> bool:
        """Whether it did not end with code 0."""
        return self.how == SIGNAL or self.value != 0

    @property
    def left_early(self) -> bool:
        """Whether it ended with 0 in the middle of its script, as os._exit(0) does."""
        return not self.failed and self.phase is not None and self.phase != FINISHED_PHASE and not self.told_ns

    @property
    def told_first(self) -> bool:
        """Whether it failed after the launcher's signal. What a thread raised before, it had survived until then."""
        return bool(self.told_ns) and (self.failed_ns >= self.told_ns or bool(self.thread))

    @property
    def cut_short(self) -> bool:
        """Whether its own exception came first, and the launcher's signal ended it in its teardown."""
        return self.how == SIGNAL and bool(self.told_ns) and not self.told_first

    @property
    def exit_code(self) -> int:
        """The code a shell would show: its own, or 128 plus the signal; Python's for an exception that we cut short."""
        if self.cut_short:
            return 1
        return 128 + self.value if self.how == SIGNAL else self.value


class LostChild(Record):
    """A helper process of a rank that vanished when the cgroup counted an OOM kill."""

    rank: int
    pid: int
    command: str
    rss_kib: int


class LostHost(Record):
    """A host that left the group in the middle of the job.

    Attributes:
        how: what was seen of it, in words.
        heard_ns: when it was last heard, on the first host's clock.
        silent: nothing came any more; False: its connection ended, so the time is exact.
        ranks: those that ran on it.
    """

    host: str
    how: str
    heard_ns: int
    silent: bool = False
    ranks: tuple[int, ...] = ()


class ClockOffset(Record):
    """A host's monotonic clock against the first host's: ahead of it by ``offset_ns``, known to ``uncertainty_ns``."""

    host: str
    offset_ns: int
    uncertainty_ns: int


class Evidence(Record):
    """What a host, or all hosts together, know beside the ranks' ends.

    Attributes:
        stop_signal: the signal that asked the job to stop; 0: none. forced: a second one ended the grace.
        hang: what the hang watch found, "" for no hang; hang_rank: the rank it suspects.
        oom_kills: OOM kills that the cgroup counted during this attempt.
        memory_limit, memory_peak: of the cgroup, bytes; 0: no limit, unknown.
        shm_total, shm_free: /dev/shm when the first rank failed, bytes.
        memory_trends: rank -> how its memory grew, in words.
        lost_children: helpers of ranks that were gone when the OOM kill was counted.
        launcher_error: what went wrong in the launcher itself, "" for nothing; launcher_code: the exit code for it.
        aborted_rank, aborted_code: the rank that called MPI_Abort, as the MPI library told, and its code.
        stop_reason, stop_code: why the ranks were stopped, and the exit code, where no rank's end explains it.
        lost_hosts, clocks: of a job of several hosts.
        cut_links: pairs of hosts that could not reach each other when they were asked to.
        straggler: the rank that the others waited for through the attempt, in words; "" for none.
    """

    stop_signal: int = 0
    forced: bool = False
    hang: str = ""
    hang_rank: int | None = None
    oom_kills: int = 0
    memory_limit: int = 0
    memory_peak: int = 0
    shm_total: int = 0
    shm_free: int = 0
    lost_children: tuple[LostChild, ...] = ()
    memory_trends: dict[int, str] = {}
    launcher_error: str = ""
    launcher_code: int = errors.EXIT_INTERNAL
    early_exit_ok: bool = False
    aborted_rank: int | None = None
    aborted_code: int = 0
    stop_reason: str = ""
    stop_code: int = 0
    lost_hosts: tuple[LostHost, ...] = ()
    clocks: tuple[ClockOffset, ...] = ()
    cut_links: tuple[tuple[str, str], ...] = ()
    straggler: str = ""


class Verdict(Record):
    """The outcome of a job (or of one attempt).

    Attributes:
        kind: success, rank, early-exit, stopped, hang, host, network or launcher.
        headline: the one line; text: what goes into output/failure ("" on success).
        culprit: the culprit's record, if a rank is to blame.
        victims: rank -> why it is one.
        attempt: number of the attempt that this is the verdict on.
    """

    kind: str
    exit_code: int
    headline: str
    text: str = ""
    culprit: ExitRecord | None = None
    victims: dict[int, str] = {}
    records: tuple[ExitRecord, ...] = ()
    evidence: Evidence = Evidence()
    attempt: int = 0

    @property
    def ok(self) -> bool:
        """Whether the job succeeded."""
        return self.exit_code == 0


class RankProgress(Record):
    """Where a rank stands when nothing moves any more.

    Attributes:
        inside: number of the collective that it is in; None: it is in none, or tells nothing.
        step: steps that it has reported.
        operation, last: name and number of the last collective that it has entered; "" and 0 for none.
        bytes: of that collective. doing: what it does inside, in words. inside_s: for how long.
        waiting_for: the rank that it waits for; -1: none, or not known.
        host: of the rank; who receives it fills it in.
    """

    rank: int
    inside: int | None
    step: int
    operation: str = ""
    last: int = 0
    bytes: int = 0
    doing: str = ""
    inside_s: float = 0.0
    waiting_for: int = -1
    host: str = ""


class HostReport(Record):
    """One host's part of an attempt, when nothing of it is left.

    Attributes:
        records: of this host's ranks. lasted_s: from the first rank's start.
        stuck: a process did not end on SIGKILL.
    """

    host: str
    attempt: int
    records: tuple[ExitRecord, ...]
    evidence: Evidence
    lasted_s: float
    stuck: bool


def on_one_clock(record: ExitRecord, offset_ns: int) -> ExitRecord:
    """``record`` with its times moved by a clock's offset; 0 stays 0, it stands for "never"."""
    return replace(
        record,
        ended_ns=record.ended_ns - offset_ns,
        failed_ns=record.failed_ns - offset_ns,
        told_ns=record.told_ns - offset_ns if record.told_ns else 0,
    )


def together(reports: Sequence[HostReport]) -> Evidence:
    """What several hosts know, in one: signals and faults of any of them. Memory stays with :func:`judge`'s by_host."""
    if len(reports) == 1:
        return reports[0].evidence
    seen = [report.evidence for report in reports]
    stopped = next((evidence for evidence in seen if evidence.stop_signal), None)
    aborted = next((evidence for evidence in seen if evidence.aborted_rank is not None), None)
    # The highest code is that of somebody who was killed: what others saw follows from it.
    stopper = max((evidence for evidence in seen if evidence.stop_reason), key=_stop_code, default=None)
    faulty = next((report for report in reports if report.evidence.launcher_error), None)
    return Evidence(
        stop_signal=stopped.stop_signal if stopped else 0,
        forced=any(evidence.forced for evidence in seen),
        launcher_error=f"{faulty.host}: {faulty.evidence.launcher_error}" if faulty else "",
        launcher_code=faulty.evidence.launcher_code if faulty else errors.EXIT_INTERNAL,
        early_exit_ok=any(evidence.early_exit_ok for evidence in seen),
        aborted_rank=aborted.aborted_rank if aborted else None,
        aborted_code=aborted.aborted_code if aborted else 0,
        stop_reason=stopper.stop_reason if stopper else "",
        stop_code=stopper.stop_code if stopper else 0,
    )


def _stop_code(evidence: Evidence) -> int:
    return evidence.stop_code


def from_dict(kind: type[Any], value: Mapping[str, Any]) -> Any:
    """The record of ``kind`` that :func:`launcher.record.as_dict` made ``value`` of, after a way through JSON.

    Numbers have 64 bits and are finite, so that one can calculate with them.

    Raises:
        TypeError, ValueError: it is no such record; what came from another host may be anything.
    """
    if not isinstance(value, dict):
        raise TypeError(f"{kind.__name__}: an object expected, found {type(value).__name__}")
    nested, declared = _NESTED.get(kind, {}), kind.__annotations__
    fields = {}
    for name, item in value.items():
        inner = nested.get(name)
        if item is None or inner is None:
            if not _fits(item, str(declared.get(name))):
                raise TypeError(f"{kind.__name__}: {name} is no {declared.get(name)}, but {type(item).__name__}")
            if type(item) in (int, float) and not -_MOST <= item <= _MOST:  # NaN is not in any range
                raise ValueError(f"{kind.__name__}: {name} is no finite number of 64 bits")
            fields[name] = item
        elif isinstance(inner, tuple):
            if not isinstance(item, list):
                raise TypeError(f"{kind.__name__}: {name} is no list, but {type(item).__name__}")
            fields[name] = tuple(from_dict(inner[0], one) for one in item)
        elif isinstance(inner, type) and issubclass(inner, Record):
            fields[name] = from_dict(inner, item)
        else:
            fields[name] = inner(item)
    return kind(**fields)


def whole_number(value: object) -> int:
    """``value``, if it is an integer (no bool) of 64 bits.

    Raises:
        TypeError, ValueError: it is not.
    """
    if type(value) is not int:
        raise TypeError(f"a whole number expected, found {type(value).__name__}")
    if not -_MOST <= value <= _MOST:
        raise ValueError("a whole number of 64 bits expected, found a longer one")
    return value


def _fits(item: object, declared: str) -> bool:
    """Whether ``item`` is of the type ``declared`` in a record; records and their like have no default of None."""
    optional = declared.endswith(" | None")
    allowed = _PLAIN.get(declared.removesuffix(" | None"))
    if item is None:
        return optional
    return allowed is not None and type(item) in allowed


_MOST = (1 << 63) - 1
_PLAIN: dict[str, tuple[type[Any], ...]] = {"int": (int,), "str": (str,), "bool": (bool,), "float": (float, int)}


def _by_rank(value: Mapping[str, str]) -> dict[int, str]:
    if not isinstance(value, dict):
        raise TypeError("an object by rank expected")
    if not all(isinstance(text, str) for text in value.values()):
        raise TypeError("a text for each rank expected")
    return {whole_number(int(rank)): text for rank, text in value.items()}


def _numbers(value: Sequence[int]) -> tuple[int, ...]:
    return tuple(map(whole_number, value))


def _pairs(value: Sequence[Sequence[str]]) -> tuple[tuple[str, str], ...]:
    if not all(isinstance(name, str) for pair in value for name in pair):
        raise TypeError("pairs of names expected")
    return tuple((first, second) for first, second in value)


# Record -> field -> what JSON cannot tell: a record, a tuple of records, or a function that restores the value.
_NESTED: dict[type[Any], dict[str, Any]] = {
    LostHost: {"ranks": _numbers},
    Evidence: {
        "lost_children": (LostChild,),
        "memory_trends": _by_rank,
        "lost_hosts": (LostHost,),
        "clocks": (ClockOffset,),
        "cut_links": _pairs,
    },
    Verdict: {"culprit": ExitRecord, "victims": _by_rank, "records": (ExitRecord,), "evidence": Evidence},
    HostReport: {"records": (ExitRecord,), "evidence": Evidence},
}
