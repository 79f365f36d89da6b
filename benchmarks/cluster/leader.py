"""A real leader, driven as the supervisor drives its group, in a process of its own; its host's ranks are made up.

    python leader.py HOSTS RANKS secret|no-secret [PROFILE]

Prints the port, and after the job what it cost, as one line of JSON each. PROFILE: a file for what cProfile finds.
"""

from __future__ import annotations

import cProfile
import json
import resource
import select
import sys
import time

from simulated import cluster_plan, report

# What a launcher has loaded when it leads.
import launcher.cli
import launcher.prepare
import launcher.supervisor.supervisor
import launcher.supervisor.watch
import launcher.verdict  # noqa: F401
from launcher.cluster.leader import Leader
from launcher.supervisor.group import Finish, Start, Stop


def lead(leader: Leader, ranks: int) -> dict[str, float]:
    """Serve the group to its end; returns what happened when, and the verdict's exit code."""
    seen: dict[str, float] = {}
    while "code" not in seen:
        poller = select.poll()
        poller.register(leader.fileno(), select.POLLIN)
        due = leader.next_time()
        poller.poll(None if due is None else max(0, int((due - time.monotonic()) * 1000) + 1))
        for order in leader.serve(time.monotonic()):
            if isinstance(order, Start):
                seen["start_ns"] = time.monotonic_ns()
                seen["forming_cpu_s"] = time.process_time()
            elif isinstance(order, Stop):
                seen["stop_ns"] = time.monotonic_ns()
                leader.attempt_over(report(leader.plan.host, 0, ranks))
            elif isinstance(order, Finish):
                seen["code"] = order.verdict.exit_code
                seen["finish_ns"] = time.monotonic_ns()
    leader.close()
    seen["closed_ns"] = time.monotonic_ns()
    return seen


def peak_bytes() -> int:
    """The largest resident size of this process so far."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))


def main() -> None:
    """Lead one job."""
    count, ranks, secret = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "secret"
    profile = cProfile.Profile() if len(sys.argv) > 4 else None
    leader = Leader(cluster_plan(count, ranks, secret), 29500, lambda line: print(line, file=sys.stderr))
    print(json.dumps({"port": leader.leader_port}), flush=True)
    seen = profile.runcall(lead, leader, ranks) if profile else lead(leader, ranks)
    spent = resource.getrusage(resource.RUSAGE_SELF)
    seen |= {"peak_bytes": peak_bytes(), "cpu_s": spent.ru_utime + spent.ru_stime}
    print(json.dumps(seen), flush=True)
    if profile:
        profile.dump_stats(sys.argv[4])


if __name__ == "__main__":
    main()
