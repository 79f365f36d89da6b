"""Containers under test: images built from docker/, job trees mounted as the platform mounts them."""

from __future__ import annotations

import contextlib
import http.client
import importlib.metadata
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .engine import PYTHON, ROOT, CommandFailed, Engine, Unavailable, base_image, build, find_engine

END_S = 60.0
_SITE = "/opt/site"
_LIMITS = ("--shm-size", "64m")  # what the platform gives, and what engines give by default


class Container:
    """A container that was started, and its job tree on this machine."""

    def __init__(self, engine: Engine, name: str, wait_until: Callable[..., Any]) -> None:
        self.engine, self.name, self._wait_until = engine, name, wait_until

    def wait(self, deadline_s: float = END_S) -> int:
        """Its exit code, once it has ended."""
        try:
            return int(self.engine("wait", self.name, timeout_s=deadline_s).split()[-1])
        except Exception:
            print(self.logs())
            raise

    def stop(self, grace_s: int) -> int:
        """As the platform stops it: SIGTERM, and SIGKILL after the grace period; the exit code."""
        self.engine("stop", "-t", str(grace_s), self.name, timeout_s=grace_s + END_S)
        return self.wait()

    def logs(self) -> str:
        """All it has printed, on both streams."""
        with self.engine.popen("logs", self.name, stdout=-1, stderr=-2) as process:
            return process.communicate(timeout=END_S)[0].decode(errors="backslashreplace")

    def remove(self) -> None:
        """Frees its name and its address."""
        self.engine("rm", "-f", "-v", self.name)

    def inspect(self) -> dict[str, Any]:
        """What the engine knows of it."""
        found: list[dict[str, Any]] = json.loads(self.engine("container", "inspect", self.name))
        return found[0]

    def wait_healthy(self) -> None:
        """Until the image's HEALTHCHECK says that it is well."""

        def healthy() -> bool:
            if self.engine.name == "docker":
                return bool(self.inspect()["State"]["Health"]["Status"] == "healthy")
            try:  # Podman leaves the intervals to systemd, which may not be there
                self.engine("healthcheck", "run", self.name)
            except CommandFailed:
                return False
            return True

        self._wait_until(healthy, f"health\n{self.logs()}")

    def address(self) -> str:
        """Its address in its network."""
        (network,) = self.inspect()["NetworkSettings"]["Networks"].values()
        return str(network["IPAddress"])

    def request(
        self, method: str, path: str, body: bytes | None = None, content_type: str = "application/json"
    ) -> tuple[int, bytes]:
        """Status and body of an answer of the server in it."""
        connection = http.client.HTTPConnection(self.address(), 8080, timeout=END_S)
        try:
            connection.request(method, path, body, {"Content-Type": content_type})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def ask(self, body: bytes) -> Any:
        """The model's answer, in JSON; waits until the server is ready."""

        def ready() -> bool:
            try:
                return self.request("GET", "/ping")[0] == 200
            except OSError:
                return False

        self._wait_until(ready, f"/ping\n{self.logs()}")
        status, answer = self.request("POST", "/invocations", body)
        assert status == 200, answer
        return json.loads(answer)


class Containers:
    """Starts containers; all are removed at the end of the test."""

    def __init__(self, engine: Engine, make_job: Callable[[str], Any], wait_until: Callable[..., Any]) -> None:
        self.engine, self._make_job, self.wait_until = engine, make_job, wait_until
        self._prefix = f"launcher-test-{os.getpid()}-{time.monotonic_ns() % 1_000_000}"
        self._numbers = itertools.count(1)
        self._started: list[str] = []
        self.network = ""

    def job(
        self,
        host: str = "algo-1",
        hosts: tuple[str, ...] = (),
        script: str = "",
        hyperparameters: dict[str, Any] | None = None,
        **tree: Any,
    ) -> Any:
        """A job tree that any user of the container may write to; its program is train.py: ``script``, dedented."""
        program = {"sagemaker_program": "train.py", **(hyperparameters or {})}
        tree["hyperparameters"] = {name: value for name, value in program.items() if value is not None}
        job = self._make_job(host)
        interface = "eth0" if hosts else "lo"
        resources = {"current_host": host, "hosts": list(hosts or (host,)), "network_interface_name": interface}
        job.tree(resources=resources, **tree)
        if script:
            (job.base / "code" / "train.py").write_text(textwrap.dedent(script))
        for path in [job.base, *job.base.rglob("*")]:
            path.chmod(0o777 if path.is_dir() else 0o666)
        return job

    def no_other_tmpfs(self) -> tuple[str, ...]:
        """With a read-only root Podman mounts memory at /tmp and the like unless told not to; Docker does not."""
        return ("--read-only-tmpfs=false",) if self.engine.name == "podman" else ()

    def start(self, image: str, *words: str, job: Any = None, options: tuple[str, ...] = ()) -> Container:
        """``docker run --detach options... image words...`` with the job's tree at /opt/ml."""
        name = f"{self._prefix}-{next(self._numbers)}"
        self._started.append(name)
        tree = () if job is None else ("--volume", f"{job.base}:/opt/ml")
        network = () if "--network" in options or self.network else ("--network", "none")
        self.engine("run", "--detach", "--name", name, *_LIMITS, *network, *tree, *options, image, *words)
        return Container(self.engine, name, self.wait_until)

    def run(self, image: str, *words: str, deadline_s: float = END_S, **how: Any) -> tuple[int, Container]:
        """Starts one and waits for its end."""
        container = self.start(image, *words, **how)
        return container.wait(deadline_s), container

    def hosts(self, count: int) -> list[tuple[str, tuple[str, ...]]]:
        """Names and the options that give containers an address each, and names that all of them know."""
        if not self.network:
            self.network = f"{self._prefix}-network"
            number = os.getpid() % 200 + 20
            self._subnet = f"10.77.{number}"
            self.engine("network", "create", "--subnet", f"{self._subnet}.0/24", self.network)
        names = [f"algo-{number}" for number in range(1, count + 1)]
        address = {name: f"{self._subnet}.{10 + number}" for number, name in enumerate(names)}
        known = [word for name in names for word in ("--add-host", f"{name}:{address[name]}")]
        return [
            (name, ("--network", self.network, "--ip", address[name], "--hostname", name, "--memory", "2g", *known))
            for name in names
        ]

    def close(self) -> None:
        for name in self._started:
            with contextlib.suppress(CommandFailed):
                self.engine("rm", "-f", "-v", name)
        if self.network:
            self.engine("network", "rm", self.network)


@pytest.fixture(scope="session")
def engine() -> Engine:
    try:
        return find_engine()
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="session")
def base(engine: Engine) -> str:
    """The image that all others stand on."""
    try:
        return base_image(engine)
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="session")
def image(engine: Engine, base: str) -> Callable[[str], str]:
    """Builds ``docker/NAME.Dockerfile``, once."""
    built: dict[str, str] = {}

    def get(name: str) -> str:
        if name not in built:
            built[name] = build(engine, name, base)
        return built[name]

    return get


@pytest.fixture
def containers(engine: Engine, make_job: Callable[[str], Any], wait_until: Callable[..., Any]) -> Iterator[Containers]:
    one = Containers(engine, make_job, wait_until)
    try:
        yield one
    finally:
        one.close()


@pytest.fixture(scope="session")
def site(image: Callable[[str], str], engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Options that give a container Python packages of this machine: ``site("torch")``.

    They stand for a deep-learning base image, which only a registry has. Files are linked where that is possible.
    """
    made: dict[tuple[str, ...], tuple[str, ...]] = {}

    def get(*names: str) -> tuple[str, ...]:
        if names not in made:
            for name in names:
                if importlib.util.find_spec(name) is None:
                    pytest.skip(f"not installed: {name}")
            seen = engine("run", "--rm", "--network", "none", "--entrypoint", "python", image("train"), "--version")
            if not seen.startswith(f"Python {PYTHON}."):
                pytest.skip(f"packages of Python {PYTHON} are here, the image has {seen.strip()}")
            target = tmp_path_factory.mktemp("site")
            for name in distributions(names):
                link_distribution(name, target)
            target.chmod(0o755)
            made[names] = ("--volume", f"{target}:{_SITE}:ro", "--env", f"PYTHONPATH={_SITE}")
        return made[names]

    return get


def distributions(names: tuple[str, ...]) -> set[str]:
    """These distributions and all they require here."""
    found: set[str] = set()
    left = list(names)
    while left:
        name = left.pop().lower().replace("_", "-")
        if name in found:
            continue
        try:
            required = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # of another platform, or of an extra
        found.add(name)
        left += [re.split(r"[^\w.-]", line)[0] for line in required if "extra ==" not in line]
    return found


def link_distribution(name: str, target: Path) -> None:
    for file in importlib.metadata.files(name) or []:
        if ".." in file.parts or "__pycache__" in file.parts:
            continue
        source, place = Path(str(file.locate())), target / file
        if place.exists() or not source.exists():
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, place)
        except OSError:
            shutil.copy(source, place)


@pytest.fixture
def digits() -> Callable[[Any], None]:
    """Puts the digits example and its data into a job tree."""
    pytest.importorskip("sklearn")
    examples = ROOT / "examples" / "digits"

    def put(job: Any) -> None:
        for source in examples.glob("*.py"):
            shutil.copy(source, job.base / "code")
        channel = job.base / "input" / "data" / "training"
        subprocess.run([sys.executable, examples / "prepare.py", channel], check=True, capture_output=True)
        channel.chmod(0o755)

    return put
