"""Jobs with the real Horovod: what its API says of the ranks, what its collectives compute, and how jobs end."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.engines.horovod import Build, installed

from ..hosts.netns import Network, lacking

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(240),
    pytest.mark.skipif(
        importlib.util.find_spec("horovod") is None,
        reason="not installed: horovod (to be built; 0.28.1 wants C++17 in its CMakeLists.txt for torch 2)",
    ),
]

SCRIPT = """
import json, os, sys
import torch, horovod.torch as hvd

hvd.init()
seen = {
    "place": [hvd.rank(), hvd.size(), hvd.local_rank(), hvd.local_size(), hvd.cross_rank(), hvd.cross_size()],
    "sum": hvd.allreduce(torch.full((3,), hvd.rank() + 1.0), op=hvd.Sum).tolist(),
    "gathered": hvd.allgather(torch.full((hvd.rank() + 1,), hvd.rank())).tolist(),
}
torch.manual_seed(hvd.rank())
model = torch.nn.Linear(2, 1)
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
seen["before"] = model.weight.flatten().tolist()
optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
model(torch.full((1, 2), hvd.rank() + 1.0)).sum().backward()
optimizer.step()
seen["after"] = model.weight.flatten().tolist()
if hvd.gloo_enabled():  # MPI cannot be initialized twice
    hvd.shutdown()
    hvd.init()  # the same ranks meet a second time
seen["again"] = hvd.allreduce(torch.ones(1), op=hvd.Sum).item()
hvd.shutdown()
with open(os.path.join(sys.argv[1], "rank%d" % seen["place"][0]), "w") as file:
    json.dump(seen, file)
"""


@pytest.fixture(scope="session")
def build() -> Build:
    return installed(sys.executable, os.environ)


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return path


def check(directory: Path, places: list[list[int]]) -> None:
    """Every rank saw its place, and the collectives gave what arithmetic says."""
    size = len(places)
    for rank, place in enumerate(places):
        seen = json.loads((directory / f"rank{rank}").read_text())
        assert seen["place"] == place
        assert seen["sum"] == [size * (size + 1) / 2] * 3
        assert seen["gathered"] == [other for other in range(size) for _ in range(other + 1)]
        first = json.loads((directory / "rank0").read_text())
        assert seen["before"] == first["before"]
        # The gradient of rank r is r + 1 for each weight; the mean of all times 0.5 is taken off.
        step = 0.5 * (size + 1) / 2
        assert seen["after"] == pytest.approx([weight - step for weight in seen["before"]], abs=1e-6)
        assert seen["again"] == size


# rank, size, local rank, local size, cross rank, cross size
ONE_HOST = [[0, 2, 0, 2, 0, 1], [1, 2, 1, 2, 0, 1]]
TWO_HOSTS = [[0, 4, 0, 2, 0, 2], [1, 4, 1, 2, 0, 2], [2, 4, 0, 2, 1, 2], [3, 4, 1, 2, 1, 2]]
UNEQUAL_HOSTS = [[0, 3, 0, 2, 0, 2], [1, 3, 1, 2, 0, 1], [2, 3, 0, 1, 1, 2]]


@pytest.fixture(params=["gloo", "mpi"])
def controller(request: pytest.FixtureRequest, build: Build) -> str:
    if request.param not in build.controllers:
        pytest.skip(f"not installed: horovod with {request.param} (it was built with {', '.join(build.controllers)})")
    return str(request.param)


def test_one_host(job: Any, script: Path, tmp_path: Path, controller: str) -> None:
    arguments = ("--engine", "horovod", "--horovod-controller", controller, "-n", "2", script, tmp_path)
    assert job.run(*arguments, deadline_s=100) == 0, job.output()
    check(tmp_path, ONE_HOST)


def test_simulated_hosts(tmp_path: Path, script: Path, job: Any, build: Build) -> None:
    if "gloo" not in build.controllers:
        pytest.skip("not installed: horovod with gloo (MPI does not run on simulated hosts)")
    arguments = ("simulate", "--hosts", "2", "--dir", tmp_path / "hosts", "-n", "2", "--engine", "horovod")
    done = subprocess.run(
        [sys.executable, "-m", "launcher", *arguments, "--horovod-controller", "gloo", script, tmp_path],
        env=job.environ(),
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    check(tmp_path, TWO_HOSTS)


@pytest.mark.root
def test_two_hosts_with_unequal_slots(as_root: None, tmp_path: Path, script: Path, job: Any, controller: str) -> None:
    if lacking():
        pytest.skip(lacking())
    command = [sys.executable, "-m", "launcher", "--engine", "horovod", "--horovod-controller", controller]
    command += ["--hosts", "algo-1:2,algo-2:1", str(script), str(tmp_path)]
    with Network(tmp_path / "hosts", 2) as network, contextlib.ExitStack() as stack:
        running = []
        for machine in network.machines:
            output = stack.enter_context((machine.directory / "output").open("wb"))
            words = [*machine.wrapper(str(machine.directory)), *command]
            running.append(
                subprocess.Popen(words, env=job.environ(), stdin=subprocess.DEVNULL, stdout=output, stderr=output)
            )
        try:
            codes = [process.wait(120) for process in running]
        finally:
            for process in running:
                process.kill()
                process.wait()
        said = "\n".join((machine.directory / "output").read_text() for machine in network.machines)
    assert codes == [0, 0], said
    check(tmp_path, UNEQUAL_HOSTS)


def test_rank_that_fails(job: Any, controller: str) -> None:
    """The others are in a collective that never ends; the job ends with the failed rank's code."""
    script = job.script(
        """
        import sys, torch, horovod.torch as hvd
        hvd.init()
        hvd.allreduce(torch.ones(1), name="first")
        if hvd.rank() == 1:
            sys.stdout.flush()
            import os
            os._exit(5)
        hvd.allreduce(torch.ones(1), name="second")
        """
    )
    arguments = ("--engine", "horovod", "--horovod-controller", controller, "--grace", "2", "-n", "2", script)
    assert job.run(*arguments, deadline_s=100) == 5, job.output()
    assert job.failure.startswith("rank 1 on "), job.failure


def test_restart_meets_in_an_empty_store(job: Any, tmp_path: Path, build: Build) -> None:
    if "gloo" not in build.controllers:
        pytest.skip(f"not installed: horovod with gloo (it was built with {', '.join(build.controllers)})")
    script = job.script(
        """
        import os, sys, torch, horovod.torch as hvd
        hvd.init()
        total = hvd.allreduce(torch.ones(1), op=hvd.Sum).item()
        attempt = os.environ["LAUNCHER_ATTEMPT"]
        with open(os.path.join(sys.argv[1], "attempt%s-rank%d" % (attempt, hvd.rank())), "w") as file:
            file.write("%d %s" % (total, os.environ["HOROVOD_GLOO_RENDEZVOUS_PORT"]))
        if attempt == "0":
            os._exit(9)
        hvd.shutdown()
        """
    )
    arguments = ("--engine", "horovod", "--horovod-controller", "gloo", "--max-restarts", "1", "-n", "2")
    assert job.run(*arguments, script, tmp_path, deadline_s=100) == 0, job.output()
    ports = set()
    for attempt in (0, 1):
        for path in tmp_path.glob(f"attempt{attempt}-rank*"):
            total, port = path.read_text().split()
            assert total == "2"
            ports.add((attempt, port))
    assert len({port for _, port in ports}) == 2


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--virtual-local-rank"], "--virtual-local-rank gives every rank the local rank 0, but Horovod needs"),
        (["--python", "/bin/false"], "cannot ask /bin/false where it looks for modules"),
    ],
)
def test_options_that_do_not_fit(job: Any, script: Path, options: list[str], reason: str) -> None:
    assert job.run("--engine", "horovod", *options, script) == 64, job.output()
    assert reason in job.stderr


def test_controller_that_is_not_built(job: Any, script: Path, build: Build) -> None:
    other = next((name for name in ("gloo", "mpi") if name not in build.controllers), "")
    if not other:
        pytest.skip("this horovod was built with both controllers")
    assert job.run("--engine", "horovod", "--horovod-controller", other, script) == 64
    assert f"--horovod-controller is '{other}', but " in job.stderr


def test_elastic_mode_of_horovod_is_left_out(job: Any, controller: str) -> None:
    """hvd.elastic.run works, as a function that is run once: the group is restarted as a whole."""
    script = job.script(
        """
        import torch, horovod.torch as hvd
        hvd.init()
        @hvd.elastic.run
        def train(state):
            for state.step in range(state.step, 3):
                state.total = hvd.allreduce(torch.ones(1), op=hvd.Sum).item()
                state.commit()
            return state.total
        print("total", train(hvd.elastic.TorchState(model=torch.nn.Linear(1, 1), step=0, total=0)), flush=True)
        """
    )
    arguments = ("--engine", "horovod", "--horovod-controller", controller, "-n", "2", script)
    assert job.run(*arguments, env={"HOROVOD_ELASTIC": "1"}, deadline_s=100) == 0, job.output()
    assert job.stdout.count("total 2.0") == 2
