"""Subsets of the ranks that run collectives of their own."""

from __future__ import annotations

from collections.abc import Sequence

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class ProcessSet:
    """Some of the job's ranks. Usable once it was given to ``init`` or ``add_process_set``.

    Attributes:
        process_set_id: 0 for all ranks; None while it is not in use.
        ranks: as the job numbers them, ascending.

    Raises:
        ValueError: ``ranks_or_comm`` is no sequence of rank numbers.
    """

    process_set_id: int | None = None
    ranks: list[int] | None = None
    mpi_comm: Any = None

    def __init__(self, ranks_or_comm: Sequence[int]) -> None:
        if not isinstance(ranks_or_comm, (Sequence, range, set, frozenset)):
            raise ValueError(
                f"a ProcessSet is made of a list of ranks, found {type(ranks_or_comm).__name__}; of a communicator of "
                "MPI give the ranks"
            )
        ranks = sorted(ranks_or_comm)
        if any(not isinstance(rank, int) for rank in ranks) or len(set(ranks)) < len(ranks):
            raise ValueError(f"a ProcessSet is made of different rank numbers, found {ranks_or_comm!r}")
        self.ranks = ranks

    def size(self) -> int | None:
        """How many ranks it has; None while it is not in use."""
        return None if self.process_set_id is None or self.ranks is None else len(self.ranks)

    def rank(self) -> int | None:
        """This rank's place in it, -1 outside of it; None while it is not in use.

        Roots of broadcasts are given as the job numbers them all the same.
        """
        from launcher.horovod.torch.basics import rank

        if self.process_set_id is None or self.ranks is None:
            return None
        return self.ranks.index(rank()) if rank() in self.ranks else -1

    def included(self) -> bool | None:
        """Whether this rank is in it; None for one that nothing is known of."""
        from launcher.horovod.torch.basics import rank

        return None if self.ranks is None else rank() in self.ranks

    def _invalidate(self) -> None:
        self.process_set_id = None

    def __repr__(self) -> str:
        return f"ProcessSet(process_set_id={self.process_set_id}, ranks={self.ranks})"


global_process_set = ProcessSet([])
global_process_set.process_set_id, global_process_set.ranks = 0, None


def add_process_set(process_set: ProcessSet | Sequence[int]) -> ProcessSet:
    """Puts a set into use. All ranks of the job must call it, in the same order, in the set or not.

    Raises:
        ValueError: there is one of these ranks, or a rank is none of the job's.
        HorovodInternalError: the ranks named different sets.
    """
    from launcher.horovod.torch.basics import world

    wanted = process_set if isinstance(process_set, ProcessSet) else ProcessSet(process_set)
    world().add_process_set(wanted)
    return wanted


def remove_process_set(process_set: ProcessSet) -> bool:
    """Takes a set out of use, on all ranks of the job. False: it was in none, or is that of all ranks."""
    from launcher.horovod.torch.basics import world

    if not process_set.process_set_id:
        return False
    return world().remove_process_set(process_set)
