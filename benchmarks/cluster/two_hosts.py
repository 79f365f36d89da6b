"""The measurements on hosts in network namespaces. Each measures one run of one launcher."""

from __future__ import annotations

import random
import time

from peers import Peer
from stage import Job, Stage

Sample = dict[str, float]
SETTLE_S = (0.3, 0.4)  # from "all ranks run" to the fault; drawn, since some launchers look only each 100 ms
FAILING = 1  # number of the host whose rank fails
LOSS_HOSTS = 3
MPIRUN = {"mpirun", "mpiexec", "prterun", "orterun"}


def _ms(ns: float) -> float:
    return ns / 1e6


def first_line(stage: Stage, peer: Peer, ranks: int) -> Sample:
    """Scripts that import nothing heavy: time to their first lines on both hosts, and to the end of the job."""
    with Job(stage, peer, 2, ranks, "first_line.py") as job:
        pids = [launcher.pid for launcher in job.launchers]
        ends = job.ends(pids, 60)
        if len(ends) < len(pids) or any(launcher.wait() for launcher in job.launchers):
            raise job.fail("a launcher did not end, or not with 0")
        lines = [int(text) - job.started_ns for text in job.read_ranks("first")]
        return {
            "last_ms": _ms(max(lines)),
            "first_ms": _ms(min(lines)),
            "job_ms": _ms(max(ends.values()) - job.started_ns),
        }


def exit_code(stage: Stage, peer: Peer, ranks: int, cap_s: float) -> Sample:
    """A rank of the second host ends with 3, all others sleep: to the end of both launchers and all ranks.

    What has not ended ``cap_s`` after the fault counts as ended then.
    """
    name = stage.machines[FAILING].name
    with Job(stage, peer, 2, ranks, "hold.py", name) as job:
        job.meet_ranks()
        time.sleep(random.uniform(*SETTLE_S))
        job.go()
        launchers = [launcher.pid for launcher in job.launchers]
        found = job.ends([*launchers, *job.ranks.values()], cap_s)
        fault_ns = int((job.dir / f"failed.{name}.0").read_text())

        def last(pids: list[int]) -> float:
            return _ms(max(found[pid] - fault_ns if pid in found else cap_s * 1e9 for pid in pids))

        other = [pid for (host, _), pid in job.ranks.items() if host != name]
        sample = {
            "gone_ms": last([*launchers, *job.ranks.values()]),
            "failing_host_ms": last([launchers[min(FAILING, len(launchers) - 1)]]),
            "other_host_ms": last([launchers[0]]),
            "other_ranks_ms": last(other),
            "cap_ms": cap_s * 1e3,
        }
        for number, launcher in enumerate(job.launchers):
            if launcher.pid in found:
                sample[f"code_{number + 1}"] = float(launcher.wait())
        return sample


def loss(stage: Stage, peer: Peer, cap_s: float, lost: int) -> Sample:
    """Packets of one of three hosts are dropped while all ranks sleep: to the end of the launchers of the others."""
    with Job(stage, peer, LOSS_HOSTS, 1, "hold.py") as job:
        job.meet_ranks()
        time.sleep(random.uniform(*SETTLE_S))
        others = [number for number in range(len(job.launchers)) if number != lost]
        watched = [job.launchers[number].pid for number in others]
        watched += [pid for (host, _), pid in job.ranks.items() if host != job.names[lost]]
        fault_ns = time.monotonic_ns()
        try:
            job.machines[lost].cut()
            found = job.ends(watched, cap_s)
            ends = [_ms(found[pid] - fault_ns) if pid in found else cap_s * 1e3 for pid in watched]
            naming = [job.failure(number).startswith(f"{job.names[lost]} ") for number in others]
            sample = {"others_ms": max(ends), "named": float(all(naming)), "cap_ms": cap_s * 1e3, "lost": lost + 1.0}
            if lost < len(job.launchers):
                own = job.launchers[lost].pid
                end = job.ends([own], 10.0 if max(ends) < cap_s * 1e3 else 0.001)
                if own in end:
                    sample["itself_ms"] = _ms(end[own] - fault_ns)
            if len(found) == len(watched):
                sample["code"] = float(max(job.launchers[number].wait() for number in others))
            return sample
        finally:
            job.machines[lost].heal()


def mpi_end(stage: Stage, peer: Peer, ranks: int) -> Sample:
    """A successful MPI job: from mpirun's end to the end of the launchers of both hosts."""
    with Job(stage, peer, 2, ranks, "mpi_end.py") as job:
        job.meet_ranks()
        programs = [
            pid
            for pid, command in job.machines[0].processes().items()
            if any(word.rpartition("/")[2] in MPIRUN for word in command.split()[:2])
        ]
        if not programs:
            raise job.fail("no mpirun runs on the first host")
        launchers = [launcher.pid for launcher in job.launchers]
        job.watch(programs)
        go_ns = time.monotonic_ns()
        job.go()
        found = job.ends([*programs, *launchers], 60)
        if len(found) < len(programs) + len(launchers) or any(launcher.wait() for launcher in job.launchers):
            raise job.fail("a launcher did not end, or not with 0")
        mpirun_ns = max(found[pid] for pid in programs)
        return {
            "after_mpirun_ms": _ms(max(found[pid] for pid in launchers) - mpirun_ns),
            "mpirun_ms": _ms(mpirun_ns - go_ns),
        }
