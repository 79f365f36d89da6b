"""Begin and end, who is who, and what this build has."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys

from launcher.collectives import group as groups
from launcher.collectives.place import read_place
from launcher.errors import UsageError
from launcher.horovod import stall, timeline
from launcher.horovod.channel import Channel, Request
from launcher.horovod.common.exceptions import HorovodInternalError
from launcher.horovod.torch.carrier import Body, TorchCarrier
from launcher.horovod.torch.device import DeviceGroup
from launcher.horovod.torch.process_sets import ProcessSet, global_process_set

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

# As long as the launcher itself waits for a rank that does nothing (--hang-timeout).
_TIMEOUT_S = 1800.0
_JOB_OF_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_NTASKS")


class World:
    """The ranks of the job between ``init`` and ``shutdown``: this one's place among them, and the process sets.

    Attributes:
        number: how often this process has called ``init``; all ranks call it equally often.
        channels: by process set id; only sets that this rank is in.
    """

    def __init__(self, number: int) -> None:
        environ = os.environ
        self.number = number
        self.rank, self.size = _number("RANK", 0), _number("WORLD_SIZE", 1)
        self.local_rank, self.local_size = _number("LOCAL_RANK", 0), _number("LOCAL_WORLD_SIZE", self.size)
        if self.size == 1 and "RANK" not in environ:
            for name in _JOB_OF_MPI:
                if environ.get(name, "1") not in ("", "1"):
                    line = f"{name} is {environ[name]}, but this process was not started by the launcher"
                    print(f"[launcher] horovod: {line}: it is a world of one", file=sys.stderr)
        shutdown_s = stall.seconds("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", 0.0)
        self.timeout_s = shutdown_s or _TIMEOUT_S
        place = read_place(environ)
        # Under torchrun, say: its store tells the ranks of each other.
        self._store = _torch_store(self.timeout_s) if place is None and self.size > 1 else None
        self.channels: dict[int, Channel] = {}
        self._sets: dict[int, ProcessSet] = {}
        self._last_id = 0
        self._timeline: timeline.Timeline | None = None
        self._open(0, range(self.size), "all ranks")
        global_process_set.ranks = list(range(self.size))
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            # Not LOCAL_RANK: --virtual-local-rank tells every rank that it is the first.
            on_host = self.rank - place.local_ranks[0] if place is not None else self.local_rank
            hosts = self._gather_numbers([_number("GROUP_RANK", 0), on_host, self.local_size])
            undo.pop_all()
        same = [host for host, other, _ in hosts if other == on_host]
        self.cross_rank, self.cross_size = same.index(_number("GROUP_RANK", 0)), len(same)
        self.homogeneous = len({local_size for _, _, local_size in hosts}) == 1
        self._set_timeline(timeline.from_environment(self.rank))
        local = place.local_ranks if place is not None else (self.rank,)
        check_s = stall.check_seconds()
        self._stall = None
        if check_s and self.size > 1:
            directory = place.directory if place is not None else ""
            channels = self.channels.values
            self._stall = stall.StallInspector(lambda: list(channels()), self.rank, local, directory, check_s)

    def _open(self, process_set_id: int, ranks: Sequence[int], label: str) -> None:
        """Joins the group of a set that this rank is in."""
        name = f"horovod-{self.number}-{process_set_id}"
        place = ranks.index(self.rank)
        group = groups.join(name, place, len(ranks), ranks=list(ranks), store=self._store, timeout_s=self.timeout_s)
        carrier = TorchCarrier(group, lambda: DeviceGroup(name, place, len(ranks), self.timeout_s))
        self.channels[process_set_id] = Channel(group, ranks, carrier, label)
        self.channels[process_set_id].timeline = self._timeline

    def channel(self, process_set: ProcessSet) -> Channel:
        """Where requests for the set go.

        Raises:
            ValueError: the set is not in use, or this rank is not in it.
        """
        number = process_set.process_set_id
        if number is None or number not in self.channels:
            what = "is not in use: add_process_set() it first" if number is None else f"does not have rank {self.rank}"
            raise ValueError(f"{process_set!r} {what}")
        return self.channels[number]

    def _gather_numbers(self, numbers: list[int]) -> list[list[int]]:
        import torch

        channel = self.channels[0]
        body = Body([torch.tensor([numbers], dtype=torch.int64)], [None])
        what = ("allgather", ("int64",), ((-1, len(numbers)),), "", 1.0, 1.0, -1, "cpu")

        def finish() -> Any:
            assert body.targets[0] is not None
            return body.targets[0].tolist()

        found: list[list[int]] = channel.wait(
            channel.submit(Request(channel.next_name("launcher"), what, body, finish), wake=False)
        )
        return found

    def add_process_set(self, process_set: ProcessSet) -> None:
        """See process_sets.add_process_set."""
        ranks = process_set.ranks
        assert ranks is not None
        if not ranks or ranks[0] < 0 or ranks[-1] >= self.size:
            raise ValueError(f"{process_set!r}: expected at least one rank, and ranks from 0 to {self.size - 1}")
        if ranks == global_process_set.ranks or any(known.ranks == ranks for known in self._sets.values()):
            raise ValueError(f"there is a process set of the ranks {ranks} already")
        bits = [int(rank in ranks) for rank in range(self.size)]
        told = self._gather_numbers(bits)
        for rank, theirs in enumerate(told):
            if theirs != bits:
                other = [number for number, bit in enumerate(theirs) if bit]
                raise HorovodInternalError(
                    f"add_process_set: this rank ({self.rank}) adds the ranks {ranks}, rank {rank} adds {other}; all "
                    "ranks must add the same sets in the same order"
                )
        self._last_id += 1
        if self.rank in ranks:
            self._open(self._last_id, ranks, f"process set {self._last_id}")
        process_set.process_set_id = self._last_id
        self._sets[self._last_id] = process_set

    def remove_process_set(self, process_set: ProcessSet) -> bool:
        """See process_sets.remove_process_set."""
        number = process_set.process_set_id
        if number is None or number not in self._sets:
            return False
        self._gather_numbers([number])  # nobody leaves while another still works in it
        self._sets.pop(number)._invalidate()
        process_set._invalidate()
        channel = self.channels.pop(number, None)
        if channel is not None:
            channel.close()
        return True

    def start_timeline(self, path: str) -> None:
        """See start_timeline."""
        self._set_timeline(timeline.Timeline(path, self.rank))

    def stop_timeline(self) -> None:
        """See stop_timeline."""
        self._set_timeline(None)

    def _set_timeline(self, new: timeline.Timeline | None) -> None:
        old, self._timeline = self._timeline, new
        for channel in self.channels.values():
            channel.timeline = new
        if old is not None:
            old.close()

    def close(self) -> None:
        """Leaves all sets."""
        inspector = self.__dict__.get("_stall")
        if inspector is not None:
            inspector.close()
        for known in self._sets.values():
            known._invalidate()
        for channel in reversed(list(self.channels.values())):
            channel.close()
        self.channels.clear()
        self._set_timeline(None)

    def forget(self) -> None:
        """In a forked child: rank() and size() still hold, collectives do not."""
        for channel in self.channels.values():
            channel.forget()
        self._stall = None
        self._timeline = None


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    try:
        value = int(text) if text else default
    except ValueError:
        value = -1
    if value < 0:
        raise UsageError(f"environment variable {name} is {text!r}; expected a whole number, as the launcher sets it")
    return value


def _torch_store(timeout_s: float) -> Any:
    import datetime

    from torch import distributed

    try:
        store, _, _ = next(distributed.rendezvous("env://", timeout=datetime.timedelta(seconds=timeout_s)))
    except ValueError as error:
        raise UsageError(
            f"horovod: the ranks cannot find each other: {error}; start the script with python -m launcher"
        ) from error
    return distributed.PrefixStore("launcher-horovod", store)


_world: World | None = None
_begun = 0


def world() -> World:
    """The world of this process.

    Raises:
        ValueError: ``init`` was not called.
    """
    if _world is None:
        raise ValueError("Horovod's API is not initialized: call hvd.init() first")
    return _world


def init(comm: Any = None, process_sets: Sequence[ProcessSet] | str | None = None) -> None:
    """Joins the other ranks of the job. A second call before ``shutdown`` does nothing.

    Args:
        comm: None, the list of all ranks, or MPI's communicator of the whole job; for others take process sets.
        process_sets: sets to put into use, the same on all ranks; "dynamic" is accepted, sets can be added always.

    Raises:
        ValueError: ``comm`` is not of all ranks.
        CollectiveError: a rank did not come in time.
    """
    global _world, _begun
    if _world is not None:
        return
    _begun += 1
    made = World(_begun)
    members = made.size if comm is None else comm.Get_size() if hasattr(comm, "Get_size") else len(set(comm))
    if members != made.size:
        made.close()
        raise ValueError(f"init(comm): found {members} of {made.size} ranks; leave it out, and make a ProcessSet")
    _world = made
    with contextlib.ExitStack() as undo:
        undo.callback(shutdown)
        for process_set in process_sets if process_sets is not None and not isinstance(process_sets, str) else ():
            made.add_process_set(process_set)
        undo.pop_all()


def shutdown() -> None:
    """Leaves the other ranks. What is not finished fails, here and there. Done at the end of the process by itself."""
    global _world
    if _world is None:
        return
    ended, _world = _world, None
    ended.close()


def is_initialized() -> bool:
    """Whether this process is between ``init`` and ``shutdown``."""
    return _world is not None


def rank() -> int:
    """This rank's number in the job."""
    return world().rank


def size() -> int:
    """Number of ranks in the job."""
    return world().size


def local_rank() -> int:
    """This rank's number on its host."""
    return world().local_rank


def local_size() -> int:
    """Number of ranks on this host."""
    return world().local_size


def cross_rank() -> int:
    """This rank's number among those with its local rank, one a host."""
    return world().cross_rank


def cross_size() -> int:
    """Number of hosts that have this local rank."""
    return world().cross_size


def is_homogeneous() -> bool:
    """Whether all hosts have equally many ranks."""
    return world().homogeneous


def start_timeline(file_path: str, mark_cycles: bool = False) -> None:
    """Traces this rank's collectives from now on into a file for chrome://tracing.

    Args:
        mark_cycles: accepted; there are no cycles to mark.

    Raises:
        OutputError: the file cannot be made.
    """
    world().start_timeline(file_path)


def stop_timeline() -> None:
    """Ends the trace; the file is complete then."""
    world().stop_timeline()


def mpi_threads_supported() -> bool:
    """Always true: any thread may call."""
    world()
    return True


def mpi_enabled() -> bool:
    """False: messages go through the launcher's own collectives."""
    return False


def mpi_built() -> bool:
    """False; see mpi_enabled."""
    return False


def gloo_enabled() -> bool:
    """True, for scripts that insist on one of Horovod's two CPU controllers."""
    return True


def gloo_built() -> bool:
    """True; see gloo_enabled."""
    return True


def nccl_built() -> int:
    """Version of the NCCL that carries tensors on GPUs, as 22907; 0 without it."""
    import torch
    from torch import distributed

    if not distributed.is_available() or not distributed.is_nccl_available():
        return 0
    major, minor, patch = (*torch.cuda.nccl.version(), 0, 0)[:3]
    return int(major * 10000 + minor * 100 + patch)


def cuda_built() -> bool:
    """Whether this torch was built for CUDA."""
    import torch

    return torch.version.cuda is not None


def rocm_built() -> bool:
    """Whether this torch was built for ROCm."""
    import torch

    return torch.version.hip is not None


def ddl_built() -> bool:
    """False: IBM's DDL is not used."""
    return False


def ccl_built() -> bool:
    """False: Intel's oneCCL is not used."""
    return False


def _forked() -> None:
    if _world is not None:
        _world.forget()


atexit.register(shutdown)
os.register_at_fork(after_in_child=_forked)
