"""From how every rank ended to one root cause, its text and its exit code. Pure.

Words: a *culprit* failed of itself; a *victim* was ended by the launcher, or failed because another rank was gone.
Times are CLOCK_MONOTONIC nanoseconds of one host. A rank's time of failure is the moment its exception left the
script, if it could say so, else the moment its process ended: a slow teardown must not make it look innocent.
"""

from __future__ import annotations

import re
import signal

from launcher import errors
from launcher.causes import PEER_LOST, known_cause, signal_reason
from launcher.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

EXIT, SIGNAL = "exit", "signal"
FINISHED_PHASE = 3
# FailureReason of the platform shows this many characters of output/failure.
HEAD_CHARACTERS = 1024
_TAIL_LINES = 20


class ExitRecord(Record):
    """How one rank ended.

    Attributes:
        how, value: ``exit`` and the code, or ``signal`` and its number.
        ended_ns: when its process ended; failed_ns: when its exception was recorded, else ended_ns.
        told_ns: when the launcher first signalled it; 0: never.
        message, where, traceback, thread: from its error file; "" without one.
        phase: of its status page; None for ranks that keep none (binaries, shell scripts).
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
    timestamp: int = 0
    phase: int | None = None
    steps: int = 0
    max_rss_kib: int = 0
    cpu_s: float = 0.0
    stdout_tail: str = ""
    stderr_tail: str = ""
    error_file: str = ""
    note: str = ""

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


class Evidence(Record):
    """What the host knows beside the ranks' ends.

    Attributes:
        stop_signal: the signal that asked the job to stop; 0: none. forced: a second one ended the grace.
        hang: what the hang watch found, "" for no hang; hang_rank: the rank it suspects.
        oom_kills: OOM kills that the cgroup counted during this attempt.
        memory_limit, memory_peak: of the cgroup, bytes; 0: no limit, unknown.
        shm_total, shm_free: /dev/shm when the first rank failed, bytes.
        memory_trends: rank -> how its memory grew, in words.
        lost_children: helpers of ranks that were gone when the OOM kill was counted.
        launcher_error: what went wrong in the launcher itself, "" for nothing; launcher_code: the exit code for it.
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


class Verdict(Record):
    """The outcome of a job (or of one attempt).

    Attributes:
        kind: success, rank, early-exit, stopped, hang or launcher.
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


def judge(records: Sequence[ExitRecord], evidence: Evidence, program: str = "") -> Verdict:
    """The verdict on one attempt of all ranks of a job.

    Args:
        records: one for each rank that was started.
        program: what the user calls the job's script, for the text.
    """
    ordered = tuple(sorted(records, key=lambda record: record.rank))
    if evidence.launcher_error:
        code = evidence.launcher_code
        return _finish("launcher", code, evidence.launcher_error, None, {}, ordered, evidence, program)
    victims = _victims(ordered)
    culprit = _culprit(ordered, victims, evidence)
    if evidence.hang and (culprit is None or culprit.rank in victims):
        suspect = next((record for record in ordered if record.rank == evidence.hang_rank), None)
        return _finish("hang", errors.EXIT_HANG, evidence.hang, suspect, victims, ordered, evidence, program)
    if culprit is not None and (not evidence.stop_signal or culprit.rank not in victims):
        headline = f"{_name(culprit)} {_what(culprit, evidence)}"
        return _finish("rank", culprit.exit_code or 1, headline, culprit, victims, ordered, evidence, program)
    early = [record for record in ordered if record.left_early]
    # The last one to leave deserted nobody; and when all leave so, it is the script's way to end.
    deserted = any(not other.left_early and other.ended_ns > record.ended_ns for record in early for other in ordered)
    if early and deserted and not evidence.early_exit_ok and not evidence.stop_signal:
        return _early_exit(early, victims, ordered, evidence, program)
    if evidence.stop_signal and any(record.failed for record in ordered):
        return _stopped(ordered, victims, evidence, program)
    if not ordered or any(record.failed for record in ordered):
        what = "the ranks were stopped, and nothing says why" if ordered else "no rank was started"
        return _finish("launcher", errors.EXIT_INTERNAL, what, None, victims, ordered, evidence, program)
    return Verdict("success", 0, f"all {len(ordered)} ranks ended with 0", records=ordered, evidence=evidence)


def _victims(records: Sequence[ExitRecord]) -> dict[int, str]:
    """Rank -> reason, for each rank whose failure needs no explanation of its own."""
    victims: dict[int, str] = {}
    for record in records:
        if not record.failed:
            continue
        if record.told_first:
            how = f"{_signal_name(record.value)}" if record.how == SIGNAL else f"code {record.value}"
            was = "; until then SIGSTOP had held it" if record.was_stopped else ""
            victims[record.rank] = f"stopped by the launcher ({how}){was}"
        elif PEER_LOST.search(record.message) or (not record.message and PEER_LOST.search(record.stderr_tail)):
            victims[record.rank] = "lost its connection to another rank"
    return victims


def _culprit(records: Sequence[ExitRecord], victims: dict[int, str], evidence: Evidence) -> ExitRecord | None:
    """The earliest failure that is not a victim's; else a rank that left early; else the earliest failure at all."""
    by_time = sorted((record for record in records if record.failed), key=lambda record: record.failed_ns)
    for record in by_time:
        if record.rank not in victims:
            return record
    untold = [record for record in by_time if not record.told_first]
    if any(record.left_early for record in records) and not evidence.early_exit_ok:
        return None
    return untold[0] if untold else None


def _early_exit(
    early: Sequence[ExitRecord],
    victims: dict[int, str],
    records: tuple[ExitRecord, ...],
    evidence: Evidence,
    program: str,
) -> Verdict:
    first = min(early, key=lambda record: record.ended_ns)
    failed = sorted((record for record in records if record.failed), key=lambda record: record.failed_ns)
    code = next((record.exit_code for record in failed if not record.told_ns), 1)
    headline = (
        f"{_name(first)} ended early with 0: it left in the middle of its script (os._exit(0)?) "
        "while other ranks were at work; if that is meant, use --early-exit ok"
    )
    return _finish("early-exit", code, headline, first, victims, records, evidence, program)


def _stopped(records: tuple[ExitRecord, ...], victims: dict[int, str], evidence: Evidence, program: str) -> Verdict:
    name = _signal_name(evidence.stop_signal)
    late = [record.rank for record in records if record.how == SIGNAL and record.value == signal.SIGKILL]
    headline = f"stopped by {name}"
    if late:
        when = "by a second signal" if evidence.forced else "at the end of the grace period"
        headline += f"; killed {when}: rank {', '.join(map(str, late))}"
    return _finish("stopped", 128 + evidence.stop_signal, headline, None, victims, records, evidence, program)


def _finish(
    kind: str,
    exit_code: int,
    headline: str,
    culprit: ExitRecord | None,
    victims: dict[int, str],
    records: tuple[ExitRecord, ...],
    evidence: Evidence,
    program: str,
) -> Verdict:
    others = {rank: why for rank, why in victims.items() if culprit is None or rank != culprit.rank}
    text = _text(kind, exit_code, headline, culprit, others, records, evidence, program)
    return Verdict(kind, exit_code, headline, text, culprit, others, records, evidence)


def _name(record: ExitRecord) -> str:
    return f"rank {record.rank} on {record.host}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _what(record: ExitRecord, evidence: Evidence) -> str:
    """What the culprit did, to follow its name in a sentence."""
    by_signal = record.how == SIGNAL and not record.cut_short
    name = _signal_name(record.value) if by_signal else ""
    if by_signal and record.value == signal.SIGKILL and evidence.oom_kills:
        limit = f" of limit {_gib(evidence.memory_limit)}" if evidence.memory_limit else ""
        return (
            f"was OOM-killed: peak RSS {_gib(record.max_rss_kib * 1024)}{limit}, cgroup oom_kill +{evidence.oom_kills}"
        )
    child = next((child for child in evidence.lost_children if child.rank == record.rank), None)
    if evidence.oom_kills and child is not None:
        return (
            f"failed after its child process {child.pid} ({child.command}, RSS {_gib(child.rss_kib * 1024)}) was "
            f"OOM-killed, cgroup oom_kill +{evidence.oom_kills}: {_first_line(record)}"
        )
    if by_signal:
        return f"was killed by {name}" + (f": {_first_line(record)}" if record.message else "")
    if record.message:
        return f"failed: {_first_line(record)} (exit code {record.exit_code})"
    last = _last_line(record.stderr_tail)
    return f"exited with code {record.value}" + (f": {last}" if last else "")


def _first_line(record: ExitRecord) -> str:
    """The message in one line: its first, and its last, where libraries put the reason."""
    lines = [line.strip() for line in record.message.splitlines() if line.strip()]
    if not lines:
        return f"exit code {record.exit_code}"
    if len(lines) == 1:
        return _cut(lines[0], 300)
    if lines[0].startswith('File "'):  # a syntax error: Python puts the place before the error
        return f"{_cut(lines[-1], 200)} ({_cut(lines[0], 200)})"
    return f"{_cut(lines[0], 200)} [...] {_cut(lines[-1], 200)}"


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def _text(
    kind: str,
    exit_code: int,
    headline: str,
    culprit: ExitRecord | None,
    victims: dict[int, str],
    records: Sequence[ExitRecord],
    evidence: Evidence,
    program: str,
) -> str:
    """The failure file: what matters first, within HEAD_CHARACTERS, then the evidence."""
    head = [headline]
    if culprit is not None:
        if culprit.where:
            head.append(f"at {culprit.where}" + (f" (thread {culprit.thread})" if culprit.thread else ""))
        reason = _reason(culprit, evidence)
        if reason:
            head.append(reason)
        if evidence.oom_kills and evidence.memory_trends.get(culprit.rank):
            head.append(evidence.memory_trends[culprit.rank])
    head.append(f"{program}: exit code {exit_code} ({_outcomes(records, culprit, victims)})".removeprefix(": "))
    body: list[str] = []
    if culprit is not None:
        stack = _fatal_stack(culprit.stderr_tail)
        if stack and not culprit.traceback:
            body += ["", "stack at the fatal signal:", stack]
        if culprit.traceback:
            body += ["", culprit.traceback.rstrip()]
        tail = culprit.stderr_tail.rstrip().splitlines()[-_TAIL_LINES:]
        if tail and not culprit.traceback.rstrip().endswith("\n".join(tail)):
            body += ["", f"last lines of stderr of rank {culprit.rank}:", *tail]
        if not tail and not culprit.traceback:
            out = culprit.stdout_tail.rstrip().splitlines()[-_TAIL_LINES:]
            body += ["", f"last lines of stdout of rank {culprit.rank}:", *out] if out else []
    for rank, why in sorted(victims.items()):
        message = next((record.message for record in records if record.rank == rank), "")
        first = f": {message.splitlines()[0][:200]}" if message else ""
        body.append(f"rank {rank}: {why}{first}")
    return _fit(head, culprit) + "\n".join(body).rstrip() + "\n"


def _fit(head: Sequence[str], culprit: ExitRecord | None) -> str:
    """The head, cut so that the last line of the traceback is within what the platform shows."""
    text = "\n".join(head)
    if len(text) > HEAD_CHARACTERS - 2:
        text = text[: HEAD_CHARACTERS - 5] + "..."
    return text + "\n"


def _outcomes(records: Sequence[ExitRecord], culprit: ExitRecord | None, victims: dict[int, str]) -> str:
    others = [record for record in records if culprit is None or record.rank != culprit.rank]
    if not others:
        return "1 rank" if records else "no rank was started"
    ended = sum(1 for record in others if not record.failed)
    told = sum(1 for rank, why in victims.items() if why.startswith("stopped"))
    lost = len(victims) - told
    failed = len(others) - ended - told - lost
    parts = [
        f"{count} {what}"
        for count, what in (
            (ended, "ended with 0"),
            (told, "stopped by the launcher"),
            (lost, "lost a peer"),
            (failed, "failed too"),
        )
        if count > 0
    ]
    return f"of {'' if culprit is None else 'the other '}{len(others)} ranks " + ", ".join(parts)


def _reason(record: ExitRecord, evidence: Evidence) -> str:
    """Likely cause and advice, "" when nothing is known beyond what the headline says."""
    if record.how == SIGNAL and not record.cut_short:
        return signal_reason(
            record.value,
            oom_kills=evidence.oom_kills,
            peak=f"peak RSS {_gib(record.max_rss_kib * 1024)}",
            shm=f"{_gib(evidence.shm_free)} of {_gib(evidence.shm_total)} free",
            shm_small=0 < evidence.shm_total < 2**30,
            shm_full=bool(evidence.shm_total) and evidence.shm_free < max(2**20, evidence.shm_total // 50),
            was_stopped=record.was_stopped,
        )
    known = known_cause(record.message + "\n" + record.stderr_tail)
    if evidence.oom_kills and not any(child.rank == record.rank for child in evidence.lost_children):
        oom = f"the kernel killed a process at the memory limit meanwhile (cgroup oom_kill +{evidence.oom_kills})"
        return f"{oom}; {known}" if known else oom
    return known


_CURRENT = re.compile(r"^Current thread 0x.*", re.MULTILINE)
_FATAL = re.compile(r"^Fatal Python error: .*", re.MULTILINE)


def _fatal_stack(stderr: str) -> str:
    """What faulthandler wrote, most recent call first; of many threads the one that crashed."""
    found = _FATAL.search(stderr)
    if not found:
        return ""
    current = _CURRENT.search(stderr, found.end())
    stack = stderr[current.start() :].partition("\n\n")[0] if current else stderr[found.end() :].lstrip("\n")
    return "\n".join([found.group(), *stack.splitlines()[:30]])
