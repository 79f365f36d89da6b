"""The end of a job, for people: one line, then a block that tools which read torchrun's output understand."""

from __future__ import annotations

import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from launcher.verdict import ExitRecord, Verdict

_WIDTH = 60


def summary(verdict: Verdict, program: str, run_dir: str) -> str:
    """What is printed when a job has failed.

    The layout of the second part is that of torch.distributed.elastic's ChildFailedError, whose title, "Failures:",
    "Root Cause" and field names are searched for by scripts.
    """
    lines = [f"FAILED: {verdict.headline}"]
    culprit = verdict.culprit
    if culprit is not None:
        if culprit.where:
            lines.append(f"at {culprit.where}")
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
    if run_dir:
        lines.append(f"logs of all ranks: {run_dir}")
    return "\n".join(lines)


def _block(record: ExitRecord, index: int) -> list[str]:
    import signal

    stamp = time.strftime("%Y-%m-%d_%H:%M:%S", time.localtime(record.timestamp or None))
    name = ""
    if record.how == "signal":
        known = {int(number): number.name for number in signal.Signals}
        name = f" ({known.get(record.value, record.value)})"
    code = -record.value if record.how == "signal" else record.value
    lines = [
        f"[{index}]:",
        f"  time      : {stamp}",
        f"  host      : {record.host}",
        f"  rank      : {record.rank} (local_rank: {record.local_rank})",
        f"  exitcode  : {code} (pid: {record.pid}){name}",
        f"  error_file: {record.error_file or '<N/A>'}",
    ]
    if record.traceback:
        lines.append("  traceback : " + record.traceback.rstrip().replace("\n", "\n  "))
    else:
        lines.append("  traceback : none: the rank left no error file (exit, signal, or not a Python program)")
    return lines
