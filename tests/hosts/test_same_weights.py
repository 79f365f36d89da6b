"""The digits examples end with the same weights whether six ranks run on one host, on two or on three."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.root, pytest.mark.slow]

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
RANKS = 6
LIMIT_S = 100.0

missing = [name for name in ("torch", "sklearn") if importlib.util.find_spec(name) is None]
needs_torch = pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")
np = pytest.importorskip("numpy", reason="not installed: numpy")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The channel `training`, as every host of a real job gets it."""
    pytest.importorskip("sklearn", reason="not installed: scikit-learn")
    sys.path.insert(0, str(EXAMPLES / "digits"))
    try:
        from prepare import write_digits
    finally:
        sys.path.pop(0)
    directory = tmp_path_factory.mktemp("digits")
    write_digits(directory)
    return directory


@pytest.fixture
def train(make_hosts: Any, images: Path) -> Callable[..., Any]:
    """Runs an example with all ranks on so many hosts; returns the first host."""

    def run(count: int, script: Path, *args: str | Path) -> Any:
        hosts = make_hosts(count)
        for host in hosts:
            host.tree(channels={"training": {"TrainingInputMode": "File"}})
            host.resources()
            for file in images.iterdir():
                (host.base / "input" / "data" / "training" / file.name).write_bytes(file.read_bytes())
        codes = hosts.run_all("-n", str(RANKS // count), *args[:-1], script, *str(args[-1]).split(), deadline_s=LIMIT_S)
        assert codes == [0] * count, hosts.output()
        metrics = json.loads((hosts[0].base / "model" / "metrics.json").read_text())
        assert metrics["world_size"] == RANKS
        assert metrics["test_accuracy"] > 0.8
        return hosts[0]

    return run


@needs_torch
@pytest.mark.torch
@pytest.mark.timeout(4 * LIMIT_S)
def test_torch_over_gloo(train: Callable[..., Any]) -> None:
    import torch

    def weights(count: int) -> dict[str, Any]:
        script = EXAMPLES / "digits" / "train.py"
        host = train(count, script, "--preload", "torch", "--epochs 3 --batch-size 48")
        return dict(torch.load(host.base / "model" / "model.pt", weights_only=True))

    alone = weights(1)
    for count in (2, 3):
        for name, value in weights(count).items():
            torch.testing.assert_close(value, alone[name], rtol=1e-5, atol=1e-6, msg=f"{name} on {count} hosts")


@pytest.mark.mpi
@pytest.mark.timeout(4 * LIMIT_S)
def test_mpi(train: Callable[..., Any], mpirun: Path) -> None:
    def weights(count: int) -> Any:
        host = train(count, EXAMPLES / "digits_mpi" / "train.py", "--engine", "mpi", "--mpirun", mpirun, "--epochs 5")
        with np.load(host.base / "model" / "model.npz") as model:
            return model["weights"]

    alone = weights(1)
    for count in (2, 3):
        np.testing.assert_allclose(weights(count), alone, rtol=1e-9, atol=1e-12, err_msg=f"{count} hosts")
