"""Faces for torch: tensors that share the loader's memory, a dataset for DataLoader, a sampler."""

from __future__ import annotations

import os
import sys

from launcher import _data
from launcher.data.epochs import check_number
from launcher.data.fields import Ragged, Sparse
from launcher.data.loader import Loader, find_world
from launcher.data.order import TAILS, Shuffling
from launcher.data.state import State, resume
from launcher.errors import UsageError
from launcher.record import replace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
    from types import FrameType
    from typing import Any

    from launcher._data import Order
    from launcher.data.fields import Field


def makers_of(fields: Sequence[Field]) -> list[Callable[..., Any] | None]:
    """What makes tensors of a batch's NumPy arrays: for each field, the mask and the record numbers."""
    import torch

    def maker(field: Field) -> Callable[..., Any]:
        tensor = torch.from_numpy
        if field.dtype == "bfloat16":  # NumPy has its bits only

            def tensor(array: Any) -> Any:
                return torch.from_numpy(array).view(torch.bfloat16)

        if field.kind == "ragged":
            return lambda values, offsets: Ragged(tensor(values), torch.from_numpy(offsets))
        if field.kind == "sparse":
            return lambda values, offsets, keys: Sparse(
                tensor(values), torch.from_numpy(offsets), torch.from_numpy(keys), field.shape
            )
        made: Callable[..., Any] = tensor
        return made

    return [*(maker(field) for field in fields), torch.from_numpy, torch.from_numpy]


def pinning(pin: bool | None) -> dict[str, Any]:
    """What the engine does so that CUDA copies from its memory without a detour; {}: nothing.

    A batch's memory is filled again only when what the current stream had been given by then is done, so a
    ``non_blocking`` copy on it may be begun and the batch dropped, and close() waits for it. For a copy on another
    stream, or one that is begun after close(), keep the batch until that one is done.

    Raises:
        UsageError: ``pin`` is True, and torch has no CUDA.
    """
    import torch

    if pin is None:
        pin = torch.cuda.is_available() and torch.cuda.is_initialized()
    if not pin:
        return {}
    if not torch.cuda.is_available():
        raise UsageError("pin is True, but torch finds no CUDA device; leave it out")

    def fence() -> Any:
        event = torch.cuda.Event()
        event.record()
        return event

    return {**registering(torch.cuda.current_device()), "fence": fence}


def registering(device: Any) -> dict[str, Callable[[int, int], None]]:
    """Registers the engine's memory with CUDA. Called by threads that have no current device: it would be GPU 0."""
    import torch

    runtime = torch.cuda.cudart()

    def register(begin: int, nbytes: int) -> None:
        with torch.cuda.device(device):
            status = int(runtime.cudaHostRegister(begin, nbytes, 0))
        if status != 0:
            raise RuntimeError(f"cudaHostRegister of {nbytes} bytes gave CUDA error {status}; pass pin=False")

    def unregister(begin: int, nbytes: int) -> None:
        with torch.cuda.device(device):
            runtime.cudaHostUnregister(begin)

    return {"register_memory": register, "unregister_memory": unregister}


def torch_dataset(channel: str | os.PathLike[str], batch_size: int, **options: Any) -> Any:
    """An ``IterableDataset`` whose items are the batches of a :class:`Loader` with ``output="torch"``.

    For scripts that are written around DataLoader: ``DataLoader(torch_dataset("train", 256), batch_size=None)``. It has
    ``loader``, ``set_epoch()``, ``state_dict()`` and ``load_state_dict()``. The loader's threads do the work; worker
    processes (``num_workers``) would each read the same records, and are refused.

    DataLoader must be told ``batch_size=None``: it would make batches of batches, which is refused.

    Args and errors: as for Loader.
    """
    if options.pop("output", "torch") != "torch":
        raise UsageError("output is given; a dataset for DataLoader has torch tensors: leave it out, or use Loader")
    loader = Loader(channel, batch_size, output="torch", **options)
    return dataset_of(loader)


def dataset_of(loader: Loader) -> Any:
    """The ``IterableDataset`` of a loader that there is already; see :func:`torch_dataset`."""
    from torch.utils.data import IterableDataset, get_worker_info

    class Batches(IterableDataset):  # type: ignore[misc]
        def __init__(self) -> None:
            self.loader = loader

        def __iter__(self) -> Iterator[dict[str, Any]]:
            if get_worker_info() is not None:
                raise UsageError("the loader's own threads do the work: pass num_workers=0 to DataLoader")
            if _is_collated(sys._getframe(1)):
                raise UsageError("the items of this dataset are batches: pass batch_size=None to DataLoader")
            return iter(self.loader)

        def __len__(self) -> int:
            return len(self.loader)

        def __getstate__(self) -> object:
            raise UsageError("the loader can not go to another process: pass num_workers=0 to DataLoader")

        def set_epoch(self, epoch: int) -> None:
            self.loader.set_epoch(epoch)

        def state_dict(self) -> dict[str, object]:
            return self.loader.state_dict()

        def load_state_dict(self, state: Mapping[str, object]) -> None:
            self.loader.load_state_dict(state)

    return Batches()


def _is_collated(caller: FrameType) -> bool:
    """Whether a DataLoader asks that puts items together: only what it fetches them with knows (torch 2)."""
    fetches = caller.f_globals.get("__name__") == "torch.utils.data._utils.fetch"
    return fetches and caller.f_locals.get("auto_collation") is True


class Sampler:
    """DistributedSampler's drop-in over this package's order: constant memory, and a state for any number of ranks.

    ``DataLoader(dataset, sampler=launcher.data.sampler(dataset))``. Iterating it gives this rank's indices of one
    epoch, from where a loaded state stands. As with DistributedSampler, rank ``r`` has the positions r, r + ranks,
    r + 2 * ranks, ... of the order, and the order depends on set_epoch().
    """

    def __init__(
        self,
        dataset: Sized | int,
        num_replicas: int | None = None,
        rank: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        """As DistributedSampler; a number in place of the dataset is its length.

        Raises:
            UsageError: an argument is wrong.
        """
        self.rank, self.num_replicas, _ = find_world(rank, num_replicas)
        if not hasattr(dataset, "__len__") and not hasattr(dataset, "__index__"):
            raise UsageError(f"dataset is {dataset!r}; expected one that has a length, or a number, its length")
        records = len(dataset) if hasattr(dataset, "__len__") else dataset
        self._records = check_number("dataset", records, 0)
        seed = check_number("seed", seed, 0)
        self._now = State(
            fingerprint=0, records=self._records, seed=seed, shuffling=Shuffling("full" if shuffle else "none")
        )
        self._tail = TAILS.index("drop" if drop_last else "pad")
        self._base = self._given = 0

    def __len__(self) -> int:
        return _data.steps(self._records, self._base, self.num_replicas, 1, self._tail)

    def __iter__(self) -> Iterator[int]:
        """One epoch, or the rest of it after load_state_dict()."""
        base, count, ranks = self._base, len(self), self.num_replicas
        order = self._now.shuffling.order(self._now.seed, self._now.epoch, self._records)
        self._given = 0
        for begin in range(0, count, _CHUNK):
            steps = min(_CHUNK, count - begin)
            first = base + begin * ranks + self.rank
            for index in _places(order, first, steps, ranks):
                self._given += 1
                yield index
        self._base = self._given = 0
        self._now = replace(self._now, epoch=self._now.epoch + 1)

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is this epoch; from its begin, unless it is the one that a loaded state stands in.

        Raises:
            UsageError: it is no whole number from 0 on.
        """
        epoch = check_number("epoch", epoch, 0)
        if epoch != self._now.epoch or not self._base:
            self._now, self._base, self._given = replace(self._now, epoch=epoch), 0, 0

    def state_dict(self, samples: int | None = None) -> dict[str, object]:
        """Where the sampler stands.

        Args:
            samples: that this rank has used in the iteration under way. A DataLoader with workers draws indices ahead,
                so only the script knows; None: all that were drawn.
        """
        used = self._given if samples is None else samples
        position = min(self._records, self._base + used * self.num_replicas)
        return replace(self._now, position=position).to_dict()

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Goes on where ``state`` was taken, on any number of ranks.

        Raises:
            DataError: the dataset has another length. UsageError: it is no such state.
        """
        found = resume(state, replace(self._now, position=0))
        self._now, self._base, self._given = replace(found, position=0), found.position, 0


_CHUNK = 1024  # indices that are made at a time
_FEW_RANKS = 16  # up to which it is faster to make the others' too, all at once


def _places(order: Order, first: int, steps: int, ranks: int) -> list[int]:
    """The records at ``steps`` positions from ``first`` on, ``ranks`` apart; after the end, from the begin again."""
    records = order.records
    end = first + (steps - 1) * ranks + 1
    if ranks <= _FEW_RANKS and end <= records:
        return order.fill(first, end - first)[::ranks]
    return [order.at(position % records) for position in range(first, end, ranks)]


sampler = Sampler  # for DataLoader(dataset, sampler=...)
