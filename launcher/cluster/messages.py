"""What hosts say to each other once they are connected: JSON objects, told apart by ``kind``.

member -> leader   hello facts slots | pong sent member_ns | ended record | stopping number forced | quiet still
                   stacked progress cut | over report cut | failed text code
                   trouble reason | relay message
leader -> member   start attempt without slots address port store line peers peer_port
                   stop number failure line lost | sweep line | stacks | ping sent | say line | wait text
                   verdict verdict | abort text code
                   relay message
"""

from __future__ import annotations

from launcher import errors
from launcher.evidence import ExitRecord, HostReport, Verdict, from_dict
from launcher.record import as_dict, replace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    Message = dict[str, Any]

# A rank's own words in a message. What the failure file shows of them is less.
_TEXT_CHARACTERS = 16 << 10
_TAIL_CHARACTERS = 4 << 10
# Victims of one kind are told by number beyond this many.
_VICTIMS = 64


def report_message(report: HostReport, cut: Sequence[str]) -> Message:
    """A host's report; ``cut``: hosts that it could not reach. Ranks that were only stopped are told in brief."""
    records = tuple(map(_short, report.records))
    return {"kind": "over", "report": as_dict(replace(report, records=records)), "cut": list(cut)}


def read_report(message: Message) -> tuple[HostReport, tuple[str, ...]]:
    """Raises TypeError, ValueError or KeyError for what is no report."""
    report: HostReport = from_dict(HostReport, message["report"])
    return report, tuple(str(host) for host in message["cut"])


def record_message(record: ExitRecord) -> Message:
    """A rank's end, as soon as it matters to others."""
    return {"kind": "ended", "record": as_dict(_brief(record))}


def verdict_message(verdict: Verdict) -> Message:
    """The verdict without what each host knows of its own ranks: it goes to every host."""
    culprit = _cut(verdict.culprit) if verdict.culprit is not None else None
    victims = dict(list(verdict.victims.items())[:_VICTIMS])
    evidence = replace(verdict.evidence, clocks=verdict.evidence.clocks[:_VICTIMS], memory_trends={}, lost_children=())
    brief = replace(
        verdict,
        text=verdict.text[: 4 * _TEXT_CHARACTERS],
        culprit=culprit,
        victims=victims,
        records=(),
        evidence=evidence,
    )
    return {"kind": "verdict", "verdict": as_dict(brief)}


def read_verdict(message: Message) -> Verdict:
    """Raises TypeError, ValueError or KeyError for what is no verdict."""
    verdict: Verdict = from_dict(Verdict, message["verdict"])
    return verdict


def abort_message(error: errors.LauncherError) -> Message:
    """The end of the job for a reason that is no rank's."""
    return {"kind": "abort", "text": str(error)[:_TEXT_CHARACTERS], "code": error.exit_code}


def read_abort(message: Message) -> errors.LauncherError:
    """The error that :func:`abort_message` was made of."""
    text, code = str(message["text"]), int(message["code"])
    if code == errors.EXIT_REFUSED:
        return errors.RefusedError(text)
    if code > 128:
        return errors.StoppedError(code - 128)
    error = errors.ClusterError(text)
    error.exit_code = code
    return error


def pack_slots(slots: Sequence[int]) -> list[list[int]]:
    """``slots`` as runs [count, slots]: most hosts are alike, and there may be thousands."""
    runs: list[list[int]] = []
    for value in slots:
        if runs and runs[-1][1] == value:
            runs[-1][0] += 1
        else:
            runs.append([1, value])
    return runs


def unpack_slots(runs: Sequence[Sequence[int]], count: int) -> tuple[int, ...]:
    """The slots of ``count`` hosts.

    Raises:
        ValueError: there are not as many.
    """
    if sum(int(run[0]) for run in runs) != count or any(int(run[0]) < 1 for run in runs):
        raise ValueError(f"slots of {count} hosts expected")
    return tuple(int(run[1]) for run in runs for _ in range(run[0]))


def _short(record: ExitRecord) -> ExitRecord:
    return _brief(record) if record.told_first or not record.failed else _cut(record)


def _brief(record: ExitRecord) -> ExitRecord:
    return replace(record, message=record.message[:300], traceback="", stdout_tail="", stderr_tail="", note="")


def _cut(record: ExitRecord) -> ExitRecord:
    return replace(
        record,
        message=record.message[:_TEXT_CHARACTERS],
        traceback=record.traceback[-_TEXT_CHARACTERS:],
        stdout_tail=record.stdout_tail[-_TAIL_CHARACTERS:],
        stderr_tail=record.stderr_tail[-_TAIL_CHARACTERS:],
    )
