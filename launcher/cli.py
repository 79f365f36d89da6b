"""The command line: ``python -m launcher [COMMAND] [options] SCRIPT ...``; launcher.options.COMMANDS has them all."""

from __future__ import annotations

import os
import sys

from launcher.errors import (
    EXIT_OUTPUT,
    EXIT_USAGE,
    ContractError,
    InternalError,
    LauncherError,
    StoppedError,
    UsageError,
    of_machine,
)
from launcher.options import CommandLine, parse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from launcher.container import Paths
    from launcher.job import JobSpec


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns its exit code (see ``launcher.errors``)."""
    try:
        line = parse(sys.argv[1:] if argv is None else argv)
        os.getcwd()
    except LauncherError as error:
        _log(f"error: {error}")
        return error.exit_code
    except FileNotFoundError:
        _log("error: the current directory has been deleted; change to one that exists")
        return EXIT_USAGE
    try:
        if line.help:
            from launcher.usage import usage

            return _show(usage())
        if line.version:
            from launcher._version import __version__

            return _show(f"launcher {__version__}")
        if line.command == "simulate":
            from launcher.simulate import simulate

            return simulate(line, os.environ, _log)
        if line.command == "bench":
            from launcher.collectives.bench import bench

            return _show(bench(line, _log))
        if line.command in ("serve", "transform"):
            return _serve(line)
        if line.command == "data":
            from launcher.data.command import run_command

            text, code = run_command(list(line.script_args), _log)
            return _show(text) or code
        return _plan(line) if line.command == "plan" else _run(line)
    except LauncherError as error:
        _log(f"error: {error}")
        return error.exit_code


def train() -> int:
    """The console script ``train``, as the platform calls it: ``docker run IMAGE train``."""
    return main(["train", *sys.argv[1:]])


def serve() -> int:
    """The console script ``serve``, as the platform calls it: ``docker run IMAGE serve``."""
    return main(["serve", *sys.argv[1:]])


def entry() -> None:
    """Ends the process with :func:`main`'s code, without the interpreter's teardown: nothing of ours needs it."""
    os._exit(main())


def _show(text: str) -> int:
    """Prints an answer. Its exit code is 0, or EXIT_OUTPUT when it could not be written (disk full, reader gone)."""
    try:
        os.write(1, text.encode("utf-8", "backslashreplace") + b"\n")
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            _log(f"error: cannot write to stdout: {error.strerror}")
        return EXIT_OUTPUT
    return 0


def _log(text: str) -> None:
    try:
        os.write(2, f"[launcher] {text}\n".encode("utf-8", "backslashreplace"))
    except OSError:
        return  # stderr is closed or full: there is nowhere left to say so


def _run(line: CommandLine) -> int:
    from launcher import job, run
    from launcher.prepare import prepare

    _end_on_stop_signals()
    spec: JobSpec | None = None
    try:
        spec = job.resolve(line, os.environ, _log)
        for name in line.ignored:
            _log(f"{name} has no effect here: hosts find each other by the container contract")
        prepared = prepare(spec, os.environ)
        return run.execute(prepared, os.environ).exit_code
    except LauncherError as error:
        run.report_error(error, spec.container.paths if spec else _contract_paths(line, error), _log)
        if spec is not None and spec.made_tree and isinstance(error, UsageError):
            run.discard_tree(spec)  # a mistake on the command line leaves nothing behind
        return error.exit_code
    except OSError as error:
        run.report_error(of_machine(error), spec.container.paths if spec else None, _log)
        return EXIT_OUTPUT
    except Exception as error:  # the one boundary: a fault of ours ends with a code of its own, and says so
        import traceback

        fault = InternalError(f"{type(error).__name__}: {error}; this is a fault of the launcher, please report it")
        _log(traceback.format_exc())
        run.report_error(fault, spec.container.paths if spec else None, _log)
        return fault.exit_code


def _serve(line: CommandLine) -> int:
    from launcher.serving import command

    words = list(line.script_args)
    if "--help" in words or "-h" in words:
        return _show(command.help_text(line.command))
    if line.command == "serve" and "--check" in words:
        from launcher.serving.check import check

        return check([word for word in words if word != "--check"], os.environ, _log)
    _end_on_stop_signals()
    act = command.serve if line.command == "serve" else command.transform
    return act(words, os.environ, _log)


def _end_on_stop_signals() -> None:
    """Until ranks run, a stop ends the preparation (a download, pip): process 1 would otherwise not even notice it."""
    import _signal  # type: ignore[import-not-found]  # signal itself imports enum, before the ranks start

    def stop(number: int, frame: object) -> None:
        raise StoppedError(number)

    for number in (_signal.SIGTERM, _signal.SIGINT):
        _signal.signal(number, stop)


def _contract_paths(line: CommandLine, error: LauncherError) -> Paths | None:
    """Where an error of the contract itself is to be written: its tree could not be read, but it is there."""
    from launcher.container import Paths, base_dir

    base = str(line.given.get("base_dir") or os.environ.get("LAUNCHER_BASE_DIR") or base_dir(os.environ))
    return Paths.at(base) if isinstance(error, ContractError) or line.command == "train" else None


def _plan(line: CommandLine) -> int:
    from launcher import job
    from launcher.plan import as_json, as_table
    from launcher.prepare import prepare

    prepared = prepare(job.resolve(line, os.environ, _log), os.environ)
    return _show(as_json(prepared) if line.as_json else as_table(prepared))
