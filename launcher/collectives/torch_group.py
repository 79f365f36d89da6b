"""The process group of ``backend="launcher"``: its life, its names, and what torch asks it about."""

from __future__ import annotations

import weakref
from functools import partial

import torch
import torch.distributed as dist

from launcher._native import LocalGroup
from launcher.collectives.executor import Executor
from launcher.collectives.torch_cuda import GpuAllreduce
from launcher.collectives.torch_engine import Engines
from launcher.collectives.torch_operations import Operations
from launcher.collectives.torch_shared import Buckets, Pool

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import timedelta
    from typing import Any

    from launcher.collectives.group import Group

# What an abort waits for this rank's own call to come back.
_ABORT_S = 5.0


class LauncherProcessGroup(Operations, dist.ProcessGroup):  # type: ignore[misc]
    """Collectives on CPU tensors through the launcher's core, small allreduces between GPUs by its kernels, all else
    through torch's own engines.

    A call that its caller waits for at once runs in the caller's thread when nothing is queued; others are carried out
    in order by a communication thread, or by who waits for them. Calls of one group are to be made in the same order on
    all ranks; calls of different groups do not wait for each other.

    Tensors may be non-contiguous (they are copied). Types that the core does not reduce (complex, float8, sparse) go
    through Gloo; what is only moved may have any type.

    Args:
        group: of the core; it is closed with this object.
        store: torch's, for the engines.
        timeout: of the engines; the group has its own.
        name: as torch calls this group.
        ranks: the members as the job numbers them.
    """

    def __init__(self, group: Group, store: Any, timeout: timedelta, name: str, ranks: Sequence[int]) -> None:
        rank, size = group.rank, group.size
        try:
            super().__init__(store, rank, size)
        except TypeError:  # older torch
            super().__init__(rank, size)
        self.pool: Pool
        self._group = group
        self._store = store
        self._rank = rank
        self._size = size
        self._name = name
        self._description = "undefined"
        self._members = list(ranks)
        self._timeout = timeout
        self._executor = Executor(f"torch-{name}", group.abort)
        self._run = self._executor.run
        self._allreduce = group.allreduce
        self._buckets = Buckets(group)
        self.pool = Pool(group, self._run)
        one_host = isinstance(group, LocalGroup)
        self._engines = Engines(store, rank, ranks, timeout, name, one_host)
        self._gpu = GpuAllreduce(group, ranks, one_host, self._executor, self._engines)
        self._splits = 0
        self._closer = weakref.finalize(
            self, _close, self._executor, group, self._gpu, self._buckets, self.pool, self._engines
        )
        self._closer.atexit = False  # the executor sees to work that is left then, and does not wait for ever

    # ---- what torch's engines do

    def send(self, tensors: Any, rank: int, tag: int = 0) -> Any:
        """To one rank, which receives with the same tag."""
        return self._engines.of(tensors[0], "sending between two ranks").send(tensors, rank, tag)

    def recv(self, tensors: Any, rank: int, tag: int = 0) -> Any:
        """From one rank."""
        return self._engines.of(tensors[0], "sending between two ranks").recv(tensors, rank, tag)

    def recv_anysource(self, tensors: Any, tag: int = 0) -> Any:
        """From whichever rank sends."""
        return self._engines.of(tensors[0], "sending between two ranks").recv_anysource(tensors, tag)

    def monitored_barrier(self, timeout: timedelta | None = None, wait_all_ranks: bool = False) -> None:
        """A barrier that names the ranks which did not come."""
        self._engines.gloo("monitored_barrier").monitored_barrier(timeout or self._timeout, wait_all_ranks)

    # ---- the group itself

    def getBackendName(self) -> str:
        return "launcher"

    def statistics(self) -> dict[str, Any]:
        """What the core has counted, calls and bytes by path; ``gpu``: who carried what. See docs/collectives.md."""
        return {**self._run(self._group.statistics), "gpu": self._gpu.statistics()}

    @property
    def group_name(self) -> str:
        """As torch calls this group."""
        return self._name

    def getGroupName(self) -> str:
        return self._name

    def _set_group_name(self, name: str) -> None:
        self._name = name

    setGroupName = _set_group_name

    @property
    def group_desc(self) -> str:
        """For people."""
        return self._description

    def getGroupDesc(self) -> str:
        return self._description

    def _set_group_desc(self, description: str) -> None:
        self._description = description

    setGroupDesc = _set_group_desc

    @property
    def _device_types(self) -> list[Any]:
        return [torch.device(kind) for kind in (("cpu", "cuda") if torch.cuda.is_available() else ("cpu",))]

    def _get_backend(self, device: Any) -> Any:
        kind = torch.device(device).type
        if kind == "cpu":
            return _CpuBackend(self)
        if kind == "cuda" and torch.cuda.is_available():
            return self._engines.cuda("tensors in GPU memory")
        raise RuntimeError(f'backend "launcher" has no engine for device type {kind}')

    def get_group_store(self) -> Any:
        """torch's store for this group."""
        return self._store

    def set_timeout(self, timeout: timedelta) -> None:
        """How long a call waits for another rank, from the next call on."""
        self._timeout = timeout
        self._run(partial(setattr, self._group, "timeout_s", timeout.total_seconds()))
        self._gpu.set_timeout(timeout.total_seconds())
        self._engines.set_timeout(timeout)

    def _start_coalescing(self, device: Any) -> None:
        backend = self._get_backend(device)
        if not isinstance(backend, _CpuBackend):
            backend._start_coalescing()
            self._gpu.together = True

    def _end_coalescing(self, device: Any) -> Any:
        backend = self._get_backend(device)
        if not isinstance(backend, _CpuBackend):
            self._gpu.together = False
            return backend._end_coalescing()
        return self._start(_nothing, False, [])  # over when all that was queued before it is

    def split_group(
        self,
        ranks: Sequence[int],
        timeout: timedelta | None = None,
        opts: Any = None,
        group_name: str | None = None,
        group_desc: str | None = None,
        device_types: Any = None,
    ) -> LauncherProcessGroup | None:
        """A group of some of this one's ranks (numbered as in it); None on the others. All of them call it."""
        from launcher.collectives.torch_backend import make

        self._splits += 1
        if self._rank not in ranks:
            return None
        # The rest of the ranks may make another group of the same split.
        name = group_name or f"{self._name}:split:{self._splits}:{min(ranks)}"
        store = dist.PrefixStore(f"{name}/", self._store)
        members = [self._members[rank] for rank in ranks]
        group = make(store, list(ranks).index(self._rank), members, timeout or self._timeout, name)
        group._set_group_desc(group_desc or f"{self._description}:split:{self._splits}")
        return group

    def shutdown(self) -> None:
        """Finishes what was started and leaves the group."""
        self._closer()

    def abort(self) -> None:
        """Leaves the group at once; the other ranks' calls fail, naming this rank."""
        self._gpu.abort()
        self._group.abort("the process group was aborted")
        self._engines.shutdown(abort=True)
        try:
            self._executor.close(_ABORT_S)
        except TimeoutError:
            pass  # its call ends when the group does
        self._closer()


class _CpuBackend:
    """What torch asks a device's back-end about."""

    supports_splitting = False
    supports_coalescing = False
    supports_time_estimate = False
    supports_shrinking = False

    def __init__(self, group: LauncherProcessGroup) -> None:
        self._group = group

    def name(self) -> str:
        return "launcher"

    def supports_tensor_alloc(self, device: Any) -> bool:
        """FSDP2's ``set_allocate_memory_from_process_group_for_comm`` asks it."""
        return True

    def allocate_tensor(self, size: int, *, dtype: Any, device: Any) -> Any:
        """A tensor in memory that all ranks map."""
        return self._group.pool.tensor(int(size), dtype)


def _close(executor: Executor, group: Group, gpu: GpuAllreduce, buckets: Buckets, pool: Pool, engines: Engines) -> None:
    executor.close()
    gpu.close()
    buckets.close()
    pool.closed = True
    group.close()
    engines.shutdown()


def _nothing() -> None:
    pass
