"""What the loaders of files and of streams have in common: one epoch after the other, and where they stand in it."""

from __future__ import annotations

import operator
import sys
from abc import ABC, abstractmethod

from launcher.data.order import MOST
from launcher.data.progress import reporter
from launcher.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any

    from typing_extensions import Self


class Epochs(ABC):
    """Where a loader stands, and its loop over batches. A derived class says where they come from.

    Args:
        batch_size: rows of a batch.
        functions: of a batch, applied one after the other.
        progress: steps and samples are told to the launcher.
    """

    def __init__(self, batch_size: int, functions: Sequence[Callable[[Any], Any]], progress: bool) -> None:
        self._batch_size, self._functions = batch_size, functions
        self._report = reporter() if progress else None
        self._turn = 0  # of the iteration under way: those before it are over
        self._under_way = False
        self._epoch, self._position = 0, 0  # that the iteration under way, or else the next one, begins at
        self._resumed = self._closed = self._said_bad = False

    # --- what it is made of -------------------------------------------------------------------------------------------

    @abstractmethod
    def _begin(self, epoch: int, position: int) -> Callable[[], dict[str, Any] | None]:
        """What gives the batches from there to the end of the epoch, and then None."""

    @abstractmethod
    def _reached(self) -> int:
        """The position of the iteration under way: after the batch that was given last."""

    @abstractmethod
    def _shut(self) -> None:
        """Gives back what the loader holds. Called once."""

    @abstractmethod
    def statistics(self) -> dict[str, Any]:
        """Counts since the loader was made."""

    # --- where it stands ----------------------------------------------------------------------------------------------

    @property
    def batch_size(self) -> int:
        """Rows of a batch."""
        return self._batch_size

    @property
    def epoch(self) -> int:
        """The epoch that is under way, or else the one that comes next."""
        return self._epoch

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is this epoch from its begin, or from where a state that was loaded stands in it."""
        epoch = check_number("epoch", epoch, 0)
        if not (self._resumed and epoch == self._epoch):
            self._stop(epoch, 0)

    def _place(self) -> int:
        return self._reached() if self._under_way else self._position

    def _stop(self, epoch: int, position: int) -> None:
        """Ends the iteration under way; the next one begins there."""
        self._turn += 1
        self._epoch, self._position = epoch, position
        self._under_way = self._resumed = False

    def _resume(self, epoch: int, position: int) -> None:
        self._stop(epoch, position)
        self._resumed = True

    # --- iterating ----------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """One epoch, or the rest of it after load_state_dict(). An iteration under way ends; the next is another epoch.

        Raises:
            DataError, from here or at the batch: a record can not be read, a file was changed. CollectiveError, of a
                stream: another rank is gone.
        """
        self._check_open()
        if self._under_way:
            self._stop(self._epoch + 1, 0)
        self._stop(self._epoch, self._position)
        next_batch = self._begin(self._epoch, self._position)
        self._under_way = True
        return self._batches(next_batch, self._turn)

    def _batches(self, next_batch: Callable[[], dict[str, Any] | None], turn: int) -> Iterator[dict[str, Any]]:
        report, functions, rows = self._report, self._functions, self._batch_size
        while self._turn == turn:
            batch = next_batch()
            if batch is None:
                self._say_bad()
                self._stop(self._epoch + 1, 0)
                return
            for function in functions:
                batch = function(batch)
            if report is not None:
                report(rows)
            yield batch
        raise UsageError("this iteration of the loader ended when another one began, or the loader was closed")

    def _say_bad(self) -> None:
        if self._said_bad:
            return
        seen = self.statistics()
        if seen["substituted"]:
            self._said_bad = True
            print(
                f"[launcher] {seen['substituted']} records could not be read, and others stand in for them (on_bad="
                f"'substitute', mask False); the first: {seen['first_bad']}",
                file=sys.stderr,
            )

    # --- the end ------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Ends threads, or the stream (on the rank that reads, its host's other ranks' too); gives memory back.

        Batches that are kept stay valid. Where it stands can still be asked.
        """
        if not self._closed:
            if self._under_way:
                self._stop(self._epoch, self._reached())
            self._say_bad()
            self._closed = True
            self._shut()

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("the loader is closed")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def check_number(name: str, value: Any, least: int) -> int:
    """``value``, which may be NumPy's, as an int.

    Raises:
        UsageError: it is no whole number from ``least`` to 2**64 - 1.
    """
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = -1
    if not max(least, 0) <= number <= MOST:
        raise UsageError(f"{name} is {value!r}; expected a whole number of at least {least}")
    return number
