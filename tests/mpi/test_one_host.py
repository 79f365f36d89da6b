"""MPI jobs on one host, with real MPIs: ranks that talk, ranks that fail, mpirun that fails."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.mpi

TALK = """
    import json, os, sys
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    total = world.allreduce(world.rank + 1)
    report = dict(rank=world.rank, size=world.size, total=total, library=MPI.Get_library_version()[:20],
                  pid=os.getpid(), parent=os.getppid(), cwd=os.getcwd(), argv=sys.argv[1:],
                  environ={name: os.environ[name] for name in os.environ})
    with open(f"seen-{world.rank}", "w") as file:
        json.dump(report, file)
    print("sum", total)
"""
# All ranks are at work and say so; then each waits for ever.
AT_WORK = """
    import os, time
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    world.Barrier()
    open(f"at-work-{world.rank}", "w").write(str(os.getpid()))
    while True:
        time.sleep(60)
"""


def start(job: Any, mpirun: Path, *args: str | Path, **options: Any) -> Any:
    return job.start("--engine", "mpi", "--mpirun", mpirun, *args, **options)


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def named(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def guardian_of(job: Any) -> int:
    return next(pid for pid in children(job.process.pid) if named(pid) == "launcher-guard")


def helper_of(job: Any) -> int:
    """Process id of mpirun."""
    names = ("mpirun", "prterun", "mpiexec", "mpiexec.hydra")
    return next(pid for pid in children(guardian_of(job)) if named(pid) in names)


def wait_at_work(job: Any, ranks: int) -> list[int]:
    return [int(job.wait_for_file(f"at-work-{rank}").read_text()) for rank in range(ranks)]


def test_ranks_talk_and_are_children_of_the_guardian(job: Any, mpirun: Path) -> None:
    script = job.script(TALK)
    assert start(job, mpirun, "-n", "2", script, "--epochs", "3").wait() == 0, job.output()
    seen = [json.loads((job.directory / f"seen-{rank}").read_text()) for rank in (0, 1)]
    assert [one["total"] for one in seen] == [3, 3] and [one["size"] for one in seen] == [2, 2]
    assert seen[0]["parent"] == seen[1]["parent"]
    assert seen[0]["cwd"] == str(job.directory) and seen[0]["argv"] == ["--epochs", "3"]
    # Either world works: MPI's variables and torch's.
    for rank, one in enumerate(seen):
        environ = one["environ"]
        assert environ["RANK"] == environ["LOCAL_RANK"] == str(rank) and environ["WORLD_SIZE"] == "2"
        assert environ.get("OMPI_COMM_WORLD_RANK", environ.get("PMI_RANK")) == str(rank)
        assert environ["MASTER_PORT"].isdigit() and environ["SM_CURRENT_HOST"] == "algo-1"
        assert "LAUNCHER_AGENT_SOCKET" not in environ
        assert environ.get("TMPDIR") == os.environ.get("TMPDIR")
        assert job.rank_file(rank, "stdout.log").read_text() == "sum 3\n"
    assert "[algo-1 r1 l1] sum 3" in job.stdout


def test_the_mpi_library_is_that_of_mpirun(job: Any, mpirun: Path) -> None:
    script = job.script("from mpi4py import MPI; print(MPI.Get_library_version().splitlines()[0])")
    assert start(job, mpirun, "-n", "1", script).wait() == 0, job.output()
    wanted = {"openmpi-5": "Open MPI v5", "openmpi-4": "Open MPI v4", "mpich": "MPICH"}
    assert any(word in job.stdout for word in wanted.values())
    assert ("MPICH" in job.stdout) == ("mpiexec" in mpirun.name), job.stdout


def test_mpi_abort_from_rank_2(job: Any, mpirun: Path) -> None:
    script = job.script("""
        import time
        from mpi4py import MPI

        MPI.COMM_WORLD.Barrier()
        if MPI.COMM_WORLD.rank == 2:
            MPI.COMM_WORLD.Abort(7)
        time.sleep(60)
    """)
    assert start(job, mpirun, "-n", "3", script).wait() == 7, job.output()
    headline = job.failure.splitlines()[0]
    # Open MPI's rank ends by itself with 7, and mpirun may not live long enough to say why.
    assert headline.startswith("rank 2 on algo-1 ")
    assert "MPI_Abort" in headline or headline.endswith("exited with code 7")
    assert job.failure_json["detail"]["culprit"]["rank"] == 2


def test_a_rank_that_ends_before_mpi_init(job: Any, mpirun: Path) -> None:
    script = job.script("""
        import os, sys, time

        if os.environ["RANK"] == "1":
            sys.exit(7)
        time.sleep(60)
    """)
    assert start(job, mpirun, "-n", "2", script).wait() == 7, job.output()
    assert job.failure.startswith("rank 1 on algo-1 exited with code 7")


@pytest.mark.parametrize(
    ("end", "code", "told"),
    [
        ("raise ValueError('bad batch')", 1, "ValueError: bad batch"),
        ("sys.exit(3)", 3, "exited with code 3"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", 139, "SIGSEGV"),
    ],
)
def test_a_rank_that_fails_does_not_wait_in_finalize(job: Any, mpirun: Path, end: str, code: int, told: str) -> None:
    script = job.script(f"""
        import atexit, os, signal, sys
        from mpi4py import MPI

        atexit.register(lambda: open(f"handler-{{MPI.COMM_WORLD.rank}}", "w").close())
        MPI.COMM_WORLD.Barrier()
        if MPI.COMM_WORLD.rank == 1:
            {end}
        MPI.COMM_WORLD.Barrier()
    """)
    assert start(job, mpirun, "-n", "2", script).wait() == code, job.output()
    headline = job.failure.splitlines()[0]
    assert headline.startswith("rank 1 on algo-1 ") and told in headline
    assert (job.directory / "handler-1").exists() == (code != 139)
    if code == 1:
        assert "Traceback (most recent call last)" in job.failure


def test_mpirun_is_killed(job: Any, mpirun: Path) -> None:
    start(job, mpirun, "-n", "2", job.script(AT_WORK))
    wait_at_work(job, 2)
    pid = helper_of(job)
    os.kill(pid, signal.SIGKILL)
    assert job.wait() == 137, job.output()
    assert f"(pid {pid}) on algo-1 was killed by SIGKILL while ranks were at work" in job.failure


def test_the_daemon_of_hydra_is_killed(job: Any, mpirun: Path) -> None:
    if mpirun.name != "mpiexec":
        pytest.skip("mpirun of Open MPI is its own daemon")
    start(job, mpirun, "-n", "2", job.script(AT_WORK))
    wait_at_work(job, 2)
    (proxy,) = [pid for pid in children(helper_of(job)) if named(pid) == "hydra_pmi_proxy"]
    os.kill(proxy, signal.SIGKILL)
    assert job.wait() not in (0, None), job.output()
    assert "while" in job.failure and "at work" in job.failure


def test_a_stand_in_is_killed(job: Any, mpirun: Path) -> None:
    start(job, mpirun, "-n", "2", job.script(AT_WORK))
    wait_at_work(job, 2)
    agent = next(pid for pid, command in job.ranks().items() if command.rstrip().endswith("_agent --rank"))
    os.kill(agent, signal.SIGKILL)
    assert job.wait() not in (0, None), job.output()


def test_ranks_have_their_grace_whatever_mpirun_does(job: Any, mpirun: Path) -> None:
    script = job.script("""
        import os, signal, sys, time
        from mpi4py import MPI

        world = MPI.COMM_WORLD

        def save(number, frame):
            time.sleep(2.5)  # longer than any mpirun waits before it kills
            open(f"saved-{world.rank}", "w").close()
            os._exit(5)

        signal.signal(signal.SIGTERM, save)
        world.Barrier()
        if world.rank == 1:
            sys.exit(3)
        while True:
            time.sleep(0.05)
    """)
    assert start(job, mpirun, "-n", "2", script).wait() == 3, job.output()
    assert (job.directory / "saved-0").exists()
    assert job.failure.startswith("rank 1 on algo-1 exited with code 3")


def test_a_stop_of_the_platform(job: Any, mpirun: Path) -> None:
    script = job.script("""
        import os, signal, sys, time
        from mpi4py import MPI

        world = MPI.COMM_WORLD
        stop = []
        signal.signal(signal.SIGTERM, lambda number, frame: stop.append(number))
        world.Barrier()
        open(f"at-work-{world.rank}", "w").write(str(os.getpid()))
        while not stop:
            time.sleep(0.02)
        total = world.allreduce(1)  # still together
        open(f"saved-{world.rank}", "w").write(str(total))
    """)
    start(job, mpirun, "-n", "2", script)
    wait_at_work(job, 2)
    job.process.send_signal(signal.SIGTERM)
    assert job.wait() == 0, job.output()
    assert [(job.directory / f"saved-{rank}").read_text() for rank in (0, 1)] == ["2", "2"]


def test_mpirun_that_refuses_to_start(job: Any, mpirun: Path) -> None:
    script = job.script("print('never')")
    assert start(job, mpirun, "-n", "2", "--mpi-options", "--no-such-option", script).wait() not in (0, 70), (
        job.output()
    )
    assert "before it had started a rank" in job.failure and "no-such-option" in job.failure + job.stderr + job.stdout


@pytest.mark.slow
@pytest.mark.parametrize("mpirun", ["openmpi-5"], indirect=True)  # no matter of the MPI, and 10 s each
def test_mpirun_that_lingers_is_ended(job: Any, mpirun: Path) -> None:
    script = job.script("""
        import os, time
        open("at-work-0", "w").write("x")
        while not os.path.exists("go"):
            time.sleep(0.01)
    """)
    start(job, mpirun, "-n", "1", script)
    job.wait_for_file("at-work-0")
    os.kill(helper_of(job), signal.SIGSTOP)
    (job.directory / "go").touch()
    assert job.wait() == 0, job.output()
    assert "has not for 10 s: ending it" in job.stderr


def test_options_of_the_platform(job: Any, mpirun: Path) -> None:
    job.tree(
        hyperparameters={
            "sagemaker_program": "train.py",
            "sagemaker_mpi_enabled": True,
            "sagemaker_mpi_num_of_processes_per_host": 2,
            "sagemaker_mpi_custom_mpi_options": "--NCCL_DEBUG INFO -x COLOUR=green",
            "sagemaker_submit_directory": str(job.base / "code"),
        }
    )
    job.script(
        """
        import os
        from mpi4py import MPI
        print(MPI.COMM_WORLD.allreduce(1), os.environ["NCCL_DEBUG"], os.environ["COLOUR"])
    """,
        "opt-ml/code/train.py",
    )
    job.start("train", "--mpirun", mpirun)
    assert job.wait() == 0, job.output()
    assert job.stdout.count("2 INFO green") == 2


def test_a_program_that_is_no_python(job: Any, mpirun: Path) -> None:
    script = job.script("#!/bin/sh\necho I am ${OMPI_COMM_WORLD_RANK:-$PMI_RANK} $RANK\n", "work.sh")
    script.chmod(0o755)
    assert start(job, mpirun, "-n", "2", "--no-python", script).wait() == 0, job.output()
    assert "I am 0 0" in job.stdout and "I am 1 1" in job.stdout


def test_restarts(job: Any, mpirun: Path) -> None:
    script = job.script("""
        import os, sys
        from mpi4py import MPI
        world = MPI.COMM_WORLD
        world.Barrier()
        if os.environ["LAUNCHER_ATTEMPT"] == "0" and world.rank == 1:
            sys.exit(4)
        print("attempt", os.environ["LAUNCHER_ATTEMPT"], world.allreduce(1))
    """)
    assert start(job, mpirun, "-n", "2", "--max-restarts", "1", script).wait() == 0, job.output()
    assert job.stdout.count("attempt 1 2") == 2


def test_nothing_is_left_in_the_temporary_directory(job: Any, mpirun: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    assert start(job, mpirun, "-n", "2", job.script(TALK), env={"TMPDIR": str(scratch)}).wait() == 0, job.output()
    assert list(scratch.iterdir()) == []


def test_an_environment_of_many_megabytes(job: Any, mpirun: Path) -> None:
    """As far as execve allows; the agent's request carries it all."""
    extra = {f"LARGE_{index}": "x" * 100_000 for index in range(8)}
    assert start(job, mpirun, "-n", "2", job.script(TALK), env=extra).wait() == 0, job.output()
    assert len(json.loads((job.directory / "seen-1").read_text())["environ"]["LARGE_7"]) == 100_000


@pytest.mark.slow
def test_mpirun_that_starts_nothing(job: Any) -> None:
    fake = job.script(
        """
        #!/bin/sh
        if [ "$1" = --version ]; then echo "mpirun (Open MPI) 5.0.11"; else exec sleep 60; fi
    """.lstrip().replace("        ", ""),
        "mpirun",
    )
    fake.chmod(0o755)
    start(job, fake, "-n", "2", job.script(""))
    assert "MPI has not asked for rank 0, 1 of algo-1 after 10 s" in job.wait_for_line("not asked", "stderr")
    job.process.send_signal(signal.SIGTERM)
    assert job.wait() == 143, job.output()


def test_no_mpirun(job: Any, tmp_path: Path) -> None:
    script = job.script("")
    code = job.run("--engine", "mpi", "-n", "2", "--mpirun", tmp_path / "mpirun", script)
    assert code == 64 and "is not an executable file" in job.stderr


def test_another_program_is_no_mpirun(job: Any) -> None:
    code = job.run("--engine", "mpi", "-n", "2", "--mpirun", sys.executable, job.script(""))
    assert code == 64 and "known are Open MPI 4 and 5, and MPICH's hydra" in job.stderr
