"""What torch.distributed gets back from a collective: works, futures and errors of torch's kinds."""

from __future__ import annotations

from collections import deque

import torch
import torch.distributed as dist

from launcher.errors import CollectiveError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from datetime import timedelta
    from typing import Any

    from launcher.collectives.executor import Pending


# Before 2.7 torch's C++ side held a work without its Python half, and waited for an empty one, perhaps more than once
# (coalesced tensors share a work). There the last ones are kept, without tensors once they have been waited for.
_kept: deque[CollectiveWork] | None = (
    deque(maxlen=4096) if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 7) else None
)


class CollectiveBackendError(CollectiveError, dist.DistBackendError):  # type: ignore[misc]
    """A CollectiveError that ``except torch.distributed.DistBackendError`` (and ``RuntimeError``) catches too."""


def translate(error: CollectiveError) -> CollectiveBackendError:
    """The same error as one of torch's."""
    if isinstance(error, CollectiveBackendError):
        return error
    return CollectiveBackendError(str(error), error.reason, error.rank, error.host, error.operation, error.sequence)


class CollectiveWork(dist.Work):  # type: ignore[misc]
    """A collective that the communication thread carries out. Waiting for it may carry it out in the waiting thread."""

    def __init__(self, pending: Pending, tensors: list[Any]) -> None:
        super().__init__()
        self._pending = pending
        self._tensors = tensors
        self._future: Any = None
        if _kept is not None:
            _kept.append(self)

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Blocks until the result is in place; a ``timeout`` of 0 is none, as everywhere in torch.

        Raises:
            CollectiveBackendError: the collective failed, or (reason ``timeout``) was not over in time; in the second
                case it goes on.
        """
        seconds = timeout.total_seconds() if timeout else 0.0
        try:
            self._pending.wait(seconds if seconds > 0 else None)
        except CollectiveError as error:
            raise translate(error) from None
        except TimeoutError:
            raise CollectiveBackendError(
                f"wait(timeout={seconds:g} s): the collective was not over in time; it goes on, and so can its wait",
                "timeout",
            ) from None
        if _kept is not None:
            self._tensors = []
        return True

    def synchronize(self) -> None:
        """As :meth:`wait`: there is no stream to put between."""
        self.wait()

    block_current_stream = synchronize

    def is_completed(self) -> bool:
        """Whether it is over, well or not."""
        return self._pending.done()

    def is_success(self) -> bool:
        """Whether it is over and did not fail."""
        return self._pending.done() and self._pending.exception() is None

    def exception(self) -> BaseException | None:
        """What it failed with; None while it runs and when it did not fail."""
        return _error(self._pending) if self._pending.done() else None

    def result(self) -> list[Any]:
        """The tensors with the result; waits for it."""
        tensors = self._tensors
        self.wait()
        return tensors

    def get_future(self) -> Any:
        """A ``torch.futures.Future`` of :meth:`result`, completed by the thread that carries the collective out."""
        if self._future is None:
            inner: Any = torch.futures.Future()
            # Future.set_exception is for waiters in Python only; DDP's reducer waits in C++, and sees what a callback
            # raised.
            self._future = inner.then(_value)
            tensors = self._tensors
            self._pending.add_done_callback(lambda pending: inner.set_result(_error(pending) or tensors))
        return self._future

    def source_rank(self) -> int:
        """Of a receive from any rank; this is none."""
        return -1

    _source_rank = source_rank


def _error(pending: Pending) -> BaseException | None:
    error = pending.exception()
    return translate(error) if isinstance(error, CollectiveError) else error


def _value(future: Any) -> Any:
    value = future.value()
    if isinstance(value, BaseException):
        raise value
    return value


class CompletedWork(dist.Work):  # type: ignore[misc]
    """The work of a collective that was over when its call returned. One for all such calls."""

    def wait(self, timeout: timedelta | None = None) -> bool:
        """True."""
        return True

    def synchronize(self) -> None:
        """Nothing."""

    block_current_stream = synchronize

    def is_completed(self) -> bool:
        """True."""
        return True

    is_success = is_completed

    def exception(self) -> None:
        """None: a call that failed has raised."""

    def result(self) -> list[Any]:
        """No tensors: the call was not asked for a work, its buffers hold the result."""
        return []

    def get_future(self) -> Any:
        """A completed future of :meth:`result`."""
        future: Any = torch.futures.Future()
        future.set_result(self.result())
        return future

    def source_rank(self) -> int:
        """Of a receive from any rank; this is none."""
        return -1

    _source_rank = source_rank


COMPLETED = CompletedWork()
