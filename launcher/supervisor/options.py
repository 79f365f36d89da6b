"""What the supervisor has to know to run a job on this host."""

from __future__ import annotations

from launcher.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from launcher.engines.torch import RankLaunch
    from launcher.supervisor.adoption import MpiPlan
    from launcher.supervisor.group import Start


class HostPlan(Record):
    """One host's part of a job. Times are seconds.

    Attributes:
        launches: the ranks of this host in an attempt; what there is to be said about them goes to the callable.
        grace_failure_s, grace_stop_s: from SIGTERM to SIGKILL after a failure, and on a stop of the platform.
        preload: modules for the zygote, "" for none.
        deadline_file: where a stop's deadline is told to the ranks.
        written_directories: where the job writes, looked at for space.
        follow_parent: end when the process that started the launcher, parent_pid, ends.
        straggler_window_s: how often the group is told how long each rank has waited for others; 0: never.
        mpi: the MPI side of an attempt; None for a job without MPI.
        handle_signals: take SIGTERM and the like (only in a main thread).
        library: the calling process goes on afterwards, and has children and handlers of its own.
    """

    host: str
    run_dir: str
    launches: Callable[[Start, Callable[[str], None]], list[RankLaunch]]
    cap_bytes: int
    raw: bool
    grace_failure_s: float
    grace_stop_s: float
    hang_timeout_s: float
    early_exit: str
    preload: str
    deadline_file: str
    written_directories: tuple[str, ...]
    follow_parent: bool
    straggler_window_s: float = 0.0
    mpi: Callable[[Start], MpiPlan] | None = None
    handle_signals: bool = True
    library: bool = False
    parent_pid: int = 0
