"""Jobs over several hosts, each host with a network, an /opt/ml, a name and, if asked, a clock of its own."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from .netns import Machine, Network, lacking, lacks_clocks

DEADLINE_S = 40.0
TOGETHER = Path(__file__).with_name("ranks") / "together.py"


class Host:
    """One host and the launcher on it. What a ``Job`` has (``failure``, ``wait_for_line``, ...) this has too."""

    def __init__(self, machine: Machine, job: Any, hosts: Hosts) -> None:
        self.machine, self.job, self.hosts = machine, job, hosts
        self.name = machine.name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.job, name)

    def start(
        self,
        *args: str | Path,
        env: dict[str, str] | None = None,
        wrapper: Sequence[str] = (),
        **more: Any,
    ) -> Host:
        """Starts ``python -m launcher args...`` on this host, in its /opt/ml/code; ``wrapper``: run inside the host."""
        base = "/opt/ml" if self.hosts.mounted else str(self.job.base)
        own = {
            "TMPDIR": "/opt/ml/tmp",
            "LAUNCHER_LOG_DIR": f"{base}/run",  # where rank_file() looks
            "SHARED": str(self.hosts.shared),
        }
        self.job.start(
            *args,
            env={**own, **(env or {})},
            wrapper=(*self.machine.wrapper(f"{base}/code"), *wrapper),
            own_tree=not self.hosts.mounted,
            **more,
        )
        return self

    def script(self, text: str, name: str = "train.py") -> Path:
        """Writes a script (dedented) into this host's /opt/ml/code."""
        path = self.job.base / "code" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        return path

    def resources(self, **changes: Any) -> None:
        """Writes resourceconfig.json as the platform would, with ``changes``; None takes a key away."""
        config = {
            "current_host": self.name,
            "hosts": [host.name for host in self.hosts],
            "network_interface_name": "eth0",
            **changes,
        }
        config = {key: value for key, value in config.items() if value is not None}
        path = self.job.base / "input" / "config" / "resourceconfig.json"
        path.write_text(json.dumps(config))

    def signal(self, number: int) -> None:
        """Sends a signal to the launcher of this host."""
        self.job.process.send_signal(number)


class Hosts(Sequence[Host]):
    """All hosts of one job, in the order of the host list; the first is the leader.

    ``shared`` is a directory that all hosts see under the same path, for files by which a test and its ranks tell each
    other things; ranks find it in the variable SHARED, and what to do with it in the module ``together``.
    """

    def __init__(
        self,
        network: Network,
        jobs: Sequence[Any],
        shared: Path,
        wait_until: Callable[..., Any],
        mounted: bool,
    ) -> None:
        self.network, self.shared, self._wait_until = network, shared, wait_until
        self.mounted = mounted  # as /opt/ml: the first job of a machine
        self._hosts = [Host(machine, job, self) for machine, job in zip(network.machines, jobs, strict=True)]
        for host in self._hosts:
            host.job.tree()
            host.resources()
            shutil.copy(TOGETHER, host.job.base / "code")

    def __len__(self) -> int:
        return len(self._hosts)

    def __getitem__(self, index: Any) -> Any:
        return self._hosts[index]

    def script(self, text: str, name: str = "train.py") -> None:
        """The same script on every host."""
        for host in self:
            host.script(text, name)

    def start_all(self, *args: str | Path, **options: Any) -> None:
        """Starts the launcher on every host with the same arguments."""
        for host in self:
            host.start(*args, **options)

    def wait_for_ranks(self, *ranks: int, attempt: int = 0) -> list[int]:
        """pids of these ranks, once each has called ``up()``."""
        return [int(self.wait_for_file(f"up{attempt}-{rank}")) for rank in ranks]

    def wait_all(self, deadline_s: float = DEADLINE_S) -> list[int]:
        """Exit codes in the order of the hosts, once all launchers have ended."""

        self.wait_until(
            lambda: all(host.job.process.poll() is not None for host in self), "the end of all launchers", deadline_s
        )
        return [host.job.process.returncode for host in self]

    def run_all(self, *args: str | Path, deadline_s: float = DEADLINE_S, **options: Any) -> list[int]:
        """``start_all`` and ``wait_all``."""
        self.start_all(*args, **options)
        return self.wait_all(deadline_s)

    def wait_until(self, condition: Callable[[], Any], what: str, deadline_s: float = DEADLINE_S) -> Any:
        """The first true value of ``condition()``; a failure shows what all launchers have printed by then."""
        try:
            return self._wait_until(condition, what, deadline_s)
        except pytest.fail.Exception as failed:
            pytest.fail(f"{failed}\n{self.output()}")

    def output(self) -> str:
        """Everything that all launchers have printed."""
        return "\n".join(f"====== {host.name}\n{host.job.output()}" for host in self)

    def failures(self) -> list[str]:
        """The text of output/failure of every host."""
        return [host.job.failure for host in self]

    def assert_all_say(self, code: int, beginning: str) -> dict[str, Any]:
        """Every launcher ends with ``code``, and every host's failure file is the same and begins so.

        Returns:
            The detail of the first host's failure.json.
        """
        codes = self.wait_all()
        assert codes == [code] * len(self), f"{codes}\n{self.output()}"
        texts = self.failures()
        assert texts[0].startswith(beginning), f"{texts[0]}\n{self.output()}"
        assert texts == [texts[0]] * len(self)
        self.assert_nothing_left()
        return self[0].failure_json["detail"]

    def wait_for_file(self, name: str, deadline_s: float = DEADLINE_S) -> str:
        """The content of a file in ``shared`` once it is there and not empty."""
        path = self.shared / name
        self.wait_until(lambda: path.exists() and path.stat().st_size > 0, f"file {name}", deadline_s)
        return path.read_text()

    def tell(self, name: str, text: str = "x") -> None:
        """Makes a file in ``shared``, complete as soon as it is there."""
        part = self.shared / f"{name}.part"
        part.write_text(text)
        part.rename(self.shared / name)

    def partition(self, first: Host, second: Host) -> None:
        self.network.partition(first.machine, second.machine)

    def rejoin(self, first: Host, second: Host) -> None:
        self.network.rejoin(first.machine, second.machine)

    def assert_nothing_left(self) -> None:
        """No process of any kind runs on a host."""
        left: dict[str, dict[int, str]] = {}

        def none() -> bool:
            left.update((host.name, host.machine.processes()) for host in self)
            return not any(left.values())

        try:
            self._wait_until(none, "no process on any host", 5.0)
        except pytest.fail.Exception:
            pytest.fail(f"left on the hosts: {left}\n{self.output()}")


@pytest.fixture
def make_network(as_root: None, tmp_path: Path) -> Iterator[Callable[..., Network]]:
    """Networks of hosts without a job: ``make_network(3, family=6, clocks_s=(0, 5))``. Gone when the test is over."""
    reason = lacking()
    if reason:
        pytest.skip(reason)
    networks: list[Network] = []

    def make(count: int, *, directory: Path | None = None, **options: Any) -> Network:
        missing = lacks_clocks() if any(options.get("clocks_s", ())) else ""
        if missing:
            pytest.skip(missing)
        networks.append(Network(directory or tmp_path / f"network-{len(networks)}", count, **options))
        return networks[-1]

    try:
        yield make
    finally:
        for network in networks:
            network.close()


@pytest.fixture
def make_hosts(
    make_network: Callable[..., Network],
    make_job: Callable[[str], Any],
    tmp_path: Path,
    wait_until: Callable[..., Any],
) -> Iterator[Callable[..., Hosts]]:
    """Hosts with job trees: ``make_hosts(2)``; ``on``: another job on the hosts of that one.

    When all launchers have ended, nothing may be left on any host.
    """
    made: list[Hosts] = []

    def make(count: int, *, on: Hosts | None = None, **options: Any) -> Hosts:
        directory = tmp_path / f"hosts-{len(made)}"
        shared = directory / "shared"
        shared.mkdir(parents=True)
        jobs = [make_job(f"{directory.name}/algo-{number}") for number in range(1, count + 1)]
        network = on.network if on is not None else make_network(count, directory=directory, **options)
        made.append(Hosts(network, jobs, shared, wait_until, on is None))
        return made[-1]

    yield make
    for hosts in made:
        if all(host.job.process is not None and host.job.process.poll() is not None for host in hosts):
            hosts.assert_nothing_left()
