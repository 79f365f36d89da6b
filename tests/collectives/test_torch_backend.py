"""backend="launcher" of torch.distributed: every call, training, and the ends of groups, on real ranks.

The rank programs are in torch_ranks; each runs once and tells the outcome of many checks.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="the back-end is torch's")
pytestmark = pytest.mark.torch

PROGRAMS = Path(__file__).parent / "torch_ranks"
Outcome = list[dict[str, str]]


def names(program: str) -> list[str]:
    return re.findall(r"@check\ndef (\w+)", (PROGRAMS / program).read_text())


def launch(directory: Path, ranks: int, program: str, extra: dict[str, str] | None = None) -> tuple[int, str]:
    """Exit code and output of a job of ``ranks`` ranks."""
    own = ("LAUNCHER_", "SM_", "SAGEMAKER_", "PET_", "TORCHELASTIC_")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    environ |= {"PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1", **(extra or {})}
    done = subprocess.run(
        [sys.executable, "-m", "launcher", "--job-dir", "job", "-n", str(ranks), str(PROGRAMS / program)],
        cwd=directory,
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=110,
        check=False,
    )
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Outcome]:
    """What each rank says of each check of a program, which is run once."""
    known: dict[tuple[str, int], Outcome] = {}

    def get(program: str, ranks: int, extra: dict[str, str] | None = None) -> Outcome:
        if (program, ranks) not in known:
            directory = tmp_path_factory.mktemp("torch")
            code, output = launch(directory, ranks, program, extra)
            files = [directory / f"outcome.{rank}" for rank in range(ranks)]
            assert all(file.exists() for file in files), f"exit code {code}\n{output}"
            known[program, ranks] = [json.loads(file.read_text()) for file in files]
            assert code == 0, output
        return known[program, ranks]

    return get


def check(outcomes: Outcome, name: str) -> None:
    for rank, outcome in enumerate(outcomes):
        assert name in outcome, f"rank {rank} did not come to it, after {next(reversed(outcome), 'nothing')}"
        assert outcome[name] == "", f"rank {rank}: {outcome[name]}"


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", names("operations.py"))
def test_operations(outcome: Callable[..., Outcome], ranks: int, name: str) -> None:
    check(outcome("operations.py", ranks), name)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", names("training.py"))
def test_training(outcome: Callable[..., Outcome], ranks: int, name: str) -> None:
    """The same weights as with Gloo; after 50 steps with two ranks."""
    extra = {"STEPS": "50" if ranks == 2 else "10"}
    if name == "compiled_ddp":
        if ranks != 2:
            pytest.skip("one number of ranks shows it, and compiling takes long")
        if shutil.which("g++") is None:
            pytest.skip("torch.compile needs g++")
    if shutil.which("g++") is not None:
        extra["COMPILE"] = "1"
    check(outcome("training.py", ranks, extra), name)


@pytest.mark.parametrize("name", names("life.py"))
def test_life(outcome: Callable[..., Outcome], name: str) -> None:
    check(outcome("life.py", 2), name)


def test_buckets_stay_private_on_request(tmp_path: Path) -> None:
    extra = {"LAUNCHER_ZERO_COPY": "0", "CHECKS": "ddp", "STEPS": "6"}
    code, output = launch(tmp_path, 2, "training.py", extra)
    assert code == 0, output
    for rank in range(2):
        assert json.loads((tmp_path / f"outcome.{rank}").read_text()) == {"ddp": ""}


def test_a_rank_that_is_killed(tmp_path: Path) -> None:
    code, output = launch(tmp_path, 2, "faults.py")
    assert code == 128 + 9, output
    seen: dict[str, dict[str, Any]] = json.loads((tmp_path / "seen").read_text())
    assert seen["late"]["reason"] == "timeout" and seen["late"]["torch"], seen
    for what in ("backward", "synchronous", "asynchronous"):
        assert "rank 1" in seen[what]["text"], (what, seen)
        assert seen[what]["seconds"] < 10, (what, seen)
    for what in ("synchronous", "asynchronous"):
        assert seen[what]["torch"] and seen[what]["rank"] == 1 and seen[what]["reason"] == "lost", (what, seen)


def test_ddp_script_needs_no_line_of_ours(job: Any) -> None:
    """From torch 2.5 on, torch finds the back-end by itself."""
    job.script("""
        import torch, torch.distributed as dist
        dist.init_process_group("launcher")
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 1))
        model(torch.full((1, 2), 1.0 + dist.get_rank())).sum().backward()
        print("GRADIENT", model.module.weight.grad.tolist(), dist.get_backend())
        dist.destroy_process_group()
    """)
    assert job.run("-n", "2", "--log-prefix", "", "train.py", deadline_s=60) == 0, job.output()
    assert job.stdout.count("GRADIENT [[1.5, 1.5]] launcher") == 2


@pytest.mark.parametrize("first", ["torch", "launcher"])
def test_init_registers_and_imports_no_torch(tmp_path: Path, first: str) -> None:
    program = f"""
import sys
if {first == "torch"}:
    import torch
import launcher
launcher.init()
assert ("torch" in sys.modules) == {first == "torch"}
import torch.distributed as dist
assert dist.is_backend_available("launcher")
assert not any(name.startswith("launcher.collectives.torch_b") for name in sys.modules)
dist.init_process_group("launcher", store=dist.HashStore(), rank=0, world_size=1)
import torch
tensor = torch.ones(3)
dist.all_reduce(tensor)
assert tensor.tolist() == [1, 1, 1]
dist.destroy_process_group()
"""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("LAUNCHER_", "SM_"))}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
