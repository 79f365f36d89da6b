"""The loader of a channel in Pipe mode: what launcher.data.Loader is where there are no files."""

from __future__ import annotations

import sys

from launcher import _data
from launcher.data.pipe import Stream, StreamOptions, numpy_makers, open_stream
from launcher.data.progress import reporter
from launcher.data.transforms import change, split
from launcher.errors import UsageError
from launcher.record import replace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from typing import Any

    from launcher.data.channel import Place
    from launcher.data.fields import Field

# What a Loader of files takes: what a stream has no use for, and what it can not have.
_OF_FILES = ("threads", "ring", "ring_limit", "pin", "on_reshard")
_REFUSED = ("extent", "lanes", "store", "device", "device_cache")


class PipeLoader:
    """Iterating it gives one epoch of batches: dicts of arrays, a row for each record. See launcher.data.Loader.

    What is different: the records of an epoch come once, in the order of the stream or mixed inside a window; their
    number is known when the stream has ended, so there is no ``len()``; a state is good for the same number of hosts
    only, and going on from it reads the epoch up to it again. Each epoch is a stream of its own, so the platform must
    have begun as many; leaving one early is fine.

    Args:
        place: the channel.
        options: as StreamOptions has them.
        rank, world_size, transform, output, reuse, record_numbers, progress: as of Loader.
        strict: a state that can not be gone on from is an error, else a warning and the epoch from its begin.
        allow_empty: an epoch without a step is no error.
        format_options: of the format.
    """

    def __init__(
        self,
        place: Place,
        options: StreamOptions,
        *,
        rank: int | None = None,
        world_size: int | None = None,
        transform: Any = None,
        output: str = "numpy",
        reuse: bool = False,
        record_numbers: bool = False,
        progress: bool = True,
        strict: bool = True,
        allow_empty: bool = False,
        **format_options: Any,
    ) -> None:
        self._native, self._functions = split(transform)
        self._options, self._strict, self._allow_empty = options, strict, allow_empty
        makers: Callable[[Sequence[Field]], list[Any]] = numpy_makers
        if output == "torch":
            from launcher.data.torch_data import makers_of

            makers = makers_of
        elif output != "numpy":
            raise UsageError(f"output is {output!r}; expected 'numpy', 'torch'")
        self._stream: Stream = open_stream(
            place,
            options,
            rank=rank,
            world_size=world_size,
            makers=makers,
            change=self._change if self._native else None,
            reuse=reuse,
            record_numbers=record_numbers,
            **format_options,
        )
        self._report = reporter() if progress else None
        self._epoch, self._position = 0, 0  # of the iteration that comes next
        self._under_way = False
        self._turn = 0
        self._resumed = self._closed = self._said_bad = False

    def _change(self, decoder: _data.StreamDecoder) -> _data.StreamDecoder:
        cursor = _data.stream_cursor(decoder)
        return _data.cursor_decoder(cursor, change(cursor, self._native))

    @property
    def batch_size(self) -> int:
        """Rows of a batch."""
        return self._options.batch_size

    @property
    def fields(self) -> tuple[Field, ...]:
        """The fields of a batch; () before the first record of the first epoch has come."""
        return self._stream.fields

    @property
    def epoch(self) -> int:
        """The epoch that is under way, or else the one that comes next."""
        return self._epoch

    def statistics(self) -> dict[str, Any]:
        """Counts since the loader was made; see Stream.statistics()."""
        return self._stream.statistics()

    # --- where it stands ----------------------------------------------------------------------------------------------

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is this epoch from its begin, or from where a state that was loaded stands in it."""
        if not isinstance(epoch, int) or isinstance(epoch, bool) or epoch < 0:
            raise UsageError(f"epoch is {epoch!r}; expected a whole number of at least 0")
        if not (self._resumed and epoch == self._epoch):
            self._stop(epoch, 0)

    def state_dict(self) -> dict[str, object]:
        """Where the loader stands: after the batch that was given last. The same on all ranks."""
        position = self._stream.position if self._under_way else self._position
        return {**self._stream.state_dict(), "epoch": self._epoch, "position": position}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Goes on where ``state`` was taken, at the same number of hosts: the epoch is read up to there again.

        Raises:
            UsageError: it is no state of this channel, or one that can not be gone on from here (``strict``).
        """
        try:
            epoch, position = self._stream.load_state_dict(state)
        except UsageError as error:
            found = state.get("epoch")
            if self._strict or not isinstance(found, int):
                raise
            print(f"[launcher] {error}; the epoch begins anew (strict=False)", file=sys.stderr)
            epoch, position = found, 0
        self._stop(epoch, position)
        self._resumed = True

    def _stop(self, epoch: int, position: int) -> None:
        """Ends the iteration under way."""
        self._turn += 1
        self._epoch, self._position, self._under_way, self._resumed = epoch, position, False, False

    # --- iterating ----------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """One epoch, or the rest of it after load_state_dict(). An iteration under way ends; the next is another epoch.

        Raises:
            DataError, CollectiveError: as Stream.begin(), and at the batch as Stream.next_batch().
        """
        self._check_open()
        if self._under_way:
            self._stop(self._epoch + 1, 0)
        self._stop(self._epoch, self._position)
        self._stream.begin(self._epoch, self._position)
        self._under_way = True
        return self._batches(self._turn)

    def _batches(self, turn: int) -> Iterator[dict[str, Any]]:
        stream, report, rows = self._stream, self._report, self._options.batch_size
        while self._turn == turn:
            batch = stream.next_batch()
            if batch is None:
                if stream.steps == 0 and self._position == 0 and not self._allow_empty:
                    raise stream.too_short()
                self._say_bad()
                self._stop(self._epoch + 1, 0)
                return
            for function in self._functions:
                batch = function(batch)
            if report is not None:
                report(rows)
            yield batch
        raise UsageError("this iteration of the loader ended when another one began, or the loader was closed")

    def _say_bad(self) -> None:
        seen = self._stream.statistics()
        if seen["substituted"] and not self._said_bad:
            self._said_bad = True
            print(
                f"[launcher] {seen['substituted']} records could not be read, and others stand in for them (on_bad="
                f"'substitute', mask False); the first: {seen['first_bad']}",
                file=sys.stderr,
            )

    # --- the end ------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Ends the stream; on the rank that reads, its host's other ranks' too. Batches that are kept stay valid."""
        if not self._closed:
            self._position = self._stream.position if self._under_way else self._position
            self._stop(self._epoch, self._position)
            self._closed = True
            self._say_bad()
            self._stream.close()

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("the loader is closed")

    def __enter__(self) -> PipeLoader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"PipeLoader({self._stream.name}, epoch {self.epoch})"


def make(
    place: Place,
    batch_size: int,
    *,
    format: str = "auto",
    fields: Any = None,
    window: int | None = None,
    timeout_s: float | None = None,
    **arguments: Any,
) -> PipeLoader:
    """A PipeLoader from what a Loader was called with.

    Raises:
        UsageError: an argument that makes no sense for a stream.
    """
    for name in _OF_FILES:
        arguments.pop(name, None)
    for name in _REFUSED:
        if arguments.pop(name, None):
            raise UsageError(f"{name} is for channels of files; this one is in Pipe mode")
    options = StreamOptions(batch_size, format=format, fields=fields)
    given = {name: arguments.pop(name) for name in StreamOptions._fields if name in arguments}
    if window is not None:
        given["window"] = window
    if timeout_s is not None:
        given["timeout_s"] = timeout_s
    return PipeLoader(place, replace(options, **given), **arguments)
