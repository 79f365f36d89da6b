"""Collectives over two hosts: shared memory inside, sockets or MPI across; the weights of one host, and who died."""

from __future__ import annotations

import importlib.util
import os
import signal
from pathlib import Path
from typing import Any

import pytest

np = pytest.importorskip("numpy", reason="not installed: numpy")

pytestmark = [pytest.mark.root]
RANKS = 4
needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="not installed: torch")

# A softmax classifier of images of 8 x 8 into 10 classes, 48 steps of 48 images each; the batch is shared out by rank.
TRAIN = """
    import sys
    import numpy as np
    from launcher import Communicator
    from together import *

    random = np.random.default_rng(7)
    images, labels = random.standard_normal((480, 64)), random.integers(0, 10, 480)
    weights = np.zeros((64, 10))
    with Communicator() as comm:
        mine = slice(comm.rank, None, comm.size)
        comm.broadcast(weights, root=comm.size - 1)
        for step in range(48):
            at = np.arange(step * 48, (step + 1) * 48) % 480
            x, y = images[at][mine], labels[at][mine]
            scores = x @ weights
            shares = np.exp(scores - scores.max(1, keepdims=True))
            shares /= shares.sum(1, keepdims=True)
            shares[np.arange(len(y)), y] -= 1.0
            gradient = x.T @ shares / len(y)
            weights -= 0.5 * comm.allreduce(gradient, "average")
        large = np.full(300_001, comm.rank + 1.0, np.float32)
        assert np.all(comm.allreduce(large) == comm.size * (comm.size + 1) / 2)
        every = comm.all_gather(weights[None])
        assert np.all(every == weights), "the ranks have other bits"
        if comm.rank == 0:
            np.save(shared / f"weights-{len(os.environ['SM_HOSTS'].split(','))}.npy", weights)
        between = comm.statistics().get("between")
        print("leg", between["leg"] if between else "none", flush=True)
"""
LOOP = """
    import numpy as np
    from launcher import Communicator
    from together import *

    comm = Communicator()
    data = np.ones(200_000, np.float32)
    comm.allreduce(data)
    tell(f"up{attempt}-{rank}", str(os.getpid()))
    while True:
        comm.allreduce(data)
"""


def weights_of(make_hosts: Any, count: int, leg: str, *args: Any, **env: str) -> Any:
    """What the classifier learns with all ranks on so many hosts."""
    hosts = make_hosts(count)
    hosts.script(TRAIN)
    codes = hosts.run_all("-n", str(RANKS // count), *args, "train.py", env={"OMP_NUM_THREADS": "1", **env})
    assert codes == [0] * count, hosts.output()
    assert sum(host.stdout.count(f"leg {leg}") for host in hosts) == RANKS, hosts.output()
    said = hosts.output().count("between the hosts")
    assert said == (count > 1), hosts.output()
    return np.load(hosts.shared / f"weights-{count}.npy")


@needs_torch
@pytest.mark.torch
def test_the_same_weights_over_sockets(make_hosts: Any) -> None:
    alone = weights_of(make_hosts, 1, "none")
    np.testing.assert_allclose(weights_of(make_hosts, 2, "sockets"), alone, rtol=1e-9, atol=1e-12)


@pytest.mark.mpi
def test_the_same_weights_over_mpi(make_hosts: Any, mpirun: Path) -> None:
    arguments = ("--engine", "mpi", "--mpirun", mpirun)
    alone = weights_of(make_hosts, 1, "none", *arguments)
    over_mpi = weights_of(make_hosts, 2, "mpi", *arguments, LAUNCHER_COLLECTIVE_LEG="mpi")
    np.testing.assert_allclose(over_mpi, alone, rtol=1e-9, atol=1e-12)


def _a_rank_is_killed(hosts: Any, *args: Any, **env: str) -> None:
    hosts.script(LOOP)
    hosts.start_all("-n", "2", *args, "train.py", env=env)
    pids = hosts.wait_for_ranks(0, 1, 2, 3)
    os.kill(pids[3], signal.SIGKILL)
    hosts.assert_all_say(137, "rank 3 on algo-2 was killed by SIGKILL")


@needs_torch
@pytest.mark.torch
def test_a_killed_rank_of_the_other_host_over_sockets(make_hosts: Any) -> None:
    _a_rank_is_killed(make_hosts(2))


@pytest.mark.mpi
def test_a_killed_rank_of_the_other_host_over_mpi(make_hosts: Any, mpirun: Path) -> None:
    _a_rank_is_killed(make_hosts(2), "--engine", "mpi", "--mpirun", mpirun, LAUNCHER_COLLECTIVE_LEG="mpi")
