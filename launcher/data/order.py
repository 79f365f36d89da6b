"""Which order an epoch's records come in, by name and in numbers; the order itself is native (native/data/order.h)."""

from __future__ import annotations

from launcher._data import Order
from launcher.errors import UsageError
from launcher.record import Record

SHUFFLES = ("none", "full", "blocks")  # as native: their places are the numbers of Shuffle
TAILS = ("drop", "pad", "short")  # the same, of Tail
MOST = 2**64 - 1  # seeds, epochs and numbers of records are unsigned 64-bit numbers

# Of the order "blocks": an extent is read in pieces of 1 MiB one after the other (object stores and disks are then near
# their best), of which the two at its ends are read for its neighbours as well: 1/16 more than there is, on average. A
# window of extents is what its reader holds at a time: 256 MiB.
EXTENT_BYTES = 16 << 20
WINDOW_EXTENTS = 16


class Shuffling(Record):
    """An order but for seed, epoch and number of records.

    ``shuffle``: ``none`` (as the files have them), ``full`` (any record anywhere), ``blocks`` (extents of neighbouring
    records are moved, then the records of a window of extents mixed). For ``blocks`` only: ``extent``, in records;
    ``window``, in extents; ``lanes``, parts of the order, of which each host reads its own.
    """

    shuffle: str = "full"
    extent: int = 1
    window: int = 1
    lanes: int = 1

    def order(self, seed: int, epoch: int, records: int) -> Order:
        """The order of one epoch."""
        return Order(SHUFFLES.index(self.shuffle), seed, epoch, records, self.extent, self.window, self.lanes)


def choose(
    shuffle: str,
    *,
    remote: bool,
    records: int,
    nbytes: int,
    readers: int = 1,
    extent: int | None = None,
    window: int | None = None,
    lanes: int | None = None,
) -> Shuffling:
    """What ``shuffle`` means for a channel.

    Args:
        shuffle: a name of SHUFFLES, or ``auto``: ``full``, but ``blocks`` where records are read from a remote store.
        remote: the channel's files are such (FastFile mode).
        records, nbytes: of the channel.
        readers: ranks that share the channel's files; each gets a lane, so that no two hold the same window.
        extent, window, lanes: in place of what fits EXTENT_BYTES, WINDOW_EXTENTS and ``readers``. The order depends on
            them, so a job that shall have the same one on more ranks passes ``lanes``.

    Raises:
        UsageError: an unknown name, a number below 1, or numbers for an order that has none.
    """
    if shuffle not in (*SHUFFLES, "auto"):
        raise UsageError(f"shuffle is {shuffle!r}; expected 'auto', {', '.join(map(repr, SHUFFLES))}")
    name = ("blocks" if remote else "full") if shuffle == "auto" else shuffle
    given = {"extent": extent, "window": window, "lanes": lanes}
    for option, value in given.items():
        if value is not None and not 1 <= value <= MOST:
            raise UsageError(f"{option} is {value}; expected a whole number of at least 1")
    if name != "blocks":
        extra = [option for option, value in given.items() if value is not None]
        if extra and shuffle != "auto":
            raise UsageError(f"{extra[0]} is for shuffle='blocks', but shuffle is {shuffle!r}")
        return Shuffling(name)
    fitting = max(1, EXTENT_BYTES * records // nbytes) if nbytes else 1
    return Shuffling(name, extent or fitting, window or WINDOW_EXTENTS, lanes or readers)
