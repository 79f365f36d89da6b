"""Who carries an allreduce of GPU memory: what ranks tell each other, and what follows. Needs no torch and no GPU."""

from __future__ import annotations

import struct

from launcher.collectives.cuda_ipc import OPERATIONS, TYPES, Crossover
from launcher.collectives.elements import FLOATING, ReduceOp
from launcher.collectives.place import read_switch
from launcher.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

SWITCH = "LAUNCHER_CUDA_IPC"
MOST_BYTES = 4 << 20
"""The largest message that is timed against NCCL. The GPU's memory holds it three times, and as often for captures."""

ENGINE, IPC, CONNECT, MEASURE = "engine", "ipc", "connect", "measure"
"""What to do with a message: give it to torch's engine, to our kernels, or first connect, or measure."""

_SAID = struct.Struct("<???32s200s")


def switched_on() -> bool:
    """Whether CUDA IPC may be used: ``LAUNCHER_CUDA_IPC`` is not 0. One rank's 0 is enough for its groups.

    Raises:
        UsageError: the variable is neither 0 nor 1.
    """
    return read_switch(SWITCH)


class Place(Record):
    """What a rank says of itself.

    ``on``: see :func:`switched_on`; ``nccl``: its torch has NCCL; ``shares``: its NCCL may share a GPU; ``bus``: its
    GPU's PCI address, "" where ``reason`` says why it can not take part.
    """

    on: bool
    nccl: bool
    shares: bool
    bus: str
    reason: str = ""

    def pack(self) -> bytes:
        """As many bytes for every rank."""
        return _SAID.pack(self.on, self.nccl, self.shares, self.bus.encode(), self.reason.encode()[:200])

    @staticmethod
    def unpack(said: bytes) -> Place:
        """What :meth:`pack` gave."""
        on, nccl, shares, bus, reason = _SAID.unpack(said)
        return Place(on, nccl, shares, bus.rstrip(b"\0").decode(), reason.rstrip(b"\0").decode(errors="replace"))


class Layout(Record):
    """What follows from all ranks' places. ``off``: why CUDA IPC is not used; ``no_nccl``: why NCCL can not be."""

    off: str = ""
    no_nccl: str = ""
    shared: bool = False


def find_layout(places: Sequence[Place], most: int) -> Layout:
    """The same on all ranks. ``most``: ranks that the kernels take."""
    first: dict[str, int] = {}
    twice = ""
    for rank, place in enumerate(places):
        if place.bus and first.setdefault(place.bus, rank) != rank and not twice:
            twice = f"ranks {first[place.bus]} and {rank} of the group share a GPU"
    no_nccl = ""
    lacking = [rank for rank, place in enumerate(places) if not place.nccl]
    if lacking:
        no_nccl = f"torch of rank {lacking[0]} of the group was built without NCCL"
    elif twice and not all(place.shares for place in places):
        no_nccl = f"{twice}, which NCCL refuses"
    off = ""
    if len(places) > most:
        off = f"{len(places)} ranks, and it takes up to {most}"
    for rank, place in enumerate(places):
        if not off and not place.on:
            off = f"rank {rank} of the group has {SWITCH}=0"
        if not off and place.reason:
            off = f"rank {rank} of the group can not take part: {place.reason}"
    return Layout(off, no_nccl, bool(twice))


class Link(Record):
    """The outcome of connecting. ``refused``: why there is no CUDA IPC; ``captures``: CUDA graphs may hold calls."""

    refused: str = ""
    captures: bool = False


def decide(
    layout: Layout,
    link: Link | None,
    crossover: Crossover | None,
    dtype: int | None,
    op: int | None,
    nbytes: int,
    *,
    capturing: bool = False,
    together: bool = False,
) -> str:
    """What to do with an allreduce: ENGINE, IPC, CONNECT or MEASURE.

    Args:
        link: None: not connected yet.
        crossover: of this type; None: not measured yet.
        dtype, op: a DType and a ReduceOp, None for what the core does not know.
        capturing: a CUDA graph is being captured; nothing new can be connected or measured then.
        together: NCCL collects calls, to begin them at once.
    """
    if layout.off or together or nbytes == 0 or dtype not in TYPES or op not in OPERATIONS:
        return ENGINE
    if op == ReduceOp.AVERAGE and dtype not in FLOATING:
        return ENGINE
    if nbytes > MOST_BYTES and not layout.no_nccl:
        return ENGINE
    if link is None:
        return ENGINE if capturing else CONNECT
    if link.refused or (capturing and not link.captures):
        return ENGINE
    if crossover is None:
        return ENGINE if capturing else MEASURE
    return IPC if layout.no_nccl or nbytes <= crossover.two_shot_bytes else ENGINE
