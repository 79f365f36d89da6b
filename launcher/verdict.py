"""From how every rank ended to one root cause, its text and its exit code. Pure.

Words: a *culprit* failed of itself; a *victim* was ended by the launcher, or failed because another rank was gone.
Times are of one clock. A rank's time of failure is the moment its exception left the script, if it could say so, else
the moment its process ended: a slow teardown must not make it look innocent.
"""

from __future__ import annotations

import re
import signal

from launcher import errors
from launcher.causes import COLLECTIVE, PEER_LOST, known_cause, signal_reason
from launcher.evidence import EXIT, SIGNAL, Evidence, ExitRecord, LostHost, Verdict
from launcher.record import replace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# FailureReason of the platform shows this many characters of output/failure.
HEAD_CHARACTERS = 1024
_TAIL_LINES = 20
# Of many victims, the text and what other hosts are told name the first ones.
SHOWN_VICTIMS = 64
_SHOWN_NUMBERS = 16
# A host's heartbeat comes once a second: when it was last heard is known that well.
_HEARTBEAT_NS = 1_000_000_000


def judge(
    records: Sequence[ExitRecord],
    evidence: Evidence,
    program: str = "",
    by_host: Mapping[str, Evidence] | None = None,
) -> Verdict:
    """The verdict on one attempt of all ranks of a job.

    Args:
        records: one for each rank that was started; their times are of one clock.
        evidence: what is known of all hosts together.
        program: what the user calls the job's script, for the text.
        by_host: of several hosts, what each knows of its memory and the like; None: ``evidence`` says that too.
    """
    ordered = _with_abort(tuple(sorted(records, key=lambda record: record.rank)), evidence)
    if evidence.launcher_error:
        code = evidence.launcher_code
        return _finish("launcher", code, evidence.launcher_error, None, {}, ordered, evidence, program)
    victims = _victims(ordered)
    culprit = _aborted(ordered, evidence) or _culprit(ordered, victims, evidence)
    own = evidence if culprit is None or by_host is None else by_host.get(culprit.host, evidence)
    innocent = culprit is None or culprit.rank in victims
    lost = _lost_first(evidence, None if innocent else culprit)
    if lost is not None:
        return _finish("host", errors.EXIT_CLUSTER, _loss(lost), None, victims, ordered, evidence, program)
    if evidence.cut_links and innocent:
        pairs = "; ".join(f"{first} and {second} cannot reach each other" for first, second in evidence.cut_links[:8])
        headline = f"the network is cut: {pairs}" + (f" ({evidence.hang})" if evidence.hang else "")
        return _finish("network", errors.EXIT_CLUSTER, headline, None, victims, ordered, evidence, program)
    if evidence.hang and innocent:
        suspect = next((record for record in ordered if record.rank == evidence.hang_rank), None)
        return _finish("hang", errors.EXIT_HANG, evidence.hang, suspect, victims, ordered, evidence, program)
    absent = _absent(ordered) if innocent and not evidence.stop_signal else None
    if absent is not None and culprit is not None:
        headline = f"{_name(absent[0])} did not reach {absent[1]}"
        return _finish("rank", culprit.exit_code, headline, absent[0], victims, ordered, evidence, program)
    accused = _accused(ordered) if innocent and not evidence.stop_signal else None
    if accused is not None and culprit is not None:
        headline, suspect = accused
        return _finish("rank", culprit.exit_code, headline, suspect, victims, ordered, evidence, program)
    if culprit is not None and (not evidence.stop_signal or culprit.rank not in victims):
        code = evidence.aborted_code if culprit.rank == evidence.aborted_rank else culprit.exit_code
        headline = f"{_name(culprit)} {_what(culprit, own, evidence)}"
        return _finish("rank", code or 1, headline, culprit, victims, ordered, evidence, program, own)
    early = [record for record in ordered if record.left_early]
    # The last one to leave deserted nobody; and when all leave so, it is the script's way to end.
    stayed_ns = [record.ended_ns for record in ordered if not record.left_early]
    missed = any(record.failed and not record.told_first for record in ordered)  # whatever the order of the ends
    deserted = early and stayed_ns and (missed or max(stayed_ns) > min(record.ended_ns for record in early))
    if deserted and not evidence.early_exit_ok and not evidence.stop_signal:
        return _early_exit(early, victims, ordered, evidence, program)
    if evidence.stop_signal and any(record.failed for record in ordered):
        return _stopped(ordered, victims, evidence, program)
    if not ordered or any(record.failed for record in ordered):
        what = "the ranks were stopped, and nothing says why" if ordered else "no rank was started"
        what, code = evidence.stop_reason or what, evidence.stop_code or errors.EXIT_INTERNAL
        return _finish("launcher", code, what, None, victims, ordered, evidence, program)
    return Verdict("success", 0, f"all {len(ordered)} ranks ended with 0", records=ordered, evidence=evidence)


def _with_abort(records: tuple[ExitRecord, ...], evidence: Evidence) -> tuple[ExitRecord, ...]:
    """``records`` with the end that MPI_Abort asked for: MPICH lets a rank that calls it wait to be killed.

    Not when another rank had failed before: one that gives up because it was told to end is no cause.
    """
    if evidence.aborted_rank is None or any(record.failed and not record.told_first for record in records):
        return records
    return tuple(
        replace(record, how=EXIT, value=evidence.aborted_code, told_ns=0)
        if record.failed and record.rank == evidence.aborted_rank
        else record
        for record in records
    )


def _aborted(records: Sequence[ExitRecord], evidence: Evidence) -> ExitRecord | None:
    """The rank that called MPI_Abort: the library's own word, whatever ended first in the rush that follows."""
    return next(
        (
            record
            for record in records
            if record.rank == evidence.aborted_rank and record.failed and not record.told_first
        ),
        None,
    )


def _lost_first(evidence: Evidence, culprit: ExitRecord | None) -> LostHost | None:
    """The first host that was lost, unless ``culprit`` failed before that."""
    if not evidence.lost_hosts:
        return None
    first = min(evidence.lost_hosts, key=lambda lost: lost.heard_ns)
    if culprit is not None and culprit.failed_ns <= first.heard_ns + (_HEARTBEAT_NS if first.silent else 0):
        return None
    return first


def _loss(lost: LostHost) -> str:
    return f"{lost.host}{f' (rank {_numbers(lost.ranks)})' if lost.ranks else ''} {lost.how}"


def _numbers(ranks: Sequence[int]) -> str:
    """Ranks in one line, the first ones of many."""
    return ", ".join(map(str, ranks[:_SHOWN_NUMBERS])) + (", ..." if len(ranks) > _SHOWN_NUMBERS else "")


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
        elif found := _accusation(record):
            victims[record.rank] = f"could not finish {found['operation']} #{found['sequence']}"
        elif PEER_LOST.search(record.message) or (
            not record.message and (record.waited_for or PEER_LOST.search(record.stderr_tail))
        ):
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


def _absent(records: Sequence[ExitRecord]) -> tuple[ExitRecord, str] | None:
    """The one rank that the watchdogs of all others have waited for, and in which collective; None when it is unknown.

    With several ranks that say nothing, some may only have been stopped before their own watchdog spoke.
    """
    silent = [record for record in records if not record.waited_for]
    if len(silent) != 1 or len(records) == 1 or not silent[0].told_first:
        return None
    missed = next(record.waited_for for record in records if record.waited_for)[:100]
    return silent[0], f"{missed}, where the others waited until their watchdogs gave up"


def _accusation(record: ExitRecord) -> re.Match[str] | None:
    """What a failed rank says of the collective that it could not finish, and whose fault it was: another rank's."""
    found = COLLECTIVE.search(record.message or record.stderr_tail)
    return found if found and int(found["rank"]) != record.rank else None


def _accused(records: Sequence[ExitRecord]) -> tuple[str, ExitRecord | None] | None:
    """The rank that collectives could not be finished for, where no rank has failed of itself: the line, its record.

    A rank that gives up is missed by others in turn: who is accused and accuses another one itself only passes it on.
    """
    told = {record.rank: found for record in records if record.failed and (found := _accusation(record))}
    by_rank = {record.rank: record for record in records}
    first = min(told, key=lambda rank: (by_rank[rank].told_first, by_rank[rank].failed_ns), default=None)
    if first is None:
        return None
    seen = {first}
    while (following := int(told[first]["rank"])) in told and following not in seen:
        seen.add(following)
        first = following
    found = told[first]
    where = f"{found['operation']} #{found['sequence']}"
    line = f"{_cut(found['reason'], 300)} (told by {_name(by_rank[first])}, in {where})"
    return line, by_rank.get(int(found["rank"]))


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
        f"{_name(first)} ended early with 0{_during(first)}: it left in the middle of its script (os._exit(0)?) "
        "while other ranks were at work; if that is meant, use --early-exit ok"
    )
    return _finish("early-exit", code, headline, first, victims, records, evidence, program)


def _stopped(records: tuple[ExitRecord, ...], victims: dict[int, str], evidence: Evidence, program: str) -> Verdict:
    name = _signal_name(evidence.stop_signal)
    late = [record.rank for record in records if record.how == SIGNAL and record.value == signal.SIGKILL]
    headline = f"stopped by {name}"
    if late:
        when = "by a second signal" if evidence.forced else "at the end of the grace period"
        headline += f"; killed {when}: rank {_numbers(late)}"
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
    own: Evidence | None = None,
) -> Verdict:
    """``own``: what the culprit's host knows, where that is more than ``evidence``."""
    others = {rank: why for rank, why in victims.items() if culprit is None or rank != culprit.rank}
    text = _text(kind, exit_code, headline, culprit, others, records, own or evidence, program)
    text += _clock_lines(evidence, culprit, records)
    if evidence.straggler:
        text += f"{evidence.straggler}\n"
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


def _clock_lines(evidence: Evidence, culprit: ExitRecord | None, records: Sequence[ExitRecord]) -> str:
    """How well the order of events on several hosts is known; "" for one host."""
    clocks = {clock.host: clock for clock in evidence.clocks}
    hosts = {record.host for record in records if record.failed} & clocks.keys()
    lines: list[str] = []
    for clock in [clocks[host] for host in sorted(hosts)][:8]:
        offset, known = clock.offset_ns / 1e9, clock.uncertainty_ns / 1e6
        lines.append(f"clock of {clock.host}: {offset:+.6f} s against the first host's, known to {known:.3f} ms\n")
    if culprit is not None:
        doubt = clocks[culprit.host].uncertainty_ns if culprit.host in clocks else 0
        for record in records:
            if not record.failed or record.told_first or record.host == culprit.host:
                continue
            spread = doubt + (clocks[record.host].uncertainty_ns if record.host in clocks else 0)
            if abs(record.failed_ns - culprit.failed_ns) <= spread:
                lines.append(f"rank {record.rank} on {record.host} failed at the same time, as far as clocks tell\n")
    return "".join(lines)


def _what(record: ExitRecord, evidence: Evidence, group: Evidence) -> str:
    """What the culprit did, to follow its name in a sentence. ``evidence`` is its host's."""
    if record.rank == group.aborted_rank:
        return f"called MPI_Abort({group.aborted_code})" + (f": {_first_line(record)}" if record.message else "")
    during = _during(record)
    by_signal = record.how == SIGNAL and not record.cut_short
    name = _signal_name(record.value) if by_signal else ""
    if by_signal and record.value == signal.SIGKILL and evidence.oom_kills:
        limit = f" of limit {_gib(evidence.memory_limit)}" if evidence.memory_limit else ""
        peak = f"peak RSS {_gib(record.max_rss_kib * 1024)}{limit}"
        return f"was OOM-killed{during}: {peak}, cgroup oom_kill +{evidence.oom_kills}"
    child = next((child for child in evidence.lost_children if child.rank == record.rank), None)
    if evidence.oom_kills and child is not None:
        return (
            f"failed after its child process {child.pid} ({child.command}, RSS {_gib(child.rss_kib * 1024)}) was "
            f"OOM-killed{during}, cgroup oom_kill +{evidence.oom_kills}: {_first_line(record)}"
        )
    if by_signal:
        return f"was killed by {name}{during}" + (f": {_first_line(record)}" if record.message else "")
    if record.message:
        return f"failed{during}: {_first_line(record)} (exit code {record.exit_code})"
    last = _last_line(record.stderr_tail)
    return f"exited with code {record.value}{during}" + (f": {last}" if last else "")


def _during(record: ExitRecord) -> str:
    """The collective that a rank ended in, to follow a verb; "" for none."""
    if not record.collective_phase:
        return ""
    return f" during {_collective(record)} ({_cut(record.collective_phase, 40)})"


def _collective(record: ExitRecord) -> str:
    return f"{_cut(record.operation, 40) or 'collective'} #{record.sequence}"


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
        if culprit.sequence and not culprit.collective_phase:
            head.append(f"the last collective that rank {culprit.rank} had finished: {_collective(culprit)}")
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
    said = {record.rank: record.message for record in records}
    shown = sorted(victims.items())
    for rank, why in shown[:SHOWN_VICTIMS]:
        message = said.get(rank, "")
        first = f": {message.splitlines()[0][:200]}" if message else ""
        body.append(f"rank {rank}: {why}{first}")
    if len(shown) > SHOWN_VICTIMS:
        body.append(f"and {len(shown) - SHOWN_VICTIMS} more ranks alike")
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
    if record.how == SIGNAL and not record.told_ns:
        thrown = _TERMINATE.search(record.stderr_tail)
        known = known_cause(thrown.group()) if thrown and record.value == signal.SIGABRT else ""
        return known or signal_reason(
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


# What C++ writes before it aborts: that there was an exception, its type, and its text from a line of its own on.
_TERMINATE = re.compile(r"^terminate called .*(?:\n  what\(\):.*)?", re.MULTILINE)
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
