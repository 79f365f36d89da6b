"""A request on its way from the server to a worker, and its answer on the way back.

All of it lives in the server's event loop. What comes in pieces has a window each way (``wire.WINDOW_BYTES``), so that
neither a slow client nor a slow handler fills the memory.
"""

from __future__ import annotations

import asyncio
import collections
import time

from launcher.serving import wire
from launcher.serving.failures import InvocationError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from launcher.serving.link import Worker


class Reply:
    """An answer. ``headers``: names and values in turn. ``stream`` gives the rest of a body that comes in pieces."""

    __slots__ = ("body", "content_type", "headers", "status", "stream")

    def __init__(
        self, status: int, content_type: str, headers: tuple[str, ...], body: bytes, stream: Stream | None
    ) -> None:
        self.status, self.content_type, self.headers, self.body, self.stream = (
            status,
            content_type,
            headers,
            body,
            stream,
        )


class Stream:
    """The pieces of an answer, as they come from the worker; what is taken makes room for more.

    ``on_late`` is called when its time is over, with pieces that the client may never read still on their way.
    """

    def __init__(self, entry: Entry) -> None:
        self.on_late: Callable[[], object] | None = None
        self._entry = entry
        self._pieces: collections.deque[tuple[bytes, bool]] = collections.deque()
        self._over = False
        self._error = ""
        self._more = asyncio.Event()

    async def next(self) -> tuple[bytes, bool] | None:
        """The next piece, and whether it is a text of a conversation; None: that was all.

        Raises:
            InvocationError: the answer broke off.
        """
        while not self._pieces:
            if self._over:
                if self._error:
                    raise InvocationError(500, self._error)
                return None
            self._more.clear()
            await self._more.wait()
        piece, text = self._pieces.popleft()
        worker = self._entry.worker
        if worker is not None and not self._over:
            worker.send(wire.CREDIT, self._entry.id, len(piece) + wire.PIECE_BYTES)
        return piece, text

    async def whole(self) -> bytes:
        """All pieces together.

        Raises:
            InvocationError: the answer broke off.
        """
        pieces = []
        while (next_one := await self.next()) is not None:
            pieces.append(next_one[0])
        return b"".join(pieces)

    def put(self, piece: bytes, text: bool) -> None:
        """From the worker."""
        self._pieces.append((piece, text))
        self._more.set()

    def end(self, error: str = "") -> None:
        """No more comes."""
        self._over, self._error = True, error
        self._more.set()


class Talk:
    """What the client of a conversation says, on its way to the worker: no more than the handler has room for."""

    def __init__(self) -> None:
        self._room = wire.WINDOW_BYTES
        self._more = asyncio.Event()

    async def say(self, entry: Entry, message: bytes, text: bool) -> None:
        """Sends a message when the handler has taken enough of those before."""
        while self._room <= 0:
            self._more.clear()
            await self._more.wait()
        self._room -= len(message) + wire.PIECE_BYTES
        if entry.worker is not None:
            entry.worker.send(wire.MESSAGE, entry.id, int(text), body=message)

    def taken(self, length: int) -> None:
        """The handler has taken messages that were counted with so many bytes."""
        self._room += length
        self._more.set()


class Entry:
    """A request on its way. ``texts`` as in a REQUEST frame; ``key``: requests with the same may be batched.
    ``home``: serial of the only worker that may answer it, the one with its session; 0: any. ``talk``: of a
    conversation; it has a stream as soon as the handler has begun.
    """

    __slots__ = (
        "ahead",
        "body",
        "future",
        "given_up",
        "home",
        "id",
        "key",
        "queued_s",
        "sent_s",
        "stream",
        "talk",
        "texts",
        "timer",
        "worker",
    )

    def __init__(self, texts: tuple[str, ...], body: bytes, key: tuple[str, str], home: int = 0) -> None:
        self.texts, self.body, self.key, self.home = texts, body, key, home
        self.id = 0
        self.future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self.worker: Worker | None = None
        self.stream: Stream | None = None
        self.talk: Talk | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.queued_s = self.sent_s = time.monotonic()
        self.given_up = False
        self.ahead = False  # sent to a worker that has another one in hand

    def fail(self, error: InvocationError) -> None:
        """Ends it with an error, or its pieces, if they have begun."""
        if self.stream is not None:
            self.stream.end(str(error))
        elif not self.future.done():
            self.future.set_exception(error)
        self.over()

    def over(self) -> None:
        """Nothing more is to come, or to be waited for."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
