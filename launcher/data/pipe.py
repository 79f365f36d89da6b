"""Channels in Pipe mode: a stream for each epoch, which one rank of each host reads for all of them.

A byte of a FIFO comes once, so there is no index, no random order and no second look: records are mixed inside a window
that moves along, and to resume is to read up to the place again. The steps of an epoch are the same on all ranks: one
is only handed out when it is complete on all of them (native/data/dealer.h).
"""

from __future__ import annotations

import atexit
import ctypes
import json
import os
import weakref

from launcher import _data
from launcher.collectives.group import join
from launcher.collectives.place import read_place
from launcher.data.channel import Place, find_place
from launcher.data.epochs import check_number
from launcher.data.fields import Field, Ragged, Sparse, source_fields
from launcher.data.manifest import attribute_fields, check_wrapped
from launcher.data.meeting import meet
from launcher.data.order import TAILS
from launcher.data.steps import Agreement
from launcher.data.stream_format import Framing, decoder_of, format_of, framing_of, with_parameters
from launcher.errors import DataError, LauncherError, UsageError
from launcher.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    from launcher.collectives.group import Group
    from launcher.collectives.place import Place as RankPlace

    FieldTuple = tuple[str, int, int, tuple[int, ...]]
    Maker = Callable[..., Any] | None

STATE_VERSION = 1
TIMEOUT_S = 600.0
WINDOW_RECORDS = 8192
WINDOW_BYTES = 256 << 20
RING_BYTES = 8 << 20
_UINT8, _MIN, _MAX = 5, 2, 3  # numbers of a DType and of two ReduceOps (native/include/launcher/elements.h)


class StreamOptions(Record):
    """What a stream is opened with.

    Attributes:
        batch_size: rows of a rank's batch.
        format: a name of launcher.data.formats.FORMATS; ``auto``: by the channel's content type.
        fields: what to read of each record, as for files.
        attributes: of an augmented manifest, see launcher.data.manifest.
        tail: ``drop``, ``pad`` or ``short``.
        shuffle: ``none``, or ``window`` (``auto``): records are mixed inside a window.
        window, window_bytes: its size, in records and at most in bytes.
        seed: of the mixing.
        on_bad: ``raise``, or ``substitute``: the last good record of the rank stands in for a bad one, masked.
        bad_limit: bad records of an epoch before they are an error after all; 0: none.
        compression: ``none`` or ``gzip``, as the channel's CompressionType.
        timeout_s: how long to wait for the FIFO, its writer, and more bytes, in seconds.
        ring_bytes: memory between the reader and each rank.
    """

    batch_size: int
    format: str = "auto"
    fields: Any = None
    attributes: Sequence[str] | Mapping[str, object] | None = None
    tail: str = "drop"
    shuffle: str = "auto"
    window: int = WINDOW_RECORDS
    window_bytes: int = WINDOW_BYTES
    seed: int = 0
    on_bad: str = "raise"
    bad_limit: int = 0
    compression: str = "none"
    timeout_s: float = TIMEOUT_S
    ring_bytes: int = RING_BYTES


class Presentation(Record):
    """How batches are shown; see open_stream()."""

    makers: Callable[[Sequence[Field]], list[Maker]]
    change: Callable[[_data.StreamDecoder], _data.StreamDecoder] | None = None
    reuse: bool = False
    record_numbers: bool = False


def numpy_makers(fields: Sequence[Field]) -> list[Maker]:
    """What makes the columns of a batch: NumPy arrays as they are, else a Ragged or Sparse of them."""
    makers: list[Maker] = []
    for field in fields:
        if field.kind == "fixed":
            makers.append(None)
        elif field.kind == "ragged":
            makers.append(Ragged)
        else:
            shape = field.shape
            makers.append(lambda values, offsets, keys, shape=shape: Sparse(values, offsets, keys, shape))
    return [*makers, None, None]


def open_stream(
    channel: str | os.PathLike[str] | Place,
    options: StreamOptions,
    *,
    rank: int | None = None,
    world_size: int | None = None,
    makers: Callable[[Sequence[Field]], list[Maker]] = numpy_makers,
    change: Callable[[_data.StreamDecoder], _data.StreamDecoder] | None = None,
    reuse: bool = False,
    record_numbers: bool = False,
    **format_options: Any,
) -> Stream:
    """Opens a channel in Pipe mode; all ranks call it, with the same arguments. Nothing is read before begin().

    Args:
        channel: its name, or its place: the FIFO of epoch 0 is ``<path>_0``.
        rank, world_size: as the launcher says, unless given; then they must be the same.
        makers: what the columns of a batch become, for each field, the mask and the record numbers.
        change: what changes the fields on their way into the batch.
        reuse: the arrays of a batch are those of the one before.
        record_numbers: with the number of each record in the stream, key "record" (int64; -1: padding).
        format_options: of the format, as for files.

    Raises:
        UsageError: no such channel, a channel of files, an option that makes no sense, ranks with other arguments.
        CollectiveError: a rank did not come.
    """
    place = channel if isinstance(channel, Place) else find_place(channel)
    if place.mode != "Pipe":
        raise UsageError(f"channel {place.name or place.path!r} is in {place.mode} mode; it is no stream")
    _check(options)
    presentation = Presentation(makers, change, reuse, record_numbers)
    return Stream(place, options, _ranks(rank, world_size), presentation, format_options)


def _check(options: StreamOptions) -> None:
    allowed: dict[str, tuple[object, ...]] = {
        "tail": TAILS,
        "shuffle": ("auto", "none", "window"),
        "on_bad": ("raise", "substitute"),
        "compression": ("none", "gzip"),
    }
    for name, values in allowed.items():
        if getattr(options, name) not in values:
            hint = "; a stream can only be mixed inside a window" if name == "shuffle" else ""
            hint = "; what is damaged can not be left out of a stream" if name == "on_bad" else hint
            raise UsageError(
                f"{name} is {getattr(options, name)!r}; expected {', '.join(map(repr, values))} in Pipe mode{hint}"
            )
    for name in ("batch_size", "window", "window_bytes", "ring_bytes"):
        check_number(name, getattr(options, name), 1)
    if not options.timeout_s > 0:
        raise UsageError(f"timeout_s is {options.timeout_s}; expected more than 0 seconds")


def _ranks(rank: int | None, world_size: int | None) -> RankPlace | None:
    place = read_place(os.environ)
    own = (place.rank, place.world_size) if place else (0, 1)
    given = (own[0] if rank is None else rank, own[1] if world_size is None else world_size)
    if given != own:
        raise UsageError(
            f"rank {given[0]} of {given[1]} was asked for, but this is rank {own[0]} of {own[1]}: a stream is shared "
            "by the ranks that the launcher started"
        )
    return place


class Stream:
    """A channel in Pipe mode. ``begin(epoch)``, then ``next_batch()`` until it gives None.

    Attributes:
        fields: of the records; () before the first epoch has begun.
        epoch, position: where it stands; position in records of the stream, the same on all ranks.
    """

    def __init__(
        self,
        place: Place,
        options: StreamOptions,
        ranks: RankPlace | None,
        presentation: Presentation,
        format_options: Mapping[str, Any],
    ) -> None:
        self._place, self._options, self._ranks = place, options, ranks
        self._presentation, self._format_options = presentation, dict(format_options)
        self.fields: tuple[Field, ...] = ()
        self.epoch, self._base, self._began = 0, 0, False
        self._attributes: list[FieldTuple] = []
        if options.attributes is not None:
            check_wrapped(place)
            self._format = "recordio"
            self._attributes = attribute_fields(options.attributes)
            framing = Framing("recordio", len(self._attributes))
        else:
            self._format = format_of(place, options.format)
            framing = framing_of(self._format, with_parameters(place, format_options), options.fields)
        local = ranks.local_ranks if ranks else (0,)
        number = _next_number(self.name)
        self._hosts, firsts = self._meet_hosts(local[0])
        self._shared = self._hosts == 1 or place.distribution != "ShardedByS3Key"
        self._world = (ranks.world_size if ranks else 1) if self._shared else len(local)
        self._reads = ranks is None or ranks.rank == local[0]
        self._group: Group | None = None
        self._group_name, self._firsts, self._runs = f"data/{self.name}/stream/{number}", firsts, 0
        outlets = meet(
            f"{self.name} {number}",
            ranks,
            self._arguments(),
            ring_bytes=options.ring_bytes,
            timeout_s=options.timeout_s,
        )
        try:
            who = f"rank {local[0]}" + (f" on {ranks.host}" if ranks else "")
            self._receiver = _data.StreamReceiver(
                outlets.ring,
                outlets.socket,
                options.batch_size,
                who,
                substitute=options.on_bad == "substitute",
                bad_limit=options.bad_limit,
            )
            self._dealer: _data.StreamDealer | None = None
            if self._reads:
                self._dealer = _data.StreamDealer(
                    list(outlets.dealer_rings),
                    list(outlets.dealer_sockets),
                    framing.kind,
                    framing.unit,
                    framing.text,
                    batch=options.batch_size,
                    world=self._world,
                    first=local[0] if self._shared else 0,
                    tail=TAILS.index(options.tail),
                    window=1 if options.shuffle == "none" else options.window,
                    window_bytes=options.window_bytes,
                    seed=options.seed,
                    agree=self._agree if self._hosts > 1 else None,
                )
        finally:
            outlets.close()
        _streams.add(self)

    # --- epochs ---------------------------------------------------------------------------------------------------

    def begin(self, epoch: int, position: int = 0) -> None:
        """Opens the epoch's FIFO and waits for its first record; all ranks begin the same epochs in the same order.

        What is left of the epoch before it is not read. ``position``: records to leave out, of this epoch's.

        Raises:
            DataError: the FIFO does not come, its writer stalls, or what comes is none of the format.
            CollectiveError: the rank that reads is gone, or at another epoch; a host did not come.
        """
        file = f"{self._place.path}_{epoch}"
        self._leave()
        self._runs += 1
        if self._dealer is not None:
            if self._hosts > 1:
                try:
                    self._group = self._join_hosts()
                except LauncherError as error:
                    self._dealer.refuse(file, str(error))  # the others' waits end with the reason
                    raise
            gzip = self._options.compression == "gzip"
            self._dealer.start(file, self.name, epoch, self._options.timeout_s, position, gzip)
        self.epoch, self._base, self._began = epoch, position, True
        with self._telling_hosts():
            sample = self._receiver.begin(epoch, file)
            if not self.fields:
                decoder = (
                    _data.attributes_decoder(self._attributes, str(self._format_options.get("dialect", "auto")))
                    if self._attributes
                    else decoder_of(self._format, self._place, self._options.fields, self._format_options, sample, file)
                )
                shown = self._presentation
                if shown.change is not None:
                    decoder = shown.change(decoder)
                self.fields = source_fields(decoder.fields)
                mask = self._options.tail == "pad" or self._options.on_bad == "substitute"
                self._receiver.set_decoder(
                    decoder, shown.makers(self.fields), mask=mask, numbers=shown.record_numbers, reuse=shown.reuse
                )

    def next_batch(self) -> dict[str, Any] | None:
        """The rank's next batch; None at the end of the epoch, which all ranks meet after the same number of steps.

        Raises:
            DataError: a record is damaged (with the FIFO, the place in the stream, and the number), the stream ends
                inside one, or its writer stalls.
            CollectiveError: the rank that reads has ended, or has left the epoch.
        """
        with self._telling_hosts():
            batch: dict[str, Any] | None = self._receiver.next()
        return batch

    def too_short(self) -> DataError:
        """The error for an epoch without a step."""
        file, rows = f"{self._place.path}_{self.epoch}", self._world * self._options.batch_size
        return DataError(
            f"{file}: the stream has fewer records than the {rows} of one step of {self._world} ranks; use a smaller "
            "batch_size, or tail='pad' or 'short', or allow_empty=True",
            "mismatch",
            file,
        )

    @property
    def name(self) -> str:
        """The channel's."""
        return self._place.name or self._place.path

    @property
    def steps(self) -> int:
        """Batches of this epoch that were handed out."""
        return self._receiver.steps if self._began else 0

    @property
    def position(self) -> int:
        """Records of the epoch that the ranks have been given, of the whole stream of this host."""
        return self._base + self.steps * self._world * self._options.batch_size

    def close(self) -> None:
        """Closes the stream. On the rank that reads: for the others of its host as well."""
        self._leave()
        if self._dealer is not None:
            self._dealer.close()

    def statistics(self) -> dict[str, Any]:
        """``batches``, ``records``, ``substituted``, ``first_bad`` and ``waited_s`` (seconds) of this rank.

        On the rank that reads also ``stream``: ``records`` and ``bytes`` read, ``input_s`` and ``room_s`` waited for
        the writer and for ranks.
        """
        found = self._receiver.statistics()
        if self._dealer is not None:
            found["stream"] = self._dealer.statistics()
        return found

    # --- state ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, object]:
        """Where the stream stands: whole numbers and texts, the same on all ranks."""
        return {
            "version": STATE_VERSION,
            "pipe": self._place.name,
            "epoch": self.epoch,
            "position": self.position,
            "hosts": self._hosts,
            "shared": int(self._shared),
            **self._mixing(),
        }

    def load_state_dict(self, state: Mapping[str, object]) -> tuple[int, int]:
        """The epoch and position to :meth:`begin` with, to go on where ``state`` was saved.

        Raises:
            UsageError: it is no such state; the number of hosts or the mixing is another: records would be lost.
        """
        if state.get("version") != STATE_VERSION or "pipe" not in state:
            raise UsageError(f"the state is {dict(state)!r}; expected what state_dict() of a stream gave")
        now = {"hosts": self._hosts, "shared": int(self._shared), **self._mixing()}
        for name, value in now.items():
            if state.get(name) != value:
                raise UsageError(
                    f"channel {self._place.name!r}: the state has {name} {state.get(name)!r}, here it is {value!r}; a "
                    "stream goes on only as it was begun: begin another epoch instead"
                )
        epoch, position = state.get("epoch"), state.get("position")
        if not isinstance(epoch, int) or not isinstance(position, int) or epoch < 0 or position < 0:
            raise UsageError(f"the state has epoch {epoch!r} and position {position!r}; expected whole numbers")
        return epoch, position

    def _mixing(self) -> dict[str, object]:
        if self._options.shuffle == "none":
            return {"window": 1}
        return {
            "window": self._options.window,
            "window_bytes": self._options.window_bytes,
            "seed": self._options.seed,
        }

    # --- parts ----------------------------------------------------------------------------------------------------

    def _arguments(self) -> dict[str, object]:
        options = self._options
        return {
            "channel": self._place.name or self._place.path,
            "batch_size": options.batch_size,
            "format": self._format,
            "attributes": [list(field) for field in self._attributes],
            "tail": options.tail,
            "compression": options.compression,
            **self._mixing(),
        }

    def _meet_hosts(self, first: int) -> tuple[int, list[int]]:
        """The number of hosts, and the first rank of each."""
        ranks = self._ranks
        if ranks is None or len(ranks.local_ranks) == ranks.world_size:
            return 1, [first]
        agreement = Agreement(f"{self.name}/pipe", ranks.rank, ranks.world_size, timeout_s=self._options.timeout_s)
        mine = json.dumps({"first": first, "ranks": len(ranks.local_ranks), **self._arguments()}, sort_keys=True)
        table = [json.loads(value) for value in agreement.exchange(mine.encode())]
        for rank, other in enumerate(table):
            for name, value in other.items():
                if name != "first" and value != table[0][name]:
                    what = "ranks on its host" if name == "ranks" else name
                    raise UsageError(
                        f"channel {self._place.name!r}: {what} is {value!r} for rank {rank} and {table[0][name]!r} for "
                        "rank 0; a stream needs the same everywhere"
                    )
        firsts = sorted({int(other["first"]) for other in table})
        return len(firsts), firsts

    def _join_hosts(self) -> Group:
        """The first ranks of the hosts, for one epoch: what another one has left unfinished is none of its."""
        own = self._firsts.index(self._ranks.local_ranks[0]) if self._ranks else 0
        name, timeout_s = f"{self._group_name}/{self._runs}", self._options.timeout_s
        return join(name, own, self._hosts, ranks=self._firsts, timeout_s=timeout_s, leg="sockets")

    def _agree(self, step: int, ready: bool) -> bool:
        """Whether all hosts (drop), or any (pad, short), have records for a step. Called by the dealer's thread."""
        assert self._group is not None
        value = ctypes.c_uint8(int(ready))
        op = _MIN if self._options.tail == "drop" else _MAX
        self._group.allreduce(ctypes.addressof(value), ctypes.addressof(value), 1, _UINT8, op)
        return bool(value.value)

    def _telling_hosts(self) -> _Telling:
        return _Telling(self._group)

    def _leave(self) -> None:
        # The others' waits for this host end with the group: before the dealer's thread is joined, which may be in one.
        group, self._group = self._group, None
        if group is not None:
            group.close()
        if self._dealer is not None:
            self._dealer.stop()


class _Telling:
    """What goes wrong on the rank that reads ends the other hosts' waits for it."""

    def __init__(self, group: Group | None) -> None:
        self._group = group

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, LauncherError) and self._group is not None:
            self._group.abort(str(error))


_streams: weakref.WeakSet[Stream] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Ends threads before the interpreter is taken down."""
    for stream in list(_streams):
        stream.close()


_numbers: dict[tuple[int, str], int] = {}


def _next_number(name: str) -> int:
    """How often this process has opened the channel: the same on all ranks, which open it in the same order."""
    key = (os.getpid(), name)
    _numbers[key] = _numbers.get(key, -1) + 1
    return _numbers[key]
