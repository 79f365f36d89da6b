"""From a job on several hosts to this host's place in their group. Loaded only when there are several."""

from __future__ import annotations

from launcher.cluster.facts import collect
from launcher.cluster.group import Cluster
from launcher.cluster.options import ClusterPlan
from launcher.cluster.secret import job_digest, job_key, key_without_secret, read_secret
from launcher.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from launcher.job import JobSpec
    from launcher.supervisor.coordinator import Policy
    from launcher.supervisor.group import Group

_MARGIN_S = 6.0  # SIGKILL's own limit, and the way back
_HYPERPARAMETER = "sagemaker_launcher_secret"


def join(
    spec: JobSpec,
    policy: Policy,
    slots: int,
    grace_s: float,
    environ: Mapping[str, str],
    reserve: Callable[[], int],
    open_store: Callable[[str, Iterable[str]], int],
    say: Callable[[str], None],
    *,
    free_layout: bool,
) -> Group:
    """This host's end of the group: the leader's on the first host, else a member's.

    Args:
        slots: ranks of this host.
        grace_s: what ranks may take to end after a failure.
        environ: may hold the job's secret.
        reserve: gives a MASTER_PORT that is free on this host, should it lead.
        open_store: as of :class:`ClusterPlan`.
        free_layout: as of :class:`ClusterPlan`.

    Raises:
        UsageError: the secret cannot be had.
        ClusterError: no port to listen on.
    """
    found = spec.hosts
    if not 0 < spec["leader_port"] < 65536:
        raise UsageError(f"leader_port is {spec['leader_port']}; expected a port, 1 to 65535")
    # Only what all hosts know alike, and what the user chose: it is compared before anything else is.
    job = job_digest(spec["rdzv_id"] or spec.container.job_name or "")
    secret = _secret(spec, environ)
    plan = ClusterPlan(
        hosts=found.hosts,
        host=found.host,
        slots=slots,
        addresses=found.addresses,
        named=found.named,
        leader_port=spec["leader_port"],
        key=job_key(secret) if secret else key_without_secret(job),
        secret=bool(secret),
        job=job,
        facts=collect(host=found.host, hosts=found.hosts, entry=spec.entry, mode=spec.mode),
        peer_check=spec["peer_check"],
        join_timeout_s=spec["join_timeout"],
        host_timeout_s=spec["host_timeout"],
        master_address=spec["master_addr"],
        program=spec.entry.name,
        open_store=open_store,
        policy=policy,
        enough=policy.min_hosts,
        free_layout=free_layout,
        processes=spec["mpi_processes"] if free_layout else 0,
        meet_again_s=spec["host_timeout"] + grace_s + _MARGIN_S,
    )
    say(f"{len(found.hosts)} hosts from {found.source}; this is {found.host}")
    return Cluster(plan, reserve, say)


def _secret(spec: JobSpec, environ: Mapping[str, str]) -> bytes:
    file = spec["secret_file"]
    secret, _ = read_secret(environ, file, spec.settings["secret_file"].source)
    # Least private of all, since whoever may describe the job reads it: only where nothing else is given.
    return secret or str(spec.container.reserved.get(_HYPERPARAMETER, "")).encode()
