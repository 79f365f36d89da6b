"""A container engine for the tests: the machine's Docker or Podman, else Podman out of Debian's packages (as root).

No pytest in here: benchmarks use this module as well.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
_SUITE = "bookworm"
_PREFIX = "localhost/launcher-test"
_CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
_BUILD_S = 900.0
_SHORT_S = 60.0


class Unavailable(Exception):
    """Why no container can run on this machine."""


class CommandFailed(Exception):
    """An engine's command, and all it printed."""


def _run(command: Sequence[str | Path], timeout_s: float, env: Mapping[str, str] | None = None) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, timeout=timeout_s, env=env, stdin=subprocess.DEVNULL
    )
    if done.returncode:
        raise CommandFailed(
            f"{' '.join(words)}: exit code {done.returncode}\n{done.stdout[-8000:]}{done.stderr[-8000:]}"
        )
    return done.stdout


class Engine:
    """Builds images and runs containers; ``env`` is what its command needs in the environment."""

    def __init__(self, name: str, env: Mapping[str, str], build_options: Sequence[str]) -> None:
        self.name, self.env, self._build_options = name, dict(env), list(build_options)

    def __call__(self, *words: str | Path, timeout_s: float = _SHORT_S) -> str:
        """Runs ``docker words...``; returns what it prints on stdout.

        Raises:
            CommandFailed: its exit code was not 0.
        """
        return _run([self.name, *words], timeout_s, self.env)

    def popen(self, *words: str | Path, **options: Any) -> subprocess.Popen[bytes]:
        """Starts ``docker words...``."""
        return subprocess.Popen([self.name, *map(str, words)], env=self.env, stdin=subprocess.DEVNULL, **options)

    def build(self, dockerfile: Path, tag: str, context: Path, target: str = "", **arguments: str) -> str:
        """Builds an image; returns its tag. ``arguments`` are the Dockerfile's own."""
        words: list[str | Path] = ["build", *self._build_options, "-f", dockerfile, "-t", tag]
        for name, value in arguments.items():
            words += ["--build-arg", f"{name}={value}"]
        if target:
            words += ["--target", target]
        self(*words, context, timeout_s=_BUILD_S)
        return tag

    def inspect(self, image: str) -> dict[str, Any]:
        """What the engine knows of an image."""
        found: list[dict[str, Any]] = json.loads(self("image", "inspect", image))
        return found[0]

    def layer_bytes(self, image: str) -> int:
        """The last layer of an image that is not empty, uncompressed."""
        if self.name == "docker":
            sizes = self("history", "--human=false", "--format", "{{.Size}}", image).split()
        else:
            sizes = [layer["size"] for layer in json.loads(self("history", "--format", "json", image))]
        return next(int(size) for size in sizes if int(size))

    def has(self, image: str) -> bool:
        try:
            self("image", "inspect", image)
        except CommandFailed:
            return False
        return True


def find_engine(install: bool = True) -> Engine:
    """The engine of this machine. Installs Podman, if allowed, when there is none and this is root on Debian.

    Raises:
        Unavailable: there is none, and none can be installed.
    """
    if shutil.which("docker") and _answers(["docker", "info"]):
        return Engine("docker", os.environ, [])
    if not shutil.which("podman"):
        if not install or os.geteuid() != 0 or not shutil.which("apt-get"):
            raise Unavailable(
                "no Docker or Podman answers here, and only root can install one (from Debian's packages)"
            )
        _install("podman", "runc")
    # chroot: a build needs no network and no cgroup of its own, which a machine that is a container may not give it.
    options = ["--isolation", "chroot", "--layers", "--format", "docker", "--quiet"]
    return Engine("podman", _podman_environment(), options)


def _answers(command: Sequence[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, check=False, timeout=_SHORT_S).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def _install(*packages: str) -> None:
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    try:
        _run(["apt-get", "-qq", "update"], _BUILD_S, env)
        patient = ["apt-get", "-qq", "-y", "-o", "DPkg::Lock::Timeout=300"]
        _run([*patient, "install", "--no-install-recommends", *packages], _BUILD_S, env)
    except (CommandFailed, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{', '.join(packages)} cannot be installed: {error}") from error


def _podman_environment() -> dict[str, str]:
    """As root Podman raises limits, which a machine that is itself confined refuses: it is told smaller ones."""
    if os.geteuid() != 0 or "CONTAINERS_CONF" in os.environ:
        return dict(os.environ)
    lines = ["[containers]", 'default_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]']
    if shutil.which("runc"):
        lines += ["[engine]", 'runtime = "runc"']
    with tempfile.NamedTemporaryFile("w", prefix="containers-", suffix=".conf", delete=False) as file:
        file.write("\n".join(lines) + "\n")
    return {**os.environ, "CONTAINERS_CONF": file.name}


def base_image(engine: Engine) -> str:
    """An image with the Python version of this interpreter if a registry is reached, else a bare Debian, made here."""
    official = f"docker.io/library/python:{PYTHON}-slim-{_SUITE}"
    if engine.has(official):
        return official
    try:
        engine("pull", official, timeout_s=_BUILD_S)
    except (CommandFailed, subprocess.TimeoutExpired):
        return _bare_debian(engine)
    return official


def _bare_debian(engine: Engine) -> str:
    tag = f"{_PREFIX}-debian:{_SUITE}"
    if engine.has(tag):
        return tag
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise Unavailable("no registry is reached, and only root can make a base image (with debootstrap)")
    if not shutil.which("debootstrap"):
        _install("debootstrap")
    with tempfile.TemporaryDirectory(prefix="debian-") as directory:
        system = Path(directory, "root")
        try:
            _run(["debootstrap", "--variant=minbase", "--include=ca-certificates", _SUITE, system], _BUILD_S)
        except CommandFailed as error:
            raise Unavailable(f"no registry is reached, and debootstrap failed: {error}") from error
        # A mirror may have a certificate that only this machine knows.
        shutil.copy(_CERTIFICATES, system / _CERTIFICATES.relative_to("/"))
        for lists in ((system / "var/cache/apt/archives").glob("*.deb"), (system / "var/lib/apt/lists").glob("*_*")):
            for path in lists:
                path.unlink()
        archive = Path(directory, "root.tar")
        _run(["tar", "-C", system, "-cf", archive, "."], _BUILD_S)
        engine("import", archive, tag, timeout_s=_BUILD_S)
    return tag


def build(engine: Engine, name: str, base: str) -> str:
    """The image of ``docker/NAME.Dockerfile`` on ``base``."""
    return engine.build(ROOT / "docker" / f"{name}.Dockerfile", f"{_PREFIX}-{name}", ROOT, BASE_IMAGE=base)
