"""The rendezvous of Horovod's Gloo controller: a small key-value store that speaks a strict subset of HTTP/1.1.

``PUT /scope/key`` keeps a value, ``GET`` answers with it or with 404, ``DELETE`` says that its rank has finished with
the scope. Horovod's client opens a connection for each request and asks for an absent key every 10 ms. Values are
bytes and are only handed back. It runs in the leader's process, in a thread of its own that makes a system call for
each request: the interpreter's lock is free in between, so the supervisor is never kept waiting.
"""

from __future__ import annotations

import re
import select
import socket
import time

from launcher.errors import ClusterError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterable

MAX_HEAD = 8 << 10  # bytes of a request up to its body
MAX_VALUE = 8 << 20  # a rank puts some 130 bytes for each other rank
MAX_STORED = 1 << 30  # bytes of all values, and of bodies still on their way
MAX_CONNECTIONS = 4096  # further ones wait in the kernel's queue
_CHUNK = 64 << 10
_BACKLOG = 1024
_KEY_COST = 256  # bytes that a key costs beside its value, about

_REQUEST = re.compile(rb"([A-Z]{1,16}) /([\w.:~@=,+-]{1,256})/([\w.:~@=,+-]{1,256}) HTTP/1\.([01])", re.ASCII)
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\t -~\x80-\xff]*)")
_REASONS = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    411: "Length Required",
    413: "Content Too Large",
    417: "Expectation Failed",
    431: "Request Header Fields Too Large",
    501: "Not Implemented",
    507: "Insufficient Storage",
}
# Scopes in which ranks meet. Their keys go away together, once every rank is done: one may still be reading another's.
_MEETINGS = ("global", "local_", "cross_")


class KeyValueStore:
    """The store as a server. Attempts share nothing: each has an empty store on a port of its own.

    Attributes:
        counts: connections and requests that were turned down, by reason; for people to read.
    """

    def __init__(self, address: str, admit: Callable[[str], bool], *, request_timeout_s: float = 10.0) -> None:
        """A store that is not listening yet.

        Args:
            address: IPv4 address to listen on; the only kind Horovod's client can reach.
            admit: tells whether a numeric address may connect. Called in the store's thread; must not wait.
            request_timeout_s: limit from one answer of a connection to its next, or to its first.
        """
        self.counts: dict[str, int] = {}
        self._address, self._admit, self._timeout_s = address, admit, request_timeout_s
        self._thread: threading.Thread | None = None
        self._stop: socket.socket | None = None

    def start(self) -> int:
        """Listens and serves from now on; the port.

        Raises:
            ClusterError: the address cannot be listened on.
        """
        import threading

        try:
            listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            try:
                listener.bind((self._address, 0))
                listener.listen(_BACKLOG)
            except OSError:
                listener.close()
                raise
        except OSError as error:
            raise ClusterError(
                f"Horovod's key-value store cannot listen on {self._address} ({error.strerror or error}); "
                "it needs an IPv4 address of this host: give another with --host-addresses"
            ) from None
        self._stop, theirs = socket.socketpair()
        server = _Server(listener, theirs, self._admit, self._timeout_s, self.counts)
        self._thread = threading.Thread(target=server.serve, name="horovod-store", daemon=True)
        # Signals are for the main thread, whose wait they must end.
        import signal

        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            self._thread.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        port: int = listener.getsockname()[1]
        return port

    def reset(self) -> int:
        """Forgets everything for a new attempt; its port. What ranks of the last one still send finds nobody."""
        self.close()
        return self.start()

    def close(self) -> None:
        """Stops serving. May be called twice."""
        if self._stop is None or self._thread is None:
            return
        self._stop.close()
        self._thread.join()
        self._stop = self._thread = None


class JobStore:
    """The store of a job, on its first host: one for each attempt, for the hosts that are in it."""

    def __init__(self, several: bool, say: Callable[[str], None]) -> None:
        """``several``: there are other hosts, which may reach this one at any of its addresses.

        ``say`` takes a line at the end, if anything was turned down.
        """
        self._say = say
        self._peers: frozenset[str] = frozenset()
        self._store = KeyValueStore("0.0.0.0" if several else "127.0.0.1", self._admit)

    def open(self, own: str, peers: Iterable[str]) -> int:
        """An empty store instead of the last attempt's; its port.

        Args:
            own: this host's numeric address as the others see it.
            peers: numeric addresses of the other hosts.

        Raises:
            ClusterError: it cannot listen, or the hosts have no IPv4 between them.
        """
        if ":" in own:
            raise ClusterError(
                f"the hosts reach each other by IPv6 ({own}), but Horovod's Gloo controller speaks IPv4 only; "
                "give IPv4 addresses with --host-addresses, or use --horovod-controller mpi"
            )
        self._peers = frozenset((own, *peers))
        return self._store.reset()

    def release(self) -> None:
        """Stops serving, if it does."""
        self._store.close()
        counts, self._store.counts = self._store.counts, {}
        if counts:
            found = ", ".join(f"{reason}: {count}" for reason, count in sorted(counts.items()))
            self._say(f"Horovod's key-value store turned down connections or requests ({found})")

    def _admit(self, address: str) -> bool:
        return address in self._peers or address.startswith("127.")


class _Store:
    """Scopes of keys with values, within a bound."""

    def __init__(self) -> None:
        self._scopes: dict[str, dict[str, bytes]] = {}
        self._finished: dict[str, set[str]] = {}
        self.size = 0

    def get(self, scope: str, key: str) -> bytes | None:
        return self._scopes.get(scope, {}).get(key)

    def put(self, scope: str, key: str, value: bytes) -> None:
        self._remove(scope, key)
        self._scopes.setdefault(scope, {})[key] = value
        self.size += len(value) + len(scope) + len(key) + _KEY_COST
        self._finished.get(scope, set()).discard(key)

    def finish(self, scope: str, key: str) -> None:
        if not scope.startswith(_MEETINGS):
            self._remove(scope, key)
            return
        keys = self._scopes.get(scope, {})
        if key not in keys:
            return
        finished = self._finished.setdefault(scope, set())
        finished.add(key)
        # No rank finishes before it has met all others, so every rank's key is there by the first call. A rank's key
        # is its number; other keys go away with them.
        if all(name in finished for name in keys if name.isdigit()):
            for name in list(keys):
                self._remove(scope, name)

    def _remove(self, scope: str, key: str) -> None:
        keys = self._scopes.get(scope, {})
        value = keys.pop(key, None)
        if value is not None:
            self.size -= len(value) + len(scope) + len(key) + _KEY_COST
            if not keys:
                del self._scopes[scope]
                self._finished.pop(scope, None)


class _RefusedRequest(Exception):
    def __init__(self, status: int) -> None:
        self.status = status


class _Connection:
    """One client: what has come, what is still to be sent, and the request whose body is awaited."""

    def __init__(self, sock: socket.socket, deadline_s: float) -> None:
        self.sock = sock
        self.deadline_s = deadline_s
        self.received = bytearray()
        self.unsent = memoryview(b"")
        self.request: tuple[bytes, str, str] | None = None  # method, scope, key
        self.length = 0  # of its body
        self.closes = False  # the client wants an end after it
        self.last = False  # no further request is taken
        self.watched = select.EPOLLIN


class _Server:
    """The thread's side. Nothing in it waits but for the poll."""

    def __init__(
        self,
        listener: socket.socket,
        stop: socket.socket,
        admit: Callable[[str], bool],
        timeout_s: float,
        counts: dict[str, int],
    ) -> None:
        self._listener, self._stop, self._admit, self._timeout_s, self._counts = (
            listener,
            stop,
            admit,
            timeout_s,
            counts,
        )
        self._store = _Store()
        self._connections: dict[int, _Connection] = {}
        self._awaited = 0  # bytes of bodies on their way
        self._listening = False
        self._poll = select.epoll()

    def serve(self) -> None:
        """Until the other end of ``stop`` is closed."""
        self._poll.register(self._stop, select.EPOLLIN)
        self._listen()
        listener, stop = self._listener.fileno(), self._stop.fileno()
        next_look_s = 0.0
        try:
            while True:
                idle = self._listening and not self._connections
                for number, _ in self._poll.poll(-1 if idle else min(1.0, self._timeout_s / 4)):
                    if number == stop:
                        return
                    if number == listener:
                        self._accept()
                    elif number in self._connections:
                        self._advance(self._connections[number])
                now_s = time.monotonic()
                if now_s >= next_look_s:
                    next_look_s = now_s + min(1.0, self._timeout_s / 4)
                    self._drop_slow(now_s)
                    self._listen()
        finally:
            for connection in self._connections.values():
                connection.sock.close()
            self._listener.close()
            self._stop.close()
            self._poll.close()

    def _count(self, reason: str) -> None:
        self._counts[reason] = self._counts.get(reason, 0) + 1

    def _listen(self) -> None:
        """Takes connections as long as there is room."""
        wanted = len(self._connections) < MAX_CONNECTIONS
        if wanted and not self._listening:
            self._poll.register(self._listener, select.EPOLLIN)
        elif self._listening and not wanted:
            self._poll.unregister(self._listener)
        self._listening = wanted

    def _accept(self) -> None:
        try:
            sock, peer = self._listener.accept()
        except (BlockingIOError, ConnectionError):  # gone again
            return
        except OSError:  # no descriptor is free: look again a little later
            self._poll.unregister(self._listener)
            self._listening = False
            self._count("no descriptor free")
            return
        if not self._admit(peer[0]):
            self._count("address not admitted")
            sock.close()
            return
        sock.setblocking(False)
        self._connections[sock.fileno()] = _Connection(sock, time.monotonic() + self._timeout_s)
        self._poll.register(sock, select.EPOLLIN)
        self._listen()

    def _drop_slow(self, now_s: float) -> None:
        for connection in [one for one in self._connections.values() if one.deadline_s < now_s]:
            if connection.received or connection.request or connection.unsent:
                self._count("too slow")
            self._drop(connection)

    def _drop(self, connection: _Connection) -> None:
        if connection.request is not None:
            self._awaited -= connection.length
        del self._connections[connection.sock.fileno()]
        connection.sock.close()  # which takes it out of the poll, too
        self._listen()

    def _advance(self, connection: _Connection) -> None:
        """Reads, answers and sends as much as can be done at once."""
        ended = False
        try:
            if not connection.unsent:
                data = connection.sock.recv(_CHUNK)
                ended = not data
                if not connection.last:  # after the last request bytes are only read lest a reset overtake the answer
                    connection.received += data
            while self._send(connection) and not connection.last:
                answer = self._answer(connection)
                if not answer:
                    break
                connection.unsent = memoryview(answer)
        except BlockingIOError:
            return
        except OSError:  # reset by the client
            self._drop(connection)
            return
        if ended and not connection.unsent:
            if connection.received or connection.request:
                self._count("cut short")
            self._drop(connection)
            return
        watched = select.EPOLLOUT if connection.unsent else select.EPOLLIN
        if watched != connection.watched:
            connection.watched = watched
            self._poll.modify(connection.sock, watched)

    def _send(self, connection: _Connection) -> bool:
        """Sends; True once nothing is left to send."""
        if connection.unsent:
            try:
                sent = connection.sock.send(connection.unsent)
            except BlockingIOError:
                return False
            connection.unsent = connection.unsent[sent:]
            if connection.unsent:
                return False
            connection.deadline_s = time.monotonic() + self._timeout_s
            if connection.last:
                connection.sock.shutdown(socket.SHUT_WR)
        return True

    def _answer(self, connection: _Connection) -> bytes:
        """The answer to the next request; b"" while it is not complete."""
        try:
            if connection.request is None and not self._take_head(connection):
                return b""
            if len(connection.received) < connection.length:
                return b""
            status, value = self._perform(connection)
        except _RefusedRequest as refused:
            status, value = refused.status, b""
            self._count(_REASONS[status])
            connection.last = True
            connection.received.clear()
        close = b"Connection: close\r\n" if connection.last else b""
        head = f"HTTP/1.1 {status} {_REASONS[status]}\r\nContent-Length: {len(value)}\r\n"
        return head.encode() + close + b"\r\n" + value

    def _take_head(self, connection: _Connection) -> bool:
        """Reads a request up to its body, once that is all there.

        Raises:
            _RefusedRequest: it is not one of those that the store takes.
        """
        received = connection.received
        end = received.find(b"\r\n\r\n", 0, MAX_HEAD)
        if end < 0:
            if len(received) >= MAX_HEAD:
                raise _RefusedRequest(431)
            return False
        line, *fields = bytes(received[:end]).split(b"\r\n")
        request = _REQUEST.fullmatch(line)
        if request is None:
            raise _RefusedRequest(400)
        method, scope, key, minor = request.groups()
        if method not in (b"GET", b"PUT", b"DELETE"):
            raise _RefusedRequest(405)
        length = None
        close = minor == b"0"
        for text in fields:
            field = _FIELD.fullmatch(text)
            if field is None:
                raise _RefusedRequest(400)
            name, value = field[1].lower(), field[2].strip()
            if name == b"content-length":
                if length is not None or not value.isdigit() or len(value) > 15:
                    raise _RefusedRequest(400)
                length = int(value)
            elif name == b"transfer-encoding":
                raise _RefusedRequest(501)
            elif name == b"expect":
                raise _RefusedRequest(417)
            elif name == b"connection" and b"close" in value.lower():
                close = True
        if length is None:
            if method == b"PUT":
                raise _RefusedRequest(411)
            length = 0
        if length > MAX_VALUE:
            raise _RefusedRequest(413)
        if self._store.size + self._awaited + length > MAX_STORED:
            raise _RefusedRequest(507)
        connection.request, connection.length = (method, scope.decode(), key.decode()), length
        connection.closes = close
        self._awaited += length
        del received[: end + 4]
        return True

    def _perform(self, connection: _Connection) -> tuple[int, bytes]:
        assert connection.request is not None
        (method, scope, key), length = connection.request, connection.length
        body = bytes(connection.received[:length])
        del connection.received[:length]
        connection.request, connection.length, connection.last = None, 0, connection.closes
        self._awaited -= length
        if method == b"PUT":
            self._store.put(scope, key, body)
        elif method == b"DELETE":
            self._store.finish(scope, key)
        else:
            found = self._store.get(scope, key)
            return (404, b"") if found is None else (200, found)
        return 200, b""
