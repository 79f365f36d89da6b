"""A job of several hosts on this one: real launchers, each with a loopback address and a job tree of its own."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.job import preview
from launcher.options import parse
from launcher.simulate import plan

SHOW = """
import json, os, sys
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "SM_HOSTS",
         "SM_CURRENT_HOST", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "SM_OUTPUT_DIR")
seen = {name: os.environ[name] for name in names}
seen.update(cpus=sorted(os.sched_getaffinity(0)), argv=sys.argv)
if "SM_CHANNEL_DATA" in os.environ:
    seen["data"] = os.listdir(os.environ["SM_CHANNEL_DATA"])
os.write(1, ("SEEN " + json.dumps(seen) + "\\n").encode())
"""

# Ranks that say they are up, and wait for what comes.
WAIT = """
import os, signal, sys
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: (os.write(1, b"STOP\\n"), sys.exit(9)))
os.write(1, f"UP {os.environ['RANK']}\\n".encode())
while True:
    signal.pause()
"""


def simulate(job: Any, *args: str | Path, **options: Any) -> Any:
    return job.start("simulate", *args, own_tree=False, **options)


def seen(job: Any) -> list[dict[str, Any]]:
    lines = [line.partition("SEEN ")[2] for line in job.stdout.splitlines() if "SEEN " in line]
    return sorted((json.loads(line) for line in lines), key=lambda one: int(one["RANK"]))


def test_hosts_form_one_job(job: Any) -> None:
    job.script(SHOW)
    (job.directory / "data").mkdir()
    (job.directory / "data" / "x.csv").touch()
    arguments = ("--hosts", "3", "--dir", "sim", "-n", "2", "--channel", "data=data", "train.py", "--hosts", "9")
    assert simulate(job, *arguments).wait() == 0, job.output()
    ranks = seen(job)
    assert [int(one["RANK"]) for one in ranks] == list(range(6))
    assert [one["SM_CURRENT_HOST"] for one in ranks] == ["algo-1"] * 2 + ["algo-2"] * 2 + ["algo-3"] * 2
    assert [one["LOCAL_RANK"] for one in ranks] == ["0", "1"] * 3
    for one in ranks:
        assert (one["WORLD_SIZE"], one["LOCAL_WORLD_SIZE"], one["GROUP_WORLD_SIZE"]) == ("6", "2", "3")
        assert json.loads(one["SM_HOSTS"]) == ["algo-1", "algo-2", "algo-3"]
        assert one["argv"] == ["train.py", "--hosts", "9"]
        assert one["data"] == ["x.csv"]
        host = job.directory / "sim" / one["SM_CURRENT_HOST"]
        assert one["SM_OUTPUT_DIR"] == str(host / "output")
        assert (host / "output" / "success").exists()
    for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        assert len({one[name] for one in ranks}) == 1, name
    assert f"simulating 3 hosts, algo-1 to algo-3, with job trees under {job.directory / 'sim'}" in job.stderr


def test_all_lines_are_whole_and_say_whose_they_are(job: Any) -> None:
    job.script("import os\nfor number in range(300): print('line', number, 'x' * 200)")
    assert simulate(job, "--hosts", "2", "train.py").wait() == 0, job.output()
    expected = [f"line {number} {'x' * 200}" for number in range(300)]
    for prefix in ("[algo-1 r0 l0] ", "[algo-2 r1 l0] "):
        assert [line.removeprefix(prefix) for line in job.stdout.splitlines() if line.startswith(prefix)] == expected
    assert len(job.stdout.splitlines()) == 600


def test_exit_code_is_the_jobs_and_all_hosts_name_the_same_culprit(job: Any) -> None:
    job.script(
        """
        import os, sys, time
        if os.environ["RANK"] == "1":
            raise SystemExit(7)
        time.sleep(600)
        """
    )
    assert simulate(job, "--hosts", "3", "--dir", "sim", "train.py").wait() == 7, job.output()
    assert "different codes" not in job.stderr
    failures = [(job.directory / "sim" / f"algo-{n}" / "output" / "failure").read_text() for n in (1, 2, 3)]
    assert len(set(failures)) == 1
    assert "rank 1 on algo-2 exited with code 7" in failures[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_reaches_every_host(job: Any, number: signal.Signals) -> None:
    job.script(WAIT)
    simulate(job, "--hosts", "2", "train.py")
    for rank in (0, 1):
        job.wait_for_line(f"UP {rank}")
    job.process.send_signal(number)
    assert job.wait() == 128 + number, job.output()
    assert job.stdout.count("STOP\n") == 2


def test_a_second_stop_does_not_wait(job: Any, wait_until: Callable[..., Any]) -> None:
    job.script(
        """
        import os, signal
        signal.signal(signal.SIGTERM, lambda number, frame: os.write(1, b"TERM\\n"))
        os.write(1, f"UP {os.environ['RANK']}\\n".encode())
        while True:
            signal.pause()
        """
    )
    simulate(job, "--hosts", "2", "train.py")
    for rank in (0, 1):
        job.wait_for_line(f"UP {rank}")
    job.process.send_signal(signal.SIGTERM)
    wait_until(lambda: job.stdout.count("TERM\n") == 2, "both ranks to be told")
    job.process.send_signal(signal.SIGTERM)
    assert job.wait() in (128 + signal.SIGTERM, 128 + signal.SIGKILL), job.output()


def test_nothing_outlives_it(job: Any, wait_until: Callable[..., Any]) -> None:
    """Killed with SIGKILL itself, its launchers end with it, and their ranks."""
    job.script(WAIT)
    simulate(job, "--hosts", "2", "--grace", "1", "train.py")
    for rank in (0, 1):
        job.wait_for_line(f"UP {rank}")
    job.process.kill()
    job.wait()
    wait_until(lambda: not job.ranks(), f"all launchers ended, but {job.ranks()}")


def test_a_launcher_that_is_killed(job: Any) -> None:
    """The others lose a host; what each ended with is said."""
    job.script(WAIT)
    simulate(job, "--hosts", "3", "--grace", "1", "train.py")
    for rank in range(3):
        job.wait_for_line(f"UP {rank}")
    launchers = [pid for pid, command in job.ranks().items() if "launcher run " in command and "algo-2 " in command]
    assert len(launchers) == 1, job.ranks()
    os.kill(launchers[0], signal.SIGKILL)
    assert job.wait() == 128 + signal.SIGKILL, job.output()
    line = job.wait_for_line("ended with different codes", "stderr")
    assert "algo-2 with 137" in line
    assert "algo-1 with 69" in line and "algo-3 with 69" in line


def test_what_surrounds_it_has_no_say(job: Any) -> None:
    """Hosts, ranks and secrets of a surrounding job, a container's tree, or a YAML file: the hosts are simulated."""
    job.script(SHOW)
    job.tree(resources={"current_host": "b", "hosts": ["a", "b"]})
    (job.directory / "other").mkdir()
    (job.directory / "data").mkdir()
    (job.directory / "launcher.yaml").write_text("hosts: x,y\nmin_hosts: 1\nchannel: {data: data}\n")
    env = {
        "LAUNCHER_HOST": "y",
        "LAUNCHER_HOSTFILE": "nowhere",
        "LAUNCHER_CHANNEL": "data=other",
        "LAUNCHER_SECRET": "of another job",
        "PET_NNODES": "7",
        "PET_NODE_RANK": "5",
        "PET_STANDALONE": "1",
        "SAGEMAKER_BASE_DIR": str(job.base),
        "SLURM_JOB_NODELIST": "n[1-4]",
        "JOB_COMPLETION_INDEX": "3",
    }
    assert simulate(job, "--hosts=2", "train.py", env=env).wait() == 0, job.output()
    assert [json.loads(one["SM_HOSTS"]) for one in seen(job)] == [["algo-1", "algo-2"]] * 2
    assert [one["data"] for one in seen(job)] == [[], []]
    trees = sorted(path.name for path in (job.directory / "launcher_runs").glob("*/*"))
    assert trees == ["algo-1", "algo-2"]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["train.py"], "simulate: --hosts is missing; expected a number of hosts"),
        (["--hosts", "0", "train.py"], "--hosts is 0"),
        (["--hosts", "a,b", "train.py"], "--hosts is a,b"),
        (["--hosts", "9999", "train.py"], "--hosts is 9999"),
        (["--hosts", "2"], "no script given"),
        (["--hosts", "2", "none.py"], "no such script: none.py"),
        (["--hosts", "2", "--base-dir", "x", "train.py"], "leave out --base-dir; --dir says where"),
        (["--hosts", "2", "--job-dir", "x", "train.py"], "leave out --job-dir; --dir says where"),
        (["--hosts", "2", "--host", "x", "train.py"], "leave out --host; --hosts N is enough"),
        (["--hosts", "2", "--nnodes", "2", "train.py"], "leave out --nnodes"),
        (["--hosts", "2", "--grace", "soon", "train.py"], "option --grace: grace is 'soon'"),
        (["--hosts", "2", "--dir"], "option --dir needs a value"),
        (["--hosts", "2", "--json", "train.py"], "--json belongs to `plan`"),
        (["--hosts", "2", "--channel", "data=none", "train.py"], "channel 'data': there is no file or directory none"),
    ],
)
def test_mistakes_are_said_once_and_leave_nothing(job: Any, arguments: list[str], problem: str) -> None:
    job.script("raise SystemExit('must not run')")
    assert simulate(job, *arguments).wait() == 64, job.output()
    assert job.stderr.count("error: ") == 1
    assert problem in job.stderr
    assert not (job.directory / "launcher_runs").exists()


def test_a_place_that_cannot_be_written(job: Any) -> None:
    job.script("")
    (job.directory / "taken").touch()
    assert simulate(job, "--hosts", "2", "--dir", "taken", "train.py").wait() == 74, job.output()
    assert "--dir names another place" in job.stderr


# ---- what each launcher is given


def planned(tmp_path: Path, *arguments: str, environ: dict[str, str] | None = None) -> list[Any]:
    (tmp_path / "train.py").touch()
    line = parse(["simulate", *arguments, str(tmp_path / "train.py")])
    settings_line = parse([str(tmp_path / "train.py")])
    run_id, settings = preview(settings_line, environ or {})
    count = int(str(line.given["hosts"]))
    return plan(line, environ or {}, settings, count, str(tmp_path / "sim"), run_id)


def test_addresses_are_distinct_and_loopback(tmp_path: Path) -> None:
    hosts = planned(tmp_path, "--hosts", "600")
    addresses = {host.address for host in hosts}
    assert len(addresses) == 600
    assert all(0 < int(address.rpartition(".")[2]) < 255 and address.startswith("127.0.") for address in addresses)
    assert [host.name for host in hosts][-1] == "algo-600"
    assert all(f"--host-addresses=algo-600={hosts[-1].address}" in host.argv for host in hosts)


def test_the_secret_is_fresh_and_not_on_the_command_line(tmp_path: Path) -> None:
    one, other = planned(tmp_path, "--hosts", "2"), planned(tmp_path, "--hosts", "2")
    secrets = {host.environ["LAUNCHER_SECRET"] for host in one}
    assert len(secrets) == 1
    assert secrets != {host.environ["LAUNCHER_SECRET"] for host in other}
    assert not any(word in " ".join(host.argv) for host in one for word in secrets)


def test_cpus_are_shared(tmp_path: Path) -> None:
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        pytest.skip("needs two CPUs to share")
    shares = [host.cpus for host in planned(tmp_path, "--hosts", "2")]
    assert sorted(cpu for share in shares for cpu in share) == allowed
    assert abs(len(shares[0]) - len(shares[1])) <= 1


def test_more_hosts_than_cpus_are_not_bound(tmp_path: Path) -> None:
    count = str(len(os.sched_getaffinity(0)) + 1)
    for host in planned(tmp_path, "--hosts", count):
        assert host.cpus == ()
        assert "--affinity=none" in host.argv
    for host in planned(tmp_path, "--affinity", "split", "--hosts", count):
        assert "--affinity=split" in host.argv


@pytest.mark.parametrize(
    ("visible", "hosts", "expected"),
    [
        ("0,1,2,3", 2, ["0,1", "2,3"]),
        ("0,1,2,3,4", 2, ["0,1", "2,3,4"]),
        ("GPU-a,GPU-b", 2, ["GPU-a", "GPU-b"]),
        ("0", 2, ["0", "0"]),
        ("", 2, ["", ""]),
        ("0,1", 1, ["0,1"]),
    ],
)
def test_gpus_are_shared(tmp_path: Path, visible: str, hosts: int, expected: list[str]) -> None:
    found = planned(tmp_path, "--hosts", str(hosts), environ={"CUDA_VISIBLE_DEVICES": visible})
    assert [host.environ["CUDA_VISIBLE_DEVICES"] for host in found] == expected


@pytest.mark.torch
def test_torch_across_simulated_hosts(job: Any) -> None:
    pytest.importorskip("torch", reason="needs torch")
    job.script(
        """
        import torch
        import torch.distributed as dist
        dist.init_process_group("gloo")
        value = torch.ones(3) * (dist.get_rank() + 1)
        dist.all_reduce(value)
        print("SUM", int(value[0]), flush=True)
        dist.destroy_process_group()
        """
    )
    assert simulate(job, "--hosts", "3", "train.py").wait(120) == 0, job.output()
    assert job.stdout.count("SUM 6\n") == 3
