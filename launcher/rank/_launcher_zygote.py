"""A process that imports once, never becomes a rank, and forks ranks when the guardian asks for one.

The guardian must be the parent of each rank (it waits for it, and the rank dies with it), so a rank is forked twice
and the process in between ends at once: the orphan falls to the nearest subreaper, which is the guardian. Fork, not
clone(CLONE_PARENT): only fork runs the handlers of pthread_atfork and os.register_at_fork, which OpenBLAS, the
interpreter and ``random`` need.

A request is one frame (see native/guardian/wire.h) with two descriptors: slot, directory, cpus, argv, environment.
"""

from __future__ import annotations

import array
import ctypes
import gc
import importlib
import os
import signal
import socket
import sys
import time

CONTROL_FD = 3
PR_SET_PDEATHSIG = 1
_MAX_FRAME = 16 * 1024 * 1024
_ADOPTION_LIMIT_S = 10.0


def serve(arguments: list[str]) -> list[str]:
    """Imports the modules named in ``arguments[0]`` and answers requests; returns in every rank, with its argv."""
    control = socket.socket(fileno=CONTROL_FD)
    control.set_inheritable(False)
    guardian = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    for name in arguments[0].split(","):
        importlib.import_module(name)
    _refuse_unforkable()
    control.sendall(_hello(-1, 0))
    gc.collect()
    gc.freeze()  # a collection in a rank would otherwise touch, and so copy, every shared page
    while True:
        request = _receive(control)
        if request is None:
            os._exit(0)  # the guardian has closed the socket: the job is over
        fields, out_fd, err_fd = request
        try:
            middle = os.fork()
        except OSError as error:
            middle = -1
            control.sendall(_hello(int(fields[0]), -(error.errno or 1)))
        if middle:
            os.close(out_fd)
            os.close(err_fd)
            if middle > 0:
                os.waitpid(middle, 0)
            continue
        try:
            if os.fork():
                os._exit(0)
        except OSError as error:
            control.sendall(_hello(int(fields[0]), -(error.errno or 1)))
            os._exit(0)
        return _become_rank(control, guardian, libc, fields, out_fd, err_fd)


def _hello(slot: int, pid: int) -> bytes:
    return array.array("i", [slot, pid]).tobytes()


def _refuse_unforkable() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        raise RuntimeError(
            "a preloaded module initialised CUDA, which does not survive fork(); leave it out of --preload"
        )
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        names = sorted({_thread_name(task) for task in os.listdir("/proc/self/task")})
        print(
            f"[launcher] preload: {threads - 1} thread(s) were started by an import ({', '.join(names)}); "
            "they do not exist in the ranks",
            file=sys.stderr,
        )


def _thread_name(task: str) -> str:
    try:
        with open(f"/proc/self/task/{task}/comm", encoding="utf-8") as file:
            return file.read().strip()
    except OSError:
        return task


def _receive(control: socket.socket) -> tuple[list[str], int, int] | None:
    head, descriptors, _, _ = socket.recv_fds(control, 4, 2)
    if not head:
        return None
    while len(head) < 4:
        head += control.recv(4 - len(head))
    size = int.from_bytes(head, "little")
    if size > _MAX_FRAME or len(descriptors) != 2:
        raise RuntimeError(f"bad request: {size} bytes, {len(descriptors)} descriptors")
    body = bytearray()
    while len(body) < size:
        piece = control.recv(min(65536, size - len(body)))
        if not piece:
            return None
        body += piece
    for fd in descriptors:
        os.set_inheritable(fd, False)
    return [os.fsdecode(field) for field in bytes(body).split(b"\0")], descriptors[0], descriptors[1]


def _become_rank(
    control: socket.socket, guardian: int, libc: ctypes.CDLL, fields: list[str], out_fd: int, err_fd: int
) -> list[str]:
    deadline, pause = time.monotonic() + _ADOPTION_LIMIT_S, 0.0002
    while os.getppid() != guardian:  # until the process in between is gone
        if time.monotonic() > deadline:
            os._exit(127)
        time.sleep(pause)
        pause = min(2 * pause, 0.01)
    os.setsid()
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != guardian:
        os._exit(127)
    # From here on this is a rank like any other: what goes wrong below ends it with a code that is reported.
    control.sendall(_hello(int(fields[0]), os.getpid()))
    control.close()
    items = iter(fields[1:])
    directory = next(items)
    cpus = [int(next(items)) for _ in range(int(next(items)))]
    argv = [next(items) for _ in range(int(next(items)))]
    environment = [next(items) for _ in range(int(next(items)))]
    os.dup2(out_fd, 1)
    os.dup2(err_fd, 2)
    os.close(out_fd)
    os.close(err_fd)
    if cpus:
        os.sched_setaffinity(0, cpus)
    os.environ.clear()
    for entry in environment:
        name, _, value = entry.partition("=")
        os.environ[name] = value
    if directory:
        os.chdir(directory)
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed()  # a plain start would have drawn its own; the random module does so by itself
    # argv as the interpreter would have been given it: [python, -u, boot.py, kind, target, ...]
    return argv[2:]
