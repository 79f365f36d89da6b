"""Hosts on this machine (tests/hosts/netns.py), and one run of one launcher on them.

All times are CLOCK_MONOTONIC, which all hosts share, in nanoseconds. Ends of processes are seen through pidfds.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from types import ModuleType, TracebackType

from jobs import RunFailed, clean_environment
from peers import AGENT, Peer, Request

RANKS = Path(__file__).resolve().parent / "ranks"
_NETNS = Path(__file__).resolve().parents[2] / "tests" / "hosts" / "netns.py"
_FORM_S = 60.0

# Waits on the host until all hosts are ready, then becomes the launcher. $0: where its output goes.
_GATE = 'echo; read -r _; exec "$@" </dev/null >"$0" 2>&1'


def load_netns() -> ModuleType:
    """The module that makes hosts; it belongs to the tests, which are no package."""
    spec = importlib.util.spec_from_file_location("netns", _NETNS)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["netns"] = module
    spec.loader.exec_module(module)
    return module


class Stage:
    """``count`` hosts that live as long as the benchmark."""

    def __init__(self, scratch: Path, count: int) -> None:
        self.scratch = scratch
        scratch.mkdir(parents=True, exist_ok=True)
        self.network = load_netns().Network(scratch / "hosts", count)
        self.machines = self.network.machines
        self.agent = scratch / "agent"
        self.agent.write_text(AGENT)
        self.agent.chmod(0o755)
        for machine in self.machines:
            for name in ("input/config", "input/data", "model", "output/data", "checkpoints"):
                (machine.base / name).mkdir(parents=True, exist_ok=True)
            config = machine.base / "input" / "config"
            (config / "hyperparameters.json").write_text("{}")
            (config / "inputdataconfig.json").write_text("{}")

    def close(self) -> None:
        """Takes the hosts away."""
        self.network.close()


class Job:
    """A job that was started on the first ``hosts`` hosts of a stage, on all at the same instant.

    A context manager: whatever is left of it is killed at the end.

    Attributes:
        started_ns: when the launchers were about to be executed.
        launchers: host number -> its launcher.
        ranks: (host name, local rank) -> process id, known once they were met.
    """

    def __init__(self, stage: Stage, peer: Peer, hosts: int, ranks: int, script: str, *arguments: str) -> None:
        self.stage = stage
        self.machines = stage.machines[:hosts]
        self.names = tuple(machine.name for machine in self.machines)
        self.places = [(name, local) for name in self.names for local in range(ranks)]
        self.ranks: dict[tuple[str, int], int] = {}
        self.dir = stage.scratch / uuid.uuid4().hex[:8]
        self.dir.mkdir()
        self._pidfds: dict[int, int] = {}
        for machine in self.machines:
            (self.dir / f"holder.{machine.name}").write_text(str(machine.pid))
            resources = {"current_host": machine.name, "hosts": self.names, "network_interface_name": "eth0"}
            (machine.base / "input" / "config" / "resourceconfig.json").write_text(json.dumps(resources))
            for name in ("failure", "failure.json", "success"):
                (machine.base / "output" / name).unlink(missing_ok=True)
        # Another port each time: those of the last run may be held back by the kernel for a while.
        port = random.randrange(20_000, 30_000)
        request = Request(self.names, ranks, port, stage.agent, RANKS / script, arguments)
        self.commands = peer.commands(request)
        env = clean_environment(self.dir) | {"TMPDIR": "/opt/ml/tmp", "CLUSTER_BENCH_DIR": str(self.dir)}
        self.launchers = [
            subprocess.Popen(
                [*machine.wrapper(), "sh", "-c", _GATE, str(self.dir / f"output.{machine.name}"), *command],
                env=env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            for machine, command in zip(self.machines, self.commands, strict=False)
        ]
        for launcher in self.launchers:
            assert launcher.stdout is not None
            launcher.stdout.readline()
            launcher.stdout.close()
        self.started_ns = time.monotonic_ns()
        for launcher in self.launchers:
            assert launcher.stdin is not None
            launcher.stdin.write(b"\n")
            launcher.stdin.close()

    def __enter__(self) -> Job:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for fd in self._pidfds.values():
            os.close(fd)
        deadline = time.monotonic() + 20
        for machine in self.machines:
            while (left := machine.processes()) and time.monotonic() < deadline:
                for pid in left:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                time.sleep(0.01)
        for launcher in self.launchers:
            launcher.kill()
            launcher.wait()
        for machine in self.machines:
            for path in (machine.base / "tmp").iterdir():
                shutil.rmtree(path, ignore_errors=True)
        shutil.rmtree(self.dir, ignore_errors=True)

    def fail(self, what: str) -> RunFailed:
        """The error for this run, with the end of every launcher's output."""
        tails = [
            f"-- {path.name}:\n{path.read_bytes()[-1500:].decode(errors='replace')}"
            for path in sorted(self.dir.glob("output.*"))
        ]
        return RunFailed("\n".join([what, f"command: {' '.join(self.commands[0])}", *tails]))

    def failure(self, host: int) -> str:
        """The first line of a host's failure file, "" without one."""
        try:
            return (self.machines[host].base / "output" / "failure").read_text().partition("\n")[0]
        except FileNotFoundError:
            return ""

    def read_ranks(self, name: str) -> list[str]:
        """Waits until every rank has told ``name``; the texts in the order of ``places``."""
        paths = [self.dir / f"{name}.{host}.{local}" for host, local in self.places]
        deadline = time.monotonic() + _FORM_S
        while not all(path.exists() for path in paths):
            if time.monotonic() > deadline:
                raise self.fail(f"no {name!r} from all ranks within {_FORM_S:g} s")
            if any(launcher.poll() is not None for launcher in self.launchers):
                time.sleep(0.1)
                if not all(path.exists() for path in paths):
                    raise self.fail(f"a launcher ended before all ranks had told {name!r}")
            time.sleep(0.002)
        return [path.read_text() for path in paths]

    def meet_ranks(self) -> None:
        """Waits until all ranks run, and watches them and the launchers from now on."""
        pids = [int(text) for text in self.read_ranks("ready")]
        self.ranks = dict(zip(self.places, pids, strict=True))
        self.watch([*pids, *(launcher.pid for launcher in self.launchers)])

    def watch(self, pids: list[int]) -> None:
        """Opens pidfds now, so that no end is missed."""
        for pid in pids:
            if pid not in self._pidfds:
                self._pidfds[pid] = os.pidfd_open(pid)

    def go(self) -> None:
        """Lets the ranks that wait for it go on."""
        (self.dir / "go").touch()

    def ends(self, pids: list[int], limit_s: float) -> dict[int, int]:
        """When these processes ended, ns; those that still run after ``limit_s`` are not in it."""
        self.watch(pids)
        fds = {self._pidfds[pid]: pid for pid in pids}
        poll = select.poll()
        for fd in fds:
            poll.register(fd, select.POLLIN)
        found: dict[int, int] = {}
        deadline = time.monotonic() + limit_s
        while len(found) < len(pids) and (left := deadline - time.monotonic()) > 0:
            for fd, _ in poll.poll(left * 1000):
                poll.unregister(fd)
                found[fds[fd]] = time.monotonic_ns()
        return found
