"""MPI jobs over several hosts without ssh; fault table, rows 43 to 45, and what mpirun gets wrong."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.mpi, pytest.mark.root]

TALK = """
    import json, os
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    total = world.allreduce(world.rank + 1)
    names = world.gather((world.rank, os.environ["RANK"], os.environ["LOCAL_RANK"], os.environ["SM_CURRENT_HOST"],
                          os.environ["GLOO_SOCKET_IFNAME"]))
    if world.rank == 0:
        print("sum", total, "names", json.dumps(names), flush=True)
"""
AT_WORK = """
    import os, time
    from mpi4py import MPI
    from together import *

    MPI.COMM_WORLD.Barrier()
    up()
    while True:
        time.sleep(60)
"""
DAEMONS = ("orted", "prted", "hydra_pmi_proxy")


def start(hosts: Any, mpirun: Path, *args: str, **options: Any) -> None:
    hosts.start_all("--engine", "mpi", "--mpirun", mpirun, *args, **options)


def daemons(host: Any) -> list[int]:
    """Process ids of the MPI daemons on a host."""
    found = []
    for pid in host.machine.processes():
        try:
            name = Path(f"/proc/{pid}/comm").read_text().strip()
        except OSError:
            continue
        if name in DAEMONS:
            found.append(pid)
    return found


def test_three_hosts(make_hosts: Any, mpirun: Path) -> None:
    hosts = make_hosts(3)
    hosts.script(TALK)
    start(hosts, mpirun, "-n", "2", "train.py")
    assert hosts.wait_all() == [0, 0, 0], hosts.output()
    names = [[rank, str(rank), str(rank % 2), f"algo-{rank // 2 + 1}", "eth0"] for rank in range(6)]
    assert f"sum 21 names {names}".replace("'", '"') in hosts[0].stdout


def test_unequal_hosts(make_hosts: Any, mpirun: Path) -> None:
    hosts = make_hosts(2)
    hosts.script(TALK)
    for host, count in zip(hosts, "12", strict=True):
        host.start("--engine", "mpi", "--mpirun", mpirun, "-n", count, "train.py")
    assert hosts.wait_all() == [0, 0], hosts.output()
    assert '"1", "0", "algo-2"' in hosts[0].stdout and '"2", "1", "algo-2"' in hosts[0].stdout


def test_row_43_a_daemon_is_killed(make_hosts: Any, mpirun: Path) -> None:
    hosts = make_hosts(2)
    hosts.script(AT_WORK)
    start(hosts, mpirun, "-n", "1", "train.py")
    hosts.wait_for_ranks(0, 1)
    (pid,) = daemons(hosts[1])
    name = Path(f"/proc/{pid}/comm").read_text().strip()
    os.kill(pid, signal.SIGKILL)
    hosts.assert_all_say(137, "")
    assert f"the MPI daemon {name} (pid {pid}) on algo-2 was killed by SIGKILL" in hosts[0].failure.splitlines()[0]


def test_row_43_mpirun_is_killed(make_hosts: Any, mpirun: Path) -> None:
    hosts = make_hosts(2)
    hosts.script(AT_WORK)
    start(hosts, mpirun, "-n", "1", "train.py")
    hosts.wait_for_ranks(0, 1)
    names = ("mpirun", "prterun", "mpiexec")
    (pid,) = [pid for pid in hosts[0].machine.processes() if Path(f"/proc/{pid}/comm").read_text().strip() in names]
    os.kill(pid, signal.SIGKILL)
    hosts.assert_all_say(137, "")
    assert "(pid" in hosts[1].failure and "on algo-1 was killed by SIGKILL while ranks were at work" in hosts[1].failure


def test_row_44_a_rank_ends_before_mpi_init(make_hosts: Any, mpirun: Path) -> None:
    hosts = make_hosts(2)
    hosts.script("""
        import os, sys, time
        if os.environ["RANK"] == "1":
            sys.exit(7)
        time.sleep(60)
    """)
    start(hosts, mpirun, "-n", "1", "train.py")
    hosts.assert_all_say(7, "rank 1 on algo-2 exited with code 7")


def test_row_45_mpi_abort_from_rank_2(make_hosts: Any, mpirun: Path) -> None:
    hosts = make_hosts(2)
    hosts.script("""
        import time
        from mpi4py import MPI

        MPI.COMM_WORLD.Barrier()
        if MPI.COMM_WORLD.rank == 2:
            MPI.COMM_WORLD.Abort(7)
        time.sleep(60)
    """)
    start(hosts, mpirun, "-n", "2", "train.py")
    hosts.assert_all_say(7, "rank 2 on algo-2 ")


def test_a_rank_is_killed_on_the_other_host(make_hosts: Any, mpirun: Path) -> None:
    hosts = make_hosts(2)
    hosts.script(AT_WORK)
    start(hosts, mpirun, "-n", "1", "train.py")
    _, second = hosts.wait_for_ranks(0, 1)
    os.kill(second, signal.SIGKILL)
    hosts.assert_all_say(137, "rank 1 on algo-2 was killed by SIGKILL")


def test_restarts_on_all_hosts(make_hosts: Any, mpirun: Path) -> None:
    hosts = make_hosts(2)
    hosts.script("""
        import os, sys
        from mpi4py import MPI
        world = MPI.COMM_WORLD
        world.Barrier()
        if os.environ["LAUNCHER_ATTEMPT"] == "0" and world.rank == 1:
            sys.exit(4)
        print("attempt", os.environ["LAUNCHER_ATTEMPT"], world.allreduce(1))
    """)
    start(hosts, mpirun, "-n", "1", "--max-restarts", "1", "train.py")
    assert hosts.wait_all() == [0, 0], hosts.output()
    assert "attempt 1 2" in hosts[0].stdout and "attempt 1 2" in hosts[1].stdout


def test_another_layout_of_ranks(make_hosts: Any, mpirun: Path) -> None:
    """The user's options may place ranks otherwise than the launcher would: mpirun's word counts."""
    if mpirun.name == "mpiexec":
        pytest.skip("hydra goes by the list of hosts alone")
    hosts = make_hosts(2)
    hosts.script(TALK)
    start(hosts, mpirun, "-n", "2", "--mpi-options", "--map-by node", "train.py")
    assert hosts.wait_all() == [0, 0], hosts.output()
    assert '[1, "1", "0", "algo-2", "eth0"], [2, "2", "1", "algo-1", "eth0"]' in hosts[0].stdout
    assert "[algo-2 r1 l0]" not in hosts[0].stdout


@pytest.mark.parametrize(("processes", "places"), [("2", [(0, "algo-1"), (1, "algo-1")]), ("3", [(2, "algo-2")])])
def test_fewer_ranks_than_slots(make_hosts: Any, mpirun: Path, processes: str, places: list[tuple[int, str]]) -> None:
    """Host after host is filled; one that is left without a rank waits for the others."""
    hosts = make_hosts(2)
    hosts.script(TALK)
    start(hosts, mpirun, "-n", "2", "--mpi-processes", processes, "train.py")
    assert hosts.wait_all() == [0, 0], hosts.output()
    line = hosts[0].wait_for_line("names")
    names = json.loads(line[line.index("names ") + 6 :])
    assert len(names) == int(processes)
    assert set(places) <= {(rank, host) for rank, _, _, host, _ in names}


def test_more_ranks_than_slots(make_hosts: Any, mpirun: Path) -> None:
    hosts = make_hosts(2)
    hosts.script(TALK)
    start(hosts, mpirun, "-n", "1", "--mpi-processes", "3", "train.py")
    assert hosts.wait_all() == [64, 64], hosts.output()
    assert "mpi_processes is 3, but the hosts have 2 slots" in hosts[1].failure
