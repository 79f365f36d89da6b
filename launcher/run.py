"""From a resolved job to its end: the plan of this host, the run, and what is left behind for people and platform."""

from __future__ import annotations

import os
import stat

from launcher import container as contract
from launcher import hosts as host_lists
from launcher import ports
from launcher import topology as topologies
from launcher.engines import torch as engine
from launcher.errors import ContractError, LauncherError, OutputError, UsageError
from launcher.job import JobSpec, count_ranks, parse_map, parse_ranks
from launcher.machine import Machine, probe
from launcher.record import Record, replace
from launcher.supervisor.coordinator import Policy
from launcher.supervisor.group import Alone, Start
from launcher.supervisor.options import HostPlan

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import Any

    from launcher.cluster.kvstore import JobStore
    from launcher.container import Paths, StaleMark
    from launcher.evidence import Verdict
    from launcher.mpi_plan import MpiJob
    from launcher.supervisor.adoption import MpiPlan
    from launcher.supervisor.group import Group
    from launcher.topology import RankPlace, Topology

GRACE_AFTER_FAILURE_S = 30.0
_NOT_FOR_RANKS = (
    "LAUNCHER_SECRET",
    # Left by a launcher above this one, or by torchrun: nothing of it is true for these ranks.
    "LAUNCHER_STATUS_PAGE",
    "LAUNCHER_RESULT",
    "TORCHELASTIC_ERROR_FILE",
    "TORCHELASTIC_USE_AGENT_STORE",
)


class Prepared(Record):
    """All decisions on one host's part of a job; printed by ``plan``, run by :func:`execute`.

    Attributes:
        mpi: mpirun and what it is given, of an MPI job.
        topology: with the slots that the host list gives, else with this host's for all. Of several hosts, the
            leader tells the true ones when they have met.
        rendezvous: as far as it is settled; port 0: one that is free.
        console: by local rank, the streams that are shown (bit 0 stdout, bit 1 stderr).
        horovod: controller of Horovod's engine, ``gloo`` or ``mpi``; "" for other engines.
    """

    spec: JobSpec
    machine: Machine
    topology: Topology
    rendezvous: engine.Rendezvous
    environ: dict[str, str]
    run_dir: str
    keep_logs: bool
    console: tuple[int, ...]
    mpi: MpiJob | None
    grace_failure_s: float
    grace_stop_s: float
    horovod: str = ""


def prepare(spec: JobSpec, environ: Mapping[str, str]) -> Prepared:
    """Decides everything that is left once the job is known. Writes nothing, starts nothing.

    Raises:
        UsageError: an option does not fit the host.
    """
    machine = probe(environ)
    hosts = spec.hosts
    counted = count_ranks(spec.settings["nproc_per_node"], machine.gpus, machine.neurons, len(machine.cpus))
    slots = host_lists.slots(hosts, counted, spec.settings["nproc_per_node"])
    horovod = _horovod_controller(spec, environ) if spec["engine"] == "horovod" else ""
    by_platform = spec["engine"] == "auto" and spec.container.flag("sagemaker_mpi_enabled")
    mpi = None
    if spec["engine"] == "mpi" or horovod == "mpi" or by_platform:
        from launcher import mpi_plan

        mpi = mpi_plan.prepare(spec, hosts.host_rank == 0, environ)
        slots = mpi_plan.limit_slots(slots, spec["mpi_processes"])
    ranks = slots[hosts.host_rank]
    bound = spec["affinity"] == "split"
    shares = topologies.share_cpus(machine.cpus, ranks, machine.domains) if bound else ((),) * ranks
    threads = topologies.threads_for(len(machine.cpus), machine.quota, ranks)
    topology = topologies.plan(hosts.hosts, hosts.host, slots, shares, threads)
    rendezvous = _rendezvous(spec, topology)
    run_dir, keep_logs = _run_directory(spec)
    grace = spec["grace"]
    if spec["stop_reserve"] >= spec["stop_timeout"] and grace is None:
        raise UsageError(
            f"stop_reserve ({spec['stop_reserve']:g} s) must be less than stop_timeout ({spec['stop_timeout']:g} s)"
        )
    return Prepared(
        spec=spec,
        machine=machine,
        topology=topology,
        rendezvous=rendezvous,
        environ=_shared_environ(spec, environ, machine, topology, run_dir),
        run_dir=run_dir,
        keep_logs=keep_logs,
        console=_console(spec, topology),
        mpi=mpi,
        grace_failure_s=GRACE_AFTER_FAILURE_S if grace is None else grace,
        grace_stop_s=spec["stop_timeout"] - spec["stop_reserve"] if grace is None else grace,
        horovod=horovod,
    )


def execute(
    prepared: Prepared, environ: Mapping[str, str], *, handle_signals: bool = True, library: bool = False
) -> Verdict:
    """Runs this host's part of the job, writes its failure (or success) file and prints the summary.

    Args:
        environ: as given to :func:`prepare`; the job's secret may be in it.
        handle_signals: take SIGTERM and the like; only possible in a main thread.
        library: the calling process goes on afterwards.

    Raises:
        OutputError: the run directory cannot be made.
        InternalError: the guardian cannot be started.
        ClusterError, RefusedError: the hosts of the job did not come together.
    """
    from launcher.supervisor.supervisor import Supervisor

    spec = prepared.spec
    stale = contract.note_stale(spec.container.paths)
    _make_run_directory(prepared.run_dir)
    held: list[ports.Reserved | JobStore] = []
    supervisor = None
    try:
        supervisor = Supervisor(
            _host_plan(prepared, handle_signals, library), lambda say: _group(prepared, environ, held, say)
        )
        if spec.made_tree:
            supervisor.say(f"job tree: {spec.container.paths.base}")
        for path in stale.kept:
            supervisor.say(f"stale file not removed: {path}")
        verdict = supervisor.run()
        _conclude(prepared, verdict, stale, supervisor.say)
    finally:
        for reserved in held:
            reserved.release()
        if supervisor is not None:
            supervisor.close()
    if not library:  # its caller is given the paths
        _clear_run_directory(prepared, verdict)
    return verdict


def report_error(error: LauncherError, paths: Paths | None, log: Callable[[str], None]) -> None:
    """Leaves an error that came before any rank was started in the failure file, and prints it."""
    log(f"error: {error}")
    if paths is None or not os.path.isdir(paths.output_dir):
        return
    detail = {"kind": type(error).__name__, "exit_code": error.exit_code}
    if isinstance(error, ContractError):
        detail.update(file=error.file, field=error.field, found=error.found, expected=error.expected)
    try:
        contract.write_failure(paths, f"{type(error).__name__}: {error}\n", detail, contract.note_stale(paths))
    except OutputError as problem:
        log(str(problem))


def discard_tree(spec: JobSpec) -> None:
    """Removes a job tree that was made for this run and never used: nothing but what we put there may be in it."""
    import shutil

    base = spec.container.paths.base
    if spec["job_dir"]:
        return  # one that the user named may hold other things
    shutil.rmtree(base, ignore_errors=True)
    above = os.path.dirname(base)
    try:
        while os.path.basename(base) != "launcher_runs":
            os.rmdir(above)
            base, above = above, os.path.dirname(above)
    except OSError:
        return  # other things are in it, other hosts' trees for example


# ---- preparing


def _rendezvous(spec: JobSpec, topology: Topology) -> engine.Rendezvous:
    several = len(topology.hosts) > 1
    if spec["master_port"] > 65535:
        raise UsageError(f"master_port is {spec['master_port']}; expected a port, 0 to 65535")
    address = spec["master_addr"] or (topology.hosts[0] if several else "127.0.0.1")
    return engine.Rendezvous(address, spec["master_port"] or (engine.DEFAULT_PORT if several else 0))


def _horovod_controller(spec: JobSpec, environ: Mapping[str, str]) -> str:
    from launcher.engines import horovod, mpi

    if spec["virtual_local_rank"]:
        raise UsageError("--virtual-local-rank gives every rank the local rank 0, but Horovod needs the true ones")
    build = horovod.installed(spec.entry.python, environ)
    # All hosts must decide alike, and of several only the first needs an mpirun.
    mpirun = "mpirun"
    if len(spec.hosts.hosts) == 1:
        try:
            mpirun = mpi.find_mpirun(spec["mpirun"], spec.entry.python, environ.get("PATH", os.defpath))
        except UsageError:
            mpirun = ""
    return horovod.choose_controller(spec["horovod_controller"], build, environ, mpirun)


def _run_directory(spec: JobSpec) -> tuple[str, bool]:
    """Where this run's logs, error files and status pages go; and whether output is kept in files."""
    chosen = spec["log_dir"]
    keep = chosen != os.devnull
    if chosen and keep:
        base = chosen
    elif spec.made_tree and keep:
        base = os.path.join(spec.container.paths.base, "run")
    else:
        # Beside the contract's tree, not in it: everything under output/ is uploaded.
        base = _shared_base()
    return os.path.join(os.path.abspath(base), f"{spec.run_id}_{os.urandom(4).hex()}"), keep


def _shared_base() -> str:
    return os.path.join(os.path.abspath(os.environ.get("TMPDIR") or "/tmp"), f"launcher-{os.getuid()}")


def _clear_run_directory(prepared: Prepared, verdict: Verdict) -> None:
    """Removes what nobody will look for: the files of a success in the shared place, and what holds no logs."""
    if prepared.keep_logs and not (verdict.ok and os.path.dirname(prepared.run_dir) == _shared_base()):
        return
    import shutil

    shutil.rmtree(prepared.run_dir, ignore_errors=True)


def _make_run_directory(path: str) -> None:
    base = os.path.dirname(path)
    try:
        os.makedirs(base, mode=0o700, exist_ok=True)
        info = os.lstat(base)
        if base == _shared_base() and (
            not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o022
        ):
            raise OutputError(f"{base} is not a directory of this user's alone; remove it, or give --log-dir")
        os.mkdir(path, 0o700)
    except OSError as error:
        raise OutputError(f"cannot make the run directory {path}: {error.strerror}; give another --log-dir") from error


def _shared_environ(
    spec: JobSpec, environ: Mapping[str, str], machine: Machine, topology: Topology, run_dir: str
) -> dict[str, str]:
    """What all ranks of this host share."""
    shared = dict(environ)
    for name in _NOT_FOR_RANKS:
        shared.pop(name, None)
    shared.update(
        contract.sm_environment(
            spec.container,
            num_cpus=machine.cpu_count,
            num_gpus=machine.gpus,
            num_neurons=machine.neurons,
            user_entry_point=spec.entry.name,
        )
    )
    shared.update(
        LAUNCHER_JOB_ID=os.path.basename(run_dir),
        LAUNCHER_RUN_DIR=run_dir,
        LAUNCHER_STOP_DEADLINE=os.path.join(run_dir, "stop_deadline_ns"),
        LAUNCHER_CHECKPOINT_DIR=spec.container.paths.checkpoints_dir,
    )
    contract.check_lengths(shared)
    return shared


def _console(spec: JobSpec, topology: Topology) -> tuple[int, ...]:
    count = len(topology.local)
    redirects = parse_map(spec["redirects"], "redirects", count)
    tee = parse_map(spec["tee"], "tee", count)
    chosen = spec["local_ranks_filter"]
    shown = parse_ranks(chosen, "local_ranks_filter", count) if chosen else range(count)
    for place in topology.local:
        _prefix(spec, place, topology.world_size)  # a mistake in the template must not wait for the start
    return tuple(
        (3 & ~redirects[local_rank]) | tee[local_rank] if local_rank in shown else 0 for local_rank in range(count)
    )


def _prefix(spec: JobSpec, place: RankPlace, world_size: int) -> str:
    """What stands before each line of a rank."""
    prefix = spec["log_prefix"]
    if prefix == "auto":
        prefix = "[${host} r${rank} l${local_rank}] " if world_size > 1 else ""
    elif prefix:
        prefix = prefix.rstrip(" ") + " "
    for name, value in (
        ("host", place.host),
        ("rank", place.rank),
        ("local_rank", place.local_rank),
        ("role_name", spec["role"]),
    ):
        prefix = prefix.replace("${" + name + "}", str(value))
    if "${" in prefix:
        template = spec["log_prefix"]
        raise UsageError(f"log_prefix {template!r}: unknown name; there are host, rank, local_rank and role_name")
    return str(prefix)


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
    environ = prepared.environ
    environ = {**environ, **_network(prepared, start, say or (lambda line: None))}
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
            prefix=_prefix(spec, place, topology.world_size),
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


def _group(
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
        min_hosts=0 if len(topology.hosts) < 2 else host_lists.fewest(spec.settings, spec.hosts),
    )
    if len(topology.hosts) < 2:
        first = replace(first_start(prepared), port=reserve(), store_address="127.0.0.1")

        def start(attempt: int) -> Start:
            return replace(first, attempt=attempt, store_port=open_store("127.0.0.1", ()))

        return Alone(policy, spec.entry.name, start)
    from launcher.joining import join

    return join(spec, policy, len(topology.local), prepared.grace_failure_s, environ, reserve, open_store, say)


def _host_plan(prepared: Prepared, handle_signals: bool, library: bool) -> HostPlan:
    spec = prepared.spec
    alone = prepared.topology.world_size == 1
    return HostPlan(
        host=prepared.topology.host,
        run_dir=prepared.run_dir,
        launches=lambda start, say: rank_launches(prepared, start, say),
        cap_bytes=spec["log_max_mb"] << 20,
        raw=alone and not _prefix(spec, prepared.topology.local[0], 1),
        grace_failure_s=prepared.grace_failure_s,
        grace_stop_s=prepared.grace_stop_s,
        hang_timeout_s=spec["hang_timeout"],
        early_exit=spec["early_exit"],
        preload=spec["preload"] if prepared.mpi is None else "",  # a rank is mpirun's to start, and no fork of ours
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
        return _prefix(prepared.spec, place, world_size)

    return mpi_plan.plan(
        prepared.mpi,
        start,
        here.host,
        run_dir=prepared.run_dir,
        environ=prepared.environ,
        interface=network.get("GLOO_SOCKET_IFNAME", ""),
        prefix=prefix,
    )


# ---- concluding


def _conclude(prepared: Prepared, verdict: Verdict, stale: StaleMark, say: Any) -> None:
    paths, program = prepared.spec.container.paths, prepared.spec.entry.name
    if verdict.ok:
        try:
            contract.write_success(paths)
        except OutputError as error:
            say(f"the job succeeded, but {error}")
        return
    from launcher.record import as_dict
    from launcher.report import summary

    detail = as_dict(verdict)
    detail.update(run_id=prepared.spec.run_id, run_dir=prepared.run_dir, program=program)
    users, where = None, paths.failure_file
    try:
        users = contract.write_failure(paths, verdict.text, detail, stale)
    except OutputError as error:
        say(str(error))
        where = ""
    say(summary(verdict, program, where, prepared.run_dir if prepared.keep_logs else ""))
    if users is not None:
        say(f"{paths.failure_file} is the script's own and is kept; the launcher's view: {paths.failure_json}")
