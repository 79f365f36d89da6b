"""The loader of a channel in Pipe mode: what launcher.data.Loader is where there are no files."""

from __future__ import annotations

import sys

from launcher import _data
from launcher.data.epochs import Epochs, check_number
from launcher.data.pipe import Stream, StreamOptions, numpy_makers, open_stream
from launcher.data.transforms import change, split
from launcher.errors import UsageError
from launcher.record import replace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    from launcher.data.channel import Place
    from launcher.data.fields import Field

# What a Loader of files takes: what a stream has no use for, and what it can not have.
_OF_FILES = ("threads", "ring", "ring_limit", "ring_wait", "pin", "on_reshard")
_REFUSED = ("extent", "lanes", "store", "device", "device_cache")


class PipeLoader(Epochs):
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
        self._native, functions = split(transform)
        self._strict, self._allow_empty = strict, allow_empty
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
        super().__init__(options.batch_size, functions, progress)

    def _change(self, decoder: _data.StreamDecoder) -> _data.StreamDecoder:
        cursor = _data.stream_cursor(decoder)
        return _data.cursor_decoder(cursor, change(cursor, self._native))

    @property
    def fields(self) -> tuple[Field, ...]:
        """The fields of a batch; () before the first record of the first epoch has come."""
        return self._stream.fields

    def statistics(self) -> dict[str, Any]:
        """Counts since the loader was made; see Stream.statistics()."""
        return self._stream.statistics()

    # --- where it stands ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, object]:
        """Where the loader stands: after the batch that was given last. The same on all ranks."""
        return {**self._stream.state_dict(), "epoch": self._epoch, "position": self._place()}

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
        self._resume(epoch, position)

    # --- what Epochs asks for -----------------------------------------------------------------------------------------

    def _begin(self, epoch: int, position: int) -> Callable[[], dict[str, Any] | None]:
        self._stream.begin(epoch, position)
        return self._next

    def _next(self) -> dict[str, Any] | None:
        stream = self._stream
        batch = stream.next_batch()
        if batch is None and stream.steps == 0 and self._position == 0 and not self._allow_empty:
            raise stream.too_short()
        return batch

    def _reached(self) -> int:
        return self._stream.position

    def _shut(self) -> None:
        self._stream.close()

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
    if str(arguments.get("device")) == "cpu":  # as for files: torch tensors in the host's memory
        del arguments["device"]
        arguments["output"] = "torch"
    for name in _REFUSED:
        if arguments.pop(name, None):
            raise UsageError(f"{name} is for channels of files; this one is in Pipe mode")
    options = StreamOptions(check_number("batch_size", batch_size, 1), format=format, fields=fields)
    given = {name: arguments.pop(name) for name in StreamOptions._fields if name in arguments}
    if window is not None:
        given["window"] = window
    if timeout_s is not None:
        given["timeout_s"] = timeout_s
    return PipeLoader(place, replace(options, **given), **arguments)
