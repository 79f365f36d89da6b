"""Ranks as torchrun would start them: command, environment, log tree.

The variables are those that torch 2.13's elastic agent sets (its agent/server/local_elastic_agent.py), with two
deliberate differences: ``OMP_NUM_THREADS`` is the rank's share of the CPUs instead of 1, and
``TORCHELASTIC_USE_AGENT_STORE`` is always "False", since rank 0 hosts the store.
"""

from __future__ import annotations

import os

from launcher.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from launcher.job import Entry
    from launcher.topology import RankPlace, Topology

BOOT = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "rank", "boot.py")
# What SageMaker's PyTorch images use between hosts; on one host a free port is taken.
DEFAULT_PORT = 7777


class RankLaunch(Record):
    """Everything needed to start one rank. Paths are "" where nothing is to be written.

    ``console``: which streams are shown (bit 0 stdout, bit 1 stderr), each line after ``prefix``.
    """

    rank: int
    local_rank: int
    argv: tuple[str, ...]
    environ: dict[str, str]
    directory: str
    cpus: tuple[int, ...]
    stdout_path: str
    stderr_path: str
    error_file: str
    status_page: str
    booted: bool
    prefix: str = ""
    console: int = 3


class Rendezvous(Record):
    """Where ranks meet: rank 0 listens on ``address``:``port``."""

    address: str
    port: int


def rank_directory(run_dir: str, attempt: int, local_rank: int) -> str:
    """torchrun's log tree: ``<run directory>/attempt_<restart>/<local rank>``."""
    return os.path.join(run_dir, f"attempt_{attempt}", str(local_rank))


def launch_of(
    place: RankPlace,
    topology: Topology,
    entry: Entry,
    rendezvous: Rendezvous,
    base_environ: Mapping[str, str],
    *,
    run_id: str,
    run_dir: str,
    attempt: int,
    max_restarts: int,
    role: str,
    virtual_local_rank: bool,
    keep_logs: bool,
    prefix: str = "",
    console: int = 3,
) -> RankLaunch:
    """The launch of one rank in one attempt.

    Args:
        base_environ: what all ranks share: the caller's environment and the container contract's variables.
        keep_logs: whether output is written to files (``--log-dir /dev/null`` says no).
        prefix, console: how output is shown.
    """
    directory = rank_directory(run_dir, attempt, place.local_rank)
    error_file = os.path.join(directory, "error.json")
    status_page = os.path.join(directory, "status")
    booted = entry.kind != "command"
    environ = dict(base_environ)
    environ.update(_torch_variables(place, topology, rendezvous, run_id, attempt, max_restarts, role))
    environ["TORCHELASTIC_ERROR_FILE"] = error_file
    environ["LAUNCHER_STATUS_PAGE"] = status_page
    environ["LAUNCHER_ATTEMPT"] = str(attempt)
    if entry.kind == "call":
        environ["LAUNCHER_RESULT"] = os.path.join(directory, "result")
    environ.setdefault("OMP_NUM_THREADS", str(topology.threads_per_rank))
    environ.setdefault("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGHUP,SIGQUIT")
    environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    if virtual_local_rank:
        visible = environ.get("CUDA_VISIBLE_DEVICES")
        devices = visible.split(",") if visible else [str(rank) for rank in range(len(topology.local))]
        environ["CUDA_VISIBLE_DEVICES"] = devices[place.local_rank]
        environ["LOCAL_RANK"] = "0"
    # torchrun replaces this macro in arguments.
    args = tuple(arg.replace("${local_rank}", str(place.local_rank)) for arg in entry.args)
    argv = (entry.target, *args) if not booted else (entry.python, "-u", BOOT, entry.kind, entry.target, *args)
    return RankLaunch(
        rank=place.rank,
        local_rank=place.local_rank,
        argv=argv,
        environ=environ,
        directory=entry.directory,
        cpus=place.cpus,
        stdout_path=os.path.join(directory, "stdout.log") if keep_logs else "",
        stderr_path=os.path.join(directory, "stderr.log") if keep_logs else "",
        error_file=error_file,
        status_page=status_page,
        booted=booted,
        prefix=prefix,
        console=console,
    )


def _torch_variables(
    place: RankPlace,
    topology: Topology,
    rendezvous: Rendezvous,
    run_id: str,
    attempt: int,
    max_restarts: int,
    role: str,
) -> dict[str, str]:
    local_size, world_size = str(len(topology.local)), str(topology.world_size)
    return {
        "LOCAL_RANK": str(place.local_rank),
        "RANK": str(place.rank),
        "GROUP_RANK": str(place.host_rank),
        "ROLE_RANK": str(place.rank),
        "ROLE_NAME": role,
        "LOCAL_WORLD_SIZE": local_size,
        "WORLD_SIZE": world_size,
        "GROUP_WORLD_SIZE": str(len(topology.hosts)),
        "ROLE_WORLD_SIZE": world_size,
        "MASTER_ADDR": rendezvous.address,
        "MASTER_PORT": str(rendezvous.port),
        "TORCHELASTIC_RESTART_COUNT": str(attempt),
        "TORCHELASTIC_MAX_RESTARTS": str(max_restarts),
        "TORCHELASTIC_RUN_ID": run_id,
        "TORCHELASTIC_USE_AGENT_STORE": "False",
    }
