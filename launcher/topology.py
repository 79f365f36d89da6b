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


def plan(
    hosts: Sequence[str],
    host: str,
    slots: Sequence[int],
    cpus: Sequence[Sequence[int]],
    threads_per_rank: int,
) -> Topology:
    """The topology seen from ``host``. Slots need not be equal: 8 ranks here, 4 there.

    Args:
        slots: the number of ranks of each host, in the order of ``hosts``.
        cpus: for each local rank, the CPUs it is bound to; an empty sequence for none.
        threads_per_rank: OMP_NUM_THREADS of this host's ranks.
    """
    host_rank = list(hosts).index(host)
    first = sum(slots[:host_rank])
    places = tuple(
        RankPlace(
            rank=first + local_rank,
            local_rank=local_rank,
            host=host,
            host_rank=host_rank,
            cpus=tuple(cpus[local_rank]),
        )
        for local_rank in range(slots[host_rank])
    )
    return Topology(
        hosts=tuple(hosts),
        host=host,
        host_rank=host_rank,
        slots=tuple(slots),
        world_size=sum(slots),
        local=places,
        threads_per_rank=threads_per_rank,
    )


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


def limit_slots(slots: Sequence[int], processes: int) -> tuple[int, ...]:
    """Slots of each host when only ``processes`` ranks are wanted: host after host is filled; 0: all of them.

    Raises:
        UsageError: there are fewer slots than that.
    """
    if not processes:
        return tuple(slots)
    if processes > sum(slots):
        raise UsageError(f"mpi_processes is {processes}, but the hosts have {sum(slots)} slots: {tuple(slots)}")
    limited, left = [], processes
    for count in slots:
        limited.append(min(count, left))
        left -= limited[-1]
    return tuple(limited)
