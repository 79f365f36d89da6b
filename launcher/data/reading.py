"""What a loader reads through: the files of a channel, from any place of the order on."""

from __future__ import annotations

import os
import sys

from launcher.data.fields import Ragged, Sparse, source_fields
from launcher.data.order import SHUFFLES, TAILS, choose
from launcher.data.state import State, marks, resume
from launcher.data.steps import TIMEOUT_S, Agreement, Facts
from launcher.data.transforms import change
from launcher.errors import UsageError
from launcher.record import Record, replace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    from launcher._data import Source
    from launcher.collectives.group import Store
    from launcher.data.catalogue import Opened
    from launcher.data.device import Batches
    from launcher.data.fields import Field
    from launcher.data.steps import Plan
    from launcher.data.transforms import Change

# A batch below this is made faster than handed over between threads: 256 KiB take some 25 us, waking a thread a few.
_INLINE_BYTES = 1 << 20
# Threads that read a remote store at the same time: it answers late, not slowly.
_REMOTE_THREADS = 4
# What is read of one at a time (native/data/extents.h).
_PIECE_BYTES = 1 << 20

_COUNTS = ("batches", "records", "substituted", "waited_s", "full_s", "slots", "lent")


class Wanted(Record):
    """The arguments of a loader, as launcher.data.loader.Loader has them; ``rank`` to ``local_size`` are found out."""

    channel: str | os.PathLike[str] | Opened
    batch_size: int
    rank: int
    world_size: int
    local_size: int
    format: str
    fields: Any
    shuffle: str
    seed: int
    tail: str
    threads: int | None
    ring: int
    ring_limit: int
    ring_wait: float
    on_bad: str
    bad_limit: int
    changes: Sequence[Change]
    output: str
    reuse: bool
    record_numbers: bool
    pin: bool | None
    strict: bool
    on_reshard: str
    extent: int | None
    window: int | None
    lanes: int | None
    allow_empty: bool
    timeout_s: float | None
    store: Store | None
    options: Mapping[str, Any]
    device: Any = None  # a torch.device
    device_cache: bool = False

    @property
    def masked(self) -> bool:
        """Whether batches have the key "mask"."""
        return self.tail == "pad" or self.on_bad == "substitute"

    def makers(self, fields: Sequence[Field]) -> list[Callable[..., Any] | None]:
        """What makes the columns of a batch of NumPy arrays; as launcher._data.Engine takes them."""
        if self.output == "torch":
            from launcher.data.torch_data import makers_of

            return makers_of(fields)
        return [*(_numpy_maker(field) for field in fields), None, None]


def _numpy_maker(field: Field) -> Callable[..., Any] | None:
    if field.kind == "fixed":
        return None
    return (
        Ragged if field.kind == "ragged" else lambda values, offsets, keys: Sparse(values, offsets, keys, field.shape)
    )


# What a script does about batches that it keeps.
_KEEP_LESS = (
    "an array that is kept, or a view of it, keeps its whole batch: drop some, keep copies (.copy(), .clone()), or "
    "pass a larger ring_limit"
)


def _say_blocked(held: int) -> None:
    _say(f"the loader waits: the script keeps {held} batches, as many as ring_limit has it; {_KEEP_LESS}")


def _say_grown(held: int) -> None:
    _say(
        f"the loader waits no longer: none of the {held} batches that the script keeps came back in ring_wait seconds, "
        f"so it takes memory beyond ring_limit from now on; {_KEEP_LESS}"
    )


def _say(text: str) -> None:
    print(f"[launcher] {text}", file=sys.stderr, flush=True)


class FileReading:
    """Files: any position of the order at any time."""

    def __init__(self, wanted: Wanted) -> None:
        """Opens the channel, and agrees with the other ranks on the steps.

        Raises:
            DataError, UsageError: see launcher.data.loader.Loader.
        """
        self._wanted = wanted
        self._engine: Batches | None = None
        self._base, self._closed = 0, False
        self._counts: dict[str, Any] = dict.fromkeys(_COUNTS, 0) | {"first_bad": ""}  # that were seen last
        channel = wanted.channel
        name = os.path.basename(os.fspath(channel).rstrip("/")) if isinstance(channel, (str, os.PathLike)) else "data"
        self._agreement = Agreement(
            name, wanted.rank, wanted.world_size, timeout_s=wanted.timeout_s or TIMEOUT_S, store=wanted.store
        )
        self._plan: Plan = self._agreement.settle(self._open, allow_empty=wanted.allow_empty)
        self.threads = self._choose_threads() if wanted.threads is None else wanted.threads

    def _open(self) -> Facts:
        wanted = self._wanted
        self._opened = opened = _opened(wanted)
        self._source: Source = change(opened.source, wanted.changes)
        self.fields: tuple[Field, ...] = source_fields(self._source.fields)
        _check_names(self.fields, wanted)
        if wanted.device_cache:
            from launcher.data.device_cache import check_cache

            check_cache(self.fields)
        self._sharded = opened.distribution == "ShardedByS3Key" and wanted.world_size > wanted.local_size
        shuffling = choose(
            wanted.shuffle,
            remote=opened.access == "remote",
            records=opened.records,
            nbytes=self._source.bytes,
            readers=wanted.local_size if self._sharded else wanted.world_size,
            extent=wanted.extent,
            window=wanted.window,
            lanes=wanted.lanes,
        )
        self._own = State(
            fingerprint=opened.fingerprint,
            records=opened.records,
            seed=wanted.seed,
            shuffling=shuffling,
            files=len(opened.files),
            marks=marks(opened.files),
        )
        return self._facts()

    def _facts(self) -> Facts:
        return Facts(
            self._own,
            self._wanted.batch_size,
            self._wanted.tail,
            sharded=self._sharded,
            damage=len(self._opened.damage),
        )

    def _choose_threads(self) -> int:
        if self._opened.access == "remote":
            return _REMOTE_THREADS
        batch_bytes = self._wanted.batch_size * self._source.bytes // max(1, self._plan.records)
        spare = len(os.sched_getaffinity(0)) > self._wanted.local_size
        return 1 if spare and batch_bytes >= _INLINE_BYTES else 0

    def _reserve_windows(self) -> None:
        """Lets what is read of a remote store stay for as long as a window of the order is at it."""
        from launcher import _data

        shuffling, plan = self._plan.state.shuffling, self._plan
        if shuffling.shuffle == "blocks":
            mean_bytes = -(-self._source.bytes // max(1, plan.records))
            extent_bytes = shuffling.extent * mean_bytes + 2 * _PIECE_BYTES  # where pieces lie across its ends
            lanes = -(-shuffling.lanes // plan.world)
            # The window that ends and the one that begins are both at work in the batches that are filled at that time.
            _data.reserve_extents(lanes * (shuffling.window + 2) * extent_bytes)

    @property
    def records(self) -> int:
        """Records of the channel; where each host has files of its own, of this host."""
        return self._plan.records

    def steps(self, position: int) -> int:
        """Steps from ``position`` to the end of an epoch."""
        return self._plan.steps(position)

    @property
    def position(self) -> int:
        """After the batch that was given last."""
        return self._base if self._engine is None else self._plan.position_after(self._engine.step, self._base)

    def state_dict(self, epoch: int, position: int) -> dict[str, object]:
        """That place in words."""
        return replace(self._plan.state, epoch=epoch, position=position).to_dict()

    def load_state_dict(self, state: Mapping[str, object]) -> tuple[int, int]:
        """The epoch and the position of a saved place, on which all ranks agree. Raises: see Loader."""
        wanted = self._wanted
        found = resume(
            state,
            self._plan.state,
            strict=wanted.strict,
            on_reshard=wanted.on_reshard,
            directory=self._opened.path,
            files=self._opened.files,
        )
        self._own = replace(
            self._own, seed=found.seed, epoch=found.epoch, position=found.position, shuffling=found.shuffling
        )
        self._plan = self._agreement.settle(self._facts, allow_empty=wanted.allow_empty)
        over = found.position > 0 and self._plan.steps(found.position) == 0
        return (found.epoch + 1, 0) if over else (found.epoch, found.position)

    def begin(self, epoch: int, position: int) -> Callable[[], dict[str, Any] | None]:
        """What gives the next batch, from there on; None at the end of the epoch."""
        state, plan, wanted = self._plan.state, self._plan, self._wanted
        if self._opened.access == "remote":
            self._reserve_windows()
        parameters = {
            "shuffle": SHUFFLES.index(state.shuffling.shuffle),
            "seed": state.seed,
            "epoch": epoch,
            "records": plan.records,
            "extent": state.shuffling.extent,
            "window": state.shuffling.window,
            "lanes": state.shuffling.lanes,
            "base": position,
            "world": plan.world,
            "rank": plan.rank,
            "batch": plan.batch,
            "tail": TAILS.index(plan.tail),
            "agreed_steps": plan.steps(position),
        }
        self._base = position
        if self._engine is not None:
            self._engine.restart(parameters)
            return self._engine.next
        options: dict[str, Any] = {
            "ring": wanted.ring,
            "ring_limit": wanted.ring_limit,
            "threads": self.threads,
            "substitute": wanted.on_bad == "substitute",
            "bad_limit": wanted.bad_limit,
            "mask": wanted.masked,
            "numbers": wanted.record_numbers,
            "reuse": wanted.reuse,
            "ring_wait": wanted.ring_wait,
            "blocked": _say_blocked,
            "grown": _say_grown,
        }
        if wanted.device is not None:
            from launcher.data.device import on_device

            self._engine = on_device(
                self._source, parameters, wanted.device, cache=wanted.device_cache, pin=wanted.pin, **options
            )
            return self._engine.next
        from launcher import _data

        if wanted.output == "torch" or wanted.pin:
            from launcher.data.torch_data import pinning

            options |= pinning(wanted.pin)
        self._engine = _data.Engine(self._source, parameters, wanted.makers(self.fields), **options)
        return self._engine.next

    def statistics(self) -> dict[str, Any]:
        """As Loader.statistics()."""
        if self._engine is not None and not self._closed:
            self._counts = self._engine.statistics()
        return {**self._counts, "damaged": self._plan.damage, "threads": self.threads}

    def close(self) -> None:
        """Ends the threads."""
        if self._engine is not None:
            self.statistics()
            self._closed = True
            self._engine.close()


def _opened(wanted: Wanted) -> Opened:
    from launcher.data.catalogue import Opened, open_source

    if isinstance(wanted.channel, Opened):
        return wanted.channel
    return open_source(
        wanted.channel, format=wanted.format, fields=wanted.fields, on_bad=wanted.on_bad, **wanted.options
    )


def _check_names(fields: Sequence[Field], wanted: Wanted) -> None:
    names = [field.name for field in fields]
    for name, used in (("mask", wanted.masked), ("record", wanted.record_numbers)):
        if used and name in names:
            raise UsageError(f"the channel has a field {name!r}, which is the key of the loader's own here")
