"""From a resolved job to its end: the plan of this host, the run, and what is left behind for people and platform."""

from __future__ import annotations

import os
import stat

from launcher import container as contract
from launcher import topology as topologies
from launcher.engines import torch as engine
from launcher.errors import ContractError, LauncherError, OutputError, UsageError
from launcher.job import JobSpec, count_ranks, parse_map, parse_ranks
from launcher.machine import Machine, probe
from launcher.record import Record
from launcher.supervisor.options import Display, HostPlan

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from launcher.container import Paths, StaleMark
    from launcher.topology import Topology
    from launcher.verdict import Verdict

GRACE_AFTER_FAILURE_S = 30.0


class Prepared(Record):
    """All decisions on one host's part of a job; printed by ``plan``, run by :func:`execute`."""

    spec: JobSpec
    machine: Machine
    topology: Topology
    rendezvous: engine.Rendezvous
    environ: dict[str, str]
    run_dir: str
    keep_logs: bool
    displays: tuple[Display, ...]
    grace_failure_s: float
    grace_stop_s: float


def prepare(spec: JobSpec, environ: Mapping[str, str]) -> Prepared:
    """Decides everything that is left once the job is known. Writes nothing, starts nothing.

    Raises:
        UsageError: an option does not fit the host.
    """
    machine = probe(environ)
    resources = spec.container.resources
    ranks = count_ranks(spec.settings["nproc_per_node"], machine.gpus, machine.neurons, len(machine.cpus))
    hosts = topologies.choose_hosts(
        resources.hosts,
        spec.container.distribution_hosts,
        resources.current_host,
        spec["standalone"],
        spec["nnodes"],
    )
    bound = spec["affinity"] == "split"
    shares = topologies.share_cpus(machine.cpus, ranks, machine.domains) if bound else ((),) * ranks
    threads = topologies.threads_for(len(machine.cpus), machine.quota, ranks)
    topology = topologies.plan(hosts, resources.current_host, ranks, shares, threads)
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
        displays=_displays(spec, topology),
        grace_failure_s=GRACE_AFTER_FAILURE_S if grace is None else grace,
        grace_stop_s=spec["stop_timeout"] - spec["stop_reserve"] if grace is None else grace,
    )


def execute(prepared: Prepared, *, handle_signals: bool = True, library: bool = False) -> Verdict:
    """Runs the job on this host, writes its failure (or success) file and prints the summary.

    Args:
        handle_signals: take SIGTERM and the like; only possible in a main thread.
        library: the calling process goes on afterwards.

    Raises:
        OutputError: the run directory cannot be made.
        InternalError: the guardian cannot be started.
    """
    from launcher.supervisor.supervisor import Supervisor

    spec = prepared.spec
    stale = contract.note_stale(spec.container.paths)
    _make_run_directory(prepared.run_dir)
    reserved = _reserve_port(prepared.rendezvous, prepared.topology)
    prepared = _with_port(prepared, reserved[0])
    supervisor = Supervisor(_host_plan(prepared, handle_signals, library))
    try:
        if spec.made_tree:
            supervisor.say(f"job tree: {spec.container.paths.base}")
        for line in (*reserved[2], *(f"stale file not removed: {line}" for line in stale.kept)):
            supervisor.say(line)
        verdict = supervisor.run()
        _conclude(prepared, verdict, stale, supervisor.say)
    finally:
        for held in reserved[1]:
            held.close()
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
    if os.path.basename(os.path.dirname(base)) == "launcher_runs":  # one that the user named may hold other things
        shutil.rmtree(base, ignore_errors=True)
        if not os.listdir(os.path.dirname(base)):
            os.rmdir(os.path.dirname(base))


# ---- preparing


def _rendezvous(spec: JobSpec, topology: Topology) -> engine.Rendezvous:
    several = len(topology.hosts) > 1
    if spec["master_port"] > 65535:
        raise UsageError(f"master_port is {spec['master_port']}; expected a port, 0 to 65535")
    address = spec["master_addr"] or (topology.hosts[0] if several else "127.0.0.1")
    return engine.Rendezvous(address, spec["master_port"] or (engine.DEFAULT_PORT if several else 0))


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
    # Left by a launcher above this one, or by torchrun: nothing of it is true for these ranks.
    for name in ("LAUNCHER_STATUS_PAGE", "LAUNCHER_RESULT", "TORCHELASTIC_ERROR_FILE", "TORCHELASTIC_USE_AGENT_STORE"):
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


def _displays(spec: JobSpec, topology: Topology) -> tuple[Display, ...]:
    count = len(topology.local)
    redirects = parse_map(spec["redirects"], "redirects", count)
    tee = parse_map(spec["tee"], "tee", count)
    chosen = spec["local_ranks_filter"]
    shown = parse_ranks(chosen, "local_ranks_filter", count) if chosen else range(count)
    template = spec["log_prefix"]
    if template == "auto":
        template = "[${host} r${rank} l${local_rank}] " if topology.world_size > 1 else ""
    elif template:
        template = template.rstrip(" ") + " "
    displays = []
    for place in topology.local:
        prefix = template
        for name, value in (
            ("host", place.host),
            ("rank", place.rank),
            ("local_rank", place.local_rank),
            ("role_name", spec["role"]),
        ):
            prefix = prefix.replace("${" + name + "}", str(value))
        console = (3 & ~redirects[place.local_rank]) | tee[place.local_rank]
        if "${" in prefix:
            raise UsageError(f"log_prefix {template!r}: unknown name; there are host, rank, local_rank and role_name")
        displays.append(Display(prefix, console if place.local_rank in shown else 0))
    return tuple(displays)


def _reserve_port(rendezvous: engine.Rendezvous, topology: Topology) -> tuple[int, tuple[Any, ...], tuple[str, ...]]:
    """The port for rank 0, what keeps other launchers from it, and lines to say.

    Nothing may be bound to the port when rank 0 binds it (it may not set SO_REUSEADDR), so the port is taken from
    outside of the range that the kernel hands out by itself, and a name in the abstract namespace (of this network
    namespace, like the port) claims it among launchers; the name goes away with its descriptor.
    """
    if len(topology.hosts) > 1:
        return rendezvous.port, (), ()  # the first host alone could tell; a port they all know is used
    import _socket  # the socket module imports selectors and enum; only its C part is needed here

    lines: tuple[str, ...] = ()
    for port in (rendezvous.port, *_candidate_ports()):
        if not port:
            continue
        claim = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
        probe_socket = _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
        probe_socket.setsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEADDR, 1)
        try:
            claim.bind(f"\0launcher-master-port-{port}")
            probe_socket.bind(("0.0.0.0", port))
        except OSError as error:
            claim.close()
            if port == rendezvous.port:
                lines = (f"MASTER_PORT {port} cannot be had ({error.strerror})",)
            continue
        finally:
            probe_socket.close()
        # The ranks learn the port from us, so another one serves as well.
        return port, (claim,), tuple(f"{line}; using {port}" for line in lines)
    raise OutputError("no free port for rank 0 in 64 tries; give --master-port")


def _candidate_ports() -> list[int]:
    """Ports that the kernel does not give to connections (net.ipv4.ip_local_port_range), in random order."""
    try:
        with open("/proc/sys/net/ipv4/ip_local_port_range", encoding="ascii") as file:
            low, high = (int(word) for word in file.read().split())
    except (OSError, ValueError):
        low, high = 32768, 60999
    # Below the range from 10000 on; where it begins lower, above it; where it is everything, anywhere.
    first, last = (10000, low) if low > 12000 else (high + 1, 65536) if high < 63000 else (10000, 65536)
    random = os.urandom(128)
    return [first + int.from_bytes(random[at : at + 2], "little") % (last - first) for at in range(0, 128, 2)]


def _with_port(prepared: Prepared, port: int) -> Prepared:
    from launcher.record import replace

    return replace(prepared, rendezvous=replace(prepared.rendezvous, port=port))


def rank_launches(prepared: Prepared, attempt: int) -> list[engine.RankLaunch]:
    """The command and environment of each local rank in one attempt."""
    spec = prepared.spec
    return [
        engine.launch_of(
            place,
            prepared.topology,
            spec.entry,
            prepared.rendezvous,
            prepared.environ,
            run_id=spec.run_id,
            run_dir=prepared.run_dir,
            attempt=attempt,
            max_restarts=spec["max_restarts"],
            role=spec["role"],
            virtual_local_rank=spec["virtual_local_rank"],
            keep_logs=prepared.keep_logs,
        )
        for place in prepared.topology.local
    ]


def _host_plan(prepared: Prepared, handle_signals: bool, library: bool) -> HostPlan:
    spec = prepared.spec
    return HostPlan(
        host=prepared.topology.host,
        program=spec.entry.name,
        run_dir=prepared.run_dir,
        launches=lambda attempt: rank_launches(prepared, attempt),
        displays=prepared.displays,
        cap_bytes=spec["log_max_mb"] << 20,
        raw=prepared.topology.world_size == 1 and not prepared.displays[0].prefix,
        grace_failure_s=prepared.grace_failure_s,
        grace_stop_s=prepared.grace_stop_s,
        max_restarts=spec["max_restarts"],
        crash_loop_s=spec["crash_loop_s"],
        hang_timeout_s=spec["hang_timeout"],
        early_exit=spec["early_exit"],
        preload=spec["preload"],
        written_directories=(prepared.run_dir, spec.container.paths.output_dir, spec.container.paths.model_dir),
        deadline_file=prepared.environ["LAUNCHER_STOP_DEADLINE"],
        follow_parent=spec["follow_parent"] == "on" or (spec["follow_parent"] == "auto" and spec.mode == "train"),
        handle_signals=handle_signals,
        library=library,
        parent_pid=os.getppid(),
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
