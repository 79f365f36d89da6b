"""Several hosts at the edges of what they say and when: sizes, ends in an unlucky order, ports, a lone signal."""

from __future__ import annotations

import json
import signal
import sys
from typing import Any

import pytest

from .fleet import RUN_ID, SECRET, Stranger

EXIT_CLUSTER = 69


# ---- signals


@pytest.mark.parametrize("host", ["algo-1", "algo-2"])
def test_a_stop_on_a_host_that_is_done_already(make_fleet: Any, host: str) -> None:
    """Its report is out: no host's evidence has the signal, and yet that is why the job ended."""
    fleet = make_fleet(2)
    fleet.script(
        """
        import os, select, sys
        os.write(1, b"UP\\n")
        while os.environ["RANK"] == sys.argv[2]:
            select.select([], [], [], 1)
        """
    )
    for name in fleet.names:
        fleet.start(name, script_args=["1" if host == "algo-1" else "0"])
    fleet.up()
    done = fleet.jobs[host]
    if host == "algo-2":
        done.wait_for_line("waiting for the other hosts", "stderr")
    else:
        done.wait_for_line("1 of 2 hosts are done", "stderr")
    done.process.send_signal(signal.SIGTERM)
    assert fleet.codes() == [128 + signal.SIGTERM] * 2, fleet.output()
    for job in fleet.jobs.values():
        assert job.failure.startswith("stopped by SIGTERM"), job.failure


# ---- hosts that leave


@pytest.mark.slow
@pytest.mark.parametrize("options", [("--max-restarts=2",), ("--max-restarts=2", "--min-hosts=2")], ids=["all", "2"])
def test_a_host_that_is_lost_when_its_part_is_over(make_fleet: Any, options: tuple[str, ...]) -> None:
    """It has told how its ranks failed, then it is gone: it is missing for the next attempt."""
    fleet = make_fleet(3)
    fleet.script(
        """
        import os, select, signal, sys
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        rank, attempt = os.environ["RANK"], int(os.environ["LAUNCHER_ATTEMPT"])
        os.write(1, f"UP {attempt} {rank} of {os.environ['WORLD_SIZE']}\\n".encode())
        while not os.path.exists(sys.argv[1]):
            select.select([], [], [], 0.01)
        if rank == "1" and attempt == 0:
            sys.exit(7)
        while attempt == 0:  # until it is killed
            select.select([], [], [], 1)
        """
    )
    for name in fleet.names:
        fleet.start(name, "--grace=6", *options)
    fleet.up()
    fleet.go.touch()
    lost = fleet.jobs["algo-2"]
    lost.wait_for_line("1 of 3 hosts are done", "stderr")
    lost.process.kill()
    codes = fleet.codes()
    if len(options) > 1:
        assert codes == [0, -9, 0], fleet.output()
        assert "UP 1 1 of 2" in fleet.jobs["algo-3"].stdout
    else:
        assert codes == [7, -9, 7], fleet.output()
        assert fleet.jobs["algo-1"].failure == fleet.jobs["algo-3"].failure
        assert fleet.jobs["algo-1"].failure.startswith("rank 1 on algo-2 exited with code 7")
    for name in ("algo-1", "algo-3"):
        assert "[launcher] Traceback" not in fleet.jobs[name].stderr, fleet.output()


def test_a_host_that_stands_still_is_no_refused_connection(make_fleet: Any) -> None:
    fleet = make_fleet(2)
    for name in fleet.names:
        fleet.start(name, "--host-timeout=1")
    fleet.up()
    still = fleet.jobs["algo-2"].process
    still.send_signal(signal.SIGSTOP)
    assert fleet.codes("algo-1") == [EXIT_CLUSTER], fleet.output()
    assert fleet.jobs["algo-1"].failure.startswith("algo-2 (rank 1) is unreachable: nothing was heard of it for")
    assert "refused" not in fleet.jobs["algo-1"].stderr
    still.send_signal(signal.SIGCONT)
    assert fleet.codes("algo-2") == [EXIT_CLUSTER]


# ---- sizes


def test_many_long_failures_on_one_host(make_fleet: Any) -> None:
    """More than a frame holds: the report is cut, and the first failure keeps its words."""
    fleet = make_fleet(2)
    fleet.script(
        """
        import atexit, os, select, sys
        if os.environ["GROUP_RANK"] == "0":
            os.write(1, b"UP\\n")
            select.select([], [], [], 600)
        def wait():  # the exception is recorded; all are to fail before the first one ends
            open(f"{sys.argv[1]}-{os.environ['RANK']}", "w").close()
            while not all(os.path.exists(f"{sys.argv[1]}-{rank}") for rank in range(1, 25)):
                select.select([], [], [], 0.01)
        atexit.register(wait)
        raise ValueError("\\N{SNOWMAN}" * 20_000)
        """
    )
    fleet.start("algo-1")
    fleet.start("algo-2", "--nproc-per-node=24")
    assert fleet.codes() == [1, 1], fleet.output()
    failures = [job.failure for job in fleet.jobs.values()]
    assert failures[0] == failures[1]
    assert "on algo-2 failed: ValueError: \N{SNOWMAN}\N{SNOWMAN}" in failures[0]
    fleet.assert_clean()


@pytest.mark.parametrize("rank", ["0", "1"])
def test_one_long_failure_is_the_same_text_on_all_hosts(make_fleet: Any, rank: str) -> None:
    fleet = make_fleet(2)
    fleet.script(
        f"""
        import os, select
        if os.environ["RANK"] != "{rank}":
            select.select([], [], [], 600)
        raise ValueError("\\n".join(f"line {{number}} " + "x" * 100 for number in range(2500)))
        """
    )
    for name in fleet.names:
        fleet.start(name)
    assert fleet.codes() == [1, 1], fleet.output()
    failures = [job.failure for job in fleet.jobs.values()]
    assert failures[0] == failures[1]
    assert failures[0].startswith(f"rank {rank} on algo-{int(rank) + 1} failed: ValueError: line 0")


def test_an_error_file_of_a_megabyte(make_fleet: Any) -> None:
    """What a rank says of itself is bounded in what is told at once, too."""
    fleet = make_fleet(2)
    fleet.script(
        """
        import json, os, select, sys
        if os.environ["RANK"] != "1":
            select.select([], [], [], 600)
        long = "\\N{LATIN SMALL LETTER E WITH ACUTE}" * 250_000
        body = {"message": {"message": "mine"}, "launcher": {"where": long, "thread": long}}
        with open(os.environ["TORCHELASTIC_ERROR_FILE"], "w", encoding="utf-8") as file:
            json.dump(body, file, ensure_ascii=False)
        os._exit(5)
        """
    )
    for name in fleet.names:
        fleet.start(name)
    assert fleet.codes() == [5, 5], fleet.output()
    assert fleet.jobs["algo-1"].failure.startswith("rank 1 on algo-2")
    fleet.assert_clean()


# ---- meeting


def test_the_last_ports(make_fleet: Any, wait_until: Any) -> None:
    """There is no port 65536 to be tried."""
    fleet = make_fleet(2)
    fleet.port = fleet.leader_port = 65534
    fleet.start("algo-2")
    fleet.jobs["algo-2"].wait_for_line("waiting for the leader", "stderr")
    fleet.start("algo-1")
    fleet.up()
    fleet.finish()


@pytest.mark.slow
def test_a_leader_that_waits_does_not_refuse_itself(make_fleet: Any) -> None:
    """It looks whether the missing hosts answer; on one machine it is that who answers."""
    fleet = make_fleet(2)
    fleet.start("algo-1")
    fleet.jobs["algo-1"].wait_for_line("1 of 2 hosts are here; missing: algo-2", "stderr")
    fleet.start("algo-2")
    fleet.up()
    fleet.finish()
    assert "refused" not in fleet.jobs["algo-1"].stderr


def test_what_was_refused_is_told_when_the_hosts_do_not_meet(make_fleet: Any) -> None:
    fleet = make_fleet(2)
    fleet.start("algo-1", "--join-timeout=2")
    fleet.listening()
    for _ in range(3):
        Stranger(fleet, b"GET / HTTP/1.1\r\n\r\n").refused()
    assert fleet.codes("algo-1") == [EXIT_CLUSTER]
    assert fleet.refused() == {"announced a frame that is too long": 3}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("host", ["algo-1", "algo-2"])
def test_a_stop_while_hosts_are_missing(make_fleet: Any, host: str, number: signal.Signals) -> None:
    fleet = make_fleet(3)
    for name in ("algo-1", "algo-2"):
        fleet.start(name)
    fleet.jobs["algo-2"].wait_for_line("2 of 3 hosts are here", "stderr")
    fleet.jobs[host].process.send_signal(number)
    assert fleet.codes("algo-1", "algo-2") == [128 + number] * 2, fleet.output()
    fleet.assert_clean()


# ---- as a library

LIBRARY = """
    import json, os, sys
    import launcher

    def where(add):
        return int(os.environ["RANK"]) + add, int(os.environ["WORLD_SIZE"])

    if __name__ == "__main__":
        *settings, ranks = sys.argv[1:]
        given = dict(setting.split("=", 1) for setting in settings)
        given["host_addresses"] = dict(pair.split("=") for pair in given["host_addresses"].split(","))
        given["leader_port"] = int(given["leader_port"])
        result = launcher.launch(where, (100,), nproc=int(ranks), **given)
        print("RESULT", json.dumps([result.values, list(result.exit_codes), len(result.verdict.records)]), flush=True)
"""


def test_launch_on_several_hosts(make_fleet: Any) -> None:
    """Each host's caller gets the results of its own ranks, however many there are on the others."""
    fleet = make_fleet(2)
    fleet.script(LIBRARY)
    addresses = ",".join(f"{name}={address}" for name, address in fleet.addresses.items())
    for name, ranks in (("algo-1", "2"), ("algo-2", "1")):
        job = fleet.jobs[name]
        job.start(
            f"base_dir={job.base}",
            f"host_addresses={addresses}",
            f"leader_port={fleet.port}",
            f"rdzv_id={RUN_ID}",
            ranks,
            command=(sys.executable, fleet.script_path),
            own_tree=False,
            env={"LAUNCHER_SECRET": SECRET},
        )
    assert fleet.codes() == [0, 0], fleet.output()
    results = [json.loads(job.stdout.partition("RESULT ")[2].splitlines()[0]) for job in fleet.jobs.values()]
    assert results[0][:2] == [[[100, 3], [101, 3]], [0, 1]]
    assert results[1][:2] == [[[102, 3]], [2]]
