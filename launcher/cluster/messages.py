"""What hosts say to each other once they are connected: JSON objects, told apart by ``kind``.

member -> leader   hello facts slots | pong sent member_ns | ended record | stopping number forced | quiet still
                   waited shares | stacked progress cut | over report cut | failed text code
                   trouble reason | relay message
leader -> member   start attempt without slots address port store line peers peer_port
                   stop number failure line lost | sweep line | stacks | ping sent | say line | wait text
                   verdict verdict | abort text code
                   relay message
"""

from __future__ import annotations

from launcher import errors
from launcher.evidence import EXIT, SIGNAL, ExitRecord, HostReport, RankProgress, Verdict, from_dict, whole_number
from launcher.record import as_dict, replace
from launcher.verdict import SHOWN_VICTIMS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    Message = dict[str, Any]

# A rank's own words in a message. What the failure file shows of them is less.
_TEXT_CHARACTERS = 16 << 10
_TAIL_CHARACTERS = 4 << 10
_NAME_CHARACTERS = 1 << 10
# A character takes six bytes in JSON at worst, and a frame has 4 MiB: of the ranks of a host that failed of themselves,
# only the first ones are told with all that they have said.
_WHOLE_RECORDS = 8
_SHORT_CHARACTERS = 300
_STOP_SIGNALS = (1, 2, 3, 15)  # what a supervisor passes on: HUP, INT, QUIT, TERM
_LAST_SIGNAL = 64


def report_message(report: HostReport, cut: Sequence[str]) -> Message:
    """A host's report; ``cut``: hosts that it could not reach. Ranks that were only stopped are told in brief."""
    first = sorted((record for record in report.records if _of_itself(record)), key=lambda record: record.failed_ns)
    whole = {record.rank for record in first[:_WHOLE_RECORDS]}
    records = tuple(_cut(record) if record.rank in whole else _short(record) for record in report.records)
    return {"kind": "over", "report": as_dict(replace(report, records=records)), "cut": list(cut)}


def read_report(message: Message, host: str, attempt: int, ranks: range) -> HostReport:
    """The report of ``host``, which has ``ranks``. Raises TypeError, ValueError or KeyError for what is none."""
    report: HostReport = from_dict(HostReport, message["report"])
    evidence = report.evidence
    if report.host != host or report.attempt != attempt:
        raise ValueError(f"a report of another host or attempt than {host}, {attempt}")
    if len({_check_record(record, host, ranks).rank for record in report.records}) != len(report.records):
        raise ValueError("a rank ended twice")
    if not (0 <= evidence.stop_signal <= _LAST_SIGNAL and 0 <= evidence.aborted_code <= 255):
        raise ValueError("no signal, or no exit code")
    _failure_code(evidence.launcher_code)
    return replace(report, evidence=replace(evidence, launcher_error=evidence.launcher_error[:_TEXT_CHARACTERS]))


def read_record(message: Message, host: str, ranks: range) -> ExitRecord:
    """The end of one of the ``ranks`` of ``host``. Raises TypeError, ValueError or KeyError for what is none."""
    return _check_record(from_dict(ExitRecord, message["record"]), host, ranks)


def read_progress(message: Message, ranks: range) -> tuple[RankProgress, ...]:
    """Where some of ``ranks`` stand. Raises TypeError, ValueError or KeyError for what says nothing of that."""
    if not isinstance(message["progress"], list):
        raise TypeError("progress is no list")
    progress: tuple[RankProgress, ...] = tuple(from_dict(RankProgress, rank) for rank in message["progress"])
    if any(rank.rank not in ranks for rank in progress):
        raise ValueError("the progress of another host's rank")
    return progress


def read_waited(message: Message, ranks: range) -> dict[int, float]:
    """Shares of time that some of ``ranks`` waited for others. Raises TypeError, ValueError or KeyError for none."""
    if not isinstance(message["shares"], list):
        raise TypeError("shares are no list")
    shares = {whole_number(rank): share for rank, share in message["shares"]}
    if not all(type(share) in (int, float) and 0 <= share <= 1 for share in shares.values()):
        raise ValueError("shares of time are from 0 to 1")
    if any(rank not in ranks for rank in shares):
        raise ValueError("the waiting of another host's rank")
    return shares


def read_cut(message: Message) -> tuple[str, ...]:
    """Hosts that a host could not reach. Raises TypeError or KeyError for what are none."""
    cut = message["cut"]
    if not isinstance(cut, list) or not all(isinstance(host, str) for host in cut):
        raise TypeError("no list of hosts")
    return tuple(cut)


def read_stop(message: Message) -> tuple[int, bool]:
    """A signal and whether it is the second one. Raises TypeError, ValueError or KeyError for what is none."""
    number, forced = message["number"], message["forced"]
    if type(number) is not int or type(forced) is not bool:
        raise TypeError("no signal")
    if number not in _STOP_SIGNALS:
        raise ValueError("no signal that stops a job")
    return number, forced


def shown(value: object) -> str:
    """What another host sent, for people, in few characters."""
    return repr(value[:40]) if isinstance(value, str) else type(value).__name__


def _check_record(record: ExitRecord, host: str, ranks: range) -> ExitRecord:
    if record.host != host or record.rank not in ranks:
        raise ValueError(f"the end of a rank that is not one of {host}")
    first, last = (1, _LAST_SIGNAL) if record.how == SIGNAL else (0, 255)
    if record.how not in (EXIT, SIGNAL) or not first <= record.value <= last:
        raise ValueError("an end that is neither an exit code nor a signal")
    return record


def _failure_code(value: object) -> int:
    code = whole_number(value)
    if not 0 < code <= 255:
        raise ValueError("no exit code of a failure")
    return code


def record_message(record: ExitRecord) -> Message:
    """A rank's end, as soon as it matters to others."""
    return {"kind": "ended", "record": as_dict(_brief(record))}


def bounded(verdict: Verdict) -> Verdict:
    """``verdict`` with a text that every host can be told, so that all write the same."""
    return replace(verdict, text=verdict.text[: 4 * _TEXT_CHARACTERS])


def verdict_message(verdict: Verdict) -> Message:
    """A :func:`bounded` verdict without what each host knows of its own ranks: it goes to every host."""
    culprit = _cut(verdict.culprit) if verdict.culprit is not None else None
    victims = dict(list(verdict.victims.items())[:SHOWN_VICTIMS])
    evidence = replace(
        verdict.evidence, clocks=verdict.evidence.clocks[:SHOWN_VICTIMS], memory_trends={}, lost_children=()
    )
    brief = replace(
        verdict,
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
    """The error that :func:`abort_message` was made of. Raises TypeError, ValueError or KeyError for what is none."""
    text, code = message["text"], _failure_code(message["code"])
    if not isinstance(text, str):
        raise TypeError("no text")
    text = text[:_TEXT_CHARACTERS]
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


def _of_itself(record: ExitRecord) -> bool:
    return record.failed and not record.told_first


def _short(record: ExitRecord) -> ExitRecord:
    brief = _brief(record)
    # What tells that it only lost a peer may stand there.
    return replace(brief, stderr_tail=record.stderr_tail[-_SHORT_CHARACTERS:]) if _of_itself(record) else brief


def _brief(record: ExitRecord) -> ExitRecord:
    return replace(
        record,
        message=record.message[:_SHORT_CHARACTERS],
        where="",
        traceback="",
        thread=record.thread[:_SHORT_CHARACTERS],
        stdout_tail="",
        stderr_tail="",
        error_file="",
        note="",
    )


def _cut(record: ExitRecord) -> ExitRecord:
    return replace(
        record,
        message=record.message[:_TEXT_CHARACTERS],
        where=record.where[:_NAME_CHARACTERS],
        traceback=record.traceback[-_TEXT_CHARACTERS:],
        thread=record.thread[:_NAME_CHARACTERS],
        stdout_tail=record.stdout_tail[-_TAIL_CHARACTERS:],
        stderr_tail=record.stderr_tail[-_TAIL_CHARACTERS:],
        error_file=record.error_file[:_NAME_CHARACTERS],
        note=record.note[:_NAME_CHARACTERS],
    )
