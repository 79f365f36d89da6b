"""`docker run IMAGE train` under the platform's rules, on one host and on two."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = [pytest.mark.containers, pytest.mark.slow, pytest.mark.timeout(900)]

NOBODY = ("--user", "12345:12345", "--cap-drop", "all", "--security-opt", "no-new-privileges")


def ranks(count: int) -> tuple[str, str]:
    return ("--env", f"LAUNCHER_NPROC_PER_NODE={count}")


def test_digits_on_two_hosts(containers: Any, image: Any, site: Any, digits: Callable[[Any], None]) -> None:
    jobs, started = [], []
    names = tuple(name for name, _ in containers.hosts(2))
    for name, network in containers.hosts(2):
        jobs.append(containers.job(name, names, hyperparameters={"epochs": 2}, channels={"training": {}}))
        digits(jobs[-1])
        options = (*network, *site("torch", "numpy"))
        started.append(containers.start(image("train"), "train", job=jobs[-1], options=options))
    assert [one.wait() for one in started] == [0, 0], "\n".join(one.logs() for one in started)
    assert [job.failure for job in jobs] == ["", ""]
    metrics = json.loads((jobs[0].base / "model" / "metrics.json").read_text())
    assert metrics["world_size"] == 2
    assert metrics["test_accuracy"] > 0.8
    assert not (jobs[1].base / "model" / "metrics.json").exists()  # rank 0's


def test_a_rank_that_the_memory_limit_kills(containers: Any, image: Any) -> None:
    """The limit is the container's; the failure file names the rank, the peak and the limit."""
    job = containers.job(
        script="""
        import os, time
        if os.environ["RANK"] == "1":
            held = []
            while True:
                held.append(bytearray(b"x" * (8 << 20)))
        time.sleep(600)
        """
    )
    options = ("--memory", "256m", "--memory-swap", "256m", *ranks(2))
    code, container = containers.run(image("train"), "train", job=job, options=options)
    assert code == 137, container.logs()
    assert job.failure.startswith("rank 1 on algo-1 "), job.failure
    assert re.search(r"OOM-killed: peak RSS [\d.]+ MiB of limit 256\.0 MiB", job.failure), job.failure


def test_a_stop_leaves_a_checkpoint_and_143(containers: Any, image: Any) -> None:
    job = containers.job(
        script="""
        import pathlib, sys, time, launcher
        ctx = launcher.init()
        step = 0
        while not ctx.stop_requested:
            step += 1
            pathlib.Path(ctx.checkpoint_dir, "started").touch()
            time.sleep(0.01)
        pathlib.Path(ctx.checkpoint_dir, "step").write_text(str(step))
        sys.exit(143)
        """
    )
    container = containers.start(image("train"), "train", job=job)
    containers.wait_until((job.base / "checkpoints" / "started").exists, "the first step")
    assert container.stop(grace_s=60) == 143, container.logs()
    assert int((job.base / "checkpoints" / "step").read_text()) > 0
    assert job.failure.startswith("stopped by SIGTERM"), job.failure


def test_a_rank_that_ignores_the_stop_is_ended_within_the_platforms_grace(containers: Any, image: Any) -> None:
    job = containers.job(
        script="""
        import pathlib, signal, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        pathlib.Path("/opt/ml/checkpoints/started").touch()
        while True:
            time.sleep(60)
        """
    )
    container = containers.start(image("train"), "train", job=job, options=("--env", "LAUNCHER_GRACE=2"))
    containers.wait_until((job.base / "checkpoints" / "started").exists, "the script")
    assert container.stop(grace_s=60) == 143, container.logs()


def test_any_user_and_a_read_only_root(containers: Any, image: Any) -> None:
    """No capability, no new privileges, a user without a name, and nowhere to write but /opt/ml and /dev/shm."""
    job = containers.job(
        hyperparameters={"lr": 0.5},
        script="""
        import os, pathlib, sys, launcher
        ctx = launcher.init()
        try:
            pathlib.Path("/var/written").touch()
        except OSError as error:
            refused = error.strerror
        pathlib.Path(ctx.model_dir, f"rank{ctx.rank}").write_text(f"{os.getuid()} {refused} {sys.argv[1:]}")
        """,
    )
    options = (*NOBODY, "--read-only", *containers.no_other_tmpfs(), *ranks(2))
    code, container = containers.run(image("train"), "train", job=job, options=options)
    assert code == 0, container.logs()
    for rank in (0, 1):
        text = (job.base / "model" / f"rank{rank}").read_text()
        assert text == "12345 Read-only file system ['--lr', '0.5']"
    assert "/tmp can not be written to: logs are in /opt/ml/launcher-12345" in container.logs()


def test_failure_of_any_user(containers: Any, image: Any) -> None:
    job = containers.job(script="raise ValueError('no such thing')")
    code, container = containers.run(image("train"), "train", job=job, options=NOBODY)
    assert code == 1, container.logs()
    assert job.failure.startswith("rank 0 on algo-1 failed: ValueError: no such thing"), job.failure


def test_collectives_and_loader_with_64_mb_of_shared_memory(containers: Any, image: Any, site: Any) -> None:
    """Four ranks reduce more than /dev/shm holds, while loaders run ahead; nothing is left in it."""
    job = containers.job(
        script="""
        import os, pathlib
        import numpy as np
        import launcher
        from launcher import Communicator
        from launcher.data import Loader

        ctx = launcher.init()
        size = os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize
        assert size == 64 << 20, size
        records = pathlib.Path(f"/opt/ml/checkpoints/records-{ctx.rank}.npy")
        np.save(records, np.arange(4 << 20, dtype=np.int64).reshape(-1, 1024))
        seen = 0
        with Communicator() as communicator:
            values = np.empty(32 << 20, np.float32)  # 128 MB
            for batch in Loader(records, 512, rank=0, world_size=1):
                values[:] = ctx.rank + 1
                communicator.allreduce(values)
                assert (values == 10).all()
                seen += 1
            communicator.barrier()
            if ctx.rank == 0:
                names = [name for name in os.listdir("/dev/shm") if os.stat(f"/dev/shm/{name}").st_size > 1 << 20]
                assert not names, names
        print("steps", seen, flush=True)
        """
    )
    options = (*site("numpy"), *ranks(4))
    code, container = containers.run(image("train"), "train", job=job, options=options, deadline_s=120)
    assert code == 0, container.logs()
    assert container.logs().count("steps 8") == 4


def test_process_1_reaps_a_thousand_orphans(containers: Any, image: Any) -> None:
    job = containers.job(
        script="""
        import os, pathlib, time

        def states():
            for entry in pathlib.Path("/proc").glob("[0-9]*/stat"):
                try:
                    yield entry.read_text().rpartition(")")[2].split()[0]
                except OSError:
                    pass

        before = len(list(states()))
        for _ in range(1000):
            child = os.fork()
            if child == 0:
                if os.fork() == 0:
                    time.sleep(0.05)  # its parent has ended by then
                os._exit(0)
            os.waitpid(child, 0)
        end = time.monotonic() + 20
        while len(list(states())) > before and time.monotonic() < end:
            time.sleep(0.01)
        print("more", len(list(states())) - before, "zombies", list(states()).count("Z"), flush=True)
        """
    )
    code, container = containers.run(image("train"), "train", job=job)
    assert code == 0, container.logs()
    assert "more 0 zombies 0" in container.logs(), container.logs()


def test_what_is_wrong_is_said_and_ends_with_the_codes_of_a_plain_run(containers: Any, image: Any) -> None:
    job = containers.job(hyperparameters={"sagemaker_program": None})
    code, container = containers.run(image("train"), "train", job=job)
    assert code == 65, container.logs()
    assert "sagemaker_program" in job.failure
    code, container = containers.run(image("train"), "--version")
    assert (code, container.logs().startswith("launcher ")) == (0, True)
