"""Names to addresses in the background: ``getaddrinfo`` blocks for as long as a name server is silent."""

from __future__ import annotations

import os
import socket
import threading

from launcher.errors import InternalError
from launcher.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

THREADS = 8


class Resolved(Record):
    """The outcome for one name: its numeric addresses in the order to try them, or why there are none."""

    name: str
    addresses: tuple[str, ...]
    error: str


class Resolver:
    """Looks names up in a few threads, for one event loop; ``fileno()`` is readable when :meth:`take` has something.

    The threads end with the names, so none stays behind when all is resolved.
    """

    def __init__(self, names: Iterable[str], addresses: Mapping[str, str] | None = None) -> None:
        """Starts looking up ``names``.

        Args:
            addresses: name -> what to look up in its place, as a rule a numeric address.

        Raises:
            InternalError: this machine allows no thread.
        """
        self._instead = dict(addresses or {})
        self._lock = threading.Lock()
        self._waiting: list[str] = []
        self._pending: set[str] = set()
        self._done: list[Resolved] = []
        self._threads = 0
        self._closed = False
        self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.ask(names)

    def fileno(self) -> int:
        """A descriptor that is readable while results wait; -1 when closed."""
        return self._event

    def ask(self, names: Iterable[str]) -> None:
        """Looks ``names`` up (again). A name that is being looked up already is not asked for twice."""
        with self._lock:
            if self._closed:
                return
            for name in names:
                if name not in self._pending:
                    self._pending.add(name)
                    self._waiting.append(name)
            fresh = min(len(self._waiting), THREADS) - self._threads
            self._threads += max(0, fresh)
        for started in range(fresh):
            try:
                threading.Thread(target=self._work, name="launcher-resolver", daemon=True).start()
            except RuntimeError as error:
                self._do_with_fewer(fresh - started, error)
                return

    def _do_with_fewer(self, missing: int, error: RuntimeError) -> None:
        with self._lock:
            self._threads -= missing
            stranded = self._waiting and not self._threads
        if stranded:
            raise InternalError(
                f"cannot look up the hosts' names: {error}; the limit of processes is reached: ulimit -u, or the pids "
                "cgroup"
            ) from error

    def take(self) -> list[Resolved]:
        """The outcomes since the last call."""
        with self._lock:
            done, self._done = self._done, []
            if done:
                os.eventfd_read(self._event)
        return done

    @property
    def pending(self) -> frozenset[str]:
        """The names without an outcome so far."""
        with self._lock:
            return frozenset(self._pending)

    def close(self) -> None:
        """Forgets what was asked. A thread that waits for a name server ends when that answers or gives up."""
        with self._lock:
            self._closed = True
            self._waiting, self._done = [], []
            self._pending = set()
            event, self._event = self._event, -1
            if event >= 0:
                os.close(event)

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._threads -= 1
                    return
                name = self._waiting.pop(0)
            outcome = look_up(name, self._instead.get(name, name))
            with self._lock:
                if self._closed:
                    self._threads -= 1
                    return
                self._pending.discard(name)
                if not self._done:
                    os.eventfd_write(self._event, 1)
                self._done.append(outcome)


def look_up(name: str, instead: str = "") -> Resolved:
    """The addresses of ``name``, or of ``instead`` in its place. Blocks."""
    target = instead or name
    try:
        found = socket.getaddrinfo(target, None, type=socket.SOCK_STREAM)
    except UnicodeError:  # the codec for international names refuses what can not be one
        return Resolved(name, (), f"{target!r} is no host name")
    except OSError as error:
        return Resolved(name, (), f"{target}: {error.strerror or error}")
    return Resolved(name, tuple(dict.fromkeys(str(entry[4][0]) for entry in found)), "")
