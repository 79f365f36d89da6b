"""A worker whose handler is async: an event loop, and as many requests at a time as the server sends."""

from __future__ import annotations

import asyncio
import socket

from launcher.serving import wire
from launcher.serving.failures import InvocationError
from launcher.serving.handler import as_bytes
from launcher.serving.worker import Worker, answer_texts, broken_off, error_frame, is_text, request_of, told

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from typing import Any

    from launcher.serving.handler import Answer, Handler, Request, WorkerPlan
    from launcher.serving.worker import Channel


class _Stream:
    """What is known of an answer in pieces: the client's room for more; what it says itself; None: it has gone."""

    def __init__(self, conversation: bool = False) -> None:
        self.conversation = conversation
        self.room = wire.WINDOW_BYTES
        self.more = asyncio.Event()
        self.said: asyncio.Queue[wire.Frame | None] = asyncio.Queue()  # bounded by WINDOW_BYTES, in the server


class Concurrent(Worker, asyncio.Protocol):
    """Answers requests as tasks of ``loop``."""

    def __init__(self, plan: WorkerPlan, handler: Handler, channel: Channel, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(plan, handler)
        self._loop, self._channel = loop, channel
        self._splitter = wire.Splitter(max_body=1 << 40)
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._batches: set[int] = set()  # the tasks that answer more than one request
        self._streams: dict[int, _Stream] = {}
        self._together: list[Request] = []
        self._missing = 0  # of the requests that are to be answered together
        self._ending = loop.create_future()
        self._transport: Any = None

    def run(self) -> None:
        """Until the server says STOP, and all is answered, or the server has gone."""
        self._loop.run_until_complete(self._run())

    async def _run(self) -> None:
        sock = socket.socket(fileno=self._channel.socket.fileno())  # the channel keeps it, for a child to lose
        self._transport, _ = await self._loop.create_connection(lambda: self, sock=sock)
        await self._ending
        if self._tasks:
            await asyncio.wait(self._tasks.values())

    # ---- asyncio's protocol

    def data_received(self, data: bytes) -> None:
        """Takes what the server sent."""
        for frame in self._splitter.feed(data):
            self._take(frame)

    def connection_lost(self, exc: Exception | None) -> None:
        """The server has gone."""
        for task in self._tasks.values():
            task.cancel()
        self._end()

    def _end(self) -> None:
        if not self._ending.done():
            self._ending.set_result(None)

    # ---- frames

    def _take(self, frame: wire.Frame) -> None:
        if frame.kind == wire.REQUEST:
            if self._missing:
                self._together.append(request_of(frame))
                self._missing -= 1
                if not self._missing:
                    requests, self._together = self._together, []
                    self._start(self._answer_together(requests), [request.id for request in requests])
            else:
                request = request_of(frame)
                self._start(self._converse(request) if frame.number else self._answer(request), [request.id])
        elif frame.kind == wire.TOGETHER:
            self._missing = frame.number
        elif frame.kind == wire.CREDIT and frame.id in self._streams:
            stream = self._streams[frame.id]
            stream.room += frame.number
            stream.more.set()
        elif frame.kind in (wire.MESSAGE, wire.MESSAGES_END) and frame.id in self._streams:
            self._streams[frame.id].said.put_nowait(frame if frame.kind == wire.MESSAGE else None)
        elif frame.kind == wire.CANCEL and frame.id in self._tasks and frame.id not in self._batches:
            self._tasks[frame.id].cancel()
        elif frame.kind == wire.CLOSE_SESSION:
            self.sessions.pop(frame.texts[0], None)
        elif frame.kind == wire.STOP:
            self._end()

    def _start(self, work: Any, ids: list[int]) -> None:
        task = self._loop.create_task(work)
        self._tasks[ids[0]] = task
        if len(ids) > 1:  # one of them can not be given up alone
            self._batches.add(ids[0])
        task.add_done_callback(lambda done: self._finished(done, ids))

    def _finished(self, task: asyncio.Task[None], ids: list[int]) -> None:
        self._tasks.pop(ids[0], None)
        self._batches.discard(ids[0])
        if task.cancelled():  # before it began, or it would have answered
            for id in ids:
                self._send(wire.ERROR, id, 499, ("ClientGone", "the client has gone", ""))
        if not task.cancelled() and task.exception() is not None:
            self._transport.abort()  # a fault of this module: the server sees a worker that died
            raise task.exception()  # type: ignore[misc]

    def _send(self, kind: int, id: int, number: int = 0, texts: tuple[str, ...] = (), body: bytes = b"") -> None:
        self._channel.child_ends()
        head = wire.pack(kind, id, number, texts, len(body))
        if len(body) < 1 << 16:
            self._transport.write(head + body)
        else:
            self._transport.writelines((head, body))

    # ---- answers

    async def _answer(self, request: Request) -> None:
        try:
            answer = await self.handler.answer(request, self.context(request))
        except (InvocationError, SystemExit, KeyboardInterrupt) as error:
            self._fail(request, error)
            return
        except asyncio.CancelledError:
            self._fail(request, InvocationError(499, "the client has gone, or the handler cancelled itself"))
            return
        await self._reply(request, answer)

    async def _converse(self, request: Request) -> None:
        stream = _Stream(conversation=True)
        try:
            answer = self.handler.converse(self._messages(request, stream), self.context(request))
        except (InvocationError, SystemExit, KeyboardInterrupt) as error:
            self._fail(request, error)
            return
        self._send(wire.BEGIN, request.id, answer.status, answer_texts(answer))
        await self._send_pieces(request, answer, stream)
        self._tell_counts()

    async def _messages(self, request: Request, stream: _Stream) -> AsyncIterator[str | bytes]:
        while (frame := await stream.said.get()) is not None:
            self._send(wire.TAKEN, request.id, len(frame.body) + wire.PIECE_BYTES)
            yield frame.body.decode() if frame.number else frame.body

    async def _answer_together(self, requests: list[Request]) -> None:
        contexts = [self.context(request) for request in requests]
        try:
            results = await self.handler.answer_together(requests, contexts)
        except (SystemExit, KeyboardInterrupt) as error:
            results = [told(error)] * len(requests)
        for request, result in zip(requests, results, strict=True):
            if isinstance(result, InvocationError):
                self._fail(request, result)
            else:
                await self._reply(request, result)

    def _tell_counts(self) -> None:
        if self.metrics.counts:
            self._send(wire.COUNTS, 0, texts=self.take_counts())

    def _fail(self, request: Request, error: BaseException) -> None:
        self._tell_counts()
        self._send(wire.ERROR, request.id, *error_frame(request, told(error)))

    async def _reply(self, request: Request, answer: Answer) -> None:
        self._tell_counts()
        if not answer.stream:
            self._send(wire.ANSWER, request.id, answer.status, answer_texts(answer), answer.body)
            return
        await self._send_pieces(request, answer, _Stream())

    async def _send_pieces(self, request: Request, answer: Answer, stream: _Stream) -> None:
        self._streams[request.id] = stream
        begun = stream.conversation
        try:
            async for piece in _pieces(answer.body):
                if not begun:
                    # Only now: what fails before the first piece is an error like any other.
                    self._send(wire.BEGIN, request.id, answer.status, answer_texts(answer))
                    begun = True
                await self._send_piece(request, stream, as_bytes(piece, answer.content_type), is_text(piece))
            if not begun:
                self._send(wire.BEGIN, request.id, answer.status, answer_texts(answer))
            self._send(wire.END, request.id)
        except asyncio.CancelledError:
            await _close(answer.body)
            self._send(wire.END, request.id, 1, ("the client has gone",))
        except (Exception, SystemExit) as error:
            if begun:
                self._send(wire.END, request.id, 1, (broken_off(request, told(error)),))
            else:
                self._fail(request, error)
        finally:
            del self._streams[request.id]

    async def _send_piece(self, request: Request, stream: _Stream, piece: bytes, text: bool) -> None:
        if not piece and not stream.conversation:
            return
        self._send(wire.PIECE, request.id, int(text), body=piece)
        stream.room -= len(piece) + wire.PIECE_BYTES
        while stream.room <= 0:
            stream.more.clear()
            await stream.more.wait()


async def _pieces(body: Any) -> Any:
    if hasattr(body, "__anext__"):
        async for piece in body:
            yield piece
    else:
        for piece in body:
            yield piece
            await asyncio.sleep(0)  # other requests, too


async def _close(body: Any) -> None:
    if hasattr(body, "aclose"):
        await body.aclose()
    elif hasattr(body, "close"):
        body.close()
