"""The end of a job, for people: one line, then a block that tools which read torchrun's output understand."""

from __future__ import annotations

import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from launcher.evidence import ExitRecord, Verdict

_WIDTH = 60
_HEAD_LINES = 4


def summary(verdict: Verdict, program: str, failure_file: str, run_dir: str) -> str:
    """What is printed when a job has failed: a block for tools, then the verdict, so that it stands last.

    The layout of the block is that of torch.distributed.elastic's ChildFailedError, whose title, "Failures:",
    "Root Cause" and field names are searched for by scripts. Tracebacks have been shown already, by the ranks.
    """
    lines = []
    culprit = verdict.culprit
    if culprit is not None:
        others = [r for r in verdict.records if r.failed and r.rank != culprit.rank and r.rank not in verdict.victims]
        lines += [
            "=" * _WIDTH,
            f"{program} FAILED",
            "-" * _WIDTH,
            "Failures:",
            *(line for index, record in enumerate(others) for line in _block(record, index + 1)),
            *(() if others else ("  <NO_OTHER_FAILURES>",)),
            "-" * _WIDTH,
            "Root Cause (first observed failure):",
            *_block(culprit, 0),
            "=" * _WIDTH,
        ]
    head = verdict.text.partition("\n\n")[0].splitlines()[1:_HEAD_LINES] or [""]
    lines += [f"FAILED: {verdict.headline}", *(line for line in head if line)]
    places = [f"report: {failure_file}"] if failure_file else []
    places += [f"logs: {run_dir}"] if run_dir else []
    return "\n".join([*lines, *places])


def _block(record: ExitRecord, index: int) -> list[str]:
    import signal

    stamp = time.strftime("%Y-%m-%d_%H:%M:%S", time.localtime(record.timestamp or None))
    name, code = "", record.exit_code
    if record.how == "signal" and not record.cut_short:
        known = {int(number): number.name for number in signal.Signals}
        name, code = f" ({known.get(record.value, record.value)})", -record.value
    lines = [
        f"[{index}]:",
        f"  time      : {stamp}",
        f"  host      : {record.host}",
        f"  rank      : {record.rank} (local_rank: {record.local_rank})",
        f"  exitcode  : {code} (pid: {record.pid}){name}",
        f"  error_file: {record.error_file or '<N/A>'}",
    ]
    if record.traceback:
        lines.append("  traceback : ... " + record.traceback.rstrip().rpartition("\n")[2][:300])
    else:
        lines.append("  traceback : none: the rank left no error file (exit, signal, or not a Python program)")
    return lines
