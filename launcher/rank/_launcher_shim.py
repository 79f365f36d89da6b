"""Runs the user's Python entry point in ``__main__`` and leaves word of how it ended.

Imported by ``boot.py`` as a top-level module from its own folder: the rank's interpreter may be another than the
launcher's, without this package installed. It is on the way to the script's first line, so it imports nothing that a
bare interpreter has not loaded; what a failure needs is imported when it happens.
"""

from __future__ import annotations

import _thread
import faulthandler
import os
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Any

# Offsets and phases of the status page, as launcher/rank/status.py (a test holds the two together).
PID_OFFSET, PHASE_OFFSET, STARTED_NS_OFFSET = 16, 20, 24
RUNNING, FINISHED, FAILED = 2, 3, 4

# Dumps the stacks of all threads to stderr; the supervisor sends it to every rank of a job that hangs. A real-time
# signal, because SIGUSR1 and SIGUSR2 belong to the script (and NCCL has used USR1).
STACK_SIGNAL = 45

_HERE = os.path.dirname(os.path.abspath(__file__))
_OWN_FILES = (os.path.join(_HERE, "boot.py"), os.path.abspath(__file__), os.path.join(_HERE, "_launcher_zygote.py"))

_pid = 0
_page = ""
_error_file = ""
_thread_failure: dict[str, str] = {}


def strip(trace: TracebackType | None) -> TracebackType | None:
    """``trace`` without the leading frames of this package."""
    while trace is not None and trace.tb_frame.f_code.co_filename in _OWN_FILES:
        trace = trace.tb_next
    return trace


def run(namespace: dict[str, Any]) -> None:
    """Runs ``sys.argv[1:]``: a kind, a target, and the script's own arguments.

    Kinds: ``script PATH``, ``module NAME``, ``function MODULE:NAME``, ``call FILE``; ``zygote MODULES`` imports and
    then becomes one of them in each process it forks.
    """
    kind = sys.argv[1]
    del sys.path[0]  # this folder, put there by boot.py,
    if not _safe_path():
        del sys.path[0]  # and by the interpreter, because boot.py was the script
    if os.environ.get("LAUNCHER_HOROVOD_COMPAT"):
        _stand_in_for_horovod()
    if kind == "zygote":
        import importlib.util

        spec = importlib.util.spec_from_file_location("_launcher_zygote", os.path.join(_HERE, "_launcher_zygote.py"))
        assert spec is not None and spec.loader is not None
        zygote = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(zygote)
        sys.argv = zygote.serve(sys.argv[2:])  # returns in each forked rank, with that rank's argv
        kind = sys.argv[1]
        # The zygote froze what it had, this namespace too: left in it, the script's objects would never be deleted at
        # the end, nor files that it did not close be written.
        main = type(sys)("__main__")
        main.__dict__.update(namespace)
        sys.modules["__main__"], namespace = main, main.__dict__
        del main
    target, sys.argv = sys.argv[2], sys.argv[2:]
    attach()
    try:
        if kind == "module":
            _clear(namespace, None)
            if not _safe_path():
                sys.path.insert(0, os.getcwd())
            import runpy

            runpy._run_module_as_main(target)  # type: ignore[attr-defined]  # what `python -m` itself calls
        elif kind == "function":
            _run_function(namespace, target)
        elif kind == "call":
            _run_call(namespace, target)
        else:
            _run_script(namespace, target)
    except SystemExit as end:
        _mark(FINISHED if end.code in (None, 0) else FAILED)
        if end.code not in (None, 0):
            _leave_mpi(end)
        raise
    except BaseException as error:
        error.__traceback__ = strip(error.__traceback__)
        if os.getpid() == _pid:  # not in a forked child of the script
            _mark(FAILED)
            record(error)
            _leave_mpi(error)
        raise
    _mark(FINISHED)


def _stand_in_for_horovod() -> None:
    """``--horovod-compat``; see launcher/rank/compat.py."""
    try:
        from launcher.rank.compat import install
    except ImportError as error:
        line = f"--horovod-compat has no effect: {sys.executable} cannot import launcher ({error}); install it there"
        print(f"[launcher] {line}", file=sys.stderr)
        return
    install(os.environ["LAUNCHER_HOROVOD_COMPAT"])


def attach() -> None:
    """Takes over this process as a rank: status page, crash handlers, error file."""
    global _pid, _page, _error_file
    _pid = os.getpid()
    _page = os.environ.get("LAUNCHER_STATUS_PAGE", "")
    _error_file = os.environ.get("TORCHELASTIC_ERROR_FILE", "")
    _mark(RUNNING, time.monotonic_ns())
    try:
        faulthandler.enable()
        faulthandler.register(STACK_SIGNAL)
    except (OSError, RuntimeError, ValueError, AttributeError) as error:
        # stderr closed, or replaced by something without a descriptor: the script must still run.
        print(f"[launcher] no stack dumps from this rank: {error}", file=sys.__stderr__)
    os.execv, os.execve = _exec_hook(os.execv), _exec_hook(os.execve)
    # threading takes its default hook from here when it is imported, which the script may never do.
    _thread._excepthook = _thread_hook(_thread._excepthook)


def record(error: BaseException, thread: str = "") -> None:
    """Writes the error file that torchrun's ranks write (same schema), whole or not at all.

    Schema: torch.distributed.elastic.multiprocessing.errors.ErrorHandler. Our additions stand beside ``message``.
    """
    if not _error_file:
        return
    import json
    import traceback

    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    frames = traceback.extract_tb(error.__traceback__)
    extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
    ours: dict[str, Any] = {"monotonic_ns": time.monotonic_ns(), "pid": os.getpid(), "thread": thread}
    if frames:
        # The innermost line of the user's own; a library's is in the traceback.
        own = [frame for frame in frames if not _is_library(frame.filename)]
        frame = (own or frames)[-1]
        ours["where"] = f"{frame.filename}:{frame.lineno} in {frame.name}"
    if _thread_failure and not thread:
        ours["earlier"] = _thread_failure
    message = "".join(traceback.format_exception_only(type(error), error)).strip()
    body = {"message": {"message": message, "extraInfo": extra}, "launcher": ours}
    if thread:
        _thread_failure.update(thread=thread, message=message)
    temporary = f"{_error_file}.{os.getpid()}"
    try:
        with open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:
            json.dump(body, file)
        os.replace(temporary, _error_file)
    except OSError as problem:
        print(f"[launcher] cannot write {_error_file}: {problem}", file=sys.__stderr__)


def _leave_mpi(error: BaseException) -> None:
    """Ends this process, as the interpreter would, where that end would wait for other ranks of MPI for ever.

    mpi4py calls MPI_Finalize last of all. There a rank that has failed waits for the others, and they wait for it.
    """
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is None or os.getpid() != _pid or not mpi.Is_initialized() or mpi.Is_finalized():
        return
    if mpi.COMM_WORLD.Get_size() < 2:
        return
    status = 1
    if not isinstance(error, SystemExit):
        sys.excepthook(type(error), error, error.__traceback__)
    elif isinstance(error.code, int):
        status = error.code & 0xFF
    else:
        print(error.code, file=sys.stderr)
    if "threading" in sys.modules:
        sys.modules["threading"]._shutdown()  # waits for the script's threads
    import atexit

    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (AttributeError, OSError, ValueError):
            pass  # closed, or replaced by something else
    if isinstance(error, KeyboardInterrupt):
        import signal

        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(_pid, signal.SIGINT)
    os._exit(status)


def _is_library(path: str) -> bool:
    return path.startswith((os.path.dirname(os.__file__), "<frozen")) or "site-packages" in path


def _thread_hook(original: Any) -> Any:
    def hook(args: Any) -> None:
        original(args)
        if os.getpid() == _pid and args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
            record(args.exc_value, args.thread.name if args.thread is not None else "unknown thread")

    return hook


def _exec_hook(original: Any) -> Any:
    """What becomes another program has left its script well: nothing is known of how that program ends but its code.

    All of os.exec* call these two; subprocess does not.
    """

    def hook(*args: Any, **named: Any) -> None:
        _mark(FINISHED)
        try:
            original(*args, **named)
        finally:
            _mark(RUNNING)  # it could not be started

    return hook


def _mark(phase: int, started_ns: int = 0) -> None:
    if not _page or os.getpid() != _pid:
        return
    try:
        page = os.open(_page, os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        return  # the run directory is gone (or another user's): the supervisor judges without it
    try:
        if started_ns:
            os.pwrite(page, started_ns.to_bytes(8, "little"), STARTED_NS_OFFSET)
            os.pwrite(page, _pid.to_bytes(4, "little"), PID_OFFSET)
        os.pwrite(page, phase.to_bytes(4, "little"), PHASE_OFFSET)
    finally:
        os.close(page)


def _safe_path() -> bool:
    return bool(getattr(sys.flags, "safe_path", False))


def _clear(namespace: dict[str, Any], path: str | None) -> None:
    """Makes ``namespace`` what ``__main__`` holds when the interpreter starts ``path`` itself."""
    loader, builtins = namespace["__loader__"], namespace["__builtins__"]
    namespace.clear()
    namespace.update(
        __name__="__main__",
        __doc__=None,
        __package__=None,
        __loader__=type(loader)("__main__", path) if path else loader,
        __spec__=None,
        __annotations__={},
        __builtins__=builtins,
    )
    if path:
        namespace.update(__file__=path, __cached__=None)


def _run_script(namespace: dict[str, Any], target: str) -> None:
    path = os.path.abspath(target)
    if os.path.isdir(path) or _is_archive(path):
        # As `python directory` and `python archive.pyz`: its __main__ is run with it at the head of the path.
        _clear(namespace, None)
        sys.path.insert(0, path)
        import runpy

        runpy._run_module_as_main("__main__", False)  # type: ignore[attr-defined]
        return
    with open(path, "rb") as file:
        source = file.read()
    code = compile(source, path, "exec", dont_inherit=True)
    _clear(namespace, path)
    if not _safe_path():
        sys.path.insert(0, os.path.dirname(os.path.realpath(path)))
    exec(code, namespace)


def _is_archive(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(4) == b"PK\x03\x04"
    except OSError:
        return False


def _run_function(namespace: dict[str, Any], target: str) -> None:
    """``module:function``, called without arguments in the code directory: a framework's own entry point."""
    _clear(namespace, None)
    sys.path.insert(0, os.getcwd())
    import importlib

    module, _, function = target.partition(":")
    getattr(importlib.import_module(module), function)()


def _run_call(namespace: dict[str, Any], target: str) -> None:
    """A function handed over by ``launcher.launch``: a file of ours, in a folder that only this user can read."""
    _clear(namespace, None)
    from launcher.rank.call import run_call

    run_call(target)
