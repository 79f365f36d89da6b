"""What an MPI job needs beside its ranks: which mpirun, its command, and the MPI side of a host's plan."""

from __future__ import annotations

import os

from launcher.engines import mpi as engine
from launcher.errors import UsageError
from launcher.record import Record, replace
from launcher.supervisor.adoption import MpiPlan
from launcher.supervisor.guardian import executable

limit_slots = engine.limit_slots

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    from launcher.engines.torch import RankLaunch
    from launcher.job import JobSpec
    from launcher.supervisor.group import Start


class MpiJob(Record):
    """What is settled before the hosts have met. ``mpirun``: None on hosts that only run daemons."""

    mpirun: engine.Mpirun | None
    agent: str
    custom: engine.CustomOptions


def prepare(spec: JobSpec, leads: bool, environ: Mapping[str, str]) -> MpiJob:
    """Finds mpirun (on the first host) and reads the user's options for it.

    Raises:
        UsageError: there is no mpirun, or an option is not for the user to set.
    """
    custom = engine.parse_options(spec["mpi_options"])
    agent = os.path.join(os.path.dirname(executable()), "_agent")
    if not os.access(agent, os.X_OK):
        raise UsageError(f"{agent} is missing: reinstall the launcher package")
    mpirun = None
    if leads:
        path = engine.find_mpirun(spec["mpirun"], spec.entry.python, environ.get("PATH", os.defpath))
        mpirun = engine.ask_version(path)
    return MpiJob(mpirun, agent, custom)


def plan(
    job: MpiJob,
    start: Start,
    *,
    run_dir: str,
    environ: Mapping[str, str],
    interface: str,
    prefix: Callable[[RankLaunch], str],
    start_daemon: Callable[[str, Sequence[str], int], None],
    daemon_told: Callable[[int, int, str], None],
) -> MpiPlan:
    """The MPI side of one attempt on this host.

    Args:
        environ: what the ranks of this host share.
        interface: for daemons and ranks of several hosts; "" leaves the choice to MPI.
        prefix: what stands before the lines of a rank.
    """

    def launch_for(
        launch: RankLaunch, who: Any, agent: Mapping[str, str], daemon: Mapping[str, str], program: str
    ) -> RankLaunch:
        adopted = engine.launch_for(launch, who, agent, daemon, job.custom, program)
        return adopted if who.rank == launch.rank else replace(adopted, prefix=prefix(adopted))

    command: list[str] = []
    if job.mpirun is not None:
        command = engine.command_of(
            job.mpirun,
            start.hosts,
            start.slots,
            agent=job.agent,
            interface=interface if len(start.hosts) > 1 else "",
            custom=job.custom,
            as_root=os.geteuid() == 0,
        )
    # Their session directories go with the run's; they leave them behind when they are killed.
    scratch = os.path.join(run_dir, "mpi")
    os.makedirs(scratch, mode=0o700, exist_ok=True)
    values = {name: text for name, text in job.custom.exported.items() if text is not None}
    return MpiPlan(
        agent_socket=os.path.join(run_dir, "agents"),
        command=tuple(command),
        program=os.path.basename(job.mpirun.path) if job.mpirun is not None else "",
        environ={**environ, **values, "TMPDIR": scratch},
        directory="/",
        identify=engine.identity,
        launch_for=launch_for,
        daemon=engine.parse_daemon,
        host_of=engine.daemon_host,
        start_daemon=start_daemon,
        daemon_told=daemon_told,
    )
