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

LEGS = ("auto", "mpi", "gloo")
# Variables by which the daemon of an MPI tells a process the number of ranks.
_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_SIZE")


class LegError(Exception):
    """A message between hosts could not be carried.

    ``kind``: as of CollectiveError (``lost``, ``timeout``, ``system``), ``notice`` when the peer has said why.
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
        message_bytes: the size of message that long transfers are best cut into.
    """

    name: str
    timeout_s: float
    message_bytes: int

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


def agree(
    name: str, rank: int, names: Sequence[str], store: Store, asked: Mapping[str, Any], prefix: str
) -> tuple[str, str]:
    """The leg that all members can take, and why it is this one; the same answer on all of them.

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
        "lacking": {"mpi": mpi_lacking(os.environ), "gloo": gloo_lacking()},
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
    if not no_mpi:
        return "mpi", "the job runs under MPI"
    no_gloo = lacking("gloo")
    if no_gloo:
        raise UsageError(
            f"group {name!r} is on several hosts and no engine leads from one to the other: MPI ({no_mpi}), Gloo "
            f"({no_gloo}); install torch, or mpi4py and start the job with --engine mpi"
        )
    return "gloo", f"no MPI: {no_mpi}"
