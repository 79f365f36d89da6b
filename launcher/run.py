"""The run of a prepared job on this host, and what is left behind for people and platform."""

from __future__ import annotations

import os
import stat

from launcher import container as contract
from launcher.assembly import group_of, host_plan
from launcher.errors import ContractError, LauncherError, OutputError
from launcher.prepare import Prepared, temporary_directory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from launcher import ports
    from launcher.cluster.kvstore import JobStore
    from launcher.container import Paths, StaleMark
    from launcher.evidence import Verdict
    from launcher.job import JobSpec


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
    _make_run_directory(prepared)
    held: list[ports.Reserved | JobStore] = []
    supervisor = None
    try:
        supervisor = Supervisor(
            host_plan(prepared, handle_signals, library), lambda say: group_of(prepared, environ, held, say)
        )
        if prepared.shared_dir and os.path.dirname(prepared.shared_dir) != temporary_directory():
            supervisor.say(f"{temporary_directory()} can not be written to: logs are in {prepared.shared_dir}")
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


def _clear_run_directory(prepared: Prepared, verdict: Verdict) -> None:
    """Removes what nobody will look for: the files of a success in the shared place, and what holds no logs."""
    if prepared.keep_logs and not (verdict.ok and prepared.shared_dir):
        _clear_meetings(prepared.run_dir)
        return
    import shutil

    shutil.rmtree(prepared.run_dir, ignore_errors=True)


def _clear_meetings(run_dir: str) -> None:
    """Removes what ranks that died left where they made their groups (native/collectives/join.h)."""
    try:
        for name in os.listdir(run_dir):
            if name.startswith("group-"):
                os.unlink(os.path.join(run_dir, name))
    except OSError:
        pass  # its owner is removing the directory, or made one of that name


def _make_run_directory(prepared: Prepared) -> None:
    path = prepared.run_dir
    base = os.path.dirname(path)
    try:
        os.makedirs(base, mode=0o700, exist_ok=True)
        info = os.lstat(base)
        if prepared.shared_dir and (
            not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o022
        ):
            raise OutputError(f"{base} is not a directory of this user's alone; remove it, or give --log-dir")
        os.mkdir(path, 0o700)
    except OSError as error:
        raise OutputError(f"cannot make the run directory {path}: {error.strerror}; give another --log-dir") from error


def _conclude(prepared: Prepared, verdict: Verdict, stale: StaleMark, say: Any) -> None:
    paths, program = prepared.spec.container.paths, prepared.spec.entry.name
    if verdict.ok:
        try:
            contract.write_success(paths)
        except OutputError as error:
            say(f"the job succeeded, but {error}")
        if verdict.evidence.straggler:
            say(verdict.evidence.straggler)
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
