"""What an MPI job needs beside its ranks: which mpirun, its command, and the MPI side of a host's plan."""

from __future__ import annotations

import os

from launcher.engines import mpi as engine
from launcher.errors import UsageError
from launcher.record import Record, replace
from launcher.supervisor.adoption import MpiPlan
from launcher.supervisor.guardian import executable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from launcher.engines.torch import RankLaunch
    from launcher.job import JobSpec
    from launcher.supervisor.group import Start


class MpiJob(Record):
    """What is settled before the hosts have met.

    Attributes:
        mpirun: None on hosts that only run daemons.
        option: the user's word on which mpirun, python: the ranks' interpreter, for a host that comes to lead later.
    """

    mpirun: engine.Mpirun | None
    option: str
    python: str
    agent: str
    custom: engine.CustomOptions


def prepare(spec: JobSpec, leads: bool, environ: Mapping[str, str]) -> MpiJob:
    """Finds mpirun (on the first host) and reads the user's options for it.

    Raises:
        UsageError: there is no mpirun, the hosts are simulated, or an option is not for the user to set.
    """
    addresses = spec.hosts.addresses
    if len(spec.hosts.hosts) > 1 and all(addresses.get(host, "").startswith("127.") for host in spec.hosts.hosts):
        raise UsageError(
            "hosts on one machine (simulate) cannot run an MPI job: MPI tells hosts apart by the name of the machine, "
            "and waits for ever when two have the same; use one host, or real ones"
        )
    custom = engine.parse_options(spec["mpi_options"])
    agent = os.path.join(os.path.dirname(executable()), "_agent")
    if not os.access(agent, os.X_OK):
        raise UsageError(f"{agent} is missing: reinstall the launcher package")
    job = MpiJob(None, spec["mpirun"], spec.entry.python, agent, custom)
    return replace(job, mpirun=_find(job, environ)) if leads else job


def _find(job: MpiJob, environ: Mapping[str, str]) -> engine.Mpirun:
    return engine.ask_version(engine.find_mpirun(job.option, job.python, environ.get("PATH", os.defpath)))


def command_of(job: MpiJob, mpirun: engine.Mpirun, start: Start, interface: str) -> list[str]:
    """mpirun's command line for an attempt; ``interface`` as of :func:`plan`."""
    return engine.command_of(
        mpirun,
        start.hosts,
        start.slots,
        agent=job.agent,
        interface=interface if len(start.hosts) > 1 else "",
        custom=job.custom,
        as_root=os.geteuid() == 0,
    )


def plan(
    job: MpiJob,
    start: Start,
    host: str,
    *,
    run_dir: str,
    environ: Mapping[str, str],
    interface: str,
    prefix: Callable[[RankLaunch], str],
) -> MpiPlan:
    """The MPI side of one attempt on ``host``.

    Args:
        environ: what the ranks of this host share.
        interface: for daemons and ranks of several hosts; "" leaves the choice to MPI.
        prefix: what stands before the lines of a rank.

    Raises:
        UsageError: this host leads in place of one that was lost, and has no mpirun.
    """

    def launch_for(
        launch: RankLaunch, who: Any, agent: Mapping[str, str], daemon: Mapping[str, str], program: str
    ) -> RankLaunch:
        adopted = engine.launch_for(launch, who, agent, daemon, job.custom, program)
        return adopted if who.rank == launch.rank else replace(adopted, prefix=prefix(adopted))

    mpirun = (job.mpirun or _find(job, environ)) if host == start.hosts[0] else None
    command = command_of(job, mpirun, start, interface) if mpirun is not None else []
    # Their session directories go with the run's; they leave them behind when they are killed.
    scratch = os.path.join(run_dir, "mpi")
    os.makedirs(scratch, mode=0o700, exist_ok=True)
    values = {name: text for name, text in job.custom.exported.items() if text is not None}
    return MpiPlan(
        agent_socket=os.path.join(run_dir, "agents"),
        command=tuple(command),
        program=os.path.basename(mpirun.path) if mpirun is not None else "",
        environ={**environ, **values, "TMPDIR": scratch},
        directory="/",
        identify=engine.identity,
        launch_for=launch_for,
        daemon=engine.parse_daemon,
        host_of=engine.daemon_host,
        hosts=tuple(host for host, count in zip(start.hosts, start.slots, strict=True) if count),
    )
