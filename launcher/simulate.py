"""``python -m launcher simulate``: a job of several hosts on this one, to debug it where one sits.

Each simulated host has a launcher process, a job tree and a loopback address of its own, and a share of the CPUs and
GPUs. What it runs is the real thing: the launchers find, check and watch each other as they do on a cluster.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from launcher import container as contract
from launcher import job, topology
from launcher.errors import OutputError, UsageError
from launcher.machine import count_gpus, probe
from launcher.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from launcher.job import Setting
    from launcher.options import CommandLine

_MOST_HOSTS = 1000
# Decided here for each host; whatever environment and YAML file say is taken back.
_OURS = ("base_dir", "job_dir", "hostfile", "host", "host_addresses", "standalone", "nnodes", "node_rank")
_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


class SimulatedHost(Record):
    """One launcher that is to be started. ``cpus`` is empty when it may use all."""

    name: str
    address: str
    argv: tuple[str, ...]
    environ: dict[str, str]
    cpus: tuple[int, ...]


def simulate(line: CommandLine, environ: Mapping[str, str], log: Callable[[str], None]) -> int:
    """Runs the job and returns its exit code: the hosts' own, the highest of them where they differ.

    Raises:
        UsageError: no number of hosts, an option that makes no sense here, a bad setting, or no such script.
        OutputError: a job tree cannot be made, or a launcher cannot be started.
    """
    count = _count(line)
    run_id, settings = job.preview(_without(line, "hosts"), environ)
    directory = os.path.abspath(line.directory or os.path.join("launcher_runs", run_id))
    hosts = plan(line, environ, settings, count, directory, run_id)
    names = [host.name for host in hosts]
    try:
        for host in hosts:
            base = os.path.join(directory, host.name)
            contract.make_job_tree(base, settings["channel"].value, {}, host=host.name, hosts=names)
    except OutputError as error:
        raise OutputError(f"{error}; --dir names another place") from error
    log(f"simulating {count} hosts, {_span(names)}, with job trees under {directory}")
    codes = _run(hosts)
    if len(set(codes.values())) > 1:
        ends = ", ".join(f"{name} with {code}" for name, code in codes.items())
        log(f"the simulated hosts ended with different codes: {ends}")
    return max(codes.values())


def plan(
    line: CommandLine,
    environ: Mapping[str, str],
    settings: Mapping[str, Setting],
    count: int,
    directory: str,
    run_id: str,
) -> list[SimulatedHost]:
    """Every launcher's command and environment; nothing is started.

    Args:
        settings: what :func:`launcher.job.preview` found.
        directory: where the job trees are.
    """
    names = [f"algo-{number + 1}" for number in range(count)]
    addresses = [f"127.0.{number // 250}.{number % 250 + 1}" for number in range(count)]
    machine = probe(environ)
    shares = topology.share_cpus(machine.cpus, count, machine.domains)
    given = {name: value for name, value in line.given.items() if name not in ("hosts", "channel")}
    given.update(rdzv_id=run_id, hosts="", channel="", follow_parent="on", **dict.fromkeys(_OURS, ""))
    if not any(shares) and count > 1:
        given.setdefault("affinity", "none")
    if settings["leader_port"].source == "default":
        given["leader_port"] = _free_port()
    common = dict(environ)
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        common.setdefault(name, "lo")
    if settings["secret_file"].value == "":
        common["LAUNCHER_SECRET"] = os.urandom(32).hex()
    gpus = _share_gpus(environ, count)
    result = []
    for index, name in enumerate(names):
        base = os.path.join(directory, name)
        mine = {
            **given,
            "base_dir": base,
            "host_addresses": [f"{n}={a}" for n, a in zip(names, addresses, strict=True)],
        }
        if not settings["log_dir"].value:
            mine["log_dir"] = os.path.join(base, "run")
        argv = (sys.executable, "-m", "launcher", "run", *_spelled(mine), "--", line.script, *line.script_args)
        variables = {**common, "CUDA_VISIBLE_DEVICES": gpus[index]} if gpus else common
        result.append(SimulatedHost(name, addresses[index], argv, variables, shares[index]))
    return result


def _count(line: CommandLine) -> int:
    text = str(line.given.get("hosts", ""))
    if not (text.isascii() and text.isdigit() and 0 < int(text) <= _MOST_HOSTS):
        raise UsageError(f"simulate: --hosts is {text or 'missing'}; expected a number of hosts, 1 to {_MOST_HOSTS}")
    for name in _OURS:
        if name in line.given:
            hint = "--dir says where the job trees are made" if name.endswith("_dir") else "--hosts N is enough"
            raise UsageError(f"simulate makes the hosts itself: leave out --{name.replace('_', '-')}; {hint}")
    return int(text)


def _without(line: CommandLine, name: str) -> CommandLine:
    from launcher.record import replace

    return replace(line, given={key: value for key, value in line.given.items() if key != name})


def _spelled(given: Mapping[str, object]) -> list[str]:
    """Settings as words of a command line."""
    words = []
    for name, value in given.items():
        for one in value if isinstance(value, list) else [value]:
            words.append(f"--{name.replace('_', '-')}={one}")
    return words


def _span(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"


def _share_gpus(environ: Mapping[str, str], hosts: int) -> list[str]:
    """CUDA_VISIBLE_DEVICES of each host; empty when there are too few GPUs to give each host one of its own."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    devices = [str(number) for number in range(count_gpus(environ))] if visible is None else visible.split(",")
    if hosts < 2 or count_gpus(environ) < hosts:
        return []
    return [",".join(devices[len(devices) * i // hosts : len(devices) * (i + 1) // hosts]) for i in range(hosts)]


def _free_port() -> int:
    """A port that nobody listens on, outside of the range from which the kernel gives ports to connections."""
    import _socket

    for _ in range(64):
        port = 10000 + int.from_bytes(os.urandom(2), "little") % 20000
        probe_socket = _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
        try:
            probe_socket.bind(("0.0.0.0", port))
        except OSError:
            continue
        finally:
            probe_socket.close()
        return port
    raise OutputError("no free port for the first host; give --leader-port")


# ---- running


def _run(hosts: Sequence[SimulatedHost]) -> dict[str, int]:
    """Starts all launchers, passes signals on to them, and waits: host name -> exit code."""
    # All of it through sigwait: a signal that comes between two starts waits until there is somebody to have it.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # were it ignored, there would be no exit codes
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, (*_PASSED_ON, signal.SIGCHLD))
    running: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for host in hosts:
            try:
                running[host.name] = _start(host, previous)
            except (OSError, subprocess.SubprocessError) as error:
                _end(running)
                raise OutputError(f"cannot start the launcher of {host.name}: {error}") from error
        codes: dict[str, int] = {}
        while len(codes) < len(hosts):
            number = signal.sigwait((*_PASSED_ON, signal.SIGCHLD))
            for name, process in running.items():
                if name in codes:
                    continue
                if number != signal.SIGCHLD:
                    process.send_signal(number)
                elif process.poll() is not None:
                    codes[name] = process.returncode if process.returncode >= 0 else 128 - process.returncode
        return {host.name: codes[host.name] for host in hosts}
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _start(host: SimulatedHost, mask: set[signal.Signals] | set[int]) -> subprocess.Popen[bytes]:
    from launcher._native import set_parent_death_signal

    parent = os.getpid()

    def prepare() -> None:
        # A group of its own: a terminal's Ctrl-C reaches it once, through us, and not a second time directly.
        os.setpgid(0, 0)
        set_parent_death_signal(signal.SIGTERM)  # until the launcher itself follows its parent
        if os.getppid() != parent:
            os._exit(128 + signal.SIGTERM)
        if host.cpus:
            os.sched_setaffinity(0, host.cpus)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    return subprocess.Popen(host.argv, env=host.environ, stdin=subprocess.DEVNULL, preexec_fn=prepare)


def _end(running: Mapping[str, subprocess.Popen[bytes]]) -> None:
    for process in running.values():
        process.send_signal(signal.SIGTERM)
    for process in running.values():
        process.wait()
