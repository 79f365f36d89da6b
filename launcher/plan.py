"""What ``python -m launcher plan`` prints: every decision, and where it came from."""

from __future__ import annotations

import json
import os

from launcher import container as contract
from launcher.record import as_dict
from launcher.run import Prepared, rank_launches

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def describe(prepared: Prepared) -> dict[str, Any]:
    """All decisions as plain data; secrets in environment, hyperparameters and arguments are masked."""
    spec = prepared.spec
    launches = rank_launches(prepared, 0)
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
        "topology": as_dict(prepared.topology),
        "rendezvous": {
            "address": prepared.rendezvous.address,
            "port": prepared.rendezvous.port or "a free one, chosen at the start",
        },
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
    lines.append(f"  hosts           {', '.join(prepared.topology.hosts)} (this is {prepared.topology.host})")
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
