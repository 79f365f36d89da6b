"""One process set's requests on their way: collected, agreed on with the other ranks, carried out.

A thread of its own works off what was asked for asynchronously. A caller that waits does the work itself when nobody
is at it, so a blocking call costs no change of threads.
"""

from __future__ import annotations

import ctypes
import itertools
import sys
import threading
import time
from _thread import allocate_lock

from launcher.collectives.elements import DType
from launcher.errors import CollectiveError, OutputError
from launcher.horovod import negotiation
from launcher.horovod.common.exceptions import HorovodInternalError
from launcher.horovod.negotiation import Signature

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, Protocol

    from launcher.collectives.group import Group
    from launcher.horovod.timeline import Timeline

    class Carrier(Protocol):
        """What knows tensors."""

        def run(self, requests: Sequence[Request], done: Callable[[Request], None]) -> None:
            """Carries out what all ranks have agreed on, in this order, and tells of each when it is done."""

        def stand_in(self, signature: Signature) -> Request:
            """The part of a rank that has joined: zeros, or no rows."""

        def close(self) -> None:
            """Lets go of the group's memory."""


# While ranks wait for different things, each looks again after this long, or at once when something new is asked for.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.0002, 0.02
# What shutdown() gives to work that nobody has waited for, and to a call to come back after the group was given up.
_DRAIN_S, _CLOSE_S = 1.0, 5.0


class Request:
    """One collective that this rank has asked for. ``body`` is the carrier's; ``finish`` makes the caller's result."""

    __slots__ = (
        *("name", "what", "key", "digest", "nbytes", "since_ns", "body", "finish"),
        *("done", "result", "error", "waiters"),
    )

    def __init__(
        self,
        name: str,
        what: tuple[Any, ...],
        body: Any = None,
        finish: Callable[[], Any] | None = None,
        nbytes: int = 0,
    ) -> None:
        self.name, self.what, self.body, self.finish, self.nbytes = name, what, body, finish, nbytes
        self.key = negotiation.key_of(what[0], name)
        self.digest = negotiation.digest_of(what)
        self.since_ns = time.monotonic_ns()
        self.done = False
        self.result: Any = None
        self.error: BaseException | None = None
        self.waiters: list[Any] | None = None

    def attach(self, waiter: Any) -> bool:
        """Has the lock ``waiter`` released when it is done; False when it is already. The channel's lock is held."""
        if not self.done:
            self.waiters = [*(self.waiters or ()), waiter]
        return not self.done

    @property
    def kind(self) -> str:
        """What is asked for: ``allreduce`` and so on."""
        return str(self.what[0])

    @property
    def signature(self) -> Signature:
        """Name and all that must be equal on all ranks."""
        return Signature(self.name, *self.what)


class Channel:
    """This rank's end of a process set.

    Args:
        group: the set's group; the channel closes it.
        ranks: its members as the job numbers them.
        label: for messages and the thread's name.
    """

    def __init__(self, group: Group, ranks: Sequence[int], carrier: Carrier, label: str) -> None:
        self.group, self.ranks, self.label = group, tuple(ranks), label
        self.size = group.size
        self.timeline: Timeline | None = None
        # Requests of this rank that others have not made, as the last exchange of lists told.
        self.lacking: dict[int, list[int]] = {}
        self._carrier = carrier
        self._pending: dict[int, Request] = {}
        self._counters: dict[str, int] = {}
        self._news = threading.Condition(threading.Lock())
        self._fresh = False
        self._pumping = allocate_lock()  # held by the thread that does the work
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._closed = False
        self._join: Request | None = None
        self._joined: frozenset[int] = frozenset()
        self._last_joined = -1
        self._pause_s = _FIRST_PAUSE_S
        self._offer = ctypes.create_string_buffer(negotiation.OFFER_BYTES)
        self._offers = ctypes.create_string_buffer(negotiation.OFFER_BYTES * self.size)
        self._offer_counts = [negotiation.OFFER_BYTES] * self.size

    # ---- for callers

    def next_name(self, kind: str) -> str:
        """A name for a request that was given none: ranks match such requests by their order."""
        with self._news:
            number = self._counters[kind] = self._counters.get(kind, 0) + 1
        return f"{kind}.noname.{number}"

    def submit(self, request: Request, wake: bool = True) -> Request:
        """Takes a request. ``wake`` False: the caller waits for it at once.

        Raises:
            ValueError: one of this kind and name is still being worked on.
            HorovodInternalError: the set has failed or was shut down.
        """
        with self._news:
            if self._failure is not None or self._closed:
                raise self._error()
            if request.key in self._pending:
                raise ValueError(
                    f"{request.kind} {request.name!r} is still being worked on: synchronize() it first, "
                    "or give another name"
                )
            self._pending[request.key] = request
            self._fresh = True
            if wake:
                self._wake()
        return request

    def wait(self, request: Request) -> Any:
        """Blocks until ``request`` is done and returns its result.

        Raises:
            HorovodInternalError: it has failed.
        """
        if not request.done and self._pumping.acquire(False):
            try:
                self._pump(request)
            finally:
                self._pumping.release()
            if self._pending:
                with self._news:
                    self._wake()
        if not request.done:
            waiter = allocate_lock()
            waiter.acquire()
            with self._news:
                self._wake()  # who pumped may have stopped before it saw this request
                attached = request.attach(waiter)
            if attached:
                waiter.acquire()
        if request.error is not None:
            raise request.error
        return request.result

    def join(self) -> int:
        """Takes part with zeros in what others ask for, until all have joined. Returns the rank that came last."""
        request = Request("join", ("join",))
        with self._news:
            if self._failure is not None or self._closed:
                raise self._error()
            self._join = request
            self._fresh = True
        return int(self.wait(request))

    def waiting(self) -> list[Request]:
        """Requests that are not done, oldest first."""
        with self._news:
            return list(self._pending.values())

    def close(self) -> None:
        """Leaves the set. What others still wait for fails there, and what this rank waits for fails here."""
        if self._closed:
            return
        self._drain()
        with self._news:
            self._closed = True
            self._wake()
        reason = f"{self.label}: rank {self.ranks[self.group.rank]} has called shutdown()"
        idle = self._pumping.acquire(False)
        if not idle:  # a call that waits for a rank which may never come
            self.group.abort(reason)
            idle = self._pumping.acquire(timeout=_CLOSE_S)
        self._fail(HorovodInternalError(f"{reason}; call init() before the next collective"))
        if not idle:
            return  # memory is still in use by a call that does not come back: it is left to the end of the process
        self._pumping.release()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(_CLOSE_S)
        self._carrier.close()
        self.group.close()

    def _drain(self) -> None:
        """Gives what all ranks have asked for, and this one did not wait for, the time to be done."""
        waiting = self.waiting()
        if not waiting or self._thread is None:
            return
        waiter = allocate_lock()
        waiter.acquire()
        with self._news:
            attached = waiting[-1].attach(waiter)
        if attached:
            waiter.acquire(timeout=_DRAIN_S)

    def forget(self) -> None:
        """In a forked child: the group stays with the parent."""
        self._closed = True
        self._failure = HorovodInternalError(
            f"{self.label}: this process was forked from a rank; collectives stay with the parent"
        )
        self._pending.clear()
        self._thread = None
        self._news = threading.Condition(threading.Lock())

    # ---- the work

    def _wake(self) -> None:
        """Starts or wakes the thread; the caller holds the lock."""
        if self._thread is None and not self._closed:
            name = f"launcher-horovod-{self.label}"
            self._thread = threading.Thread(target=self._loop, name=name, daemon=True)
            self._thread.start()
        self._news.notify_all()

    def _loop(self) -> None:
        while True:
            with self._news:
                while not self._pending and self._join is None and not self._closed:
                    self._news.wait()
                if self._closed or self._failure is not None:
                    return
            with self._pumping:
                self._pump(None)

    def _pump(self, until: Request | None) -> None:
        """Works until ``until`` is done, or (None) until nothing waits. The caller holds _pumping."""
        while not self._closed and self._failure is None:
            if until.done if until is not None else not (self._pending or self._join):
                return
            try:
                progress = self._round()
            except BaseException as error:  # kept: every request of this set fails with it
                if not isinstance(error, CollectiveError):
                    self.group.abort(f"{type(error).__name__}: {error}")
                self._fail(error)
                if not isinstance(error, Exception):
                    raise
                return
            if progress:
                self._pause_s = _FIRST_PAUSE_S
                continue
            with self._news:
                if not self._fresh:
                    self._news.wait(self._pause_s)
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)

    def _round(self) -> bool:
        """One agreement and what follows from it. Returns whether anything was carried out."""
        with self._news:
            self._fresh = False
            offered = list(itertools.islice(self._pending.values(), negotiation.SLOTS))
            flags = negotiation.JOINED if self._join is not None else 0
            total = len(self._pending)
        if self.size > 1:
            offer = negotiation.encode_offer(flags, [(request.key, request.digest) for request in offered], total)
            ctypes.memmove(self._offer, offer, len(offer))
            self.group.all_gather(
                ctypes.addressof(self._offer), ctypes.addressof(self._offers), self._offer_counts, DType.uint8
            )
            offers = self._offers.raw
            if flags or offers != offer * self.size:
                keys, lists_needed = negotiation.match(offers)
                if lists_needed:
                    return self._exchange()
                offered = [self._pending[key] for key in keys]
        elif flags:
            return self._exchange()
        self.lacking = {}
        self._run(offered)
        return bool(offered)

    def _exchange(self) -> bool:
        """The long way: everybody tells all it waits for."""
        with self._news:
            self._fresh = False
            joined = self._join is not None
            mine = dict(self._pending)
        lists = [negotiation.decode_list(data) for data in self._gather(joined, mine)]
        agreement = negotiation.agree(lists, self.ranks)
        here = frozenset(rank for rank, waiting in zip(self.ranks, lists, strict=True) if waiting.joined)
        if here - self._joined:
            self._last_joined = max(here - self._joined)
        self._joined = here
        self.lacking = agreement.lacking
        for key, reason in agreement.refused.items():
            if key in mine:
                self._complete(mine[key], HorovodInternalError(reason))
        self._run([mine.get(key) or self._carrier.stand_in(what) for key, what in agreement.run.items()])
        if agreement.all_joined:
            self._joined = frozenset()
            with self._news:
                request, self._join = self._join, None
                self._counters.clear()  # ranks that had more data have counted further
            if request is not None:
                request.result = self._last_joined
                self._complete(request)
            return True
        return bool(agreement.run or agreement.refused)

    def _gather(self, joined: bool, mine: dict[int, Request]) -> list[bytes]:
        data = negotiation.encode_list(joined, (request.signature for request in mine.values()))
        size = ctypes.c_int64(len(data))
        sizes = (ctypes.c_int64 * self.size)()
        self.group.all_gather(ctypes.addressof(size), ctypes.addressof(sizes), [1] * self.size, DType.int64)
        lengths = list(sizes)
        if max(lengths) > negotiation.LIST_LIMIT_BYTES:
            raise HorovodInternalError(f"{self.label}: a rank's list of what it waits for takes {max(lengths)} bytes")
        source = ctypes.create_string_buffer(data, len(data))
        target = ctypes.create_string_buffer(sum(lengths))
        self.group.all_gather(ctypes.addressof(source), ctypes.addressof(target), lengths, DType.uint8)
        ends = list(itertools.accumulate(lengths))
        return [target.raw[end - length : end] for end, length in zip(ends, lengths, strict=True)]

    def _run(self, requests: list[Request]) -> None:
        if not requests:
            return
        matched_ns = time.monotonic_ns()

        def done(request: Request) -> None:
            if self.timeline is not None:
                self._trace(request, matched_ns)
            self._complete(request)

        self._carrier.run(requests, done)

    def _trace(self, request: Request, matched_ns: int) -> None:
        assert self.timeline is not None
        try:
            begin_ns = min(request.since_ns, matched_ns)
            self.timeline.add(request.name, request.kind, begin_ns, matched_ns, time.monotonic_ns(), request.nbytes)
        except OutputError as error:
            self.timeline = None
            print(f"[launcher] horovod: no timeline any more: {error}", file=sys.stderr)

    def _complete(self, request: Request, error: BaseException | None = None) -> None:
        request.error = error
        if error is None and request.finish is not None:
            request.result = request.finish()
        request.body = request.finish = None  # and with them the buffers
        with self._news:
            if self._pending.get(request.key) is request:
                del self._pending[request.key]
            request.done = True
            waiters, request.waiters = request.waiters, None
        for waiter in waiters or ():
            waiter.release()

    def _fail(self, cause: BaseException) -> None:
        with self._news:
            if self._failure is None:
                self._failure = cause
            pending = list(self._pending.values())
            if self._join is not None:
                pending.append(self._join)
                self._join = None
            self._news.notify_all()
        for request in pending:
            self._complete(request, self._error())

    def _error(self) -> BaseException:
        """A new error for each caller, with what happened first as its cause."""
        cause = self._failure
        if cause is None:
            return HorovodInternalError(f"{self.label}: shut down; call init() before the next collective")
        if isinstance(cause, HorovodInternalError) and cause.__cause__ is None:
            return HorovodInternalError(str(cause))
        error = HorovodInternalError(f"{self.label}: {cause}")
        error.__cause__ = cause
        return error
