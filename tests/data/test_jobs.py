"""Loaders in whole jobs: hosts with files of their own, a rank that is killed, a file that is cut under one rank."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

numpy = pytest.importorskip("numpy")

ROWS = 4  # of an object

SHARDED = """
    import json, os
    from pathlib import Path

    rank, host = os.environ["RANK"], os.environ["GROUP_RANK"]
    tree, shown = Path(os.environ["TREES"]) / host / "input", Path(os.environ["SHOWN"])
    os.environ["SM_INPUT_CONFIG_DIR"], os.environ["SM_INPUT_DATA_DIR"] = str(tree / "config"), str(tree / "data")
    from launcher.data import Loader
    from launcher.errors import UsageError

    def rows(batches):
        return [[int(row) for row in batch["values"][:, 0][batch.get("mask", slice(None))]] for batch in batches]

    found = {}
    state = shown.parent / "state"
    if not state.exists():
        for tail in ("drop", "pad"):
            with Loader("train", 4, tail=tail, timeout_s=60) as loader:
                found[tail] = rows(loader)
        with Loader("train", 4, timeout_s=60) as loader:
            batches = iter(loader)
            found["begun"] = rows([next(batches), next(batches)])
            found["state"] = loader.state_dict()
    else:
        saved = json.loads(state.read_text())
        with Loader("train", 4, timeout_s=60) as loader:
            try:
                loader.load_state_dict(saved)
            except UsageError as error:
                found["refused"] = str(error)
        with Loader("train", 4, timeout_s=60, on_reshard="epoch_restart") as loader:
            loader.load_state_dict(saved)
            found["epoch"], found["again"] = loader.epoch, rows(loader)
    (shown / rank).write_text(json.dumps(found))
"""


def share_out(trees: Path, objects: Sequence[int]) -> None:
    """A tree for each host, with so many objects of ``ROWS`` rows each; each row has its number."""
    number = 0
    for host, count in enumerate(objects):
        config, folder = trees / str(host) / "input/config", trees / str(host) / "input/data/train"
        config.mkdir(parents=True)
        folder.mkdir(parents=True)
        channel = {"TrainingInputMode": "File", "S3DistributionType": "ShardedByS3Key", "ContentType": "text/csv"}
        (config / "inputdataconfig.json").write_text(json.dumps({"train": channel}))
        for _ in range(count):
            (folder / f"part-{number:03}").write_text("".join(f"{row},0\n" for row in range(number, number + ROWS)))
            number += ROWS


@pytest.mark.torch
@pytest.mark.slow
def test_f16_hosts_with_objects_of_their_own(make_job: Any, tmp_path: Path) -> None:
    """F16: 10, 11 and 3 objects: all ranks make the same steps; other hosts begin the epoch anew, if that is wanted."""
    pytest.importorskip("torch", reason="torch serves the store between hosts")

    def simulate(objects: Sequence[int]) -> list[dict[str, Any]]:
        hosts = str(len(objects))
        job, shown, trees = make_job(hosts), tmp_path / f"shown-{hosts}", tmp_path / f"trees-{hosts}"
        shown.mkdir()
        share_out(trees, objects)
        words = ("simulate", "--hosts", hosts, "--dir", job.directory / "hosts", "-n", "1", job.script(SHARDED))
        assert job.run(*words, own_tree=False, env={"SHOWN": str(shown), "TREES": str(trees)}) == 0, job.output()
        return [json.loads((shown / str(rank)).read_text()) for rank in range(len(objects))]

    three = simulate((10, 11, 3))
    firsts = [0, 10 * ROWS, 21 * ROWS, 24 * ROWS]
    for rank, found in enumerate(three):
        own = range(firsts[rank], firsts[rank + 1])
        dropped, padded = (sorted(row for batch in found[tail] for row in batch) for tail in ("drop", "pad"))
        assert len(found["drop"]) == 3 and len(found["pad"]) == 11  # 12 rows and 44 rows in steps of 4
        assert len(set(dropped)) == len(dropped) == 12 and set(dropped) <= set(own)
        assert padded == list(own)
        assert found["state"] == three[0]["state"] and found["begun"] == found["drop"][:2]
    (tmp_path / "state").write_text(json.dumps(three[0]["state"]))
    for rank, found in enumerate(simulate((12, 12))):
        assert "the state was saved on 3 hosts" in found["refused"] and "on_reshard='epoch_restart'" in found["refused"]
        assert found["epoch"] == 0 and len(found["again"]) == 12
        assert sorted(row for batch in found["again"] for row in batch) == list(range(48 * rank, 48 * (rank + 1)))


READS = """
    import os
    from launcher.data import Loader

    loader = Loader("train", 16)
    for epoch in range(int(os.environ["EPOCHS"])):
        for step, batch in enumerate(loader):
            if step == 3:
                path = f"pid-{loader.rank}"
                with open(path + ".part", "w") as file:
                    file.write(str(os.getpid()))
                os.rename(path + ".part", path)
    print(f"rank {loader.rank} is done with {epoch + 1} epochs")
"""


def test_f17_a_rank_that_is_killed_leaves_nothing(job: Any, tmp_path: Path) -> None:
    """F17: the next start needs no cleaning up, and /dev/shm is as it was. As root it is one of the test's own."""
    job.tree(channels={"train": {"TrainingInputMode": "File"}})
    data = job.base / "input/data/train/a.npy"
    numpy.save(data, numpy.arange(64 * 1024, dtype=numpy.float32).reshape(1024, 64))
    shm, wrapper = Path("/dev/shm"), ()
    if os.geteuid() == 0:
        shm = tmp_path / "shm"
        shm.mkdir()
        wrapper = ("unshare", "-m", "sh", "-c", f'mount --bind {shm} /dev/shm && exec "$@"', "sh")
    before = sorted(os.listdir(shm))
    script = job.script(READS)
    job.start("-n", "2", script, env={"EPOCHS": "1000000"}, wrapper=wrapper)
    pids = [int(job.wait_for_file(f"pid-{rank}").read_text()) for rank in range(2)]
    os.kill(pids[1], signal.SIGKILL)
    assert job.wait() != 0
    assert "SIGKILL" in job.failure, job.output()
    assert sorted(os.listdir(shm)) == before
    assert job.run("-n", "2", script, env={"EPOCHS": "2"}, wrapper=wrapper) == 0, job.output()
    assert job.output().count("is done with 2 epochs") == 2
    assert sorted(os.listdir(shm)) == before


CUT = """
    import os, signal, sys, time
    from launcher.data import Loader

    def told(number, frame):
        print("rank 0 is told to stop", flush=True)
        sys.exit(1)

    loader = Loader("train", 16, shuffle="none")
    if loader.rank == 0:
        signal.signal(signal.SIGTERM, told)
    for step, batch in enumerate(loader):
        if step == 3 and loader.rank == 1:
            while not os.path.exists("rank-0-is-through"):
                time.sleep(0.005)
            os.truncate(os.environ["CUT_FILE"], int(os.environ["CUT_TO"]))
    open("rank-0-is-through", "w").close()
    while True:
        signal.pause()  # as in a collective, for a rank that does not come
"""


def test_f20_a_file_cut_under_one_rank_ends_the_job(job: Any) -> None:
    """F20: rank 1 has it mapped and is in the middle; the failure file has its error, and rank 0 is stopped."""
    job.tree(channels={"train": {"TrainingInputMode": "File"}})
    path = job.base / "input/data/train/a.npy"
    numpy.save(path, numpy.ones((4096, 1024), numpy.float32))  # a page each
    keep = path.stat().st_size - 8 * 4096
    env = {"CUT_FILE": str(path), "CUT_TO": str(keep)}
    assert job.run("-n", "2", job.script(CUT), env=env) == 1, job.output()
    assert job.failure.startswith("rank 1 on algo-1 failed: launcher.errors.DataError: "), job.failure
    assert f"{path}: byte {keep}: " in job.failure and f"{path}: byte {keep}: " in json.dumps(job.failure_json)
    assert "rank 0: stopped by the launcher" in job.failure
    assert "rank 0 is told to stop" in job.output()
