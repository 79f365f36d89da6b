"""``launcher.launch``: the command line's work as a library call, for scripts and notebooks."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading

from launcher.errors import JobFailed, UsageError
from launcher.options import BY_NAME, CommandLine, suggest
from launcher.record import Record, replace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    from launcher.evidence import Verdict


class RankResult(Record):
    """One rank's end. ``value`` is what the function returned (None for a script); memory is its peak, in bytes."""

    rank: int
    exit_code: int
    peak_rss_bytes: int
    stdout_log: str
    stderr_log: str
    value: Any = None


class Result(Record):
    """A job that succeeded. ``ranks`` are those of this host, in rank order."""

    verdict: Verdict
    ranks: tuple[RankResult, ...]
    base_dir: str

    def __repr__(self) -> str:
        return f"Result({len(self.ranks)} ranks, base_dir={self.base_dir!r})"

    @property
    def exit_codes(self) -> dict[int, int]:
        """Rank -> exit code."""
        return {result.rank: result.exit_code for result in self.ranks}

    @property
    def values(self) -> list[Any]:
        """What the function returned, by rank."""
        return [result.value for result in self.ranks]


def launch(
    target: str | Callable[..., Any],
    args: Sequence[Any] = (),
    *,
    nproc: int | str = "auto",
    env: Mapping[str, str] | None = None,
    **settings: Any,
) -> Result:
    """Runs a script, or a function in every rank, and waits for it.

    The ranks are new processes. A function must be importable by them (defined at the top level of a module or of a
    script that is guarded by ``if __name__ == "__main__"``), or ``cloudpickle`` must be installed (notebooks).

    Args:
        target: path of a script, or the function.
        args: the script's arguments (made text), or the function's positional ones.
        nproc: ranks on this host, as ``--nproc-per-node``.
        env: variables to set for the ranks, beside this process's own.
        settings: any other option of the command line by its name, e.g. ``max_restarts=2``.

    Raises:
        JobFailed: the job failed; its ``verdict`` has the root cause, the text and every rank's end.
        UsageError: an unknown setting, a bad value, or no such script.
        TypeError: the function cannot be handed to other processes.
        KeyboardInterrupt: the job was stopped by Ctrl-C.
    """
    from launcher import job, run
    from launcher.prepare import prepare
    from launcher.rank.call import LOADING

    if LOADING in os.environ:
        raise UsageError(
            f"{os.environ[LOADING]} calls launch() when it is imported, and every rank imports it: "
            "put the call under `if __name__ == '__main__':`"
        )

    for name in settings:
        if name not in BY_NAME:
            raise UsageError(f"launch() has no setting {name!r}{suggest(name, BY_NAME)}")
    environ = {**os.environ, **(env or {})}
    given = {"nproc_per_node": nproc, **settings}
    entry, payload = None, ""
    if callable(target):
        entry, payload = _call_entry(target, tuple(args))
        line = CommandLine("run", given, (), "", ())
    else:
        line = CommandLine("run", given, (), os.fspath(target), tuple(str(arg) for arg in args))
    try:
        prepared = prepare(job.resolve(line, environ, _log, entry), environ)
        # Only the main thread may have signal handlers; elsewhere Ctrl-C is the caller's.
        main = threading.current_thread() is threading.main_thread()
        verdict = run.execute(prepared, environ, handle_signals=main, library=True)
    finally:
        if payload:
            os.unlink(payload)
            os.rmdir(os.path.dirname(payload))
    result = _result(prepared, verdict, bool(payload)) if verdict.ok else None
    if not prepared.keep_logs:
        shutil.rmtree(prepared.run_dir, ignore_errors=True)
    if result is not None:
        return result
    failure = JobFailed(verdict)
    if verdict.kind == "stopped" and verdict.evidence.stop_signal == signal.SIGINT:
        raise KeyboardInterrupt from failure
    raise failure


def _log(text: str) -> None:
    print(f"[launcher] {text}", file=sys.stderr, flush=True)


def _call_entry(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, str]:
    import tempfile

    from launcher.job import CALL, Entry
    from launcher.rank.call import dump_call

    payload = os.path.join(tempfile.mkdtemp(prefix="launcher-call-"), "call")  # mode 0700
    try:
        dump_call(payload, function, args)
    except TypeError:
        os.rmdir(os.path.dirname(payload))
        raise
    name = getattr(function, "__qualname__", repr(function))
    return Entry(CALL, payload, (), os.getcwd(), sys.executable, name), payload


def _result(prepared: Any, verdict: Verdict, is_call: bool) -> Result:
    from launcher.assembly import first_start, rank_launches
    from launcher.rank.call import load_result

    # Of several hosts, the others' ranks are none of ours, and how many they are was settled when the hosts met. Files
    # go by local rank: the launches are those of a job on this host alone.
    here = prepared.topology
    alone = replace(first_start(prepared), attempt=verdict.attempt, hosts=(here.host,), slots=(len(here.local),))
    launches = {launch.local_rank: launch for launch in rank_launches(prepared, alone)}
    ranks = tuple(
        RankResult(
            rank=record.rank,
            exit_code=record.exit_code,
            peak_rss_bytes=record.max_rss_kib * 1024,
            stdout_log=launches[record.local_rank].stdout_path,
            stderr_log=launches[record.local_rank].stderr_path,
            value=load_result(launches[record.local_rank].environ["LAUNCHER_RESULT"]) if is_call else None,
        )
        for record in verdict.records
        if record.host == here.host
    )
    return Result(verdict, ranks, prepared.spec.container.paths.base)
