"""What this host has: CPUs, their neighbourhood, the cgroup's quota, accelerators. Reads files, starts nothing."""

from __future__ import annotations

import os

from launcher.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping


class Machine(Record):
    """``cpus``: this process's allowed CPUs; ``quota``: CPUs by cgroup bandwidth, None for no limit."""

    cpus: tuple[int, ...]
    cpu_count: int
    quota: float | None
    gpus: int
    neurons: int
    domains: dict[int, tuple[int, int]]


def probe(environ: Mapping[str, str]) -> Machine:
    """Looks at the machine, by reading small files only.

    Args:
        environ: the ranks' environment; its CUDA_VISIBLE_DEVICES counts.
    """
    cpus = tuple(sorted(os.sched_getaffinity(0)))
    return Machine(
        cpus=cpus,
        cpu_count=os.cpu_count() or len(cpus),
        quota=_cpu_quota(),
        gpus=count_gpus(environ),
        neurons=_count_neurons(),
        domains=_domains(cpus) if len(cpus) > 2 else {},
    )


def _read(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""  # not this kernel, not this cgroup version


def count_gpus(environ: Mapping[str, str]) -> int:
    """NVIDIA devices of this container that CUDA_VISIBLE_DEVICES leaves. Device files: no process is started."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([entry for entry in visible.split(",") if entry.strip() not in ("", "-1")])
    return sum(1 for name in os.listdir("/dev") if name.startswith("nvidia") and name[6:].isdigit())


def _count_neurons() -> int:
    """AWS Neuron cores: devices times cores of each, which the driver shows in sysfs."""
    total = 0
    for name in os.listdir("/dev"):
        if name.startswith("neuron") and name[6:].isdigit():
            cores = _read(f"/sys/class/neuron_device/{name}/core_count")
            total += int(cores) if cores.isdigit() else 1
    return total


def _cpu_quota() -> float | None:
    # cgroup v2: "max 100000" or "quota period"; v1: two files, quota -1 for none.
    fields = _read("/sys/fs/cgroup/cpu.max").split()
    if len(fields) == 2 and fields[0].isdigit():
        return int(fields[0]) / int(fields[1])
    quota = _read("/sys/fs/cgroup/cpu/cpu.cfs_quota_us")
    period = _read("/sys/fs/cgroup/cpu/cpu.cfs_period_us")
    if quota.isdigit() and period.isdigit() and int(period):
        return int(quota) / int(period)
    return None


def _domains(cpus: tuple[int, ...]) -> dict[int, tuple[int, int]]:
    node_of: dict[int, int] = {}
    root = "/sys/devices/system/node"
    for name in os.listdir(root) if os.path.isdir(root) else ():
        if name.startswith("node") and name[4:].isdigit():
            for cpu in _cpu_list(_read(f"{root}/{name}/cpulist")):
                node_of[cpu] = int(name[4:])
    result = {}
    for cpu in cpus:
        siblings = _cpu_list(_read(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"))
        result[cpu] = (node_of.get(cpu, 0), min(siblings, default=cpu))
    return result


def _cpu_list(text: str) -> list[int]:
    """The kernel's list format, ``0-3,8``."""
    result: list[int] = []
    for piece in text.split(","):
        first, _, last = piece.partition("-")
        if first.isdigit():
            result += range(int(first), int(last or first) + 1)
    return result
