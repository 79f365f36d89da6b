"""What ranks say of their collectives on their status pages, and what the launcher makes of it.

These ranks write the pages themselves, as any engine may; the launcher's own collectives are in tests/collectives.
"""

from __future__ import annotations

import os

import pytest

PAGE = """
import os, signal, sys, time
from launcher.rank import status
page = status.open_page(os.environ["LAUNCHER_STATUS_PAGE"], writable=True)
rank = int(os.environ["RANK"])
page.enter_collective("broadcast", 8, 1283)
page.leave_collective()
"""


@pytest.mark.slow
def test_a_hang_names_who_never_came_and_who_computes_is_no_hang(make_job):
    """Rows 26 and 28: two jobs beside each other, with a rank that the others wait for; one sleeps, one evaluates."""
    hangs, works = make_job("hangs"), make_job("works")
    hangs.script(
        PAGE
        + """
if rank != 1:
    page.enter_collective("allreduce", 25 << 20, 1284)
    page.set_collective_phase(status.WAITING)
    page.set_waiting_for(1)
    while rank == 0:
        pass  # it spins, which is no progress
while True:
    signal.pause()  # which the signal for a stack ends, too
"""
    )
    over = works.directory / "over"
    os.mkfifo(over)
    works.script(
        PAGE
        + f"over = {str(over)!r}"
        + """
page.enter_collective("barrier", 0, 1284)
end = time.monotonic() + 4
if rank == 1:
    page.leave_collective()
    while time.monotonic() < end:
        pass
    open(over, "w").close()
else:
    page.set_waiting_for(1)
    open(over).close()  # blocks until rank 1 has come there
"""
    )
    hangs.start("-n", "3", "--hang-timeout", "2", "train.py")
    works.start("-n", "2", "--hang-timeout", "2", "train.py")
    assert hangs.wait() == 75, hangs.output()
    headline = hangs.failure.splitlines()[0]
    assert "; rank 1 on " in headline
    assert " never entered allreduce #1284 (last: broadcast #1283); " in headline
    assert "; ranks 0, 2 wait in allreduce #1284 of 25 MiB since " in headline
    detail = hangs.failure_json["detail"]
    assert detail["culprit"]["rank"] == 1
    record = next(record for record in detail["records"] if record["rank"] == 2)
    assert (record["operation"], record["sequence"]) == ("allreduce", 1284)
    assert record["collective_phase"] == "waiting for others"
    assert works.wait() == 0, works.output()


@pytest.mark.parametrize(
    ("end", "words"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "was killed by SIGKILL during reduce_scatter #1284 (reducing)"),
        ("os._exit(7)", "exited with code 7 during reduce_scatter #1284 (reducing)"),
        ("raise KeyError('x')", "failed during reduce_scatter #1284 (reducing): KeyError: 'x' (exit code 1)"),
    ],
)
def test_the_end_of_a_rank_inside_a_collective_says_so(job, end, words):
    job.script(
        PAGE
        + f"""
page.enter_collective("reduce_scatter", 1 << 20, 1284)
page.set_collective_phase(status.REDUCING)
if rank == 1:
    {end}
time.sleep(600)
"""
    )
    assert job.run("-n", "2", "train.py") != 0
    assert words in job.failure.splitlines()[0]


def test_a_name_that_would_break_a_line_does_not(job):
    """The page is the rank's to write."""
    job.script(
        PAGE
        + """
page.enter_collective("a\\nb\\x1b[31m", 1, 3)
os._exit(3)
"""
    )
    assert job.run("train.py") == 3
    assert job.failure.splitlines()[0].endswith("exited with code 3 during a?b?[31m #3 (entering)")


@pytest.mark.slow
def test_a_straggler_is_told_while_the_job_runs_and_at_its_end(job):
    """Row 41 of the peers' table. Ranks 0 and 2 wait for half of their time, rank 1 never."""
    job.script(
        PAGE
        + """
begin = time.monotonic()
done = 0.0
while time.monotonic() < begin + 3.5:
    time.sleep(0.05)
    page.enter_collective("allreduce", 64)
    wait = (time.monotonic() - begin) / 2 - done
    if rank != 1:
        page.add_collective_wait(int(wait * 1e9))
        done += wait
    page.leave_collective()
"""
    )
    assert job.run("-n", "3", "--straggler-window", "1", "train.py") == 0, job.output()
    lines = [line for line in job.stderr.splitlines() if "straggler: " in line]
    assert lines and lines[0].startswith("[launcher] rank 1 on ")
    assert " is the straggler: others waited " in lines[0] and " % of the last 1 s for it" in lines[0]
    assert " was the straggler: others waited " in lines[-1]
