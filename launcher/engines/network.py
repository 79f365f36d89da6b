"""Which network interface, and which fabric, the ranks of several hosts talk over: decided by what is there."""

from __future__ import annotations

import os

from launcher import interfaces
from launcher.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_SOCKET_VARIABLES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
# PCI device of the first generation of EFA, the only one that cannot read a peer's memory (RDMA read); libfabric ends
# the process when it is told to use on it what it has not.
_EFA_WITHOUT_RDMA = "0xefa0"


def network_environ(
    interface_setting: str,
    contract_interface: str,
    local_address: str,
    environ: Mapping[str, str],
    log: Callable[[str], None],
    root: str = "/",
) -> dict[str, str]:
    """The variables to add to the ranks' environment; what ``environ`` has already is the user's, and stays.

    Args:
        interface_setting: ``--interface``; "" for none.
        contract_interface: the container's ``network_interface_name``; SageMaker's local mode names one that does
            not exist.
        local_address: this host's numeric address in its connection to the other launchers; "" when unknown.
        log: takes a line when the container's interface is not used.
        root: where ``/sys`` and ``/proc`` are.

    Raises:
        UsageError: ``--interface`` does not exist.
    """
    found: dict[str, str] = {}
    wanted = [name for name in _SOCKET_VARIABLES if not environ.get(name)]
    interface = ""
    if wanted or interface_setting:
        interface = choose_interface(interface_setting, contract_interface, local_address, log, root)
    if interface:
        found.update(dict.fromkeys(wanted, interface))
    for name, value in efa_environ(root).items():
        if not environ.get(name):
            found[name] = value
    return found


def choose_interface(
    interface_setting: str, contract_interface: str, local_address: str, log: Callable[[str], None], root: str = "/"
) -> str:
    """The interface for the ranks' traffic, "" when nothing tells; arguments as of :func:`network_environ`."""
    existing = interfaces.names(root)
    if interface_setting:
        if existing and interface_setting not in existing:
            raise UsageError(f"--interface {interface_setting}: this host has no such interface; {_those(existing)}")
        return interface_setting
    carrying = interfaces.interface_of(local_address, root) if local_address else ""
    outside = bool(carrying) and not interfaces.is_loopback(interfaces.canonical(local_address))
    if contract_interface in existing and not (outside and _is_loopback_interface(contract_interface, root)):
        return contract_interface
    if not contract_interface or carrying == contract_interface:
        return carrying
    missing = f"does not exist here ({_those(existing)})"
    reason = "reaches no other host" if contract_interface in existing else missing
    instead = f"using {carrying}, which has {local_address}" if carrying else "the libraries of the ranks choose one"
    log(f"the container's network interface {contract_interface} {reason}: {instead}; --interface names another")
    return carrying


def efa_environ(root: str = "/") -> dict[str, str]:
    """What libfabric needs where there are Elastic Fabric Adapters, by the devices and not by the instance's name."""
    directory = os.path.join(root, "sys/class/infiniband")
    try:
        names = sorted(os.listdir(directory))
    except OSError:
        return {}  # no RDMA device of any kind
    devices = [os.path.join(directory, name, "device") for name in names if _is_efa(directory, name)]
    if not devices:
        return {}
    found = {"FI_PROVIDER": "efa", "RDMAV_FORK_SAFE": "1"}
    if all(_read(os.path.join(device, "device")) != _EFA_WITHOUT_RDMA for device in devices):
        found["FI_EFA_USE_DEVICE_RDMA"] = "1"
    return found


def _is_efa(directory: str, name: str) -> bool:
    try:
        return os.path.basename(os.readlink(os.path.join(directory, name, "device/driver"))) == "efa"
    except OSError:  # a container may show devices without their drivers; udev names EFA by these patterns
        return name.startswith(("efa_", "rdmap"))


def _is_loopback_interface(name: str, root: str) -> bool:
    flags = _read(os.path.join(root, "sys/class/net", name, "flags"))
    try:
        return bool(int(flags, 16) & 0x8)  # IFF_LOOPBACK
    except ValueError:
        return name == "lo"


def _read(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""  # not shown in this container


def _those(existing: list[str]) -> str:
    return f"there are {', '.join(existing)}" if existing else "/sys shows none"
