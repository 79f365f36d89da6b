"""Hosts on one machine: each a network, a mount and a UTS namespace (if asked, a clock too), joined by a bridge.

Needs root, iproute2 and util-linux. Nothing of it is visible in the namespaces that the caller lives in: the bridge has
a namespace of its own, no namespace has a name, and all of them go away with the processes that hold them, which end
when the calling process does. No pytest in here: benchmarks use this module as well.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

IPV4 = "10.77.0.0/24"
IPV6 = "fd77::/64"
NOBODY = "02:00:00:00:de:ad"  # a hardware address that no interface has
RELAY = Path(__file__).with_name("relay.py")
_DEADLINE_S = 20.0

# Keeps the namespace of the bridge. Every holder ends with its standard input: with the process that made it.
_HUB = 'echo "$$"; exec cat >/dev/null'

# Arguments: name of the host, its directory, its /opt/ml.
_HOLDER = """
set -eu
name=$1 directory=$2 base=$3
mount --make-rprivate /
hostname "$name"
ip link set lo up
# What /sys says of network interfaces is what was true where it was mounted.
if mount --rbind /sys/fs/cgroup "$directory/cgroup" 2>/dev/null; then cgroup=yes; else cgroup=; fi
mount -t sysfs -o ro sysfs /sys
[ -z "$cgroup" ] || mount --rbind "$directory/cgroup" /sys/fs/cgroup
for file in hosts resolv.conf nsswitch.conf; do
    [ ! -e "/etc/$file" ] || mount --bind "$directory/etc/$file" "/etc/$file"
done
if [ ! -d /opt/ml ]; then
    # A mount point where there is none, and none is left behind: /opt again, with everything that is in it.
    mount -t tmpfs tmpfs "$directory/opt"
    mkdir "$directory/opt/ml"
    for entry in /opt/*; do
        [ -e "$entry" ] || continue
        if [ -d "$entry" ]; then mkdir "$directory$entry"; else : >"$directory$entry"; fi
        mount --rbind "$entry" "$directory$entry"
    done
    mkdir -p /opt
    mount --rbind "$directory/opt" /opt
fi
mount --bind "$base" /opt/ml
echo "$$"
exec cat >/dev/null
"""


def lacking() -> str:
    """What this machine lacks for hosts of its own, "" for nothing."""
    if os.geteuid() != 0:
        return "needs root: network, mount and UTS namespaces"
    for tool in ("ip", "tc", "bridge", "unshare", "nsenter", "mount", "hostname"):
        if shutil.which(tool) is None:
            return f"not installed: {tool} (iproute2, util-linux, hostname)"
    probe = "ip link add name hub type bridge && ip link add one type veth peer name two"
    tried = subprocess.run(
        ["unshare", "-n", "-m", "-u", "sh", "-c", probe], capture_output=True, text=True, check=False
    )
    return f"no network namespaces here: {tried.stderr.strip()}" if tried.returncode else ""


def lacks_clocks() -> str:
    """Why a host cannot have a clock of its own, "" when it can."""
    command = ["unshare", "--time", "--monotonic", "5", "--fork", "true"]
    tried = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"no time namespaces here: {tried.stderr.strip()}" if tried.returncode else ""


class _Holder:
    """A process that does nothing but keep namespaces alive."""

    def __init__(self, unshare: Sequence[str], script: str, arguments: Sequence[str], errors: Path) -> None:
        self.errors = errors
        with errors.open("wb") as stderr:
            self._process = subprocess.Popen(
                ["unshare", *unshare, "sh", "-c", script, "sh", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                cwd="/",
            )
        self.pid = 0  # 0 until it is ready; with a clock of its own it is a child of the process that was started
        self.pids: set[int] = set()
        self.network = ""

    def ready(self) -> None:
        """Waits until the namespaces are set up.

        Raises:
            RuntimeError: with what the set-up had to say.
        """
        assert self._process.stdout is not None
        select.select([self._process.stdout], [], [], _DEADLINE_S)
        os.set_blocking(self._process.stdout.fileno(), False)
        line = self._process.stdout.readline()
        if not line:
            self.close()
            raise RuntimeError(f"a host's namespaces could not be made: {self.errors.read_text().strip()}")
        self.pid = int(line)
        self.pids = {self.pid, self._process.pid}
        self.network = os.readlink(f"/proc/{self.pid}/ns/net")

    def close(self) -> None:
        """Ends the process; its namespaces go when nothing else is in them."""
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        else:
            self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._process.wait()
        self.pid = 0


class Machine:
    """One host. ``directory`` is its own on the real disk; ``base`` in there is what it sees as /opt/ml."""

    def __init__(self, network: Network, number: int, name: str, directory: Path, clock_s: float) -> None:
        self.network, self.number, self.name, self.directory = network, number, name, directory
        self.address = str(network.subnet[number])
        self.base = directory / "opt-ml"
        self.code = self.base / "code"
        self._state = directory / "host"  # mount points, and the files that are mounted
        for path in (self.code, self.base / "tmp", self.base / "run"):
            path.mkdir(parents=True, exist_ok=True)
        for name_of in ("etc", "opt", "cgroup"):
            (self._state / name_of).mkdir(parents=True)
        (self._state / "etc" / "hosts").write_text("127.0.0.1 localhost\n")
        # A name that is in no file is unknown at once, and no server is asked for it.
        (self._state / "etc" / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
        (self._state / "etc" / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
        clock = ("--time", "--monotonic", f"{clock_s:g}", "--boottime", f"{clock_s:g}", "--fork", "--kill-child")
        self._holder = _Holder(
            ("--net", "--mount", "--uts", *(clock if clock_s else ())),
            _HOLDER,
            (name, str(self._state), str(self.base)),
            self._state / "stderr",
        )
        self._own_clock = bool(clock_s)

    @property
    def pid(self) -> int:
        """A process that lives in this host's namespaces."""
        return self._holder.pid

    def wrapper(self, cwd: str = "/opt/ml/code") -> tuple[str, ...]:
        """What to put before a command so that it runs on this host, in ``cwd``; the process that is started becomes
        the command. Costs two execs of small programs, about 2 ms."""
        clock = ("--time",) if self._own_clock else ()
        return ("nsenter", "-t", str(self.pid), "--net", "--mount", "--uts", *clock, "env", f"--chdir={cwd}")

    def run(self, *command: str, cwd: str = "/", check: bool = True) -> subprocess.CompletedProcess[str]:
        """Runs a command on this host to its end."""
        return subprocess.run([*self.wrapper(cwd), *command], capture_output=True, text=True, check=check)

    def processes(self) -> dict[int, str]:
        """pid -> command of everything that runs in this host's network, its holder left out."""
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) in self._holder.pids:
                continue
            with contextlib.suppress(OSError):  # zombies have no namespaces any more
                if os.readlink(entry / "ns" / "net") == self._holder.network:
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    if command:  # "": a thread of the kernel
                        found[int(entry.name)] = command
        return found

    # ---- names

    def set_names(self, names: dict[str, str]) -> None:
        """Makes ``names`` (host name -> address) all that this host can resolve, beside localhost. At any time."""
        lines = ["127.0.0.1 localhost", "::1 localhost", *(f"{address} {name}" for name, address in names.items())]
        (self._state / "etc" / "hosts").write_text("\n".join(lines) + "\n")

    def rename_dns(self, **changes: str) -> None:
        """Changes what this host resolves; ``algo_2="10.77.0.9"`` for algo-2, "" takes the name away."""
        names = self.network.names()
        for key, address in changes.items():
            names[key.replace("_", "-")] = address
        self.set_names({name: address for name, address in names.items() if address})

    # ---- faults

    def cut(self) -> None:
        """Nothing goes to this host or comes from it any more, and nobody is told: no FIN, no carrier loss."""
        self.network.port(self.number, "state", "disabled")

    def heal(self) -> None:
        """Undoes :meth:`cut`."""
        self.network.port(self.number, "state", "forwarding")

    def limit_rate(self, mbit: float) -> None:
        """At most so much traffic in each direction; 0: no limit."""
        for command, device in ((self.run, "eth0"), (self.network.run, f"port{self.number}")):
            if mbit:
                bucket = ("burst", str(max(16_000, int(mbit * 1e6 / 8 / 100))), "latency", "200ms")
                command("tc", "qdisc", "replace", "dev", device, "root", "tbf", "rate", f"{mbit:g}mbit", *bucket)
            else:
                command("tc", "qdisc", "del", "dev", device, "root", check=False)

    def signal(self, pid: int, number: int) -> None:
        """Sends a signal to one of this host's processes (pids are those of the real machine)."""
        if pid not in self.processes():
            raise ProcessLookupError(f"{self.name} has no process {pid}")
        os.kill(pid, number)

    def close(self) -> None:
        """Kills what is left on this host, and takes it away."""
        if not self.pid:
            return
        end = time.monotonic() + _DEADLINE_S
        while (left := self.processes()) and time.monotonic() < end:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            select.select([], [], [], 0.005)  # until they are gone
        self._holder.close()


class Network:
    """``count`` hosts algo-1, algo-2, ... that reach each other by name. A context manager.

    Args:
        directory: an empty one; each host gets a directory of its name in it.
        family: 4 or 6, the one IP version there is.
        clocks_s: what to add to each host's monotonic clock; a host with 0 keeps the machine's.
    """

    def __init__(self, directory: Path, count: int, *, family: int = 4, clocks_s: Sequence[float] = ()) -> None:
        self.family = family
        self.subnet: Any = ipaddress.ip_network(IPV4 if family == 4 else IPV6)
        self.address = str(self.subnet[250])  # of the bridge itself, where relays listen
        self.machines: list[Machine] = []
        self._relays: list[Relay] = []
        directory.mkdir(parents=True, exist_ok=True)
        self._hub = _Holder(("--net",), _HUB, (), directory / "hub-stderr")
        try:
            for number in range(1, count + 1):
                name = f"algo-{number}"
                clock_s = clocks_s[number - 1] if number <= len(clocks_s) else 0.0
                self.machines.append(Machine(self, number, name, directory / name, clock_s))
            for holder in (self._hub, *(machine._holder for machine in self.machines)):
                holder.ready()
            self._wire()
        except BaseException:
            self.close()
            raise

    def _wire(self) -> None:
        size = self.subnet.prefixlen
        nodad = " nodad" if self.family == 6 else ""
        # No group snooping: which multicast (neighbour solicitations) goes where is not to depend on who asked before.
        hub = ["link add hub type bridge mcast_snooping 0", "link set hub up", "link set lo up"]
        hub.append(f"addr add {self.address}/{size} dev hub{nodad}")
        for machine in self.machines:
            hub += [
                f"link add port{machine.number} type veth peer name eth0 netns {machine.pid}",
                f"link set port{machine.number} master hub",
                f"link set port{machine.number} up",
            ]
        self._batch(self._enter(), hub)
        for machine in self.machines:
            if self.family == 4:
                machine.run("sh", "-c", "echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6 || :")
            self._batch(
                machine.wrapper("/"), [f"addr add {machine.address}/{size} dev eth0{nodad}", "link set eth0 up"]
            )
            machine.set_names(self.names())

    def _enter(self) -> tuple[str, ...]:
        return ("nsenter", "-t", str(self._hub.pid), "--net")

    @staticmethod
    def _batch(enter: Sequence[str], lines: Sequence[str]) -> None:
        done = subprocess.run(
            [*enter, "ip", "-batch", "-"], input="\n".join(lines) + "\n", capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"the network could not be made: {done.stderr.strip()}")

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getitem__(self, index: int) -> Machine:
        return self.machines[index]

    def names(self) -> dict[str, str]:
        """Host name -> address."""
        return {machine.name: machine.address for machine in self.machines}

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Runs a command in the network of the bridge."""
        return subprocess.run([*self._enter(), *command], capture_output=True, text=True, check=check)

    def port(self, number: int, *setting: str) -> None:
        """Changes a setting of the bridge's port to a host."""
        self.run("bridge", "link", "set", "dev", f"port{number}", *setting)

    def partition(self, first: Machine, second: Machine) -> None:
        """What these two send each other goes nowhere, silently; both still reach everybody else."""
        for one, other in ((first, second), (second, first)):
            one.run("ip", "neigh", "replace", other.address, "lladdr", NOBODY, "dev", "eth0", "nud", "permanent")

    def rejoin(self, first: Machine, second: Machine) -> None:
        """Undoes :meth:`partition`."""
        for one, other in ((first, second), (second, first)):
            one.run("ip", "neigh", "del", other.address, "dev", "eth0")

    @property
    def has_netem(self) -> bool:
        """Whether the kernel can delay and lose packets; without it there is :meth:`relay`."""
        tried = self.run("tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "0ms", check=False)
        if tried.returncode == 0:
            self.run("tc", "qdisc", "del", "dev", "lo", "root")
        return tried.returncode == 0

    def relay(self, target: str, port: int, *, delay_s: float = 0.0) -> Relay:
        """A relay at ``self.address``, ``port`` for TCP connections to ``target``'s ``port``."""
        self._relays.append(Relay(self._enter(), (self.address, port), (target, port), delay_s))
        return self._relays[-1]

    def close(self) -> None:
        """Kills what is left on the hosts, and takes everything away."""
        for relay in self._relays:
            relay.close()
        for machine in self.machines:
            machine.close()
        self._hub.close()


class Relay:
    """Passes TCP connections on, with a delay in each direction, and can stand still."""

    def __init__(self, enter: Sequence[str], listen: tuple[str, int], target: tuple[str, int], delay_s: float) -> None:
        words = [*map(str, (*listen, *target)), f"{delay_s:g}"]
        self._process = subprocess.Popen(
            [*enter, sys.executable, "-S", str(RELAY), *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._answer("listening")

    def _answer(self, expected: str) -> None:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().decode().strip()
        if line != expected:
            raise RuntimeError(f"the relay said {line!r}, not {expected!r}")

    def tell(self, order: str) -> None:
        """``stall`` (bytes are kept back), ``go``, or ``drop`` (all connections are reset); returns when it is done."""
        assert self._process.stdin is not None
        self._process.stdin.write(order.encode() + b"\n")
        self._process.stdin.flush()
        self._answer(order)

    def close(self) -> None:
        """Ends it, and its connections with it."""
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._process.wait()
