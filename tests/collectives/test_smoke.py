"""Every operation once, in plain processes and under the launcher."""

from __future__ import annotations

from typing import Any

EVERYTHING = """
with Communicator() as comm:
    assert (comm.rank, comm.size) == (RANK, SIZE)
    me = np.arange(6, dtype=np.float32) + 10 * RANK
    total = sum(np.arange(6, dtype=np.float32) + 10 * rank for rank in range(SIZE))
    seen = {}
    seen["allreduce"] = np.array_equal(comm.allreduce(me.copy()), total)
    a, b = comm.allreduce_coalesced([me.copy(), me[:3].astype(np.int64)])
    seen["coalesced"] = np.array_equal(a, total) and np.array_equal(b, total[:3].astype(np.int64))
    rows = np.tile(me, (SIZE, 1))
    seen["reduce_scatter"] = np.array_equal(comm.reduce_scatter(rows), total[None])
    seen["all_gather"] = np.array_equal(comm.all_gather(me[None])[:, 0], [10.0 * rank for rank in range(SIZE)])
    seen["broadcast"] = np.array_equal(comm.broadcast(me.copy(), root=SIZE - 1), np.arange(6) + 10 * (SIZE - 1))
    reduced = comm.reduce(me.copy(), root=SIZE - 1)
    seen["reduce"] = np.array_equal(reduced, total) if RANK == SIZE - 1 else reduced is None
    sent = np.array([[100 * RANK + other] for other in range(SIZE)])
    seen["all_to_all"] = comm.all_to_all(sent)[:, 0].tolist() == [100 * rank + RANK for rank in range(SIZE)]
    comm.barrier()
    shared = comm.empty(6)
    shared[:] = me
    seen["shared"] = np.array_equal(comm.allreduce(shared), total)
    works = [comm.allreduce_async(me + step) for step in range(4)]
    seen["async"] = all(np.array_equal(work.wait(), total + SIZE * step) for step, work in enumerate(works))
"""


def test_every_operation_once(ranks: Any) -> None:
    shown = ranks.run(2, EVERYTHING + "show(seen)")
    assert all(one and all(one.values()) for one in shown), shown
    assert ranks.left() == []
    assert "LocalGroup" not in "".join(outcome.output for outcome in ranks.outcomes())  # no leak reports


def test_under_the_launcher(job: Any) -> None:
    job.script(
        "import os\nimport numpy as np\nfrom launcher import Communicator\n"
        'RANK, SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])\n'
        + EVERYTHING
        + "print('SEEN', all(seen.values()), flush=True)\n"
    )
    assert job.run("-n", "2", "train.py") == 0, job.output()
    assert job.stdout.count("SEEN True") == 2, job.output()


def test_after_a_restart(job: Any) -> None:
    job.script("""
        import os
        import numpy as np
        from launcher import CollectiveError, Communicator

        with Communicator() as comm:
            first = os.environ["LAUNCHER_ATTEMPT"] == "0"
            comm.barrier()
            if first and comm.rank == 1:
                os._exit(3)
            total = comm.allreduce(np.full(100_000, 1.0 + comm.rank))
            print("TOTAL", total[-1], flush=True)
    """)
    assert job.run("-n", "3", "--max-restarts", "1", "train.py") == 0, job.output()
    assert job.stdout.count("TOTAL 6.0") == 3, job.output()


def test_without_a_launcher_it_is_a_world_of_one(job: Any) -> None:
    job.script(
        "import launcher\ncomm = launcher.Communicator()\nprint(comm.rank, comm.size)\n"
        "import numpy as np\nprint(comm.allreduce(np.array([1.5, 2.0]), 'average'))\n"
    )
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "train.py"],
        cwd=job.directory,
        env=job.environ(),
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "0 1\n[1.5 2. ]\n", "")
