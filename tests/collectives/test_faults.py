"""Ranks that end, or stop, in the middle of collectives: all others hear who it was, at once, and nothing is left."""

from __future__ import annotations

import itertools
import json
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from launcher.rank import status

PROGRAM = Path(__file__).parent / "programs" / "faults.py"
OPERATIONS = ("allreduce", "reduce_scatter", "all_gather", "broadcast", "reduce", "all_to_all", "barrier")
PATHS = ("automatic", "pipelined", "shared", "pulled")
KILL_POINTS = 1000
KILLED_IN_JOIN = 40
AT_ONCE_S = 1.0


def case(number: int, dice: random.Random, **given: Any) -> dict[str, Any]:
    size = dice.choice((2, 3, 3, 4))
    victim = dice.randrange(size)
    return {
        "seed": number,
        "size": size,
        "victim": victim,
        "late": (victim + 1) % size,
        "operations": OPERATIONS,
        "path": dice.choice(PATHS),
        "how": "signal",
        "after_us": dice.randrange(2000),
        "warm_calls": 5,
        "in_join": False,
        "timeout_s": 30.0,
        **given,
    }


def run(cases: list[dict[str, Any]], tmp_path: Path, deadline_s: float) -> list[dict[str, Any]]:
    """The outcomes; two drivers share the work, as there are two cores at least."""
    drivers = []
    for index in range(2):
        place = tmp_path / str(index)
        place.mkdir()
        driver = subprocess.Popen(
            [sys.executable, str(PROGRAM), str(place)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert driver.stdin is not None
        json.dump(cases[index::2], driver.stdin)
        driver.stdin.close()
        driver.stdin = None
        drivers.append(driver)
    try:
        texts = [driver.communicate(timeout=deadline_s)[0] for driver in drivers]
    finally:
        for driver in drivers:
            driver.kill()
            driver.wait()
    assert [driver.returncode for driver in drivers] == [0, 0]
    for index in range(2):
        assert list((tmp_path / str(index)).iterdir()) == []
    return [outcome for text in texts for outcome in json.loads(text)]


def check(outcome: dict[str, Any], reasons: tuple[str, ...]) -> None:
    """Every other rank has raised, named the right one, and kept nothing."""
    size, victim = outcome["size"], 10 + outcome["victim"]
    assert not outcome["hang"], outcome
    assert len(outcome["others"]) == size - 1, outcome
    for seen in outcome["others"]:
        reason, rank, host, operation, sequence, text = seen["error"]
        assert reason in reasons, outcome
        assert (rank, host) == (victim, "algo-2"), outcome
        if operation == "join":
            assert outcome["in_join"] and sequence == 0, outcome
        else:
            assert operation in OPERATIONS and sequence > 0, outcome
            assert text.startswith(f"{operation} #{sequence}"), outcome
        assert f"rank {victim} on algo-2" in text, outcome
        assert not seen["left"], outcome
    # The name of the meeting is its first rank's to remove; letters to a rank that can not come any more stay. The
    # directory is the launcher's.
    of_victim = ("faults", "faults~0~") if outcome["victim"] == 0 else (f"faults~{outcome['victim']}~0",)
    assert all(name.startswith(of_victim) and outcome["in_join"] for name in outcome["files"]), outcome


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_thousand_random_kill_points_leave_nothing_and_name_the_right_rank(tmp_path: Path) -> None:
    dice = random.Random(4)
    cases = [case(number, dice) for number in range(KILL_POINTS)]
    outcomes = run(cases, tmp_path, 240.0)
    for outcome in outcomes:
        check(outcome, ("lost",))
    late = [seen["after_s"] for outcome in outcomes for seen in outcome["others"] if seen["after_s"] > AT_ONCE_S]
    assert late == []
    # They were in the middle of it: all operations, all paths, and each thing that a rank does there.
    inside = [outcome for outcome in outcomes if outcome["inside"]]
    assert len(inside) > KILL_POINTS / 2
    assert {outcome["operation"] for outcome in inside} == set(OPERATIONS)
    assert {outcome["path"] for outcome in inside} == set(PATHS)
    phases = Counter(outcome["phase"] for outcome in inside)
    assert {status.WAITING, status.REDUCING, status.COPYING_OUT} <= set(phases), phases


@pytest.mark.parametrize("how", ["exit", "sys.exit", "exception"])
def test_who_leaves_in_the_middle_of_a_collective_is_named(how: str, tmp_path: Path) -> None:
    """Each operation, each path: by os._exit, sys.exit or an exception, from a signal handler while the call waits."""
    dice = random.Random(how)
    pairs = [*zip(OPERATIONS, itertools.cycle(PATHS)), ("allreduce", "small"), ("all_to_all", "shared")]
    cases = [
        case(number, dice, how=how, operations=[operation], path=path) for number, (operation, path) in enumerate(pairs)
    ]
    outcomes = run(cases, tmp_path, 60.0)
    for outcome in outcomes:
        check(outcome, ("lost", "left", "interrupted"))
        assert outcome["codes"][outcome["victim"]] == (1 if how == "exception" else 3), outcome
        assert all(seen["after_s"] <= AT_ONCE_S for seen in outcome["others"]), outcome
    assert sum(outcome["inside"] for outcome in outcomes) == (len(outcomes) if how == "exit" else 0)


def test_who_is_stopped_is_named_after_the_set_timeout(tmp_path: Path) -> None:
    dice = random.Random(7)
    cases = [case(number, dice, how="stop", timeout_s=0.4) for number in range(12)]
    for outcome in run(cases, tmp_path, 60.0):
        check(outcome, ("timeout",))
        assert all(seen["after_s"] <= 0.4 + AT_ONCE_S for seen in outcome["others"]), outcome
        assert outcome["codes"][outcome["victim"]] == -signal.SIGKILL


def test_who_is_killed_while_the_group_is_made_is_named(tmp_path: Path) -> None:
    """Before it has come nobody can know that it ended: then it is the one who did not come in time."""
    dice = random.Random(11)
    cases = [
        case(number, dice, in_join=True, after_us=dice.randrange(12000), timeout_s=0.5)
        for number in range(KILLED_IN_JOIN)
    ]
    reasons: set[str] = set()
    for outcome in run(cases, tmp_path, 60.0):
        check(outcome, ("lost", "left", "timeout"))
        reasons |= {seen["error"][0] for seen in outcome["others"]}
    assert "lost" in reasons, reasons


LOOP = """
import itertools, os, signal, sys, threading, time
from launcher.collectives.elements import DType
from launcher.collectives.group import join
import ctypes
rank = int(os.environ["RANK"])
group = join("loop", rank, 3, timeout_s={timeout})
one, two = (ctypes.create_string_buffer(1 << 22) for _ in range(2))
here, there = ctypes.addressof(one), ctypes.addressof(two)

def strike(number, frame):
    {end}

def collectives():
    for turn in itertools.count():
        group.allreduce(here, there, 1 << 20, DType.float32)
        group.broadcast(there, 1000, DType.float32, turn % 3)
        group.all_gather(here, there, [1 << 16] * 3, DType.float32)

for _ in range(20):
    group.barrier()
if rank == 1:
    signal.signal(signal.SIGALRM, strike)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
collectives()
"""


def test_the_failure_file_names_the_rank_and_the_operation(make_job: Any) -> None:
    """Five jobs of three ranks beside each other, of which rank 1 ends in each of the ways there are."""
    ends = {
        "kill": ("os.kill(os.getpid(), signal.SIGKILL)", 137, "was killed by SIGKILL"),
        "_exit": ("os._exit(7)", 7, "exited with code 7"),
        "exit": ("sys.exit(3)", 3, "exited with code 3"),
        "raise": ("raise KeyError('x')", 1, "failed: KeyError: 'x'"),
        "stop": ("os.kill(os.getpid(), signal.SIGSTOP)", 1, "(told by rank "),
    }
    jobs = {}
    for name, (end, _, _) in ends.items():
        jobs[name] = make_job(name)
        jobs[name].script(LOOP.format(end=end, timeout=2.0 if name == "stop" else 60.0))
        jobs[name].start("-n", "3", "--grace", "1", "train.py")
    for name, (_, code, words) in ends.items():
        job = jobs[name]
        assert job.wait(60) == code, f"{name}\n{job.output()}"
        failure = job.failure
        assert failure.startswith("rank 1 on "), failure
        assert words in failure.splitlines()[0], failure
        culprit = job.failure_json["detail"]["culprit"]
        assert culprit["rank"] == 1
        named = f"{culprit['operation']} #{culprit['sequence']}"
        assert culprit["operation"] in ("allreduce", "broadcast", "all_gather") and named in failure, failure
        victims = [line for line in failure.splitlines() if line.startswith(("rank 0: ", "rank 2: "))]
        assert len(victims) == 2, failure
        assert all(": could not finish " in line or ": stopped by the launcher" in line for line in victims), failure
        ours = ("attempt_0", "logs", "stop_deadline_ns")  # the launcher's own
        left = [path.name for path in job.base.glob("run/*/*") if path.name not in ours]
        assert left == [], left


@pytest.mark.slow
def test_a_slow_rank_is_told_to_be_the_straggler(job: Any) -> None:
    """Row 41 of the peers' table, with real collectives: rank 1 works twice as long as the others."""
    job.script(
        LOOP.partition("def strike")[0].format(timeout=60.0)
        + """
end = time.monotonic() + 3.5
while True:
    time.sleep(0.04 if rank == 1 else 0.01)
    over = ctypes.c_float.from_address(here)
    over.value = time.monotonic() > end
    group.allreduce(here, there, 1, DType.float32)
    if ctypes.c_float.from_address(there).value:
        break
    group.allreduce(here, there, 1000, DType.float32)
"""
    )
    assert job.run("-n", "3", "--straggler-window", "1", "train.py") == 0, job.output()
    lines = [line for line in job.stderr.splitlines() if "straggler: " in line]
    assert lines and " rank 1 on " in lines[0], job.output()
    assert " is the straggler: others waited " in lines[0] and " was the straggler: " in lines[-1]
