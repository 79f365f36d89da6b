"""Who is which rank, and which CPUs are whose. Pure: facts in, facts out."""

from __future__ import annotations

from launcher.errors import UsageError
from launcher.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class RankPlace(Record):
    """One rank's place. ``cpus`` is empty when the rank is not bound."""

    rank: int
    local_rank: int
    host: str
    host_rank: int
    cpus: tuple[int, ...] = ()


class Topology(Record):
    """The job's ranks. ``local`` are those of ``host``; ranks are dense, host by host in the order of ``hosts``."""

    hosts: tuple[str, ...]
    host: str
    host_rank: int
    slots: tuple[int, ...]
    world_size: int
    local: tuple[RankPlace, ...]
    threads_per_rank: int


def plan(hosts: Sequence[str], host: str, slots: int, cpus: Sequence[Sequence[int]], threads_per_rank: int) -> Topology:
    """The topology seen from ``host``, with ``slots`` ranks on every host.

    Args:
        cpus: for each local rank, the CPUs it is bound to; an empty sequence for none.
    """
    host_rank = list(hosts).index(host)
    places = tuple(
        RankPlace(
            rank=host_rank * slots + local_rank,
            local_rank=local_rank,
            host=host,
            host_rank=host_rank,
            cpus=tuple(cpus[local_rank]),
        )
        for local_rank in range(slots)
    )
    return Topology(
        hosts=tuple(hosts),
        host=host,
        host_rank=host_rank,
        slots=(slots,) * len(hosts),
        world_size=slots * len(hosts),
        local=places,
        threads_per_rank=threads_per_rank,
    )


def choose_hosts(
    listed: Sequence[str], training: Sequence[str], host: str, standalone: bool, nnodes: str
) -> tuple[str, ...]:
    """The hosts that form this job's group.

    Args:
        listed: all hosts of the container's host list.
        training: those of the instance groups that train together; a host outside of them trains alone.
        nnodes: torchrun's expectation, ``N`` or ``MIN:MAX``; empty for none.

    Raises:
        UsageError: the host list disagrees with ``nnodes``.
    """
    if standalone:
        return (host,)
    hosts = tuple(training) if host in training else (host,)
    if nnodes:
        low, _, high = nnodes.partition(":")
        if not low.isdigit() or (high and not high.isdigit()):
            raise UsageError(f"nnodes is {nnodes!r}; expected N or MIN:MAX")
        if not int(low) <= len(hosts) <= int(high or low):
            raise UsageError(
                f"nnodes is {nnodes}, but the host list has {len(hosts)} of {len(listed)}: {', '.join(hosts)}"
            )
    return hosts


def share_cpus(
    allowed: Sequence[int], ranks: int, domains: Mapping[int, tuple[int, int]]
) -> tuple[tuple[int, ...], ...]:
    """Disjoint, equal shares of ``allowed``, neighbours in the machine together; none when a rank would get no CPU.

    Args:
        domains: CPU -> (NUMA node, physical core). Threads of one core stay in one share where the count allows.
    """
    if ranks < 2 or len(allowed) < ranks:
        return ((),) * ranks
    ordered = sorted(allowed, key=lambda cpu: (*domains.get(cpu, (0, cpu)), cpu))
    size, extra = divmod(len(ordered), ranks)
    shares, start = [], 0
    for rank in range(ranks):
        end = start + size + (1 if rank < extra else 0)
        shares.append(tuple(sorted(ordered[start:end])))
        start = end
    return tuple(shares)


def threads_for(allowed: int, quota: float | None, ranks: int) -> int:
    """OMP_NUM_THREADS for each of ``ranks``: allowed CPUs, or the cgroup's CPU quota if that is less, divided."""
    available = allowed if quota is None else min(allowed, max(1, int(quota + 0.5)))
    return max(1, available // ranks)
