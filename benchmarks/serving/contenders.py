"""The servers that are compared: what each is started with, and which version it is."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ADAPTERS, MODELS = HERE / "adapters", HERE / "models"
OURS, REFERENCE, GUNICORN, LITSERVE, TORCHSERVE = (
    "launcher",
    "sagemaker-inference",
    "gunicorn",
    "LitServe",
    "TorchServe",
)
# Name on the command line and of the environment's folder -> the peer.
NAMES = {
    "launcher": OURS,
    "reference": REFERENCE,
    "gunicorn": GUNICORN,
    "litserve": LITSERVE,
    "torchserve": TORCHSERVE,
}
MMS_CONFIG = Path("/etc/sagemaker-mms.properties")  # the reference toolkit writes it, wherever it is told to serve from


class Absent(Exception):
    """A contender is not installed."""


@dataclass(frozen=True)
class Place:
    """What one start of a server may use.

    Args:
        tree: what would be /opt/ml: ``model/W.npy`` and ``model/code``.
        task: a name of ``models/*.py``.
        ports: free ones; the first is to serve.
        scratch: folder of this start; the working directory.
    """

    tree: Path
    task: str
    ports: Sequence[int]
    scratch: Path

    @property
    def port(self) -> int:
        """Where to serve."""
        return self.ports[0]

    @property
    def model(self) -> Path:
        """The model's folder."""
        return self.tree / "model"

    @property
    def loaded(self) -> Path:
        """The file that the slow model notes its end of loading in."""
        return self.scratch / "loaded"


Start = tuple[list[str], dict[str, str]]  # command line, environment


@dataclass(frozen=True)
class Contender:
    """A server in one setting."""

    label: str
    peer: str
    workers: int
    start: Callable[[Place], Start]
    one_worker: bool = False  # the setting that start, memory, readiness and recovery are taken of
    version: str = field(default="", compare=False)


def _run(*command: str) -> str:
    said = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return (said.stdout + said.stderr).strip()


def java() -> str:
    """Its version, or raises Absent."""
    program = shutil.which("java", path=os.environ.get("PATH"))
    if program is None:
        raise Absent("no java (Debian: openjdk-17-jre-headless)")
    return "Java " + _run(program, "-version").splitlines()[0].split('"')[1]


class Finder:
    """Finds the contenders that are installed in a directory of environments."""

    def __init__(self, directory: Path, scratch: Path) -> None:
        self._directory, self._scratch = directory, scratch

    def _python(self, name: str, *packages: str) -> tuple[str, str]:
        """An environment's Python, and the versions of these packages, the first decisive."""
        python = self._directory / name / "bin" / "python"
        if not python.exists():
            raise Absent(f"no environment {name!r} (install_peers.py)")
        code = "import importlib.metadata as m, sys\nfor p in sys.argv[1:]: print(p, m.version(p))"
        said = subprocess.run([str(python), "-c", code, *packages], capture_output=True, text=True, check=False)
        if said.returncode:
            raise Absent((said.stderr.strip() or "its Python failed").splitlines()[-1])
        return str(python), ", ".join(said.stdout.split("\n")[: len(packages)])

    @staticmethod
    def _environ(python: str, place: Place) -> dict[str, str]:
        """What the adapters go by; the environment's programs come first."""
        return {
            "PATH": f"{Path(python).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            "SERVING_TASK": place.task,
            "SERVING_MODEL_DIR": str(place.model),
            "SERVING_LOADED": str(place.loaded),
        }

    def _sagemaker(self, python: str, place: Place, workers: int) -> dict[str, str]:
        """What a SageMaker container is told."""
        code = place.model / "code"
        code.mkdir(parents=True, exist_ok=True)
        shutil.copy(MODELS / f"{place.task}.py", code / "inference.py")
        return {
            **self._environ(python, place),
            "SAGEMAKER_BASE_DIR": str(place.tree),
            "SAGEMAKER_PROGRAM": "inference.py",
            "SAGEMAKER_BIND_TO_PORT": str(place.port),
            "SAGEMAKER_MODEL_SERVER_WORKERS": str(workers),
        }

    def launcher(self) -> Iterator[Contender]:
        """This project's, with the same ``inference.py`` as the reference toolkit."""
        python, version = self._python("launcher", "launcher", "uvicorn", "httptools", "uvloop", "numpy")

        def start(place: Place, workers: int) -> Start:
            return [python, "-m", "launcher", "serve"], self._sagemaker(python, place, workers)

        yield from _settings(OURS, version, start)

    def reference(self) -> Iterator[Contender]:
        """The reference toolkit with its Java server."""
        python, version = self._python("reference", "sagemaker-inference", "multi-model-server", "numpy")
        version += f", {java()}"
        if os.geteuid() != 0:
            raise Absent(f"it writes {MMS_CONFIG}, which only root can")

        def start(place: Place, workers: int) -> Start:
            return [python, str(ADAPTERS / "reference.py")], self._sagemaker(python, place, workers)

        yield from _settings(REFERENCE, version, start)

    def gunicorn(self) -> Iterator[Contender]:
        """A container of one's own: gunicorn with Flask."""
        python, version = self._python("gunicorn", "gunicorn", "flask", "numpy")
        for label, workers, more in (
            ("sync, 1 worker", 1, ()),
            ("sync, 2 workers", 2, ()),
            ("gthread, 2 workers x 4", 2, ("--worker-class", "gthread", "--threads", "4")),
        ):

            def start(place: Place, workers: int = workers, more: tuple[str, ...] = more) -> Start:
                command = [python, "-m", "gunicorn", "--workers", str(workers), *more]
                command += ["--bind", f"127.0.0.1:{place.port}", "--chdir", str(ADAPTERS), "flask_app:app"]
                return command, self._environ(python, place)

            yield Contender(
                f"{GUNICORN} + Flask, {label}", GUNICORN, workers, start, label == "sync, 1 worker", version
            )

    def litserve(self) -> Iterator[Contender]:
        """LitServe, one API server."""
        python, version = self._python("litserve", "litserve", "fastapi", "uvicorn", "numpy")

        def start(place: Place, workers: int) -> Start:
            command = [python, str(ADAPTERS / "lit_server.py"), str(place.port), str(workers)]
            return command, self._environ(python, place)

        yield from _settings(LITSERVE, version, start)

    def torchserve(self) -> Iterator[Contender]:
        """TorchServe with a handler class; its archive is made once."""
        python, version = self._python("torchserve", "torchserve", "torch-model-archiver", "torch", "numpy")
        version += f", {java()}"
        programs, store = Path(python).parent, self._scratch / "store"
        store.mkdir()
        archive = [str(programs / "torch-model-archiver"), "--model-name", "model", "--version", "1"]
        archive += ["--handler", str(ADAPTERS / "torch_handler.py"), "--extra-files", str(ADAPTERS / "tasks.py")]
        said = subprocess.run([*archive, "--export-path", str(store)], capture_output=True, text=True, check=False)
        if said.returncode:
            raise Absent(f"torch-model-archiver: {(said.stderr.strip() or 'failed').splitlines()[-1]}")

        def start(place: Place, workers: int) -> Start:
            config = place.scratch / "config.properties"
            names = ("inference", "management", "metrics")
            lines = [f"{name}_address=http://127.0.0.1:{place.ports[i]}" for i, name in enumerate(names)]
            lines += [f"grpc_{name}_port={place.ports[i + 3]}" for i, name in enumerate(names[:2])]
            lines += [f"default_workers_per_model={workers}"]
            config.write_text("\n".join(lines) + "\n")
            command = [str(programs / "torchserve"), "--start", "--foreground", "--no-config-snapshots"]
            command += ["--ts-config", str(config), "--model-store", str(store), "--models", "model=model.mar"]
            return [*command, "--disable-token-auth"], self._environ(python, place)

        yield from _settings(TORCHSERVE, version, start)

    def find(self, wanted: Sequence[str], absent: dict[str, str]) -> list[Contender]:
        """Those of ``wanted`` (of NAMES) that are there; ``absent`` gets the reason for each other one."""
        found: list[Contender] = []
        for name in wanted:
            try:
                found += getattr(self, name)()
            except Absent as error:
                absent[NAMES[name]] = str(error)
        return found


def _settings(peer: str, version: str, start: Callable[[Place, int], Start]) -> Iterator[Contender]:
    """With one worker and with two."""
    for workers in (1, 2):
        label = f"{peer}, {workers} worker{'s' * (workers > 1)}"
        yield Contender(label, peer, workers, lambda place, n=workers: start(place, n), workers == 1, version)  # type: ignore[misc]
