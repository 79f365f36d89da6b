"""The examples, run as a user runs them: from a plain checkout, and in a job tree as a training container has it."""

from __future__ import annotations

import http.client
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
DIGITS = EXAMPLES / "digits" / "train.py"
LINEAR = EXAMPLES / "numpy_linear" / "train.py"
MILLION = EXAMPLES / "million_records" / "train.py"
LIMIT_S = 100.0

missing = [name for name in ("torch", "sklearn") if importlib.util.find_spec(name) is None]
needs_torch = pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")
needs_numpy = pytest.mark.skipif(importlib.util.find_spec("numpy") is None, reason="not installed: numpy")

FOREIGN = re.compile(
    r"^(SM_|SAGEMAKER_|LAUNCHER_|PET_|TORCHELASTIC_|OMPI_|PMI_|OMP_"
    r"|(RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|GROUP_RANK|MASTER_ADDR|MASTER_PORT|TRAINING_JOB_NAME)$)"
)


def environment(**extra: str) -> dict[str, str]:
    """The environment of a user's shell: nothing of another job, or of the launcher that may run these tests."""
    return {name: value for name, value in os.environ.items() if not FOREIGN.match(name)} | extra


def run(arguments: list[str | Path], cwd: Path, **extra: str) -> str:
    """Run Python with ``arguments`` and return what it printed; it must end with 0."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=environment(**extra),
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@contextmanager
def running(arguments: list[str | Path], cwd: Path) -> Iterator[subprocess.Popen[str]]:
    """Start Python with ``arguments``; past ``LIMIT_S`` it is killed, so no reader of its output waits for ever."""
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    watchdog = threading.Timer(LIMIT_S, process.kill)
    watchdog.start()
    try:
        yield process
    finally:
        watchdog.cancel()
        process.kill()
        process.communicate()


def read_until(process: subprocess.Popen[str], text: str) -> str:
    """Read lines of the process up to one that contains ``text``; return all of them."""
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if text in line:
            return seen
    pytest.fail(f"the output ended without {text!r}:\n{seen}")


def metrics_of(job: Path) -> dict[str, Any]:
    """What the example measured, and wrote beside its model."""
    metrics: dict[str, Any] = json.loads((job / "model" / "metrics.json").read_text())
    return metrics


def load_module(path: Path) -> Any:
    """A module of an example."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_ml_tree(root: Path, example: Path, hyperparameters: dict[str, str]) -> Path:
    """Lay out what the platform writes for a job with one host and the channel ``training``; code in ``code/``."""
    config = root / "input" / "config"
    config.mkdir(parents=True)
    (root / "input" / "data" / "training").mkdir(parents=True)
    for name in ("model", "output"):
        (root / name).mkdir()
    shutil.copytree(example.parent, root / "code", ignore=shutil.ignore_patterns("__pycache__", "data"))
    files = {
        "hyperparameters.json": {"sagemaker_program": json.dumps(example.name), **hyperparameters},
        "resourceconfig.json": {
            "current_host": "algo-1",
            "current_instance_type": "ml.c5.xlarge",
            "current_group_name": "homogeneousCluster",
            "hosts": ["algo-1"],
            "instance_groups": [
                {
                    "instance_group_name": "homogeneousCluster",
                    "instance_type": "ml.c5.xlarge",
                    "hosts": ["algo-1"],
                }
            ],
            "network_interface_name": "eth0",
        },
        "inputdataconfig.json": {
            "training": {
                "TrainingInputMode": "File",
                "S3DistributionType": "FullyReplicated",
                "RecordWrapperType": "None",
            }
        },
    }
    for name, content in files.items():
        (config / name).write_text(json.dumps(content))
    return root


TWO_RANKS = {"sagemaker_torch_distributed_enabled": "true", "sagemaker_mpi_num_of_processes_per_host": "2"}


@pytest.mark.slow
@pytest.mark.torch
@needs_torch
def test_digits_from_a_plain_checkout_to_answers(tmp_path: Path) -> None:
    """The main job, then a server for what it left, asked over HTTP: its answers are those of the network in Python."""
    pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install 'launcher[serve]'")
    import numpy as np
    import torch

    job = tmp_path / "job"
    output = run(["-m", "launcher", "--nproc-per-node", "2", "--job-dir", job, DIGITS], tmp_path)
    assert "no channel 'training' in this job" in output
    assert (job / "model" / "model.pt").stat().st_size > 10_000
    metrics = metrics_of(job)
    assert metrics["test_accuracy"] >= 0.95
    assert metrics["world_size"] == 2
    assert Path(metrics["data"]) == job / "input" / "data" / "training"
    losses = [entry["loss"] for entry in metrics["history"]]
    assert len(losses) == 12 and losses[-1] < losses[0] / 5
    assert not (job / "output" / "failure").exists()

    test = np.load(job / "input" / "data" / "training" / "test.npy")
    images = test["image"][:50]
    command = ["-m", "launcher", "serve", "--base-dir", job, "--port", "0", "--workers", "1"]
    with running(command, tmp_path) as process:
        port = int(re.search(r"at port (\d+)", read_until(process, "serving at port"))[1])
        read_until(process, "ready: ")
        link = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)

        def ask(body: bytes, content_type: str) -> Any:
            link.request("POST", "/invocations", body, {"Content-Type": content_type})
            answer = link.getresponse()
            return answer.status, json.loads(answer.read())

        status, answer = ask(json.dumps(images.tolist()).encode(), "application/json")
        npy = io.BytesIO()
        np.save(npy, images)
        csv = "\n".join(",".join(map(str, image.ravel())) for image in images).encode()
        assert (status, answer) == ask(npy.getvalue(), "application/x-npy") == ask(csv, "text/csv")
        refused, error = ask(b"[[1, 2, 3]]", "application/json")
        assert refused == 400 and "no images of 8 x 8 numbers" in error["message"]
        link.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=LIMIT_S) == 0

    network = load_module(DIGITS.with_name("network.py")).DigitNet()
    network.load_state_dict(torch.load(job / "model" / "model.pt", weights_only=True))
    with torch.inference_mode():
        probabilities = network(torch.as_tensor(images, dtype=torch.float32).unsqueeze(1) / 16).softmax(dim=1)
    assert status == 200
    assert answer["digit"] == probabilities.argmax(dim=1).tolist()
    assert answer["probability"] == pytest.approx(probabilities.max(dim=1).values.tolist(), rel=1e-4)
    assert (np.array(answer["digit"]) == test["label"][:50]).mean() > 0.8


@pytest.mark.slow
@pytest.mark.torch
@needs_torch
def test_digits_in_a_training_container(tmp_path: Path) -> None:
    base = make_ml_tree(tmp_path / "ml", DIGITS, {"epochs": "3", "batch-size": "32", "lr": "0.003", **TWO_RANKS})
    channel = base / "input" / "data" / "training"
    run([DIGITS.with_name("prepare.py"), channel], tmp_path)
    output = run(["-m", "launcher", "train", "--base-dir", base], tmp_path)
    assert "no channel 'training' in this job" not in output
    assert (base / "model" / "model.pt").exists()
    metrics = metrics_of(base)
    assert metrics["hyperparameters"] == {"epochs": 3, "lr": 0.003, "batch_size": 32, "seed": 0}
    assert metrics["test_accuracy"] >= 0.9
    assert metrics["world_size"] == 2
    assert Path(metrics["data"]) == channel
    assert not (base / "output" / "failure").exists()


@pytest.mark.slow
@pytest.mark.torch
@needs_torch
def test_digits_stops_with_a_checkpoint_and_goes_on(tmp_path: Path) -> None:
    job = tmp_path / "job"
    command: list[str | Path] = ["-m", "launcher", "--nproc-per-node", "2", "--job-dir", job, DIGITS]
    with running([*command, "--epochs", "1000000"], tmp_path) as process:
        read_until(process, "epoch 1/")
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read() if process.stdout else ""
        assert process.wait(timeout=LIMIT_S) == 0, rest
    stopped = re.search(r"stopped in epoch (\d+), sample \d+: ", rest)
    assert stopped, rest
    assert (job / "checkpoints" / "digits.pt").exists()
    assert not (job / "model" / "model.pt").exists()
    assert not (job / "output" / "failure").exists()

    epoch = int(stopped.group(1))
    output = run([*command, "--epochs", str(epoch)], tmp_path)
    assert f"resumed at epoch {epoch}, " in output
    assert [entry["epoch"] for entry in metrics_of(job)["history"]] == list(range(1, epoch + 1))


@needs_numpy
def test_numpy_linear_from_a_plain_checkout(tmp_path: Path) -> None:
    import numpy as np

    found = {}
    for ranks in (1, 2):
        job = tmp_path / f"job-{ranks}"
        output = run(["-m", "launcher", "--nproc-per-node", str(ranks), "--job-dir", job, LINEAR], tmp_path)
        assert all(f"rank {rank} of {ranks}: fitted" in output for rank in range(ranks)), output
        assert metrics_of(job)["r2"] > 0.45
        assert metrics_of(job)["world_size"] == ranks
        assert not (job / "output" / "failure").exists()
        with np.load(job / "model" / "model.npz") as model:
            found[ranks] = model["weights"]
    assert np.allclose(found[1], found[2])


@needs_numpy
def test_numpy_linear_in_a_training_container(tmp_path: Path) -> None:
    base = make_ml_tree(tmp_path / "ml", LINEAR, {"ridge": "1.5", **TWO_RANKS})
    channel = base / "input" / "data" / "training"
    shutil.copy(LINEAR.parent / "data" / "diabetes.csv", channel)
    run(["-m", "launcher", "train", "--base-dir", base], tmp_path)
    metrics = metrics_of(base)
    assert metrics["ridge"] == 1.5
    assert metrics["world_size"] == 2
    assert Path(metrics["data"]) == channel
    assert (base / "model" / "model.npz").exists()
    assert not (base / "output" / "failure").exists()


@needs_numpy
def test_numpy_linear_starts_in_under_a_second(tmp_path: Path) -> None:
    """The best of three starts counts, since other work on the machine only ever adds to it."""
    took = []
    for attempt in range(3):
        job = tmp_path / f"job-{attempt}"
        began = time.monotonic()
        with running(["-m", "launcher", "--nproc-per-node", "2", "--job-dir", job, LINEAR], tmp_path) as process:
            read_until(process, " of 2: fitted")
            took.append(time.monotonic() - began)
            read_until(process, "R2 on ")
            assert process.wait(timeout=LIMIT_S) == 0
    assert min(took) < 1.0, took


@pytest.mark.parametrize(
    "script",
    [pytest.param(DIGITS, marks=[pytest.mark.torch, needs_torch]), pytest.param(LINEAR, marks=needs_numpy)],
    ids=["digits", "numpy_linear"],
)
def test_an_example_runs_without_the_launcher(script: Path, tmp_path: Path) -> None:
    base = make_ml_tree(tmp_path / "ml", script, {})
    arguments = ["--epochs", "1"] if script is DIGITS else []
    run([script, *arguments], tmp_path, SM_MODEL_DIR=str(base / "model"))
    assert metrics_of(base)["world_size"] == 1


def _batches_of(folder: Path) -> list[tuple[int, int, list[int]]]:
    """(epoch, position after it, records) of the batches that ranks have written down; a line may be cut by a kill."""
    lines = [line for file in folder.iterdir() for line in file.read_text().splitlines() if line.endswith("]]")]
    return [tuple(json.loads(line)) for line in lines]


@pytest.mark.slow
@needs_torch
@pytest.mark.parametrize("elsewhere", [1, 4, "two hosts"])
def test_a_million_records_are_each_seen_once_although_the_job_is_killed(elsewhere: int | str, tmp_path: Path) -> None:
    """Some records only: killed at whatever step it is in, it goes on with another number of ranks and batch size."""
    import numpy as np

    job, records, before, after = tmp_path / "job", 40_000, tmp_path / "before", tmp_path / "after"
    data = tmp_path / "data"
    run([MILLION.with_name("prepare.py"), data, "--records", str(records)], tmp_path)
    before.mkdir()
    after.mkdir()
    common: list[str | Path] = [MILLION, "--epochs", "1", "--data", data]
    first = ["-n", "2", "--job-dir", job, *common, "--batch-size", "10", "--save-every", "50", "--log-records", before]
    with running(["-m", "launcher", *first], tmp_path) as process:
        deadline = time.monotonic() + LIMIT_S
        while not (job / "checkpoints" / "digits.npz").exists():
            assert process.poll() is None and time.monotonic() < deadline
        process.kill()
    checkpoint = next((job / "checkpoints").glob("digits.npz"))
    with np.load(checkpoint) as saved:
        position = json.loads(str(saved["loader"]))["position"]
    assert 0 < position < records
    words: list[str | Path] = ["-n", str(elsewhere), "--job-dir", job]
    if elsewhere == "two hosts":
        words = ["simulate", "--hosts", "2", "--dir", tmp_path / "hosts", "-n", "1"]
        for host in ("algo-1", "algo-2"):
            (tmp_path / "hosts" / host / "checkpoints").mkdir(parents=True)
            shutil.copy(checkpoint, tmp_path / "hosts" / host / "checkpoints")
    run(["-m", "launcher", *words, *common, "--batch-size", "20", "--log-records", after], tmp_path)
    seen = [number for _, at, batch in _batches_of(before) if at <= position for number in batch]
    seen += [number for _, _, batch in _batches_of(after) for number in batch]
    assert sorted(seen) == list(range(records))
