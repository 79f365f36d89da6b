"""The loader: a channel's records in batches, each rank its share of every step."""

from __future__ import annotations

import atexit
import os
import sys
import weakref

from launcher.collectives.place import read_place
from launcher.data.channel import find_place
from launcher.data.epochs import Epochs, check_number
from launcher.data.order import TAILS
from launcher.data.reading import FileReading, Wanted
from launcher.data.transforms import split
from launcher.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    from launcher.collectives.group import Store
    from launcher.data.catalogue import Opened
    from launcher.data.fields import Field

_RING_LIMIT = 64
_RING_WAIT_S = 5.0


class Loader(Epochs):
    """Iterating it gives one epoch of batches: dicts of arrays, a row for each record.

    The order is a function of seed and epoch alone. A step takes ``world_size * batch_size`` positions of it, and each
    rank has its part of them, so every record of an epoch comes exactly once on one of the ranks, however many there
    are. All ranks take the same number of steps.

    A batch's arrays are the loader's memory, lent: they are yours, to be written as well, for as long as you keep them
    or anything made of them without a copy. Then the memory is filled anew.

    Args:
        channel: its name, or a path of a file or folder. In Pipe mode it is a stream, whose loader is
            launcher.data.pipe_loader.PipeLoader: it says what is different.
        batch_size: rows of a batch, on each rank.
        format: of the files; "auto": as the channel's content type, their names and first bytes say.
        fields: names of the fields that are wanted, or, for files that do not say what is in them, the fields
            themselves (see the format).
        shuffle: "full" (any record anywhere), "blocks" (neighbours are moved together, then mixed: for what is read
            from a remote store), "none", "auto" ("full", but "blocks" in FastFile mode).
        seed: of the order, from 0 to 2**64 - 1.
        tail: what becomes of the last records that fill no step: "drop", "pad" (filled up with records from the begin
            of the order, key "mask" False) or "short" (a shorter batch, on some ranks perhaps of no rows).
        rank, world_size: as the launcher, torch.distributed or the environment have it, unless given.
        threads: that fill batches ahead; 0: the thread that iterates. None: 0 for batches below 1 MiB or without a
            core to spare, else 1; 4 for a remote store.
        ring: batches that there is memory for to begin with; more, up to ``ring_limit``, while you keep batches.
        ring_wait: seconds that the loader waits, when you keep ``ring_limit`` batches, for you to drop one. Then it
            takes memory for more, as long as it lives. Both are said on stderr. ``float("inf")``: it only waits.
        on_bad: what becomes of a record that can not be read: "raise" (DataError), "substitute" (the next one that
            can, key "mask" False), "skip" (left out when the files are opened, where their frames tell; else "raise").
        bad_limit: substitutes of an epoch before it is an error after all; 0: any number.
        transform: one or several of launcher.data.Normalise, OneHot, Cast, and functions of a batch; see there.
        output: "numpy" or "torch", which share memory.
        reuse: a batch is valid until the next one only, and may be the same arrays. Saves what little keeping costs.
        record_numbers: with the number of each record in the channel, key "record" (int64).
        device: "cuda" or "cuda:N": batches are torch tensors there, copied by a stream of their own while the script
            works with the ones before. Functions of ``transform`` get them there, and ``reuse`` is of no use. "cpu":
            as output="torch".
        device_cache: the GPU holds all records of the channel (each rank has its own copy), read when the first epoch
            begins, and makes the batches of them itself. For fields of a fixed size. A record that can not be read
            shows at that begin.
        pin: memory that a GPU copies from by itself (torch); None: when torch has CUDA up and output is "torch".
        strict, on_reshard: see launcher.data.state.resume().
        extent, window, lanes: of the order "blocks"; see launcher.data.order.choose().
        allow_empty: an epoch without a step is no error.
        progress: steps and samples are told to the launcher, unless the script tells them itself (Context.step()).
        timeout_s, store: of the agreement, see launcher.data.steps.Agreement.
        options: of the format.

    Raises:
        DataError: the channel's data is damaged, or not the same on all ranks.
        UsageError: an argument is wrong; there is not a step's worth of records.
    """

    def __new__(cls, channel: Any, *arguments: Any, **named: Any) -> Any:
        """A PipeLoader for a channel in Pipe mode, with the same methods, but no len(); see there."""
        if isinstance(channel, (str, os.PathLike)):
            place = find_place(channel)
            if place.mode == "Pipe":
                from launcher.data.pipe_loader import make

                return make(place, *arguments, **named)
        return super().__new__(cls)

    def __init__(
        self,
        channel: str | os.PathLike[str] | Opened,
        batch_size: int,
        *,
        format: str = "auto",
        fields: Any = None,
        shuffle: str = "auto",
        seed: int = 0,
        tail: str = "drop",
        rank: int | None = None,
        world_size: int | None = None,
        threads: int | None = None,
        ring: int = 4,
        ring_limit: int = _RING_LIMIT,
        ring_wait: float = _RING_WAIT_S,
        on_bad: str = "raise",
        bad_limit: int = 0,
        transform: Any = None,
        output: str = "numpy",
        reuse: bool = False,
        record_numbers: bool = False,
        device: Any = None,
        device_cache: bool = False,
        pin: bool | None = None,
        strict: bool = True,
        on_reshard: str = "refuse",
        extent: int | None = None,
        window: int | None = None,
        lanes: int | None = None,
        allow_empty: bool = False,
        progress: bool = True,
        timeout_s: float | None = None,
        store: Store | None = None,
        **options: Any,
    ) -> None:
        _check_choice("tail", tail, TAILS)
        _check_choice("output", output, ("numpy", "torch"))
        _check_choice("on_bad", on_bad, ("raise", "substitute", "skip"))
        batch_size = check_number("batch_size", batch_size, 1)
        seed = check_number("seed", seed, 0)
        ring = check_number("ring", ring, 1)
        ring_limit = check_number("ring_limit", ring_limit, ring)
        if not isinstance(ring_wait, (int, float)) or isinstance(ring_wait, bool) or not ring_wait >= 0:
            raise UsageError(f"ring_wait is {ring_wait!r}; expected seconds, 0 or more")
        bad_limit = check_number("bad_limit", bad_limit, 0)
        threads = None if threads is None else check_number("threads", threads, 0)
        extent, window, lanes = (
            None if value is None else check_number(name, value, 1)
            for name, value in (("extent", extent), ("window", window), ("lanes", lanes))
        )
        if device is not None or device_cache:
            from launcher.data.device import find_device

            device, output = find_device(device, device_cache), "torch"
        changes, functions = split(transform)
        self.rank, self.world_size, local_size = find_world(rank, world_size)
        self._reading = FileReading(
            Wanted(
                channel=channel,
                batch_size=batch_size,
                rank=self.rank,
                world_size=self.world_size,
                local_size=local_size,
                format=format,
                fields=fields,
                shuffle=shuffle,
                seed=seed,
                tail=tail,
                threads=threads,
                ring=ring,
                ring_limit=ring_limit,
                ring_wait=float(ring_wait),
                on_bad=on_bad,
                bad_limit=bad_limit,
                changes=changes,
                output=output,
                reuse=reuse,
                record_numbers=record_numbers,
                device=device,
                device_cache=device_cache,
                pin=pin,
                strict=strict,
                on_reshard=on_reshard,
                extent=extent,
                window=window,
                lanes=lanes,
                allow_empty=allow_empty,
                timeout_s=timeout_s,
                store=store,
                options=options,
            )
        )
        super().__init__(batch_size, functions, progress)
        self._process = os.getpid()
        _loaders.add(self)

    # --- what is in it ------------------------------------------------------------------------------------------------

    @property
    def fields(self) -> tuple[Field, ...]:
        """The fields of a batch, as native transforms leave them."""
        return self._reading.fields

    @property
    def records(self) -> int:
        """Records of the channel; where each host has files of its own, of this host."""
        return self._reading.records

    def __len__(self) -> int:
        """Batches of the iteration under way, or else of the one that comes next: fewer after a resume."""
        return self._reading.steps(self._position)

    def statistics(self) -> dict[str, Any]:
        """Counts since the loader was made.

        ``batches``, ``records``; ``substituted`` (records that another one stood in for) and ``first_bad`` (what was
        wrong with the first one); ``damaged`` (places left out when the files were opened); ``waited_s`` (for a batch),
        ``full_s`` (that threads waited for memory to fill); ``slots`` and ``lent`` (batches that there is memory for,
        and that are in use, now); ``threads``. After close() as it was then.
        """
        return self._reading.statistics()

    # --- where it stands ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, object]:
        """Where the loader stands: after the batch that was given last. 150 to 270 bytes, the same on all ranks.

        It is good for any number of ranks and any batch size.
        """
        return self._reading.state_dict(self._epoch, self._place())

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Goes on where ``state`` was taken. All ranks load the same one.

        Raises:
            DataError: problem ``changed``: the files are not those of then. UsageError: it is no state for this job.
        """
        self._check_open()
        self._resume(*self._reading.load_state_dict(state))

    # --- what Epochs asks for -----------------------------------------------------------------------------------------

    def _begin(self, epoch: int, position: int) -> Callable[[], dict[str, Any] | None]:
        return self._reading.begin(epoch, position)

    def _reached(self) -> int:
        return self._reading.position

    def _shut(self) -> None:
        self._reading.close()

    def close(self) -> None:
        """Ends threads and gives memory back; batches that are kept stay valid. Where it stands can still be asked."""
        if os.getpid() != self._process:
            self._closed = True  # in a child of fork(): nothing of it is this process's
        else:
            super().close()

    def __repr__(self) -> str:
        return f"Loader({self.records} records, rank {self.rank} of {self.world_size}, epoch {self.epoch})"


_loaders: weakref.WeakSet[Loader] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Ends threads before the interpreter is taken down."""
    for loader in list(_loaders):
        try:
            loader.close()
        except RuntimeError:
            pass  # a daemon thread is in it; it ends with the process


def find_world(rank: int | None, world_size: int | None) -> tuple[int, int, int]:
    """Rank, world size, and ranks of this host: as given, or else as launcher, torch.distributed or environment say.

    Raises:
        UsageError: only one of them is given; the environment is not what a launcher sets.
    """
    if (rank is None) != (world_size is None):
        raise UsageError("rank and world_size go together; give both or neither")
    place = read_place(os.environ)
    local = len(place.local_ranks) if place else 0
    if rank is not None and world_size is not None:
        world_size = check_number("world_size", world_size, 1)
        rank = check_number("rank", rank, 0)
        if rank >= world_size:
            raise UsageError(f"rank is {rank}; expected 0 to {world_size - 1} (world_size is {world_size})")
    elif place is not None:
        rank, world_size = place.rank, place.world_size
    else:
        distributed = sys.modules.get("torch.distributed")
        if distributed is not None and distributed.is_available() and distributed.is_initialized():
            rank, world_size = distributed.get_rank(), distributed.get_world_size()
        else:
            rank, world_size = _environment("RANK", 0), _environment("WORLD_SIZE", 1)
            if not 0 <= rank < world_size:
                raise UsageError(f"the environment says RANK={rank} of WORLD_SIZE={world_size}, which can not be")
    return rank, world_size, min(world_size, local or _environment("LOCAL_WORLD_SIZE", world_size) or world_size)


def _environment(name: str, default: int) -> int:
    raw = os.environ.get(name, "")
    if not raw:
        return default
    if not raw.isdecimal():
        raise UsageError(f"environment variable {name} is {raw!r}; expected a whole number")
    return int(raw)


def _check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UsageError(f"{name} is {value!r}; expected {', '.join(map(repr, choices))}")
