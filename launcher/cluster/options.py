"""What a host has to know to join the other hosts of its job."""

from __future__ import annotations

from launcher.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from launcher.cluster.facts import HostFacts
    from launcher.supervisor.coordinator import Policy

# A ping goes to every member this often; a host is warned of when two are missing.
HEARTBEAT_S = 1.0
LATE_S = 2.5
# Without a turn for this long, this process was stopped or starved: silence of others proves nothing.
SLEPT_S = 2.0
# While hosts are missing, and while hosts that are done wait for others, lines say so: after, and then this often.
FIRST_LINE_S = 3.0
LINE_S = 10.0
# Of a leader's refusals the one that no waiting changes.
NOT_LISTED = "is not in the host list"
PORTS = 4  # the leader's port and the next ones


def no_store(own: str, peers: Iterable[str]) -> int:
    """Of jobs whose ranks need none."""
    return 0


class ClusterPlan(Record):
    """One host's view of the group. Times are seconds.

    Attributes:
        hosts: in rank order; the first one leads.
        slots: ranks of this host.
        addresses: host -> where to reach it, instead of resolving its name.
        named: host names mean something to a resolver.
        key: proves membership; secret: whether it is made from one.
        job: tells this job from others on the same hosts, in clear text.
        peer_check: refuse, warn or off: what to do about hosts whose facts differ.
        master_address: MASTER_ADDR as the user gave it; "": the leader's own.
        program: what the user calls the job's script.
        open_store: (this host's address, the others' addresses) -> port of the store by which the ranks of the next
            attempt meet, should this host lead; 0 when they need none.
        enough: with how many hosts to begin when others do not come in time.
        meet_again_s: what the hosts that are left need to stop their ranks and meet without their leader.
        free_layout: which ranks are on which host is not for the launchers to say, but for mpirun.
        processes: ranks of the whole job, of fewer slots than there are; 0: as many as slots.
        because: why these hosts meet again, if they do; "" at first.
    """

    hosts: tuple[str, ...]
    host: str
    slots: int
    addresses: dict[str, str]
    named: bool
    leader_port: int
    key: bytes
    secret: bool
    job: str
    facts: HostFacts
    peer_check: str
    join_timeout_s: float
    host_timeout_s: float
    master_address: str
    program: str
    policy: Policy
    enough: int
    meet_again_s: float
    free_layout: bool = False
    processes: int = 0
    because: str = ""
    open_store: Callable[[str, Iterable[str]], int] = no_store
