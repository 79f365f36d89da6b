"""The server process: an event loop with uvicorn in front and the workers behind.

Imported when the workers have been started: uvicorn, asyncio and what they need take as long as a small model.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import resource
import signal
import socket
import sys
import time
from typing import cast

import uvicorn
import uvloop
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from launcher.errors import EXIT_INTERNAL
from launcher.serving.app import App
from launcher.serving.failures import TYPES, error_body
from launcher.serving.hub import Hub
from launcher.serving.metrics import Metrics
from launcher.serving.models import Models
from launcher.serving.sessions import Sessions

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any

    from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

    from launcher.serving.pool import Pool
    from launcher.serving.processes import Processes
    from launcher.serving.settings import Settings

_MOST_HEAD_BYTES = 64 * 1024  # of a request's line and headers
_LOOK_S = 1.0  # between two looks at slow connections, at memory, at sessions
_REAP_S = 1.0
_BACKLOG = 2048
_UPGRADE = re.compile(rb"\nupgrade:", re.IGNORECASE)
_UPGRADE_ELSEWHERE = re.compile(rb"\nupgrade:(?![ \t]*websocket)", re.IGNORECASE)
_JOINED_BYTES = 1 << 16  # a body below this is copied behind its head
_KILL_S = 2.0  # part of the drain: for workers that do not end by themselves
# How far a connection is with its request.
_NEW, _IDLE, _HEAD, _BODY, _DONE = "new", "idle", "head", "body", "done"


def _without_upgrade(data: bytes, offer: re.Pattern[bytes]) -> bytes:
    """A head without its offer of another protocol: the parser would take the body for that protocol's."""
    head, end, rest = data.partition(b"\r\n\r\n")
    return offer.sub(b"\nx-upgrade:", head) + end + rest


class JoiningTransport:
    """A transport that sends the head of an answer together with its body, when it is told that one follows.

    uvicorn writes them one after the other: two system calls, two packets, and a client that is woken twice.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._held = b""
        self.hold = False
        self.is_closing = transport.is_closing

    def write(self, data: bytes) -> None:
        """Sends ``data``, or keeps it until more comes."""
        if self.hold:
            self.hold = False
            self._held = data
        elif self._held:
            held, self._held = self._held, b""
            if len(data) < _JOINED_BYTES:
                self._transport.write(held + data)
            else:
                self._transport.writelines((held, data))
        else:
            self._transport.write(data)

    def close(self) -> None:
        """Ends the connection when all is sent."""
        if self._held:
            self._transport.write(self._held)
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class HttpProtocol(HttpToolsProtocol):
    """uvicorn's, with bounds for clients that are slow or say too much, and a word when one has gone."""

    settings: Settings  # of the server; set on a subclass

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.on_lost: Callable[[], None] | None = None
        self.lost = False
        self._stage = _NEW
        self._since_s = self.loop.time()
        self._head_bytes = 0
        self._may_converse = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client has come."""
        self.joining = JoiningTransport(cast("asyncio.Transport", transport))
        super().connection_made(cast("asyncio.Transport", self.joining))

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone."""
        self.lost = True
        super().connection_lost(exc)
        if self.on_lost is not None:
            self.on_lost()

    def data_received(self, data: bytes) -> None:
        """Some bytes of a request."""
        if self._stage in (_NEW, _DONE, _IDLE):  # a head begins, though all of it need not be here
            waits = self.cycle is None or self.cycle.response_complete
            self._may_converse = self.ws_protocol_class is not None and waits and data.startswith(b"GET ")
        if self._stage != _BODY and b"pgrade:" in data:
            data = _without_upgrade(data, _UPGRADE_ELSEWHERE if self._may_converse else _UPGRADE)
        if self._stage == _BODY:
            self._since_s = self.loop.time()
        elif self._stage != _DONE:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._stage in (_NEW, _HEAD, _IDLE) and self._head_bytes > _MOST_HEAD_BYTES:
            self.refuse(431, f"a request line and headers of more than {_MOST_HEAD_BYTES} bytes")

    def _should_upgrade(self) -> bool:
        return self._may_converse and super()._should_upgrade()

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self.scope["launcher.connection"] = self  # type: ignore[typeddict-unknown-key]
        self._stage, self._since_s = _HEAD, self.loop.time()

    def on_headers_complete(self) -> None:
        """Its body is next."""
        self._stage, self._since_s, self._head_bytes = _BODY, self.loop.time(), 0
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """All of it is there."""
        self._stage = _DONE
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """It has been answered."""
        if self._stage == _DONE:
            self._stage, self._since_s = _IDLE, self.loop.time()
        super().on_response_complete()

    def look(self, now_s: float) -> None:
        """Ends a connection whose request does not come. uvicorn itself ends those that wait for the next one."""
        settings, waited_s = self.settings, now_s - self._since_s
        if self._stage == _HEAD and waited_s > settings.header_timeout_s:
            self.refuse(408, f"the header of the request did not come within {settings.header_timeout_s:g} s")
        elif self._stage == _BODY and waited_s > settings.body_timeout_s and not self.flow.read_paused:
            self.refuse(408, f"nothing more of the request's body came for {settings.body_timeout_s:g} s")
        elif self._stage == _NEW and waited_s > settings.keep_alive_s:
            self.transport.close()  # it has never said a word
        elif self._stage == _IDLE and waited_s > settings.keep_alive_s + _LOOK_S and self.cycle.response_complete:
            self.transport.close()  # uvicorn's own timer ends with any byte, an empty line too

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP."""
        self.refuse(400, msg)

    def refuse(self, status: int, message: str) -> None:
        """Ends the connection with an error, where that can not be taken for a part of another answer."""
        if self.transport.is_closing():
            return
        cycle = cast("RequestResponseCycle | None", self.cycle)  # None until there is a request, whatever its type says
        if cycle is not None and not cycle.response_complete:
            if self._stage != _BODY:
                # What comes behind a request in hand: that is answered, and then there is no more.
                cycle.keep_alive = False
                self.transport.pause_reading()
                return
            cycle.disconnected = True
            cycle.message_event.set()
        if cycle is None or cycle.response_complete or not cycle.response_started:
            body = error_body(status, TYPES[status], message, "")
            head = f"HTTP/1.1 {status} {TYPES[status]}\r\nconnection: close\r\ncontent-type: application/json\r\n"
            self.transport.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        self.transport.close()

    def break_off(self) -> None:
        """Ends the connection so that the client can see that the answer is not whole."""
        if not self.lost:
            self.cycle.disconnected = True
            self.transport.abort()


class HttpServer(uvicorn.Server):
    """uvicorn's, whose signals are its caller's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals alone."""
        yield


class Server:
    """All of one server.

    Args:
        make: makes the workers of a model: ``make(name, model_dir, on_fatal)``.
        slots: of the only model's workers, which have been started already; empty for a multi-model server.
    """

    def __init__(
        self,
        settings: Settings,
        processes: Processes,
        make: Callable[[str, str, Callable[[int, str], None]], Pool],
        slots: Sequence[int],
    ) -> None:
        self._settings, self.processes, self._slots = settings, processes, slots
        self._single = None if settings.multi_model else make("", settings.model_dir, self.fatal)
        self._models = Models(settings, make)
        self._sessions = Sessions(settings.session_ttl_s) if settings.sessions else None
        self._metrics = Metrics()
        self._app = App(settings, self._models, self._single, self._sessions, self._metrics, self._log)
        self._hub = Hub(processes, self.pools, self._guardian_lost)
        self._code = 0
        self._ending: asyncio.Future[None] | None = None

    def run(self, listener: socket.socket, metrics_listener: socket.socket | None) -> int:
        """Serves until a signal, or until there is nobody to serve; returns the exit code."""
        loop = uvloop.new_event_loop()
        asyncio.set_event_loop(loop)
        try:
            return loop.run_until_complete(self._run(listener, metrics_listener))
        finally:
            loop.close()

    def say(self, text: str) -> None:
        """A line of the launcher's own."""
        self.processes.say(text)

    def _log(self, text: str) -> None:
        if text.startswith("\0"):  # a line of the access log, which is JSON and nothing else
            self.processes.guardian.send("say", 1, text[1:])
        else:
            self.processes.say(text)

    def pools(self) -> list[Pool]:
        """The workers of all models."""
        return self._models.pools() if self._single is None else [self._single]

    def fatal(self, code: int, line: str) -> None:
        """The only model can not be served any more."""
        self.say(f"error: {line}")
        self._app.state = "ending: " + line
        self._end(code)

    # ---- the loop

    async def _run(self, listener: socket.socket, metrics_listener: socket.socket | None) -> int:
        loop = asyncio.get_running_loop()
        self._ending = loop.create_future()
        self._watch_signals(loop)
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # it has nothing to say that we do not
        await self._hub.open()
        if self._single is not None:
            self._single.start(self._slots)
        self._app.state = "serving"
        servers = [self._http_server(self._app, self._settings.bidirectional)]
        running = [loop.create_task(servers[0].serve(sockets=[listener]))]
        if metrics_listener is not None:
            servers.append(self._http_server(self._metrics_app, False))
            running.append(loop.create_task(servers[1].serve(sockets=[metrics_listener])))
        looking = loop.create_task(self._look(servers))
        await asyncio.wait([self._ending, *running], return_when=asyncio.FIRST_COMPLETED)
        looking.cancel()
        await self._drain(servers, running)
        self._hub.close()
        return self._code

    def _http_server(self, app: Any, bidirectional: bool) -> HttpServer:
        settings = self._settings
        protocol = type("Protocol", (HttpProtocol,), {"settings": settings})
        sockets: Any = "none"
        if bidirectional:
            from launcher.serving.conversation import SocketProtocol

            sockets = SocketProtocol
        config = uvicorn.Config(
            app,
            http=protocol,
            loop="none",
            ws=sockets,
            ws_max_size=settings.max_payload or sys.maxsize,
            ws_per_message_deflate=False,
            # While a handler has not taken what was said, no pong is read either. The platform pings by itself.
            ws_ping_interval=None,
            ws_ping_timeout=None,
            lifespan="off",
            interface="asgi3",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=int(settings.keep_alive_s),
            timeout_graceful_shutdown=max(1, int(settings.drain_s)),
            backlog=_BACKLOG,
        )
        return HttpServer(config)

    def _watch_signals(self, loop: asyncio.AbstractEventLoop) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop, number)
        if os.getpid() == 1:
            self._reap(loop)

    def _reap(self, loop: asyncio.AbstractEventLoop) -> None:
        """An init process is given the orphans of its container: those that the guardian, which has the workers', has
        not (of a command that somebody runs in it, for one). By the clock, since uvloop keeps SIGCHLD to itself.
        """
        try:
            while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                if ended.si_pid == self.processes.guardian.pid:
                    break
                os.waitpid(ended.si_pid, os.WNOHANG)
        except ChildProcessError:
            pass  # the guardian has been waited for, and there is no other
        loop.call_later(_REAP_S, self._reap, loop)

    def _stop(self, number: int) -> None:
        name = signal.Signals(number).name
        if self._app.state.startswith("ending"):
            self.say(f"{name} again: ending now")
            self._code = 128 + number
            for pool in self.pools():
                for worker in pool.workers.values():
                    worker.kill("the server was told twice to end")
            return
        in_hand = sum(pool.in_hand + pool.waiting for pool in self.pools())
        self.say(f"{name}: ending after {in_hand} requests in hand, {self._settings.drain_s:g} s at most")
        self._app.state = "ending"
        self._end(0)

    def _end(self, code: int) -> None:
        if self._ending is not None and not self._ending.done():
            self._code = code
            self._ending.set_result(None)

    async def _drain(self, servers: list[HttpServer], running: list[asyncio.Task[None]]) -> None:
        """Ends listening, then answers what is in hand, then ends the workers."""
        end_s = time.monotonic() + self._settings.drain_s
        for server in servers:
            server.should_exit = True
        await asyncio.wait(running)
        left = sum(pool.in_hand + pool.waiting for pool in self.pools())
        if left and not self._code:
            self.say(f"{left} requests were not answered in time")
            self._code = 128 + signal.SIGTERM
        limit_s = _KILL_S if left else max(_KILL_S, end_s - time.monotonic())
        await asyncio.gather(*(pool.close(limit_s) for pool in self.pools()))

    def _guardian_lost(self) -> None:
        os.write(2, b"[launcher] error: the guardian process has ended, and every worker with it\n")
        self._app.state = "ending"
        for pool in self.pools():
            pool.lose_all("every worker has ended")
        self._end(EXIT_INTERNAL)

    async def _look(self, servers: list[HttpServer]) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(_LOOK_S)
            now_s = loop.time()
            for server in servers:
                for connection in list(server.server_state.connections):
                    if isinstance(connection, HttpProtocol):
                        connection.look(now_s)
            if self._settings.max_worker_mb:
                for pool in self.pools():
                    pool.look_at_memory()
            for session_id, home in self._sessions.expired() if self._sessions is not None else ():
                for pool in self.pools():
                    pool.close_session(home, session_id)  # only one of them has it

    async def _metrics_app(self, scope: Any, receive: Any, send: Any) -> None:
        found = scope["path"] == "/metrics" and scope["method"] == "GET"
        body = (
            self._metrics.text(self.pools()) if found else error_body(404, TYPES[404], "only GET /metrics is here", "")
        )
        kind = b"text/plain; version=0.0.4; charset=utf-8" if found else b"application/json"
        headers = [(b"content-type", kind), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200 if found else 404, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def raise_file_limit() -> None:
    """Lets the server hold as many connections as the system allows it to."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
