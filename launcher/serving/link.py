"""The server's end of one worker process: its state, what it has in hand, what it says."""

from __future__ import annotations

import asyncio
import collections
import time

from launcher.serving import wire
from launcher.serving.exchange import Reply, Stream
from launcher.serving.failures import InvocationError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from launcher.serving.exchange import Entry
    from launcher.serving.pool import Pool
    from launcher.serving.processes import Death

LOADING, READY, GONE = "loading", "ready", "gone"
# From the end of a worker's process to that of its connection, and the other way round.
_LAST_WORDS_S = 0.5


class Worker(asyncio.Protocol):
    """The server's end of one worker process."""

    def __init__(self, pool: Pool, slot: int, number: int, serial: int) -> None:
        self.pool, self.slot, self.number, self.serial = pool, slot, number, serial
        self.state = LOADING
        self.capacity = 0
        # In the order in which they were sent.
        self.entries: dict[int, Entry] = {}
        self.bound: collections.deque[Entry] = collections.deque()  # wait for this worker: it has their sessions
        self.reason = ""  # why it was killed, if by us
        self.retiring = False
        self._transport: asyncio.Transport | None = None
        self._silent = False  # its connection has ended
        self._death: Death | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.loading_timer: asyncio.TimerHandle | None = None

    # ---- its connection

    def connected(self, transport: asyncio.Transport) -> None:
        """It has come, and proven who it is."""
        self._transport = transport
        self._silent = False

    def send(self, kind: int, id: int = 0, number: int = 0, texts: tuple[str, ...] = (), body: bytes = b"") -> None:
        """Sends a frame, if it is still there."""
        if self._transport is None or self._transport.is_closing():
            return
        head = wire.pack(kind, id, number, texts, len(body))
        if len(body) < 1 << 16:
            self._transport.write(head + body if body else head)
        else:
            self._transport.writelines((head, body))

    def take(self, frame: wire.Frame) -> None:
        """A frame from it."""
        kind = frame.kind
        if kind == wire.READY:
            self.state, self.capacity = READY, max(frame.number, 1)
            self._cancel_loading()
            self.pool.is_ready(self, frame.texts[0] if frame.texts else "")
            return
        if kind == wire.FAILED:
            self._cancel_loading()
            self.pool.could_not_load(self, frame)
            return
        if kind == wire.COUNTS:
            self.pool.count(frame.texts)
            return
        entry = self.entries.get(frame.id)
        if entry is None:
            return  # of a request that was given up meanwhile
        if kind == wire.ANSWER:
            self._reply(entry, frame, None)
            self._finish(entry)
        elif kind == wire.ERROR:
            kind_text, message, traceback, *headers = (*frame.texts, "", "", "")[: max(3, len(frame.texts))]
            error = InvocationError(
                frame.number, message, kind_text, tuple(zip(headers[::2], headers[1::2], strict=True))
            )
            error.traceback = traceback
            entry.fail(error)
            self._finish(entry)
        elif kind == wire.BEGIN:
            entry.stream = Stream(entry)
            self.pool.extend(entry)
            self._reply(entry, frame, entry.stream)
        elif kind == wire.PIECE and entry.stream is not None:
            entry.stream.put(frame.body, bool(frame.number))
        elif kind == wire.TAKEN and entry.talk is not None:
            entry.talk.taken(frame.number)
        elif kind == wire.END and entry.stream is not None:
            entry.stream.end(frame.texts[0] if frame.number and frame.texts else "")
            self._finish(entry)

    def _reply(self, entry: Entry, frame: wire.Frame, stream: Stream | None) -> None:
        content_type, *headers = frame.texts or ("",)
        if not entry.future.done():
            entry.future.set_result(Reply(frame.number, content_type, tuple(headers), frame.body, stream))

    def _finish(self, entry: Entry) -> None:
        del self.entries[entry.id]
        entry.over()
        now_s = time.monotonic()
        if entry.stream is None:  # the client's time is in those that have one
            self.pool.took(now_s - entry.sent_s)
        for following in self.entries.values():
            if following.ahead:  # it has it in hand now
                following.ahead, following.sent_s, following.body = False, now_s, b""
            break
        self.pool.answered()

    def is_quick(self) -> bool:
        """Whether it has one request in hand, of the kind that is soon over."""
        if self.state != READY or self.retiring or not self.capacity == len(self.entries) == 1:
            return False
        entry = next(iter(self.entries.values()))
        return entry.talk is None and entry.stream is None

    def not_begun(self) -> list[Entry]:
        """The requests that it was sent ahead."""
        return [entry for entry in self.entries.values() if entry.ahead]

    def take_back(self, entry: Entry) -> None:
        """Lets it forget a request that it has not begun."""
        del self.entries[entry.id]
        entry.worker, entry.ahead = None, False
        self.send(wire.CANCEL, entry.id)

    def _cancel_loading(self) -> None:
        if self.loading_timer is not None:
            self.loading_timer.cancel()
            self.loading_timer = None

    def disconnected(self) -> None:
        """It has said all that it will say."""
        self._transport = None
        self._silent = True
        if self._death is not None:
            self._bury()
        elif self.state != GONE:
            # It is ending; if it is not, it is of no use any more.
            reason = "it closed its connection to the server"
            self._later(_LAST_WORDS_S, self.kill, reason)

    def died(self, death: Death) -> None:
        """Its process has ended. What it has said before may still be on its way."""
        self._death = death
        if self._silent:
            self._bury()
        else:
            self._later(_LAST_WORDS_S, self._bury)

    def bury(self, death: Death) -> None:
        """Its process has ended, and nothing more will be heard of it."""
        self._death = death
        self._bury()

    def _later(self, delay_s: float, act: Callable[..., None], *arguments: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(delay_s, act, *arguments)

    def _bury(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._death is not None and self.state != GONE:
            self.pool.processes.release(self.slot)
            self.pool.died(self, self._death)

    def has_room(self) -> bool:
        """Whether it can take a request now."""
        return self.state == READY and not self.retiring and len(self.entries) < self.capacity

    def kill(self, reason: str) -> None:
        """Ends it at once."""
        if self.state != GONE and not self.reason:
            self.reason = reason
            self.pool.processes.kill(self.slot)

    def gone(self, death: Death) -> None:
        """Its process has ended: its requests fail."""
        self.state = GONE
        self._cancel_loading()
        if self._transport is not None:
            self._transport.abort()
        self.pool.again(self.not_begun())
        what = self.reason or f"the worker that had this request {death.text}"
        status = 507 if death.out_of_memory else 500
        for entry in list(self.entries.values()):
            entry.fail(InvocationError(status, what, "InsufficientMemory" if death.out_of_memory else "WorkerDied"))
        self.entries.clear()
