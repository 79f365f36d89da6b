"""The command line: ``python -m launcher [run|train|plan] [options] SCRIPT ...``."""

from __future__ import annotations

import os
import sys

from launcher.errors import EXIT_OUTPUT, ContractError, LauncherError
from launcher.options import CommandLine, parse, usage

TYPE_CHECKING = False
if TYPE_CHECKING:
    from launcher.container import Paths


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns its exit code (see ``launcher.errors``)."""
    try:
        line = parse(sys.argv[1:] if argv is None else argv)
    except LauncherError as error:
        print(f"[launcher] error: {error}", file=sys.stderr)
        return error.exit_code
    if line.help:
        print(usage())
        return 0
    if line.version:
        from launcher._version import __version__

        print(f"launcher {__version__}")
        return 0
    try:
        return _plan(line) if line.command == "plan" else _run(line)
    except BrokenPipeError:
        # The reader of our own output went away (`plan | head`).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OUTPUT


def train() -> int:
    """The console script ``train``, as the platform calls it: ``docker run IMAGE train``."""
    return main(["train", *sys.argv[1:]])


def entry() -> None:
    """Ends the process with :func:`main`'s code, without the interpreter's teardown: nothing of ours needs it."""
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _log(text: str) -> None:
    print(f"[launcher] {text}", file=sys.stderr, flush=True)


def _run(line: CommandLine) -> int:
    from launcher import job, run

    paths: Paths | None = None
    if line.command == "train" or os.getpid() == 1:
        _end_on_stop_signals()
    try:
        spec = job.resolve(line, os.environ, _log)
        paths = spec.container.paths
        for name in line.ignored:
            _log(f"{name} has no effect here: hosts find each other by the container contract")
        prepared = run.prepare(spec, os.environ)
        return run.execute(prepared).exit_code
    except LauncherError as error:
        run.report_error(error, paths or _contract_paths(line, error))
        return error.exit_code


def _end_on_stop_signals() -> None:
    """Until ranks run, a stop ends the preparation (a download, pip): process 1 would otherwise not even notice it."""
    import signal

    from launcher.errors import StoppedError

    def stop(number: int, frame: object) -> None:
        raise StoppedError(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)


def _contract_paths(line: CommandLine, error: LauncherError) -> Paths | None:
    """Where an error of the contract itself is to be written: its tree could not be read, but it is there."""
    from launcher.container import Paths, base_dir

    base = str(line.given.get("base_dir") or os.environ.get("LAUNCHER_BASE_DIR") or base_dir(os.environ))
    return Paths.at(base) if isinstance(error, ContractError) or line.command == "train" else None


def _plan(line: CommandLine) -> int:
    from launcher import job, run
    from launcher.plan import as_json, as_table

    try:
        prepared = run.prepare(job.resolve(line, os.environ, _log), os.environ)
    except LauncherError as error:
        _log(f"error: {error}")
        return error.exit_code
    print(as_json(prepared) if line.as_json else as_table(prepared))
    return 0
