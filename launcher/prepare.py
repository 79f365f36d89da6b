"""All decisions on one host's part of a job, once the job is known. Writes nothing, starts nothing."""

from __future__ import annotations

import os

from launcher import container as contract
from launcher import hosts as host_lists
from launcher import topology as topologies
from launcher.engines import torch as engine
from launcher.errors import UsageError
from launcher.job import JobSpec, count_ranks, parse_map, parse_ranks
from launcher.machine import Machine, probe
from launcher.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from launcher.mpi_plan import MpiJob
    from launcher.topology import RankPlace, Topology

GRACE_AFTER_FAILURE_S = 30.0
_NOT_FOR_RANKS = (
    "LAUNCHER_SECRET",
    # Left by a launcher above this one, or by torchrun: nothing of it is true for these ranks.
    "LAUNCHER_HOROVOD_COMPAT",
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
        run_dir: where this run's logs, error files and status pages go.
        shared_dir: what it is in, if that is a place for the runs of all jobs; else "".
        horovod: controller of Horovod's engine, ``gloo`` or ``mpi``; "" for other engines.
    """

    spec: JobSpec
    machine: Machine
    topology: Topology
    rendezvous: engine.Rendezvous
    environ: dict[str, str]
    run_dir: str
    shared_dir: str
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

        if spec["preload"]:
            raise UsageError("--preload does not go with MPI: a rank is mpirun's to start, and no fork of the launcher")
        mpi = mpi_plan.prepare(spec, hosts.host_rank == 0, environ)
        if len(slots) == 1:  # of several hosts, the leader knows how many slots there are
            slots = topologies.limit_slots(slots, spec["mpi_processes"])
    ranks = slots[hosts.host_rank]
    bound = spec["affinity"] == "split"
    shares = topologies.share_cpus(machine.cpus, ranks, machine.domains) if bound else ((),) * ranks
    threads = topologies.threads_for(len(machine.cpus), machine.quota, ranks)
    topology = topologies.plan(hosts.hosts, hosts.host, slots, shares, threads)
    rendezvous = _rendezvous(spec, topology)
    base, shared = _run_base(spec)
    run_dir = os.path.join(base, f"{spec.run_id}_{os.urandom(4).hex()}")
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
        shared_dir=base if shared else "",
        keep_logs=spec["log_dir"] != os.devnull,
        console=_console(spec, topology),
        mpi=mpi,
        grace_failure_s=GRACE_AFTER_FAILURE_S if grace is None else grace,
        grace_stop_s=spec["stop_timeout"] - spec["stop_reserve"] if grace is None else grace,
        horovod=horovod,
    )


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


def _run_base(spec: JobSpec) -> tuple[str, bool]:
    """The directory that this run's own is made in; and whether other jobs' are, too."""
    chosen = spec["log_dir"]
    if chosen and chosen != os.devnull:
        return os.path.abspath(chosen), False
    if spec.made_tree and not chosen:
        return os.path.abspath(os.path.join(spec.container.paths.base, "run")), False
    # Beside the contract's tree, not in it: everything under output/ is uploaded. But a container's root may be
    # read-only; then any place will do, and memory last.
    places = (temporary_directory(), "/var/tmp", spec.container.paths.base, "/dev/shm")
    place = next(filter(_writable, places), places[0])
    return os.path.join(place, f"launcher-{os.getuid()}"), True


def _writable(path: str) -> bool:
    """Whether a directory can be made in ``path``, which need not be there yet."""
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    return os.access(path, os.W_OK | os.X_OK)


def temporary_directory() -> str:
    """Where temporary files belong by the environment's word."""
    return os.path.abspath(os.environ.get("TMPDIR") or "/tmp")


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
    if spec["horovod_compat"] != "off":
        shared["LAUNCHER_HOROVOD_COMPAT"] = spec["horovod_compat"]
    contract.check_lengths(shared)
    return shared


def _console(spec: JobSpec, topology: Topology) -> tuple[int, ...]:
    count = len(topology.local)
    redirects = parse_map(spec["redirects"], "redirects", count)
    tee = parse_map(spec["tee"], "tee", count)
    chosen = spec["local_ranks_filter"]
    shown = parse_ranks(chosen, "local_ranks_filter", count) if chosen else range(count)
    for place in topology.local:
        line_prefix(spec, place, topology.world_size)  # a mistake in the template must not wait for the start
    return tuple(
        (3 & ~redirects[local_rank]) | tee[local_rank] if local_rank in shown else 0 for local_rank in range(count)
    )


def line_prefix(spec: JobSpec, place: RankPlace, world_size: int) -> str:
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
