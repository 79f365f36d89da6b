"""From what was decided to what a supervisor takes: its plan of this host, the ranks of an attempt, and its group."""

from __future__ import annotations

import os

from launcher import hosts as host_lists
from launcher import ports
from launcher import topology as topologies
from launcher.engines import torch as engine
from launcher.prepare import Prepared, line_prefix
from launcher.record import replace
from launcher.supervisor.coordinator import Policy
from launcher.supervisor.group import Alone, Start
from launcher.supervisor.options import HostPlan

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from launcher.cluster.kvstore import JobStore
    from launcher.supervisor.adoption import MpiPlan
    from launcher.supervisor.group import Group


def rank_launches(
    prepared: Prepared, start: Start, say: Callable[[str], None] | None = None
) -> list[engine.RankLaunch]:
    """The command and environment of each local rank in one attempt.

    Args:
        say: takes a line about the network, if there is one to be said.
    """
    spec, here = prepared.spec, prepared.topology
    cpus = tuple(place.cpus for place in here.local)
    topology = topologies.plan(start.hosts, here.host, start.slots, cpus, here.threads_per_rank)
    environ = {**prepared.environ, **_network(prepared, start, say or (lambda line: None))}
    launches = [
        engine.launch_of(
            place,
            topology,
            spec.entry,
            engine.Rendezvous(start.address, start.port),
            environ,
            run_id=spec.run_id,
            run_dir=prepared.run_dir,
            attempt=start.attempt,
            max_restarts=spec["max_restarts"],
            role=spec["role"],
            virtual_local_rank=spec["virtual_local_rank"],
            keep_logs=prepared.keep_logs,
            prefix=line_prefix(spec, place, topology.world_size),
            console=prepared.console[place.local_rank],
        )
        for place in topology.local
    ]
    if not prepared.horovod:
        return launches
    from launcher.engines import horovod

    placed = list(zip(launches, topology.local, strict=True))
    if prepared.horovod == horovod.MPI:
        return [horovod.with_mpi(launch, place, topology) for launch, place in placed]
    # Several may be listed for torch, Horovod takes one.
    interface = environ.get("GLOO_SOCKET_IFNAME", "").partition(",")[0] if len(start.hosts) > 1 else "lo"
    store = engine.Rendezvous(start.store_address, start.store_port)
    return [horovod.with_gloo(launch, place, topology, store, interface) for launch, place in placed]


def _network(prepared: Prepared, start: Start, say: Callable[[str], None]) -> dict[str, str]:
    """The variables that name the interface for ranks; none for one host."""
    if len(start.hosts) < 2:
        return {}
    from launcher.engines.network import network_environ

    wanted = prepared.spec.container.resources.network_interface_name
    return network_environ(prepared.spec["interface"], wanted, start.local_address, prepared.environ, say)


def first_start(prepared: Prepared) -> Start:
    """The first attempt as far as it is known before the hosts have met."""
    topology, rendezvous = prepared.topology, prepared.rendezvous
    return Start(0, topology.hosts, topology.slots, rendezvous.address, rendezvous.port)


def group_of(
    prepared: Prepared,
    environ: Mapping[str, str],
    held: list[ports.Reserved | JobStore],
    say: Callable[[str], None],
) -> Group:
    """The hosts' group. Ports that are reserved for rank 0, and the ranks' store, are added to ``held``."""
    spec, topology = prepared.spec, prepared.topology
    stores: list[JobStore] = []

    def reserve() -> int:
        reserved = ports.reserve(prepared.rendezvous.port)
        held.append(reserved)
        for line in reserved.lines:
            say(line)
        return reserved.port

    def open_store(own: str, peers: Iterable[str]) -> int:
        if prepared.horovod != "gloo":
            return 0
        if not stores:
            from launcher.cluster.kvstore import JobStore

            stores.append(JobStore(len(topology.hosts) > 1, say))
            held.append(stores[0])
        return stores[0].open(own, peers)

    policy = Policy(
        max_restarts=spec["max_restarts"],
        crash_loop_s=spec["crash_loop_s"],
        early_exit=spec["early_exit"],
        hang_timeout_s=spec["hang_timeout"],
        straggler_window_s=spec["straggler_window"],
        min_hosts=0 if len(topology.hosts) < 2 else host_lists.fewest(spec.settings, spec.hosts),
    )
    if len(topology.hosts) < 2:
        first = replace(first_start(prepared), port=reserve(), store_address="127.0.0.1")

        def start(attempt: int) -> Start:
            return replace(first, attempt=attempt, store_port=open_store("127.0.0.1", ()))

        return Alone(policy, spec.entry.name, start)
    from launcher.joining import join

    return join(
        spec,
        policy,
        len(topology.local),
        prepared.grace_failure_s,
        environ,
        reserve,
        open_store,
        say,
        free_layout=prepared.mpi is not None,
    )


def host_plan(prepared: Prepared, handle_signals: bool, library: bool) -> HostPlan:
    spec = prepared.spec
    alone = prepared.topology.world_size == 1
    return HostPlan(
        host=prepared.topology.host,
        run_dir=prepared.run_dir,
        launches=lambda start, say: rank_launches(prepared, start, say),
        cap_bytes=spec["log_max_mb"] << 20,
        raw=alone and not line_prefix(spec, prepared.topology.local[0], 1),
        grace_failure_s=prepared.grace_failure_s,
        grace_stop_s=prepared.grace_stop_s,
        hang_timeout_s=spec["hang_timeout"],
        straggler_window_s=spec["straggler_window"],
        early_exit=spec["early_exit"],
        preload=spec["preload"],
        mpi=(lambda start: _mpi_plan(prepared, start)) if prepared.mpi is not None else None,
        written_directories=(prepared.run_dir, spec.container.paths.output_dir, spec.container.paths.model_dir),
        deadline_file=prepared.environ["LAUNCHER_STOP_DEADLINE"],
        follow_parent=spec["follow_parent"] == "on" or (spec["follow_parent"] == "auto" and spec.mode == "train"),
        handle_signals=handle_signals,
        library=library,
        parent_pid=os.getppid(),
    )


def _mpi_plan(prepared: Prepared, start: Start) -> MpiPlan:
    from launcher import mpi_plan

    assert prepared.mpi is not None
    world_size, here = sum(start.slots), prepared.topology

    network = _network(prepared, start, lambda line: None)

    def prefix(launch: engine.RankLaunch) -> str:
        place = topologies.RankPlace(launch.rank, launch.local_rank, here.host, here.host_rank)
        return line_prefix(prepared.spec, place, world_size)

    return mpi_plan.plan(
        prepared.mpi,
        start,
        here.host,
        run_dir=prepared.run_dir,
        environ=prepared.environ,
        interface=prepared.spec["interface"] or {**prepared.environ, **network}.get("GLOO_SOCKET_IFNAME", ""),
        prefix=prefix,
    )
