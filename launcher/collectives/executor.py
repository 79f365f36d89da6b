"""Collectives beside the training thread: one queue per group, worked off in order."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
import weakref
from _thread import allocate_lock
from collections import deque

import launcher._native  # noqa: F401  # first: what it does at the end of the process must come after what is done here
from launcher.errors import CollectiveError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

# What the end of the interpreter waits for work that nobody waited for, before it gives the group up.
_EXIT_S = 10.0
# After the group has been given up, its call comes back at once.
_JOIN_S = 5.0


class Pending:
    """A piece of work that was given to an :class:`Executor`. Methods may be called from any thread."""

    __slots__ = ("__weakref__", "_callbacks", "_done", "_error", "_executor", "_function", "_value", "_waiters")

    def __init__(self, executor: Executor, function: Callable[[], Any]) -> None:
        self._executor = executor
        self._function = function
        self._done = False
        self._value: Any = None
        self._error: BaseException | None = None
        self._waiters: list[Any] | None = None
        self._callbacks: list[Callable[[Pending], object]] | None = None

    def done(self) -> bool:
        """Whether the work is over, well or not."""
        return self._done

    def wait(self, timeout: float | None = None) -> Any:
        """Blocks until the work is over and returns what its function returned.

        Work that nobody has begun is done here, with all that stands before it, in the calling thread. With a
        ``timeout`` (seconds) it is left to the executor's thread.

        Raises:
            TimeoutError: ``timeout`` has passed; the work goes on.
            BaseException: what the function raised, or what failed before it in the same executor.
        """
        if not self._done:
            self._executor._finish(self, timeout)
        if self._error is not None:
            raise self._error
        return self._value

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Blocks like :meth:`wait`; returns the error in place of raising it, None when there is none."""
        if not self._done:
            self._executor._finish(self, timeout)
        return self._error

    def add_done_callback(self, callback: Callable[[Pending], object]) -> None:
        """Calls ``callback(self)`` when the work is over: at once, or later in the thread that ends the work.

        A callback that raises makes all later work fail with its error, as work that raises does.
        """
        with self._executor._state:
            if not self._done:
                if self._callbacks is None:
                    self._callbacks = []
                self._callbacks.append(callback)
                return
        callback(self)

    def _end(self, value: Any, error: BaseException | None) -> None:
        self._value, self._error = value, error
        self._function = _nothing  # and with it the buffers
        with self._executor._state:
            self._done = True
            waiters, callbacks = self._waiters, self._callbacks
            self._waiters = self._callbacks = None
        for waiter in waiters or ():
            waiter.release()
        for callback in callbacks or ():
            try:
                callback(self)
            except BaseException as raised:  # kept for every later piece of work; see add_done_callback
                self._executor._fail(raised)


class Executor:
    """Runs the collectives of one process group in the order of :meth:`submit`, one at a time.

    A daemon thread does the work, unless somebody who waits gets to it first: ``submit(work).wait()`` on an idle
    executor costs no change of threads. Once a piece of work has raised, all later work fails with the same error,
    since the ranks no longer agree on what comes next.

    Args:
        name: of the thread.
        abort: is called once with a reason when work has failed with anything but a CollectiveError (the others must
            not wait for this rank then), and when the interpreter ends with work that can not be finished.
    """

    def __init__(self, name: str = "collectives", abort: Callable[[str], object] | None = None) -> None:
        self._name = f"launcher-{name}"
        self._abort = abort
        self._queue: deque[Pending] = deque()
        self._state = allocate_lock()  # of a piece of work: done, waiters, callbacks; and of the thread's start
        self._running = allocate_lock()  # held by the thread that works off the queue
        self._wake = allocate_lock()  # held but while there is news for the thread
        self._wake.acquire()
        self._runner = 0  # the thread that holds _running; it must not wait for itself
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._closed = ""  # why no work is taken any more
        _executors.add(self)

    def submit(self, function: Callable[[], Any]) -> Pending:
        """Queues ``function``. May be called from any thread; from several, their order is the callers' business.

        From inside of work or a callback it is done before this returns, after all that was submitted before.

        Raises:
            CollectiveError: the executor was closed, or belongs to the process that this one was forked from.
        """
        if self._closed:
            raise CollectiveError(self._closed, "closed")
        pending = Pending(self, function)
        if self._runner == threading.get_ident():
            # From a callback: the thread that works off the queue would wait for itself, in ways that are not seen here
            # (a future of torch's, say). What stands before it comes first.
            self._queue.append(pending)
            self._work(pending)
        else:
            self._append(pending)
        return pending

    def run(self, function: Callable[[], Any]) -> Any:
        """Runs ``function`` after all that was submitted, in the calling thread, and returns what it returns.

        The same as ``submit(function).wait()`` at less than half its cost.
        """
        if self._closed:
            raise CollectiveError(self._closed, "closed")
        if self._queue or not self._running.acquire(False):
            return self.submit(function).wait()
        self._runner = threading.get_ident()
        try:
            if self._queue:  # submitted by another thread since
                pending = Pending(self, function)
                self._queue.append(pending)
                self._work(pending)
            elif self._failure is not None:
                raise self._failure
            else:
                try:
                    return function()
                except BaseException as error:
                    self._fail(error)
                    raise
        finally:
            self._runner = 0
            self._running.release()
        return pending.wait()

    def drain(self, timeout: float | None = None) -> None:
        """Blocks until all that was submitted is over; errors are those of the work, and are not raised here.

        Raises:
            TimeoutError: ``timeout`` seconds have passed.
        """
        if self._queue or self._running.locked():
            last = Pending(self, _nothing)
            self._append(last)
            self._finish(last, timeout)

    def close(self, timeout: float | None = None) -> None:
        """Finishes what was submitted and ends the thread. A second call does nothing.

        Raises:
            TimeoutError: work was not finished within ``timeout`` seconds; the group was then given up (``abort``).
        """
        if self._closed:
            return
        self._closed = f"{self._name}: the executor was closed; no work is taken any more"
        _executors.discard(self)
        try:
            self.drain(timeout)
        except TimeoutError:
            self._give_up("this rank stopped waiting for its collectives")
            raise
        finally:
            self._tell()
            if self._thread is not None and self._thread is not threading.current_thread():
                self._thread.join(_JOIN_S)

    def _append(self, pending: Pending) -> None:
        self._queue.append(pending)
        if self._thread is None:
            with self._state:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._loop, name=self._name, daemon=True)
                    self._thread.start()
        self._tell()

    def _tell(self) -> None:
        try:
            self._wake.release()
        except RuntimeError:
            pass  # the thread has been told and has not looked yet

    def _loop(self) -> None:
        while True:
            self._wake.acquire()
            while self._queue:
                with self._running:
                    self._runner = threading.get_ident()
                    try:
                        self._work(None)
                    finally:
                        self._runner = 0
            if self._closed:
                return

    def _finish(self, pending: Pending, timeout: float | None) -> None:
        """Returns when ``pending`` is over."""
        if self._runner == threading.get_ident():
            raise RuntimeError("a piece of work waits for another one of the same executor, which comes after it")
        if timeout is None and self._running.acquire(False):
            self._runner = threading.get_ident()
            try:
                if not pending._done:
                    self._work(pending)
            finally:
                self._runner = 0
                self._running.release()
            if pending._done:
                return
        waiter = allocate_lock()
        waiter.acquire()
        with self._state:
            if pending._done:
                return
            if pending._waiters is None:
                pending._waiters = []
            pending._waiters.append(waiter)
        if not waiter.acquire(timeout=-1 if timeout is None else max(timeout, 0.0)):
            raise TimeoutError(f"{self._name}: work was not finished in {timeout:g} s; it goes on")

    def _work(self, last: Pending | None) -> None:
        """Works off the queue up to ``last``; the caller holds _running."""
        queue = self._queue
        while queue:
            pending = queue.popleft()
            if self._failure is not None:
                pending._end(None, self._failure)
            else:
                try:
                    value = pending._function()
                except BaseException as error:  # not lost: it is raised by wait() of this and all later work
                    self._fail(error)
                    pending._end(None, error)
                else:
                    pending._end(value, None)
            if pending is last:
                return

    def _fail(self, error: BaseException) -> None:
        if self._failure is None:
            self._failure = error
            if not isinstance(error, CollectiveError):
                self._give_up(f"{type(error).__name__}: {error}")

    def _give_up(self, reason: str) -> None:
        abort, self._abort = self._abort, None
        if abort is not None:
            abort(reason)

    def _forked(self) -> None:
        self._closed = (
            f"{self._name}: this process was forked from one that joined a group of collectives; the group stays with "
            "the parent: join another one here, or start this process in another way than fork"
        )
        self._thread = None
        self._queue.clear()
        self._state, self._running = allocate_lock(), allocate_lock()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "failed" if self._failure is not None else f"{len(self._queue)} waiting"
        return f"Executor({self._name.removeprefix('launcher-')!r}, {state})"


def _nothing() -> None:
    pass


_executors: weakref.WeakSet[Executor] = weakref.WeakSet()


def _end_of_process() -> None:
    # A thread that comes back from native code while the interpreter is taken down would take the process with it.
    deadline = time.monotonic() + _EXIT_S
    error = getattr(sys, "last_value", None)  # what ended the program, if it was an error
    for executor in list(_executors):
        if error is not None and (executor._queue or executor._running.locked()):
            executor._give_up(f"{type(error).__name__}: {error}")  # the failure must not wait for other ranks
        try:
            executor.close(max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            pass  # the group was given up; its other ranks have been told


def _after_fork() -> None:
    for executor in list(_executors):
        executor._forked()
    _executors.clear()


atexit.register(_end_of_process)
os.register_at_fork(after_in_child=_after_fork)
