"""Ranks that are lost, wait for nothing, or are restarted."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

pytestmark = [
    pytest.mark.torch,
    pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="not installed: torch"),
]


def test_a_rank_is_lost(job: Any) -> None:
    """The other is told which; the job ends as the lost rank did."""
    script = job.script(
        """
        import os, signal, torch, horovod.torch as hvd
        hvd.init()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher stops the others as soon as one has failed
        hvd.allreduce(torch.ones(1), name="first")
        if hvd.rank() == 1:
            os._exit(7)
        try:
            hvd.allreduce(torch.ones(1), name="second")
        except hvd.HorovodInternalError as error:
            print("told:", error, "|", type(error.__cause__).__name__, error.__cause__.rank, flush=True)
            raise
        """
    )
    assert job.run("--horovod-compat", "-n", "2", "--grace", "10", script) == 7, job.output()
    assert job.failure.startswith("rank 1 on "), job.failure
    told = [line for line in job.stdout.splitlines() if "told:" in line]
    assert len(told) == 1
    assert told[0].endswith("| CollectiveError 1")
    assert "all ranks: " in told[0]


def test_a_tensor_that_one_rank_does_not_ask_for(job: Any) -> None:
    """The line says which rank and which tensor: both when that rank does something else and when it does nothing."""
    script = job.script(
        """
        import pathlib, sys, time, torch, horovod.torch as hvd
        hvd.init()

        def wait_for(name):
            deadline = time.monotonic() + 20
            while not pathlib.Path(name).exists():
                assert time.monotonic() < deadline
                time.sleep(0.01)

        for name in ("nothing", "other"):
            if hvd.rank() == 0:
                hvd.allreduce(torch.ones(1), name=f"while {name}")
            else:
                handle = hvd.allreduce_async(torch.ones(1), name="of rank 1") if name == "other" else None
                wait_for(name)
                hvd.allreduce(torch.ones(1), name=f"while {name}")
            if name == "other":
                handle = hvd.allreduce_async(torch.ones(1), name="of rank 1") if hvd.rank() == 0 else handle
                hvd.synchronize(handle)
        """
    )
    job.start("--horovod-compat", "-n", "2", script, env={"HOROVOD_STALL_CHECK_TIME_SECONDS": "0.3"})
    for name in ("nothing", "other"):
        line = job.wait_for_line(f"'allreduce while {name}' has waited for", "stderr")
        assert "Asked for by rank 0, not by rank 1." in line
        (job.directory / name).touch()
    assert job.wait() == 0, job.output()


def test_elastic_state_survives_a_restart(job: Any) -> None:
    """A rank dies; all are started again, and go on from the last commit."""
    script = job.script(
        """
        import os, torch, horovod.torch as hvd
        hvd.init()
        model = torch.nn.Linear(1, 1, bias=False)
        model.weight.data.zero_()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.5)
        optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
        sampler = hvd.elastic.ElasticSampler(range(100), shuffle=False)

        @hvd.elastic.run
        def train(state):
            while state.step < 6:
                state.optimizer.zero_grad()
                model(torch.ones(1, 1)).sum().backward()
                state.optimizer.step()
                state.step += 1
                state.sampler.record_batch(state.step, 1)
                state.history.append((state.step, os.environ["LAUNCHER_ATTEMPT"]))
                if state.step % 2 == 0:
                    state.commit()
                if state.step == 5 and hvd.rank() == 1 and os.environ["LAUNCHER_ATTEMPT"] == "0":
                    os._exit(3)

        state = hvd.elastic.TorchState(model=model, optimizer=optimizer, sampler=sampler, step=0, history=[])
        train(state)
        # With momentum: after n steps the weight is -(sum of velocities).
        velocity = weight = 0.0
        for _ in range(6):
            velocity = 0.5 * velocity + 1.0
            weight -= velocity
        assert abs(model.weight.item() - weight) < 1e-6, (model.weight, weight)
        print("history", *("%d/%s" % item for item in state.history), state.sampler.processed_num, flush=True)
        """
    )
    options = ("--horovod-compat", "-n", "2", "--max-restarts", "1", "--grace", "2")
    assert job.run(*options, script, deadline_s=60) == 0, job.output()
    assert "restarted from commit 2" in job.stderr
    assert job.stdout.count("history 1/0 2/0 3/0 4/0 5/1 6/1 12\n") == 2, job.stdout


def test_without_a_launcher(job: Any) -> None:
    """A plain process is a world of one."""
    import sys

    script = job.script(
        """
        import torch, launcher.horovod.torch as hvd
        hvd.init()
        model = torch.nn.Linear(2, 1)
        optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters())
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        assert hvd.allreduce(torch.ones(2)).tolist() == [1, 1]
        assert hvd.allgather(torch.ones(2, 1)).shape == (2, 1)
        assert hvd.broadcast_object("x") == "x"
        assert hvd.join() == 0
        print(hvd.rank(), hvd.size(), hvd.local_rank(), hvd.cross_size())
        """
    )
    assert job.run(script, command=(sys.executable,), own_tree=False) == 0, job.output()
    assert job.stdout == "0 1 0 1\n"
