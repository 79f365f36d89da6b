"""The way between hosts: what an engine has to offer for it, and which engine is taken."""

from __future__ import annotations

import json
import os
import sys
from typing import Protocol

from launcher.errors import CollectiveError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Any

    from launcher.collectives.group import Store
    from launcher.collectives.place import Place

LEGS = ("auto", "sockets", "mpi", "gloo")
_FABRICS = "/sys/class/infiniband"  # InfiniBand, RoCE, EFA: what MPI drives and sockets do not
# Variables by which the daemon of an MPI tells a process the number of ranks.
_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_SIZE")


class LegError(Exception):
    """A message between hosts could not be carried.

    ``kind``: as of CollectiveError (``lost``, ``left``, ``timeout``, ``mismatch``, ``interrupted``, ``closed``,
    ``system``), ``notice`` when the peer has said why.
    """

    def __init__(self, peer: int, kind: str, text: str) -> None:
        self.peer, self.kind, self.text = peer, kind, text
        super().__init__(text)


class Leg(Protocol):
    """Carries bytes between ranks of different hosts. Peers are ranks of the group, addresses and sizes in bytes.

    Messages from one rank to another with the same ``lane`` arrive in the order in which they were sent, and match the
    receives in the order of those. A receive may be for more bytes than come. No method but ``wait`` and ``arrived``
    blocks.

    Attributes:
        name: one of LEGS.
        message_bytes: the size of message that long transfers are best cut into.
    """

    name: str
    timeout_s: float
    message_bytes: int

    def connect(self, peers: Sequence[int]) -> None:
        """Before ranks outside this rank's column are sent to; all of ``peers`` do the same. May block."""

    def isend(self, peer: int, address: int, nbytes: int, lane: int) -> Any:
        """Begins to send; the memory must not change until :meth:`wait`."""

    def irecv(self, peer: int, address: int, nbytes: int, lane: int) -> Any:
        """Begins to receive."""

    def wait(self, handles: Iterable[Any]) -> None:
        """Blocks until all of them are over. Raises LegError naming the peer that is gone or was not seen in time."""

    def watch(self, handles: Sequence[Any]) -> None:
        """Receives whose arrival ends every :meth:`wait` with a LegError of kind ``notice``, as soon as it is seen."""

    def arrived(self, handle: Any, limit_s: float) -> bool:
        """Whether a receive is over within ``limit_s``. After a LegError only."""

    def progress(self) -> None:
        """Gives the engine the processor for a moment, where it has no thread of its own."""

    def close(self) -> None:
        """Gives up what is under way and lets go of the connections; no memory is written to any more."""


def mpi_lacking(environ: Mapping[str, str]) -> str:
    """Why this process has no MPI world that is the job's, "" when it has one. Does not start MPI."""
    import importlib.util

    given = [environ[name] for name in _MPI_SIZES if environ.get(name)]
    world = environ.get("WORLD_SIZE", "")
    started = sys.modules.get("mpi4py.MPI")
    if started is None and not given:
        return "the ranks were not started by mpirun (--engine mpi)"
    if given and world and given[0] != world:
        return f"MPI's world has {given[0]} ranks and the job {world}"
    if importlib.util.find_spec("mpi4py") is None:
        return "mpi4py is not installed"
    if started is not None and not given:
        size = started.COMM_WORLD.Get_size() if started.Is_initialized() else 1
        if str(size) != (world or str(size)) or size == 1:
            return f"MPI's world has {size} ranks and the job {world}"
    return ""


def gloo_lacking() -> str:
    """Why this process has no Gloo, "" when it has. Does not import torch."""
    import importlib.util

    return "" if importlib.util.find_spec("torch") is not None else "torch is not installed"


def fabric_lacking(folder: str = _FABRICS) -> str:
    """Why this host has no network that MPI drives past the kernel, "" when it has one."""
    try:
        return "" if os.listdir(folder) else f"no device in {folder}"
    except OSError:
        return f"no {folder}"


def agree(
    name: str, rank: int, names: Sequence[str], store: Store, asked: Mapping[str, Any], prefix: str
) -> tuple[str, str]:
    """The leg that all members can take, and why it is this one; the same answer on all of them.

    ``auto``: MPI where the job runs under it and all members have a fabric, else sockets.

    Args:
        names: who each member is, for messages ("rank 3 on algo-2").
        asked: the options of this member (``leg``, ``wire``, ``independent``); they must be the same on all members.
        prefix: of the keys.

    Raises:
        UsageError: no engine is there on all members.
        CollectiveError: a member was given other options, or did not come.
    """
    mine = {
        "asked": dict(asked),
        "lacking": {
            "mpi": mpi_lacking(os.environ),
            "gloo": gloo_lacking(),
            "fabric": fabric_lacking(),
            "sockets": "",
        },
    }
    store.set(f"{prefix}/leg/{rank}", json.dumps(mine).encode())
    told = []
    for index in range(len(names)):
        try:
            told.append(mine if index == rank else json.loads(store.get(f"{prefix}/leg/{index}")))
        except (OSError, RuntimeError, LookupError) as error:  # what stores raise on their timeout
            raise CollectiveError(
                f"join of group {name!r}: {names[index]} did not come: {error}", "timeout", operation="join"
            ) from error
    for index, other in enumerate(told):
        if other["asked"] != mine["asked"]:
            raise CollectiveError(
                f"join of group {name!r}: {names[index]} has {other['asked']}, {names[rank]} has {mine['asked']}; all "
                "members must be given the same options",
                "mismatch",
                operation="join",
            )

    def lacking(engine: str) -> str:
        reasons = {str(other["lacking"][engine]) for other in told}
        if len(reasons) == 1:
            return reasons.pop()
        for index, other in enumerate(told):
            if other["lacking"][engine]:
                return f"{names[index]}: {other['lacking'][engine]}"
        return ""

    wanted = str(asked["leg"])
    if wanted != "auto":
        missing = lacking(wanted)
        if missing:
            raise UsageError(f"group {name!r}: the leg between hosts is to be {wanted}, but {missing}")
        return wanted, "asked for"
    no_mpi = lacking("mpi")
    no_fabric = lacking("fabric")
    if no_mpi or no_fabric:
        return "sockets", (no_mpi and f"no MPI: {no_mpi}") or f"MPI would use TCP, too: {no_fabric}"
    return "mpi", "the job runs under MPI, and all hosts have a fabric"


_store: tuple[Any, Any] = (None, None)


def job_store(place: Place, timeout_s: float) -> Store:
    """A store that all ranks of the launcher's job reach: MPI's world where the job runs under MPI, else torch's.

    torch's is served by rank 0 at MASTER_ADDR, MASTER_PORT, together with the one that init_process_group makes.

    Raises:
        UsageError: neither is there. CollectiveError: rank 0 did not come.
    """
    global _store
    key = (os.getpid(), place.attempt)
    if _store[0] != key:
        _store = key, _make_store(place, timeout_s)
    store: Store = _store[1]
    return store


def _make_store(place: Place, timeout_s: float) -> Any:
    no_mpi, no_torch = mpi_lacking(os.environ), gloo_lacking()
    if not no_mpi:
        from launcher.collectives.leg_mpi import MpiStore

        return MpiStore(timeout_s)
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if no_torch or not address or not port.isdecimal():
        reason = no_torch or "MASTER_ADDR and MASTER_PORT are not set"
        raise UsageError(
            f"the members are on several hosts and nothing leads from one to the other: no MPI ({no_mpi}), no store of "
            f"torch ({reason}); install torch, or mpi4py and start the job with --engine mpi"
        )
    from datetime import timedelta

    from torch import distributed as dist

    try:
        return dist.TCPStore(
            address,
            int(port),
            place.world_size,
            place.rank == 0,
            timeout=timedelta(seconds=min(timeout_s, 1e9)),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except RuntimeError as error:
        raise CollectiveError(
            f"join: rank 0 serves no store at {address}:{port}: {error}; it has to join a group on several hosts, or "
            "call init_process_group, too",
            "timeout",
            rank=0,
            operation="join",
        ) from error
