"""What the images are: sizes, labels, the entry point; what users make of them."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .engine import ROOT, Engine

pytestmark = [pytest.mark.containers, pytest.mark.slow, pytest.mark.timeout(900)]

MULTI_MODEL = "com.amazonaws.sagemaker.capabilities.multi-models"
BIND_TO_PORT = "com.amazonaws.sagemaker.capabilities.accept-bind-to-port"
EXAMPLES = ROOT / "examples" / "images"


@pytest.mark.parametrize("name", ["train", "serve", "combined"])
def test_layer_is_small(engine: Engine, image: Callable[[str], str], name: str) -> None:
    """That of sagemaker-training has 293 MB (benchmarks/images/results)."""
    assert engine.layer_bytes(image(name)) < 15_000_000


def test_entry_point_labels_and_health_check(engine: Engine, image: Callable[[str], str]) -> None:
    configs = {name: engine.inspect(image(name))["Config"] for name in ("train", "serve", "combined")}
    for config in configs.values():
        assert config["Entrypoint"] == ["python", "-m", "launcher"]
    assert configs["train"]["Cmd"] == ["train"]
    assert configs["serve"]["Cmd"] == ["serve"]
    for name in ("serve", "combined"):
        assert configs[name]["Labels"][MULTI_MODEL] == "true"
        assert configs[name]["Labels"][BIND_TO_PORT] == "true"
    check = configs["serve"].get("Healthcheck") or engine.inspect(image("serve"))["Healthcheck"]
    assert check["Test"] == ["CMD", "python", "-m", "launcher", "serve", "--check"]


def test_nothing_to_build_with_is_shipped(containers: Any, image: Callable[[str], str]) -> None:
    script = "command -v c++ cc gcc ld strip cmake ninja; ls -d /src /wheels /layer /tmp/*; true"
    code, container = containers.run(image("combined"), "-c", script, options=("--entrypoint", "sh"))
    assert code == 0
    assert [line for line in container.logs().splitlines() if "No such file" not in line] == []


def test_image_on_top_of_ours(
    engine: Engine, containers: Any, image: Callable[[str], str], digits: Callable[[Any], None]
) -> None:
    """examples/images/with_mpi: an MPI job on two hosts."""
    made = engine.build(
        EXAMPLES / "with_mpi" / "Dockerfile",
        "localhost/launcher-test-with-mpi",
        ROOT / "examples" / "digits_mpi",
        LAUNCHER_IMAGE=image("train"),
    )
    jobs, started = [], []
    names = tuple(name for name, _ in containers.hosts(2))
    for name, network in containers.hosts(2):
        job = containers.job(
            name, names, hyperparameters={"sagemaker_program": None, "epochs": 5}, channels={"training": {}}
        )
        digits(job)
        tree = [
            word for part in ("input", "model", "output") for word in ("--volume", f"{job.base / part}:/opt/ml/{part}")
        ]
        jobs.append(job)
        started.append(containers.start(made, "train", options=(*network, *tree)))
    assert [one.wait() for one in started] == [0, 0], "\n".join(one.logs() for one in started)
    assert [job.failure for job in jobs] == ["", ""]
    metrics = json.loads((jobs[0].base / "model" / "metrics.json").read_text())
    assert metrics["world_size"] == 2
    assert metrics["test_accuracy"] > 0.8


def test_image_of_ones_own(
    engine: Engine, containers: Any, base: str, image: Callable[[str], str], tmp_path: Path
) -> None:
    """examples/images/own_image: the commands `train` and `serve` without an ENTRYPOINT."""
    prepared = engine.build(
        EXAMPLES.parents[1] / "tests" / "containers" / "Dockerfile",
        "localhost/launcher-test-python",
        ROOT,
        BASE_IMAGE=base,
    )
    wheels = engine.build(
        ROOT / "docker" / "train.Dockerfile", "localhost/launcher-test-build", ROOT, target="build", BASE_IMAGE=base
    )
    context = tmp_path / "context"
    shutil.copytree(EXAMPLES / "own_image", context)
    made = engine("create", wheels, "true").strip()
    try:
        engine("cp", f"{made}:/wheels", tmp_path / "wheels")
    finally:
        engine("rm", made)
    for wheel in (tmp_path / "wheels").glob("launcher-*.whl"):
        shutil.copy(wheel, context)
    own = engine.build(context / "Dockerfile", "localhost/launcher-test-own", context, BASE_IMAGE=prepared)
    job = containers.job(hyperparameters={"sagemaker_program": None}, channels={"training": {}})
    (job.base / "input" / "data" / "training" / "pairs.csv").write_text("0,1\n1,3\n2,5\n")
    tree = ("--volume", f"{job.base / 'input'}:/opt/ml/input", "--volume", f"{job.base / 'model'}:/opt/ml/model")
    code, container = containers.run(own, "train", options=(*tree, "--env", "SAGEMAKER_PROGRAM=train.py"))
    assert code == 0, container.logs()
    assert "y = 2.000 x + 1.000 from 3 pairs" in container.logs()
    ((_, network),) = containers.hosts(1)
    served = containers.start(own, "serve", options=(*network, *tree))
    assert served.ask(b"[1, 10]") == [3.0, 21.0]
    assert served.stop(grace_s=30) == 0, served.logs()


def test_image_that_converses(engine: Engine, containers: Any, image: Callable[[str], str]) -> None:
    """examples/images/conversations: WebSocket, on top of the serving image."""
    client = pytest.importorskip("websockets.sync.client")
    folder = EXAMPLES / "conversations"
    made = engine.build(
        folder / "Dockerfile", "localhost/launcher-test-conversations", folder, LAUNCHER_IMAGE=image("serve")
    )
    ((_, network),) = containers.hosts(1)
    served = containers.start(made, "serve", options=network)
    served.wait_healthy()
    with client.connect(f"ws://{served.address()}:8080/invocations-bidirectional-stream") as link:
        link.send("to be or not")
        assert json.loads(link.recv(30)) == {"to": 1, "be": 1, "or": 1, "not": 1}
        link.send("to be")
        assert json.loads(link.recv(30)) == {"to": 2, "be": 2, "or": 1, "not": 1}
    assert served.stop(grace_s=30) == 0, served.logs()


def test_compose_runs_two_hosts(engine: Engine, image: Callable[[str], str], tmp_path: Path) -> None:
    """docker/compose.yaml, with Docker's compose or podman-compose."""
    with_docker = engine.name == "docker"
    if not with_docker and shutil.which("podman-compose") is None:
        pytest.skip("podman-compose is not installed: pip install podman-compose")
    shutil.copytree(ROOT / "docker", tmp_path / "docker")
    shutil.copytree(ROOT / "examples" / "numpy_linear", tmp_path / "examples" / "numpy_linear")
    left = {host: tmp_path / "launcher_runs" / "compose" / host for host in ("algo-1", "algo-2")}
    for path in left.values():
        for part in ("model", "output"):
            (path / part).mkdir(parents=True)
    compose = ["docker", "compose"] if with_docker else ["podman-compose", "--podman-build-args=--isolation chroot"]
    compose += ["-f", str(tmp_path / "docker" / "compose.yaml")]
    env = {**engine.env, "LAUNCHER_IMAGE": image("train")}
    try:
        done = subprocess.run(
            [*compose, "up", "--build"], env=env, capture_output=True, text=True, check=False, timeout=300
        )
        output = done.stdout + done.stderr
    finally:
        subprocess.run([*compose, "down"], env=env, capture_output=True, check=False, timeout=120)
    assert all((path / "output" / "success").exists() for path in left.values()), output
    metrics = json.loads((left["algo-1"] / "model" / "metrics.json").read_text())
    assert metrics["world_size"] == 2
    assert metrics["r2"] > 0.4
