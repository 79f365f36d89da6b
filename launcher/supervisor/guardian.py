"""The supervisor's end of the guardian, the native process that is the parent of all ranks (native/guardian)."""

from __future__ import annotations

import fcntl
import os
import select

from launcher.errors import InternalError
from launcher.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

ALL_RANKS = -2
ZYGOTE = -1
# Slots from here down are helpers': mpirun, MPI daemons.
FIRST_HELPER = -3
_MAX_FRAME = 16 * 1024 * 1024
_NO_FILES = "the limit of open files is reached: ulimit -n"
# By errno. EINVAL comes from F_DUPFD with a floor at or above the limit.
_ADVICE = {
    11: "the limit of processes is reached: ulimit -u, or the pids cgroup",
    22: _NO_FILES,
    24: _NO_FILES,
}


class Event(Record):
    """One event: ``started``, ``spawn_failed``, ``exited``, ``empty``, ``stuck``, ``stats``, ``note``, ``bye``, or of
    agents: ``listening``, ``request``, ``hangup``, ``agent_signal``.

    The fields are those that native/guardian/guardian.h lists for it, undecoded.
    """

    verb: str
    fields: tuple[bytes, ...]

    def text(self, index: int) -> str:
        """Field ``index`` as text; bytes that are not UTF-8 are shown as escapes."""
        return self.fields[index].decode("utf-8", "backslashreplace")

    def number(self, index: int) -> int:
        """Field ``index`` as a number."""
        return int(self.fields[index])

    def items(self, index: int = 0) -> list[str]:
        """The list that begins at field ``index``: its length, then its items."""
        count = int(self.fields[index])
        return [self.text(index + 1 + item) for item in range(count)]

    def strings(self, index: int) -> tuple[list[str], int]:
        """The list that begins at field ``index`` as file names and arguments are read, and where the next field is."""
        end = index + 1 + int(self.fields[index])
        return [os.fsdecode(field) for field in self.fields[index + 1 : end]], end


def executable() -> str:
    """Path of the guardian. ``LAUNCHER_GUARDIAN`` names another build of it (tests run one with sanitizers)."""
    return os.environ.get("LAUNCHER_GUARDIAN") or os.path.join(
        os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "_guardian"
    )


class Guardian:
    """A running guardian. Not thread-safe: one thread owns it.

    Raises:
        InternalError: it cannot be started, or has ended.
    """

    def __init__(self, cap_bytes: int, raw: bool) -> None:
        path = executable()
        opened: list[int] = []
        try:
            command_read, self._commands = _pipe(opened)
            self._events, event_write = _pipe(opened)
            # Away from 3 and 4, where the guardian gets its ends (a closed stdin would make the pipes start at 0).
            ends = [_above(end, 5, opened) for end in (command_read, event_write)]
            actions = [(os.POSIX_SPAWN_DUP2, end, number) for end, number in zip(ends, (3, 4), strict=True)]
            self.pid = os.posix_spawn(path, [path, "3", "4", str(os.getpid())], os.environ, file_actions=actions)
        except OSError as error:
            for fd in opened:
                os.close(fd)
            advice = _ADVICE.get(error.errno or 0, "reinstall the launcher package")
            raise InternalError(f"cannot start {path}: {error.strerror}; {advice}") from error
        for end in ends:
            os.close(end)
        self._buffer = b""
        self._status: int | None = None
        self.closed = False
        self.send("hello", cap_bytes, int(raw))

    def fileno(self) -> int:
        """Readable when an event is there."""
        return self._events

    def send(self, *fields: object) -> None:
        """Sends one command. Lists must have been flattened with :func:`counted`."""
        payload = b"\0".join(_encode(field) for field in fields)
        frame = memoryview(len(payload).to_bytes(4, "little") + payload)
        try:
            while frame:
                frame = frame[os.write(self._commands, frame) :]
        except BrokenPipeError:
            self.closed = True  # read() tells how it ended, after what it still had to say

    def read(self) -> list[Event]:
        """All events that are there; waits for nothing. After its end: ``closed`` is set, and [] is returned."""
        poller = select.poll()  # not select(): a caller may have more than 1,024 descriptors
        poller.register(self._events, select.POLLIN)
        while poller.poll(0):
            piece = os.read(self._events, 1 << 20)
            if not piece:
                self.closed = True
                break
            self._buffer += piece
        events = []
        while len(self._buffer) >= 4:
            size = int.from_bytes(self._buffer[:4], "little")
            if size > _MAX_FRAME:
                raise InternalError(f"the guardian sent a frame of {size} bytes")
            if len(self._buffer) < 4 + size:
                break
            verb, *fields = self._buffer[4 : 4 + size].split(b"\0")
            self._buffer = self._buffer[4 + size :]
            events.append(Event(verb.decode(), tuple(fields)))
        return events

    def status(self) -> int:
        """How it ended, as os.waitpid tells; waits for the end."""
        if self._status is None:
            try:
                self._status = os.waitpid(self.pid, 0)[1]
            except ChildProcessError:
                self._status = 0  # reaped by a SIGCHLD policy that is not ours (library use)
        return self._status

    def close(self) -> None:
        """Closes the pipes. A guardian that still runs then ends by itself, and every rank with it."""
        for fd in (self._commands, self._events):
            os.close(fd)


def counted(items: Iterable[object]) -> list[object]:
    """A list as it stands in a command: its length, then its items."""
    values = list(items)
    return [len(values), *values]


def spawn_fields(
    kind: str,
    slot: int,
    *,
    directory: str,
    out_path: str,
    err_path: str,
    console: int,
    prefix: str,
    cpus: Sequence[int],
    argv: Sequence[str],
    environ: dict[str, str],
    connection: int = 0,
) -> list[object]:
    """The ``spawn`` command.

    Args:
        console: bit 0 shows stdout, bit 1 stderr.
        connection: of the agent that it stands for; 0: of none.
    """
    environment = [f"{name}={value}" for name, value in environ.items()]
    head = ["spawn", kind, slot, directory, out_path, err_path, console, prefix]
    return [*head, *counted(cpus), *counted(argv), *counted(environment), connection]


def _encode(field: object) -> bytes:
    if isinstance(field, bytes):
        return field
    return os.fsencode(str(field)).replace(b"\0", b"?")


def _pipe(opened: list[int]) -> tuple[int, int]:
    ends = os.pipe()
    opened.extend(ends)
    return ends


def _above(fd: int, floor: int, opened: list[int]) -> int:
    """``fd`` moved to ``floor`` or above."""
    moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, floor)
    os.close(fd)
    opened[opened.index(fd)] = moved
    return moved
