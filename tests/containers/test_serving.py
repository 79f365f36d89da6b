"""`docker run IMAGE serve`, and an image that trains and serves."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = [pytest.mark.containers, pytest.mark.slow, pytest.mark.timeout(900)]

INFERENCE = """
def model_fn(model_dir):
    return 2


def predict_fn(data, model):
    return [model * value for value in data]
"""


def with_model(containers: Any) -> Any:
    job = containers.job()
    code = job.base / "model" / "code"
    code.mkdir()
    (code / "inference.py").write_text(INFERENCE)
    return job


def test_a_serving_container_is_healthy_answers_and_drains(containers: Any, image: Callable[[str], str]) -> None:
    ((_, network),) = containers.hosts(1)
    served = containers.start(image("serve"), "serve", job=with_model(containers), options=network)
    served.wait_healthy()
    assert served.ask(b"[1, 2]") == [2, 4]
    # The image has no NumPy, and this model needs none; what does is refused, and says why.
    status, answer = served.request("POST", "/invocations", b"1,2\n", "text/csv")
    assert (status, json.loads(answer)["type"]) == (415, "UnsupportedMediaType")
    assert b"text/csv needs NumPy" in answer
    assert served.stop(grace_s=30) == 0, served.logs()


def test_any_user_a_read_only_root_and_little_memory(containers: Any, image: Callable[[str], str]) -> None:
    ((_, network),) = containers.hosts(1)
    options = (*network, "--user", "12345:12345", "--cap-drop", "all", "--security-opt", "no-new-privileges")
    options += ("--read-only", *containers.no_other_tmpfs(), "--memory", "256m")
    served = containers.start(image("serve"), "serve", job=with_model(containers), options=options)
    assert served.ask(b"[3]") == [6]
    assert served.stop(grace_s=30) == 0, served.logs()


def test_a_model_that_cannot_be_loaded_ends_the_container(containers: Any, image: Callable[[str], str]) -> None:
    job = with_model(containers)
    (job.base / "model" / "code" / "inference.py").write_text("def model_fn(model_dir):\n    raise OSError('torn')\n")
    code, container = containers.run(image("serve"), "serve", job=job)
    assert code == 1, container.logs()
    assert "OSError: torn" in container.logs()


def test_one_image_trains_and_serves(
    containers: Any, image: Callable[[str], str], site: Any, digits: Callable[[Any], None]
) -> None:
    """Digits with two ranks on one host, over Gloo; then the model that this left, from the same image."""
    import numpy as np

    ((name, network),) = containers.hosts(1)
    job = containers.job(name, hyperparameters={"epochs": 3}, channels={"training": {}})
    digits(job)
    options = (*network, *site("torch", "numpy"))
    code, trained = containers.run(
        image("combined"), "train", job=job, options=(*options, "--env", "LAUNCHER_NPROC_PER_NODE=2")
    )
    assert code == 0, trained.logs()
    assert (job.base / "output" / "success").exists()
    metrics = json.loads((job.base / "model" / "metrics.json").read_text())
    assert metrics["world_size"] == 2
    trained.remove()
    served = containers.start(image("combined"), "serve", job=job, options=options)
    records = np.load(job.base / "input" / "data" / "training" / "test.npy")[:20]
    answer = served.ask(json.dumps(records["image"].tolist()).encode())
    right = sum(int(a == b) for a, b in zip(answer["digit"], records["label"].tolist(), strict=True))
    assert right >= 15, answer
    assert served.stop(grace_s=30) == 0, served.logs()
