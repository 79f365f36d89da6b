"""What the leader and the light members of a simulated cluster know alike: names, secret, facts, a host's ranks.

Hosts are ``host-0000`` (the leader), ``host-0001``, ...; their names resolve to loopback.
"""

from __future__ import annotations

import time

from launcher.cluster.facts import HostFacts, collect
from launcher.cluster.options import ClusterPlan
from launcher.cluster.secret import job_digest, job_key, key_without_secret
from launcher.evidence import EXIT, SIGNAL, Evidence, ExitRecord, HostReport
from launcher.job import Entry
from launcher.record import replace
from launcher.supervisor.coordinator import Policy

# What a training image has installed, as the facts of a host list it: a few hundred distributions.
PACKAGES = {f"distribution-{number}": f"{number % 7}.{number % 13}.{number % 5}" for number in range(250)}
SECRET = b"of the simulated cluster"
HOST_TIMEOUT_S = 5.0  # the launcher's default


def host_names(count: int) -> tuple[str, ...]:
    """The host list."""
    return tuple(f"host-{number:04d}" for number in range(count))


def cluster_plan(count: int, ranks: int, secret: bool) -> ClusterPlan:
    """What the launcher of the first of ``count`` hosts, with ``ranks`` ranks each, makes of its job."""
    hosts = host_names(count)
    job = job_digest("benchmark")
    return ClusterPlan(
        hosts=hosts,
        host=hosts[0],
        slots=ranks,
        addresses=dict.fromkeys(hosts, "127.0.0.1"),
        named=True,
        leader_port=0,
        key=job_key(SECRET) if secret else key_without_secret(job),
        secret=secret,
        job=job,
        facts=facts(hosts),
        peer_check="refuse",
        join_timeout_s=120.0,
        host_timeout_s=HOST_TIMEOUT_S,
        master_address="",
        program="train.py",
        policy=Policy(max_restarts=0, crash_loop_s=5.0, early_exit="wait", hang_timeout_s=0.0),
        enough=count,
        meet_again_s=0.0,
    )


def facts(hosts: tuple[str, ...]) -> HostFacts:
    """The facts of the first host; those of the others differ in the name only."""
    entry = Entry("script", "train.py", ("--epochs", "3"), "/nowhere", "python", "train.py")
    found = collect(host=hosts[0], hosts=hosts, entry=entry, mode="run")
    return replace(found, packages=dict(PACKAGES))


def report(host: str, number: int, ranks: int, code: int = 0) -> HostReport:
    """The report of host ``number``; its first rank ended with ``code`` if that is not 0, all others were stopped."""
    now = time.monotonic_ns()
    first = number * ranks
    records = tuple(
        ExitRecord(
            host=host,
            rank=rank,
            local_rank=rank - first,
            pid=1000 + rank,
            how=EXIT if code and rank == first else SIGNAL,
            value=code if code and rank == first else 15,
            ended_ns=now,
            failed_ns=now,
            told_ns=0 if code and rank == first else now - 1_000_000,
            was_stopped=not (code and rank == first),
            phase=2,
            steps=100,
            max_rss_kib=4 << 20,
            cpu_s=123.456,
            error_file=f"/tmp/launcher-0/job_1234/attempt_0/{rank - first}/error.json",
        )
        for rank in range(first, first + ranks)
    )
    return HostReport(host, 0, records, Evidence(), 12.5, False)
