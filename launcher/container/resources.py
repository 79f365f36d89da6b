"""``resourceconfig.json``: the hosts of the job, this host's place among them, and instance groups.

Fields, from the developer guide and from dumps of real jobs: ``current_host``, ``hosts``,
``current_instance_type``, ``current_group_name``, ``instance_groups`` (``instance_group_name``, ``instance_type``,
``hosts``), ``network_interface_name`` and, on UltraServers only, ``topology`` (``hostName``, ``capacityUnitId``).
The documents' ``current_instance_group`` does not occur in real jobs and is not read.
"""

from __future__ import annotations

import os

from launcher.container.paths import RESOURCE_CONFIGS
from launcher.container.reading import object_list, read_object, shown, text, text_list
from launcher.errors import ContractError
from launcher.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

DEFAULT_GROUP = "homogeneousCluster"
DEFAULT_INSTANCE_TYPE = "local"
DEFAULT_INTERFACE = "eth0"


class InstanceGroup(Record):
    """Hosts of one instance type in a heterogeneous job."""

    name: str
    instance_type: str
    hosts: tuple[str, ...]


class TopologyEntry(Record):
    """Which capacity unit (UltraServer) a host belongs to; an absent value is ""."""

    host_name: str
    capacity_unit_id: str


class ResourceConfig(Record):
    """The checked content of the file.

    Attributes:
        file: path that was read.
        hosts: all hosts of the job in the file's order, which is the order of host ranks.
        network_interface_name: as the file has it; local mode is known to name one that does not exist.
        raw: the JSON object as it was read.
    """

    file: str
    hosts: tuple[str, ...]
    current_host: str
    current_instance_type: str
    current_group_name: str
    instance_groups: tuple[InstanceGroup, ...]
    network_interface_name: str
    topology: tuple[TopologyEntry, ...]
    raw: dict[str, Any]

    @property
    def host_rank(self) -> int:
        """Index of this host in ``hosts``."""
        return self.hosts.index(self.current_host)

    @property
    def current_group_hosts(self) -> tuple[str, ...]:
        """Hosts of this host's group; empty when the file lists no groups."""
        for group in self.instance_groups:
            if group.name == self.current_group_name:
                return group.hosts
        return ()


def read_resource_config(config_dir: str, *, retry_for_s: float) -> ResourceConfig:
    """Read the resource configuration in ``config_dir``.

    Both spellings of the file's name are looked for. When both exist they must hold the same object; the
    platform's own spelling is then the one that is named as the source.

    Raises:
        ContractError: missing, malformed, or contradictory.
    """
    found: list[tuple[str, dict[str, Any]]] = []
    for name in RESOURCE_CONFIGS:
        path = os.path.join(config_dir, name)
        value = read_object(path, retry_for_s=retry_for_s)
        if value is not None:
            found.append((path, value))
    if not found:
        path = os.path.join(config_dir, RESOURCE_CONFIGS[0])
        raise ContractError(path, "", "no such file", "the JSON object that names this host and all hosts")
    file, raw = found[0]
    for other_file, other in found[1:]:
        for field in (*raw, *other):
            if raw.get(field) != other.get(field):
                there = shown(other.get(field))
                raise ContractError(other_file, field, there, f"{shown(raw.get(field))}, as in {file}, or one file")
    return parse_resource_config(file, raw)


def parse_resource_config(file: str, raw: dict[str, Any]) -> ResourceConfig:
    """Check ``raw``, the object read from ``file``.

    Raises:
        ContractError: a field is missing, has the wrong type, or contradicts another.
    """
    for field in ("hosts", "current_host"):
        if field not in raw:
            raise ContractError(file, field, "nothing", _REQUIRED[field])
    hosts = text_list(file, "hosts", raw["hosts"])
    current = text(file, "current_host", raw["current_host"])
    if current not in hosts:
        raise ContractError(file, "current_host", shown(current), f"one of hosts, {shown(list(hosts))}")
    groups = _groups(file, raw, hosts)
    return ResourceConfig(
        file=file,
        hosts=hosts,
        current_host=current,
        current_instance_type=_optional_text(file, raw, "current_instance_type") or DEFAULT_INSTANCE_TYPE,
        current_group_name=_current_group(file, raw, groups, current),
        instance_groups=groups,
        network_interface_name=_optional_text(file, raw, "network_interface_name") or DEFAULT_INTERFACE,
        topology=_topology(file, raw),
        raw=raw,
    )


_REQUIRED = {"hosts": "a list with the name of every host", "current_host": "the name of this host"}


def _optional_text(file: str, raw: dict[str, Any], field: str) -> str | None:
    return text(file, field, raw[field]) if field in raw else None


def _groups(file: str, raw: dict[str, Any], hosts: tuple[str, ...]) -> tuple[InstanceGroup, ...]:
    result: list[InstanceGroup] = []
    group_of: dict[str, str] = {}
    items = object_list(file, "instance_groups", raw.get("instance_groups", []), "a list of objects")
    for index, item in enumerate(items):
        where = f"instance_groups[{index}]"
        if not isinstance(item, dict):
            raise ContractError(file, where, shown(item), "an object")
        for field in ("instance_group_name", "hosts"):
            if field not in item:
                raise ContractError(file, f"{where}.{field}", "nothing", f"the group's {field.split('_')[-1]}")
        name = text(file, f"{where}.instance_group_name", item["instance_group_name"])
        if any(name == group.name for group in result):
            found = f"{shown(name)} a second time"
            raise ContractError(file, f"{where}.instance_group_name", found, "each group once")
        members = text_list(file, f"{where}.hosts", item["hosts"])
        for position, host in enumerate(members):
            field = f"{where}.hosts[{position}]"
            if host not in hosts:
                raise ContractError(file, field, shown(host), f"one of hosts, {shown(list(hosts))}")
            if host in group_of:
                found = f"{shown(host)}, already in group {shown(group_of[host])}"
                raise ContractError(file, field, found, "each host in one group")
            group_of[host] = name
        instance_type = text(file, f"{where}.instance_type", item.get("instance_type", DEFAULT_INSTANCE_TYPE))
        result.append(InstanceGroup(name=name, instance_type=instance_type, hosts=members))
    return tuple(result)


def _current_group(file: str, raw: dict[str, Any], groups: tuple[InstanceGroup, ...], host: str) -> str:
    """The named group, which must hold this host; when none is named, the one that does."""
    named = _optional_text(file, raw, "current_group_name")
    holding = next((group.name for group in groups if host in group.hosts), None)
    if named is None:
        return holding or DEFAULT_GROUP
    if groups and named != holding:
        if named not in [group.name for group in groups]:
            expected = f"one of instance_groups, {shown([group.name for group in groups])}"
        else:
            expected = f"the group that {host} is in, " + (shown(holding) if holding else "but none lists it")
        raise ContractError(file, "current_group_name", shown(named), expected)
    return named


def _topology(file: str, raw: dict[str, Any]) -> tuple[TopologyEntry, ...]:
    result = []
    for index, item in enumerate(object_list(file, "topology", raw.get("topology", []), "a list of objects")):
        where = f"topology[{index}]"
        if not isinstance(item, dict):
            raise ContractError(file, where, shown(item), "an object with hostName and capacityUnitId")
        values = []
        for field in ("hostName", "capacityUnitId"):
            value = item.get(field, "")
            if not isinstance(value, str):
                raise ContractError(file, f"{where}.{field}", shown(value), "a string")
            values.append(value)
        result.append(TopologyEntry(*values))
    return tuple(result)
