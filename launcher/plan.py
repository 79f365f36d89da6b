"""What ``python -m launcher plan`` prints: every decision, and where it came from."""

from __future__ import annotations

import json
import os

from launcher import container as contract
from launcher.assembly import first_start, rank_launches
from launcher.hosts import fewest
from launcher.prepare import Prepared
from launcher.record import as_dict

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any


def describe(prepared: Prepared) -> dict[str, Any]:
    """All decisions as plain data; secrets in environment, hyperparameters and arguments are masked."""
    spec = prepared.spec
    launches = rank_launches(prepared, first_start(prepared))
    shared = {name: value for name, value in prepared.environ.items() if os.environ.get(name) != value}
    facts = spec.container
    return {
        "run_id": spec.run_id,
        "mode": spec.mode,
        "entry": {
            **as_dict(spec.entry),
            "args": contract.mask_args(spec.entry.args),
        },
        "settings": {name: as_dict(setting) for name, setting in spec.settings.items()},
        "container": {
            "base": facts.paths.base,
            "made_for_this_run": spec.made_tree,
            "resource_config": facts.resources.file,
            "hyperparameters": contract.mask_value("hyperparameters", facts.user),
            "channels": {name: channel.path for name, channel in facts.channels.items()},
            "sources": facts.sources,
        },
        "machine": {key: value for key, value in as_dict(prepared.machine).items() if key != "domains"},
        "hosts": {
            "source": spec.hosts.source,
            "list": list(spec.hosts.hosts),
            "this": spec.hosts.host,
            "addresses": spec.hosts.addresses,
            "needed": fewest(spec.settings, spec.hosts),
            # Else every host counts its own, and the plan takes them to have as many as this one.
            "slots_known": bool(spec.hosts.slots) or len(spec.hosts.hosts) == 1,
        },
        "topology": as_dict(prepared.topology),
        "rendezvous": {
            "address": prepared.rendezvous.address,
            "port": prepared.rendezvous.port or "a free one, chosen at the start",
        },
        "mpirun": _mpirun(prepared),
        "collectives": _collectives(prepared),
        "grace": {"after_failure_s": prepared.grace_failure_s, "on_stop_s": prepared.grace_stop_s},
        "run_directory": prepared.run_dir,
        "environment": contract.mask_secrets(shared),
        "ranks": [
            {
                "rank": launch.rank,
                "local_rank": launch.local_rank,
                "argv": contract.mask_args(launch.argv),
                "cpus": list(launch.cpus),
                "environment": contract.mask_secrets(
                    {name: value for name, value in launch.environ.items() if prepared.environ.get(name) != value}
                ),
            }
            for launch in launches
        ],
    }


def _mpirun(prepared: Prepared) -> list[str]:
    """mpirun's command line, as far as it is known before the hosts have met; [] where none is started."""
    if prepared.mpi is None or prepared.mpi.mpirun is None:
        return []
    from launcher.mpi_plan import command_of

    return command_of(prepared.mpi, prepared.mpi.mpirun, first_start(prepared), prepared.spec["interface"])


def _collectives(prepared: Prepared) -> dict[str, str]:
    """What carries launcher's own collectives inside a host and between hosts, and why.

    Whether mpi4py and a fabric are there, the ranks find out; they say in the log what they took.
    """
    found = {"inside": "shared memory", "between": "", "why": ""}
    if len(prepared.topology.hosts) < 2:
        return found
    wish = prepared.environ.get("LAUNCHER_COLLECTIVE_LEG", "auto")
    if wish != "auto":
        found.update(between=wish, why="LAUNCHER_COLLECTIVE_LEG")
    elif prepared.mpi is not None:
        found.update(between="sockets", why="mpi where all hosts have a fabric, such as InfiniBand or EFA, and mpi4py")
    else:
        found.update(between="sockets", why="the ranks are not started by mpirun")
    wire = prepared.environ.get("LAUNCHER_COLLECTIVE_WIRE", "none")
    if wire != "none":
        found["wire"] = wire
    return found


def as_json(prepared: Prepared) -> str:
    """The plan as one JSON object."""
    return json.dumps(describe(prepared), indent=2, default=str)


def as_table(prepared: Prepared) -> str:
    """The plan as text for people."""
    plan = describe(prepared)
    lines = [f"job {plan['run_id']} ({plan['mode']})", f"  base directory  {plan['container']['base']}"]
    lines.append(
        f"  entry point     {plan['entry']['kind']}: {plan['entry']['target']} {' '.join(plan['entry']['args'])}"
    )
    lines.append(f"  run directory   {plan['run_directory']}")
    lines.append(f"  rendezvous      {plan['rendezvous']['address']}:{plan['rendezvous']['port']}")
    if plan["mpirun"]:
        lines.append(f"  mpirun          {' '.join(plan['mpirun'])}")
    hosts, topology = plan["hosts"], prepared.topology
    lines.append(f"  hosts           {', '.join(topology.hosts)} (this is {topology.host}; from {hosts['source']})")
    if len(topology.hosts) > 1:
        lines.append(f"  ranks of hosts  {_ranks_of_hosts(topology.hosts, topology.slots)}")
        if not hosts["slots_known"]:
            lines.append("                  (if every host has as many as this one: each counts its own)")
    legs = plan["collectives"]
    across = f"; {legs['between']} between the hosts ({legs['why']})" if legs["between"] else ""
    rounded = f", float32 sums in {legs['wire']}" if "wire" in legs else ""
    lines.append(f"  collectives     {legs['inside']}{across}{rounded}")
    grace = plan["grace"]
    lines.append(
        f"  grace           {grace['after_failure_s']:g} s after a failure, {grace['on_stop_s']:g} s on a stop"
    )
    for name, path in plan["container"]["channels"].items():
        lines.append(f"  channel         {name}: {path}")
    lines += ["", "settings"]
    for name, setting in plan["settings"].items():
        value = "" if setting["value"] is None else str(setting["value"])
        lines.append(f"  {name:<20} {value or '-':<24} {setting['source']}")
    lines += ["", "ranks", "  rank  local  cpus            command"]
    for rank in plan["ranks"]:
        cpus = ",".join(map(str, rank["cpus"])) or "any"
        lines.append(f"  {rank['rank']:<5} {rank['local_rank']:<6} {cpus:<15} {' '.join(rank['argv'])}")
    lines += ["", "environment of all ranks (beside the caller's own)"]
    lines += [f"  {name}={value}" for name, value in sorted(plan["environment"].items())]
    for rank in plan["ranks"]:
        lines += ["", f"environment of rank {rank['rank']}"]
        lines += [f"  {name}={value}" for name, value in sorted(rank["environment"].items())]
    return "\n".join(lines)


def _ranks_of_hosts(hosts: Sequence[str], slots: Sequence[int]) -> str:
    """``a 0-7, b 8-11``."""
    pieces, first = [], 0
    for host, count in zip(hosts, slots, strict=True):
        last = first + count - 1
        pieces.append(f"{host} {first}" if count == 1 else f"{host} {first}-{last}")
        first = last + 1
    return ", ".join(pieces)
