"""Two hosts in network namespaces, one rank on each, joined by 10 Gbit/s."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matrix import Field, measure
from processes import Contender
from rivals import GLOO, LIMIT, MPIS, OURS, memory_limit
from stage import Stage, load_netns
from statistic import HOSTS

RATE_GBIT = 10
PAYLOAD = 1448 / 1514  # of a full Ethernet frame with TCP's time stamps, as the limit counts it
OVER_MPI, OVER_GLOO = "launcher over MPI", "launcher over Gloo"
_SECONDS = 0.1
_BUCKET_BYTES = 256_000


def lacking() -> str:
    """Why there are no hosts on this machine, "" when there are."""
    found: str = load_netns().lacking()
    return found


def _open_mpi(contender: Contender, agent: str) -> Contender:
    """The same Open MPI, on both hosts: TCP only, since these hosts share what real ones do not."""
    at = contender.start.index("-n")
    network = ("--mca", "btl", "tcp,self", "--mca", "pml", "ob1", "--mca", "btl_tcp_if_include", "eth0")
    hosts = ("--host", "algo-1:1,algo-2:1", "--mca", "plm_rsh_agent", agent)
    return _with(contender, (*contender.start[:at], *hosts, *network, *contender.start[at:]), {})


def _mpich(contender: Contender, agent: str) -> Contender:
    """The same MPICH, over UCX's TCP."""
    launch = ("-launcher", "ssh", "-launcher-exec", agent, "-hosts", "algo-1,algo-2", "-iface", "eth0")
    network = {"UCX_TLS": "tcp,self", "UCX_NET_DEVICES": "eth0"}
    return _with(contender, (contender.start[0], *launch, *contender.start[1:]), network)


def _with(contender: Contender, start: tuple[str, ...], environ: Mapping[str, str]) -> Contender:
    one = contender
    return Contender(one.label, one.peer, one.adapter, one.python, start, {**one.environ, **environ}, one.options)


def _here(contenders: Sequence[Contender], agent: str) -> list[Contender]:
    """Those that can run on several hosts, as they are started there; ours over its own sockets and each engine."""
    found = memory_limit()
    engine: Contender | None = None
    for one in contenders:
        if one.peer == GLOO:
            found.append(one)
        elif one.peer in MPIS[:2]:
            engine = engine or _open_mpi(one, agent)
            found.append(_open_mpi(one, agent))
        elif one.peer == MPIS[2]:
            found.append(_mpich(one, agent))
    if any(one.label == OURS for one in contenders):
        found.append(Contender(OURS, "launcher", "ours", sys.executable, options={"join": {"leg": "sockets"}}))
        leg = {"join": {"leg": "gloo"}}
        found.append(Contender(OVER_GLOO, "launcher", "ours", sys.executable, options=leg))
        if engine is not None:
            options = {"join": {"leg": "mpi"}, "mpi": True}
            found.append(Contender(OVER_MPI, "launcher", "ours", sys.executable, engine.start, engine.environ, options))
    return found


def _refill_ns(nbytes: int) -> int:
    """Until the bucket that a message fits into is full again; a larger message goes at the link's rate anyway."""
    return int(2 * nbytes * 8 / RATE_GBIT) if nbytes < _BUCKET_BYTES else 0


def measure_hosts(
    contenders: Sequence[Contender],
    sizes: Sequence[int],
    scratch: Path,
    support: Path,
    cores: Sequence[int],
    rounds: int,
    result: dict[str, Any],
) -> str:
    """Measures fresh buffers of float32; what the network was, in a sentence."""
    stage = Stage(scratch / "stage", 2)
    try:
        for machine in stage.machines:
            (scratch / f"holder.{machine.name}").write_text(str(machine.pid))
            limit = ("rate", f"{RATE_GBIT}gbit", "burst", f"{_BUCKET_BYTES}b", "latency", "50ms")
            machine.run("tc", "qdisc", "replace", "dev", "eth0", "root", "tbf", *limit)
        wrappers = [machine.wrapper() for machine in stage.machines]
        able = []
        for one in _here(contenders, str(stage.agent)):
            environ = {**one.environ, "CLUSTER_BENCH_DIR": str(scratch)}
            able.append(_with(one, one.start, environ))
        enter = {one.label: wrappers for one in able if one.label != LIMIT}
        samples: list[dict[str, Any]] = []
        with Field(able, 2, cores, scratch, support, result["failures"], result["versions"], enter) as field:
            field.contenders = [one for one in field.contenders if one.label != LIMIT]
            measure(field, HOSTS, sizes, ("float32",), ("fresh",), rounds, _SECONDS, samples, _refill_ns)
    finally:
        stage.close()
    goodput = RATE_GBIT / 8 * PAYLOAD
    for sample in list(samples):
        if sample["label"] == OURS:
            wire = {"label": LIMIT, "peer": LIMIT, "median_us": sample["bytes"] / goodput / 1e3}
            samples.append({**sample, **wire})
    result["samples"] += samples
    return (
        f"Two hosts in namespaces of their own on this machine, one rank and one core each, joined by a bridge; "
        f"{RATE_GBIT} Gbit/s a direction (a token bucket of 256 kB, full before each message that fits into it), "
        f"MTU 1500. The limit is the message at {goodput:.3f} GB/s, what TCP can carry of that."
    )
