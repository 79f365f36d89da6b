"""A sampler that knows what has been seen of an epoch, whatever the number of ranks that saw it."""

from __future__ import annotations

import math
import random

from torch.utils.data import Sampler

from launcher.horovod.torch.basics import rank, size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any


class ElasticSampler(Sampler):  # type: ignore[misc]
    """This rank's share of what is left of the epoch.

    Call ``record_batch`` after each batch and ``set_epoch`` at the end of each epoch, and keep it in the TorchState.

    Args:
        dataset: anything with a length, which stays the same.
        shuffle: another order in each epoch, the same on all ranks.
        seed: of the orders; the same on all ranks.
    """

    def __init__(self, dataset: Any, shuffle: bool = True, seed: int = 0) -> None:
        self.dataset, self.shuffle, self.seed = dataset, shuffle, seed
        self.epoch = 0
        self.processed_num = 0
        self.reset()

    def set_epoch(self, epoch: int) -> None:
        """Begins another epoch."""
        self.epoch, self.processed_num = epoch, 0
        self.reset()

    def record_batch(self, batch_idx: int, batch_size: int) -> None:
        """Notes that every rank has processed ``batch_size`` samples."""
        self.processed_num += batch_size * self.num_replicas

    def state_dict(self) -> dict[str, int]:
        """Epoch, and samples of it that were processed by all ranks together."""
        return {"epoch": self.epoch, "processed_num": self.processed_num}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Takes up what ``state_dict`` gave."""
        self.epoch, self.processed_num = state_dict["epoch"], state_dict["processed_num"]
        self.reset()

    def reset(self) -> None:
        """Shares what is left among the ranks there are now."""
        self.num_replicas, self.rank = size(), rank()
        order = list(range(len(self.dataset)))
        if self.shuffle:
            random.Random(self.seed + self.epoch).shuffle(order)
        self.remaining_indices = order[self.processed_num :]
        self.num_samples = math.ceil(len(self.remaining_indices) / self.num_replicas)
        self.total_size = self.num_samples * self.num_replicas

    def __iter__(self) -> Iterator[int]:
        left = self.remaining_indices
        # Every rank gets as many: the first ones are given once more.
        filled = [left[at % len(left)] for at in range(self.total_size)]
        return iter(filled[self.rank :: self.num_replicas])

    def __len__(self) -> int:
        return self.num_samples
