"""Which interface and fabric the ranks use: decided from what is under /sys, /proc and in the kernel."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from launcher import interfaces
from launcher.engines.network import choose_interface, efa_environ, network_environ
from launcher.errors import UsageError

ROUTES = """Iface	Destination	Gateway 	Flags	RefCnt	Use	Metric	Mask		MTU	Window	IRTT
eth1	000200C0	00000000	0001	0	0	0	00FFFFFF	0	0	0
eth2	00000000	010200C0	0003	0	0	0	00000000	0	0	0
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A file system with the interfaces lo, eth0 and eth1; eth1 has fd00::7."""
    for name, flags in (("lo", "0x9"), ("eth0", "0x1003"), ("eth1", "0x1003")):
        directory = tmp_path / "sys/class/net" / name
        directory.mkdir(parents=True)
        (directory / "flags").write_text(f"{flags}\n")
    (tmp_path / "sys/class/net/bonding_masters").write_text("")
    net = tmp_path / "proc/net"
    net.mkdir(parents=True)
    (net / "if_inet6").write_text(
        "fd000000000000000000000000000007 04 40 00 80     eth1\n00000000000000000000000000000001 01 80 10 80       lo\n"
    )
    return tmp_path


def rdma_device(root: Path, name: str, driver: str = "", device: str = "") -> None:
    directory = root / "sys/class/infiniband" / name / "device"
    directory.mkdir(parents=True)
    if driver:
        target = root / "sys/bus/pci/drivers" / driver
        target.mkdir(parents=True, exist_ok=True)
        (directory / "driver").symlink_to(target)
    if device:
        (directory / "device").write_text(device + "\n")


@pytest.mark.parametrize(
    ("setting", "contract", "address", "expected", "said"),
    [
        ("", "eth0", "fd00::7", "eth0", ""),
        ("eth1", "eth0", "127.0.0.1", "eth1", ""),
        ("", "ethwe", "fd00::7", "eth1", "ethwe does not exist here (there are eth0, eth1, lo): using eth1"),
        ("", "ethwe", "", "", "ethwe does not exist here"),
        ("", "", "fd00:0:0::7", "eth1", ""),
        ("", "", "", "", ""),
        ("", "lo", "127.0.0.3", "lo", ""),
        ("", "lo", "::1", "lo", ""),
        ("", "lo", "fd00::7", "eth1", "lo reaches no other host: using eth1, which has fd00::7"),
        ("", "ethwe", "127.8.0.1", "lo", "using lo"),
    ],
)
def test_interface(root: Path, setting: str, contract: str, address: str, expected: str, said: str) -> None:
    lines: list[str] = []
    assert choose_interface(setting, contract, address, lines.append, str(root)) == expected
    assert len(lines) == (1 if said else 0)
    assert said in "".join(lines)


def test_interface_that_does_not_exist_is_refused(root: Path) -> None:
    with pytest.raises(UsageError, match="--interface eth9: this host has no such interface; there are eth0, eth1, lo"):
        network_environ("eth9", "eth0", "", {}, print, str(root))


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, {"NCCL_SOCKET_IFNAME": "eth0", "GLOO_SOCKET_IFNAME": "eth0"}),
        ({"NCCL_SOCKET_IFNAME": "^lo"}, {"GLOO_SOCKET_IFNAME": "eth0"}),
        ({"NCCL_SOCKET_IFNAME": "eth1", "GLOO_SOCKET_IFNAME": "eth1"}, {}),
    ],
)
def test_what_the_user_set_stays(root: Path, environ: dict[str, str], expected: dict[str, str]) -> None:
    assert network_environ("", "eth0", "", environ, print, str(root)) == expected


def test_no_rdma_device(root: Path) -> None:
    assert efa_environ(str(root)) == {}


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        ([("mlx5_0", "mlx5_core", "")], {}),
        ([("x0", "efa", "0xefa2")], {"FI_PROVIDER": "efa", "RDMAV_FORK_SAFE": "1", "FI_EFA_USE_DEVICE_RDMA": "1"}),
        ([("rdmap0s6", "", "")], {"FI_PROVIDER": "efa", "RDMAV_FORK_SAFE": "1", "FI_EFA_USE_DEVICE_RDMA": "1"}),
        ([("efa_0", "", "0xefa0")], {"FI_PROVIDER": "efa", "RDMAV_FORK_SAFE": "1"}),
        ([("rdmap0s6", "mlx5_core", "")], {}),
        ([("mlx5_0", "mlx5_core", ""), ("x0", "efa", "0xefa0")], {"FI_PROVIDER": "efa", "RDMAV_FORK_SAFE": "1"}),
    ],
)
def test_efa_by_its_devices(root: Path, devices: list[tuple[str, str, str]], expected: dict[str, str]) -> None:
    for name, driver, device in devices:
        rdma_device(root, name, driver, device)
    assert efa_environ(str(root)) == expected
    if expected:
        assert network_environ("eth0", "", "", {"FI_PROVIDER": "tcp"}, print, str(root)) == {
            "NCCL_SOCKET_IFNAME": "eth0",
            "GLOO_SOCKET_IFNAME": "eth0",
            **{name: value for name, value in expected.items() if name != "FI_PROVIDER"},
        }


def test_addresses_of_this_host() -> None:
    """What the kernel says of itself: a socket can be bound to each address, and to no other interface's name."""
    found = interfaces.addresses()
    assert ("lo", "127.0.0.1") in found
    for name, address in found:
        assert name in interfaces.names()
        assert interfaces.interface_of(address) == name
        assert interfaces.canonical(address) == address
        if ":" not in address:
            with socket.socket() as bound:
                bound.bind((address, 0))
    assert interfaces.interface_of("127.77.0.9") == "lo"
    assert interfaces.interface_of("203.0.113.250") == ""
    assert interfaces.resolve("localhost")
    assert interfaces.resolve("no-such-host.invalid") == []


@pytest.mark.parametrize(
    ("text", "expected", "numeric"),
    [
        ("10.0.0.1", "10.0.0.1", True),
        ("::ffff:10.0.0.1", "10.0.0.1", True),
        ("FE80:0::1%eth0", "fe80::1", True),
        ("algo-1", "algo-1", False),
        ("10.0.0", "10.0.0", False),
        ("", "", False),
    ],
)
def test_numeric_addresses(text: str, expected: str, numeric: bool) -> None:
    assert interfaces.canonical(text) == expected
    assert interfaces.is_numeric(text) is numeric


def test_default_interface(root: Path) -> None:
    assert interfaces.default_interface(str(root)) == ""
    zeros = "0" * 32
    (root / "proc/net/ipv6_route").write_text(
        f"{zeros} 00 {zeros} 00 {zeros} ffffffff 00000001 00000000 00200200       lo\n"
        f"{zeros} 00 {zeros} 00 fd000000000000000000000000000001 00000400 00000000 00000000 00000003     eth1\n"
    )
    assert interfaces.default_interface(str(root)) == "eth1"
    (root / "proc/net/route").write_text(ROUTES)
    assert interfaces.default_interface(str(root)) == "eth2"


def test_no_sys_and_no_proc(tmp_path: Path) -> None:
    assert interfaces.names(str(tmp_path)) == []
    assert choose_interface("eth0", "", "", print, str(tmp_path)) == "eth0"
    lines: list[str] = []
    assert choose_interface("", "eth0", "fd00::1", lines.append, str(tmp_path)) == ""
    assert "/sys shows none" in lines[0]
