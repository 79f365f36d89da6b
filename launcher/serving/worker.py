"""A worker process: loads the model, then answers what the server sends it.

It has a socket to the server and nothing else to do with it: what the user's code prints goes to the log. A handler
without ``async`` is called in this, the only thread; one with it has an event loop, and several requests at a time.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal and socket import enum and selectors: the start would wait
import _socket
import os
import sys
import time

from launcher.errors import LauncherError
from launcher.serving import wire
from launcher.serving.context import Context, Metrics
from launcher.serving.failures import InvocationError
from launcher.serving.handler import Handler, Request, WorkerPlan, as_bytes, as_failure, log, run

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from launcher.serving.handler import Answer

PLAN_VARIABLE = "LAUNCHER_SERVE_WORKER"
_READ_BYTES = 1 << 18


class Channel:
    """The blocking end of the server's socket."""

    def __init__(self, sock: Any) -> None:
        self._socket = sock
        self._splitter = wire.Splitter(max_body=1 << 40)  # the server has looked at the size
        self._frames: list[wire.Frame] = []
        self._pid = os.getpid()
        # A handler may fork: its child must neither answer nor take what is another's.
        os.register_at_fork(after_in_child=self._lose)

    @property
    def socket(self) -> Any:
        """The socket itself."""
        return self._socket

    def _lose(self) -> None:
        """In a child: the same number is the end of another socket, whoever holds it (an event loop, say)."""
        ends = _socket.socketpair()
        os.dup2(ends[0].fileno(), self._socket.fileno())
        for end in ends:
            end.close()

    def take(self) -> wire.Frame | None:
        """The next frame; None when the server has gone."""
        while not self._frames:
            piece = self._socket.recv(_READ_BYTES)
            if not piece:
                return None
            self._frames = self._splitter.feed(piece)
        return self._frames.pop(0)

    def take_wanted(self) -> wire.Frame | None:
        """As :meth:`take`, without a request that was taken back before it was begun: that is answered so."""
        while True:
            if self._frames:
                self.waiting()  # what came while the last request was answered may take the next one back
            frame = self.take()
            if frame is None or frame.kind != wire.REQUEST:
                return frame
            back = [other for other in self._frames if other.kind == wire.CANCEL and other.id == frame.id]
            if not back:
                return frame
            self._frames.remove(back[0])
            self.send(wire.ERROR, frame.id, 499, ("ClientGone", "the client has gone", ""))

    def waiting(self) -> bool:
        """Whether :meth:`take` would not wait. Reads what there is."""
        try:
            piece = self._socket.recv(_READ_BYTES, _socket.MSG_DONTWAIT)
        except BlockingIOError:
            return bool(self._frames)
        self._frames += self._splitter.feed(piece)
        return bool(self._frames) or not piece

    def put_back(self, frames: list[wire.Frame]) -> None:
        """Keeps frames for later, before those that came after them."""
        self._frames[:0] = frames

    def send(self, kind: int, id: int = 0, number: int = 0, texts: tuple[str, ...] = (), body: bytes = b"") -> None:
        """Sends a frame. A small body goes with its head, in one piece."""
        head = wire.pack(kind, id, number, texts, len(body))
        if len(body) <= _READ_BYTES:
            self._socket.sendall(head + body)
        else:
            self._socket.sendall(head)
            self._socket.sendall(body)

    def child_ends(self) -> None:
        """Ends a child that a handler has forked and that came back out of it: it is no worker."""
        if os.getpid() != self._pid:
            os._exit(0)


class Worker:
    """What both kinds of loop have in common."""

    def __init__(self, plan: WorkerPlan, handler: Handler) -> None:
        self.handler = handler
        self.sessions: dict[str, dict[str, Any]] = {}
        self.metrics = Metrics()
        self._properties = {
            "model_dir": plan.model_dir,
            "model_name": plan.model_name,
            "gpu_id": plan.gpu,
            "batch_size": plan.batch_size,
            "server_name": Context.server_name,
            "server_version": plan.server_version,
        }

    def context(self, request: Request | None = None) -> Context:
        """For ``request``; None: for loading."""
        if request is None:
            return Context(self._properties, metrics=self.metrics)
        session = self.sessions.setdefault(request.session_id, {}) if request.session_id else None
        return Context(self._properties, request.request_id, request.headers, request.session_id, session, self.metrics)

    def take_counts(self) -> tuple[str, ...]:
        """Names and numbers of what the user has counted since it was asked last."""
        counts, self.metrics.counts = self.metrics.counts, {}
        return tuple(text for name, value in counts.items() for text in (name, repr(value)))


def request_of(frame: wire.Frame) -> Request:
    """The request that a REQUEST frame has."""
    request_id, content_type, accept, session_id, *headers = frame.texts
    return Request(frame.id, request_id, content_type, accept, session_id, tuple(headers), frame.body)


def answer_texts(answer: Answer) -> tuple[str, ...]:
    """Content type, and the headers' names and values."""
    if not answer.headers:
        return (answer.content_type,)
    return (answer.content_type, *(text for pair in answer.headers.items() for text in pair))


def error_frame(request: Request, failure: InvocationError) -> tuple[int, tuple[str, ...]]:
    """Status and texts of an ERROR; a failure of the code is also told to the log, with its traceback."""
    if failure.status >= 500:
        log(f"request {request.request_id}: {failure}\n{failure.traceback}".rstrip())
    pairs = (text for pair in failure.headers for text in pair)
    return failure.status, (failure.kind, str(failure), failure.traceback, *pairs)


class Blocking(Worker):
    """One request, or one batch, after the other."""

    def __init__(self, plan: WorkerPlan, handler: Handler, channel: Channel) -> None:
        super().__init__(plan, handler)
        self._channel = channel

    def run(self) -> None:
        """Until the server says STOP or has gone."""
        channel = self._channel
        while (frame := channel.take_wanted()) is not None and frame.kind != wire.STOP:
            if frame.kind == wire.REQUEST and frame.number:
                self._converse(request_of(frame))
            elif frame.kind == wire.REQUEST:
                self._answer(request_of(frame))
            elif frame.kind == wire.TOGETHER:
                self._answer_together(frame.number)
            elif frame.kind == wire.CLOSE_SESSION:
                self.sessions.pop(frame.texts[0], None)
            # CREDIT and CANCEL of an answer that has ended meanwhile

    def _answer(self, request: Request) -> None:
        try:
            answer = run(self.handler.answer(request, self.context(request)))
        except (InvocationError, SystemExit, KeyboardInterrupt, RuntimeError) as error:
            self._fail(request, error)
            return
        self._send(request, answer)

    def _converse(self, request: Request) -> None:
        stream = Stream(self._channel, request, conversation=True)
        try:
            answer = self.handler.converse(stream.messages(), self.context(request))
        except (InvocationError, SystemExit, KeyboardInterrupt, RuntimeError) as error:
            self._fail(request, error)
            return
        stream.begin(answer)
        self._send_pieces(request, answer, stream)
        self._tell_counts()

    def _answer_together(self, count: int) -> None:
        frames = [frame for frame in (self._channel.take() for _ in range(count)) if frame is not None]
        requests = [request_of(frame) for frame in frames]
        try:
            results = run(self.handler.answer_together(requests, [self.context(request) for request in requests]))
        except (SystemExit, KeyboardInterrupt, RuntimeError) as error:
            results = [told(error)] * len(requests)
        for request, result in zip(requests, results, strict=True):
            if isinstance(result, InvocationError):
                self._fail(request, result)
            else:
                self._send(request, result)

    def _fail(self, request: Request, error: BaseException) -> None:
        self._tell_counts()
        self._channel.send(wire.ERROR, request.id, *error_frame(request, told(error)))

    def _tell_counts(self) -> None:
        self._channel.child_ends()
        if self.metrics.counts:
            self._channel.send(wire.COUNTS, texts=self.take_counts())

    def _send(self, request: Request, answer: Answer) -> None:
        self._tell_counts()
        if not answer.stream:
            self._channel.send(wire.ANSWER, request.id, answer.status, answer_texts(answer), answer.body)
            return
        self._send_pieces(request, answer, Stream(self._channel, request))

    def _send_pieces(self, request: Request, answer: Answer, stream: Stream) -> None:
        try:
            for piece in answer.body:
                self._channel.child_ends()
                if not stream.begun:
                    # Only now: what fails before the first piece is an error like any other.
                    stream.begin(answer)
                if not stream.send(as_bytes(piece, answer.content_type), text=is_text(piece)):
                    getattr(answer.body, "close", _nothing)()  # map and the like have none
                    break
        except (Exception, SystemExit) as error:
            if stream.begun:
                self._channel.send(wire.END, request.id, 1, (broken_off(request, told(error)),))
            else:
                self._fail(request, error)
            return
        if not stream.begun:
            stream.begin(answer)
        self._channel.send(wire.END, request.id)


class Stream:
    """An answer in pieces, of which so many may be under way as the client has room for; and what the client says."""

    def __init__(self, channel: Channel, request: Request, conversation: bool = False) -> None:
        self._channel, self._request, self._conversation = channel, request, conversation
        self._room = wire.WINDOW_BYTES
        self._there = True  # the client
        self._said: list[wire.Frame] = []
        self._more = True  # to be said
        self._others: list[wire.Frame] = []
        self.begun = False

    def begin(self, answer: Answer) -> None:
        """Sends status and headers."""
        self.begun = True
        self._channel.send(wire.BEGIN, self._request.id, answer.status, answer_texts(answer))

    def send(self, piece: bytes, text: bool) -> bool:
        """Sends a piece, after waiting for room. Returns whether the client is still there."""
        if not piece and not self._conversation:  # without one, the end of the answer
            return True
        self._channel.send(wire.PIECE, self._request.id, int(text), body=piece)
        self._room -= len(piece) + wire.PIECE_BYTES
        while self._there and (self._room <= 0 or self._channel.waiting()):
            self._hear()
        self._put_back()
        return self._there

    def messages(self) -> Iterator[str | bytes]:
        """What the client says, until it has gone."""
        while True:
            while self._more and not self._said:
                self._hear()
            self._put_back()
            if not self._said:
                return
            frame = self._said.pop(0)
            self._channel.send(wire.TAKEN, self._request.id, len(frame.body) + wire.PIECE_BYTES)
            yield frame.body.decode() if frame.number else frame.body

    def _hear(self) -> None:
        frame = self._channel.take()
        if frame is None:
            self._there = self._more = False
        elif frame.id != self._request.id or frame.kind == wire.REQUEST:
            self._others.append(frame)
        elif frame.kind == wire.CANCEL:
            self._there = self._more = False
        elif frame.kind == wire.CREDIT:
            self._room += frame.number
        elif frame.kind == wire.MESSAGE:
            self._said.append(frame)
        elif frame.kind == wire.MESSAGES_END:
            self._more = False

    def _put_back(self) -> None:
        self._channel.put_back(self._others)
        self._others = []


def is_text(piece: object) -> bool:
    """Whether a message is sent as text: what is not bytes is text, or becomes JSON."""
    return not isinstance(piece, (bytes, bytearray, memoryview))


def broken_off(request: Request, failure: InvocationError) -> str:
    """Tells the log of an answer that ended by an error after it had begun; returns what happened."""
    log(f"request {request.request_id}: the answer broke off: {failure}\n{failure.traceback}".rstrip())
    return str(failure)


def _nothing() -> None:
    return


def told(error: BaseException) -> InvocationError:
    """``error`` as the client is told."""
    if isinstance(error, SystemExit):
        return InvocationError(500, f"the handler called sys.exit({error.code!r})")
    if isinstance(error, KeyboardInterrupt):
        return InvocationError(500, "the handler was interrupted")
    return as_failure(error)


def main() -> None:
    """Loads and serves; ends the process."""
    import json

    told_by_server = json.loads(os.environ.pop(PLAN_VARIABLE))
    plan = WorkerPlan(**told_by_server["plan"])
    _signal.signal(_signal.SIGINT, _signal.SIG_IGN)  # Ctrl-C is the server's
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    sock.connect(told_by_server["socket"])
    channel = Channel(sock)
    channel.send(wire.HELLO, told_by_server["slot"], texts=(told_by_server["token"],))
    handler = Handler(plan)
    loop: Any = None
    begin = time.monotonic()
    try:
        handler.find()
        if handler.waits:
            import asyncio

            loop = asyncio.new_event_loop()
            asyncio.set_event_loop(loop)
        _set_up_logging(plan.log_level)
        loading = handler.load(Worker(plan, handler).context())
        line = loop.run_until_complete(loading) if loop else run(loading)
    except BaseException as error:  # whatever the user's code does: the server tells it, and ends or tries again
        channel.child_ends()
        _tell_failure(channel, error)
        _flush()
        os._exit(error.exit_code if isinstance(error, LauncherError) else 1)
    channel.child_ends()
    took_ms = (time.monotonic() - begin) * 1000
    capacity = plan.concurrency if handler.asynchronous else 1
    channel.send(wire.READY, number=capacity, texts=(f"{line}; {took_ms:.0f} ms",))
    handler.prepare()
    try:
        if handler.asynchronous:
            from launcher.serving.async_worker import Concurrent

            Concurrent(plan, handler, channel, loop).run()
        else:
            Blocking(plan, handler, channel).run()
    except (BrokenPipeError, ConnectionResetError):
        pass  # the server has gone, and we with it
    _flush()
    os._exit(0)


def _tell_failure(channel: Channel, error: BaseException) -> None:
    import traceback

    code = error.exit_code if isinstance(error, LauncherError) else 1
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1] if frames else None
    place = f"{os.path.basename(last.filename)}:{last.lineno}, in {last.name}" if last else ""
    if isinstance(error, SystemExit):
        message = f"the code called sys.exit({error.code!r})"
    else:
        message = " ".join(str(error).split())
    text = "" if isinstance(error, LauncherError) else "".join(traceback.format_exception(error))
    channel.send(wire.FAILED, number=code, texts=(type(error).__name__, message, place, text))


def _set_up_logging(level: str) -> None:
    """The level that was asked for, for user's code that logs and has set up nothing itself."""
    logging = sys.modules.get("logging")
    if logging is not None and not logging.root.handlers:
        logging.basicConfig(level=level.upper())


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            continue  # closed, by the user or with the server


if __name__ == "__main__":
    main()
