"""Ranks agree on their steps before the first, or fail together: real ranks of one job, many cases in it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from launcher.data.order import Shuffling
from launcher.data.state import State
from launcher.data.steps import Agreement, Facts, settle
from launcher.errors import DataError, LauncherError, UsageError
from launcher.record import replace

RANKS = 3

# Each case is run by all ranks, one after the other; what each got is shown, and looked at by the tests below.
PROGRAM = """
    import json, os
    from launcher import Communicator
    from launcher.data.state import State, marks
    from launcher.data.steps import Agreement, Facts
    from launcher.errors import CollectiveError, DataError, LauncherError, UsageError
    from launcher.record import as_dict
    import numpy as np

    RANK, SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    shown = {}

    def facts(records=100, fingerprint=1, batch=4, tail="drop", position=0, **more):
        files = [("a", records, records), ("b", 5, 0)]
        return Facts(
            State(fingerprint, records, position=position, files=2, marks=marks(files)), batch, tail, **more
        )

    def show(name, find, timeout_s=30.0, **options):
        try:
            plan = Agreement(name, RANK, SIZE, timeout_s=timeout_s).settle(find, **options)
            shown[name] = {**as_dict(plan), "steps": plan.steps(), "steps_at_20": plan.steps(20)}
            return plan
        except LauncherError as error:
            shown[name] = {"error": type(error).__name__, "text": str(error), **vars(error)}

    def fails(error):
        raise error

    show("plain", lambda: facts())
    show("plain", lambda: facts(tail="pad", position=40))
    show("few", lambda: facts(records=5, tail="pad"))
    show("too few", lambda: facts(records=11))
    show("allowed", lambda: facts(records=11), allow_empty=True)
    show("batches", lambda: facts(batch=4 + (RANK == 1)))
    show("positions", lambda: facts(position=8 * (RANK == 2)))
    show("files", lambda: facts(fingerprint=1 + (RANK == 2), records=100 - (RANK == 2), damage=int(RANK == 2)))
    bad = DataError("/data/x: byte 7: cut", "truncated", "/data/x", 7, 3)
    show("damage", lambda: facts() if RANK != 1 else fails(bad))
    show("option", lambda: facts() if RANK != 0 else fails(UsageError("no such format")))
    if RANK != 2:
        show("late", lambda: facts(), timeout_s=0.5)

    got = Agreement("bytes", RANK, SIZE).exchange(b"x" * (1 << 20) if RANK == 1 else b"")
    shown["bytes"] = [len(value) for value in got]

    # Hosts of one rank each.
    os.environ["SM_CURRENT_HOST"] = f"algo-{RANK + 1}"
    own = (10, 11, 3)[RANK]
    together = Communicator()
    for tail in ("drop", "pad", "short"):
        plan = show(tail, lambda: facts(own, 7 + RANK, 2, tail, sharded=True))
        total = np.zeros(1, np.int64)
        for step in range(plan.steps()):
            rows = min(2, max(0, own - 2 * step))
            total += together.allreduce(np.array([rows if tail != "drop" else 2]))
        shown[tail + " rows"] = int(total[0])
    show("empty host", lambda: facts(own * (RANK != 1), 7 + RANK, 2, sharded=True))
    os.environ["SM_CURRENT_HOST"] = f"algo-{RANK // 2 + 1}"
    show("uneven hosts", lambda: facts(sharded=True))
    with open(f"shown-{RANK}.json", "w") as file:
        json.dump(shown, file)
"""


Shown = list[dict[str, Any]]


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shown]:
    """By rank: what each case gave there."""
    from ..conftest import Job

    job = Job(tmp_path_factory.mktemp("steps"))
    try:
        code = job.run("-n", str(RANKS), job.script(PROGRAM))
        assert code == 0, job.output()
        yield [json.loads((job.directory / f"shown-{rank}.json").read_text()) for rank in range(RANKS)]
    finally:
        job.kill()


def same_error(shown: Shown, case: str, kind: str, text: str, ranks: Sequence[int] = range(RANKS)) -> None:
    """The case ended with this error on these ranks."""
    for rank in ranks:
        found = shown[rank][case]
        assert found.get("error") == kind and re.search(text, found["text"]), (rank, found)


def test_equal_ranks_get_equal_steps(shown: Shown) -> None:
    for rank, cases in enumerate(shown):
        assert cases["few"]["steps"] == 1
        assert cases["allowed"]["steps"] == 0
        plain = cases["plain"]  # the second of that name: with pad, from position 40
        assert (plain["steps"], plain["steps_at_20"], plain["records"]) == (5, 7, 100)
        assert (plain["rank"], plain["world"]) == (rank, RANKS)


def test_f11_too_few_records_for_a_step(shown: Shown) -> None:
    """F11: an error on every rank, which says what else to do."""
    same_error(
        shown, "too few", "UsageError", r"has 11 records, and a step of 3 ranks takes 12 .*tail='pad' or 'short'"
    )


def test_other_arguments_are_an_error_everywhere(shown: Shown) -> None:
    same_error(shown, "batches", "UsageError", r"'batches': batch_size is 5 on rank 1 on .* and 4 on rank 0 on ")
    same_error(shown, "positions", "UsageError", r"position is 8 on rank 2 .* load the same state")


def test_other_files_are_an_error_everywhere(shown: Shown) -> None:
    same_error(
        shown,
        "files",
        "DataError",
        r"rank 0 on \S+ has 100 records in 2 files, rank 2 on \S+ has 99 records in 2 files and 1 left out as damaged; "
        r"by name, and counted from 0, they differ first in file 0;",
    )
    assert shown[1]["files"]["problem"] == "mismatch"


def test_damage_found_by_one_rank_is_everybodys_error(shown: Shown) -> None:
    """F1 and others: no rank begins when one of them can not."""
    same_error(shown, "damage", "DataError", r"^/data/x: byte 7: cut$", [1])
    same_error(shown, "damage", "DataError", r"^rank 1 on \S+: /data/x: byte 7: cut$", [0, 2])
    for cases in shown:
        found = cases["damage"]
        assert (found["problem"], found["file"], found["offset"], found["record"]) == ("truncated", "/data/x", 7, 3)
    same_error(shown, "option", "UsageError", "^no such format$", [0])
    same_error(shown, "option", "UsageError", r"^rank 0 on \S+: no such format$", [1, 2])


def test_a_rank_that_does_not_come_is_named_within_the_limit(shown: Shown) -> None:
    """F10: nobody waits for ever."""
    same_error(shown, "late", "CollectiveError", "^channel 'late': the ranks could not agree .* rank 2", [0, 1])
    assert [cases["late"]["reason"] for cases in shown[:2]] == ["timeout"] * 2


def test_exchanged_bytes_may_be_of_any_length(shown: Shown) -> None:
    assert [cases["bytes"] for cases in shown] == [[0, 1 << 20, 0]] * RANKS


def test_f16_hosts_with_files_of_their_own_make_the_same_steps(shown: Shown) -> None:
    """F16: 10, 11 and 3 records on three hosts; a loop of allreduces over the steps ends on all of them."""
    for rank, cases in enumerate(shown):
        assert [cases[tail]["steps"] for tail in ("drop", "pad", "short")] == [1, 6, 6]
        assert cases["drop rows"] == 1 * 3 * 2  # of three ranks
        assert cases["pad rows"] == cases["short rows"] == 24
        plan = cases["drop"]
        assert (plan["records"], plan["rank"], plan["world"]) == ((10, 11, 3)[rank], 0, 1)
        assert plan["state"] == shown[0]["drop"]["state"]
        assert plan["state"]["records"] == 24
        assert plan["state"]["hosts"] == [["algo-1", 10], ["algo-2", 11], ["algo-3", 3]]


def test_f10_a_host_without_records_is_everybodys_error(shown: Shown) -> None:
    """F10: an empty shard of one host."""
    same_error(shown, "empty host", "DataError", "'empty host' has no records on host algo-2")


def test_hosts_with_files_of_their_own_need_as_many_ranks(shown: Shown) -> None:
    same_error(shown, "uneven hosts", "UsageError", "algo-1: 2, algo-2: 1")


@pytest.mark.torch
@pytest.mark.slow
def test_f16_two_hosts_agree_over_the_jobs_store(job: Any) -> None:
    """F16: hosts that are really apart: simulated ones, which share no memory."""
    pytest.importorskip("torch", reason="torch serves the store between hosts")
    script = """
        import os
        from launcher.data.state import State
        from launcher.data.steps import Agreement, Facts

        rank, host = int(os.environ["RANK"]), int(os.environ["GROUP_RANK"])
        own = Facts(State(host + 1, (40, 30)[host]), 2, "drop", sharded=True)
        plan = Agreement("train", rank, 2, timeout_s=60).settle(lambda: own)
        with open(os.path.join(os.environ["SHOWN"], str(rank)), "w") as file:
            print(plan.steps(), plan.records, plan.state.hosts, plan.state.fingerprint, file=file)
    """
    words = ("simulate", "--hosts", "2", "--dir", job.directory / "hosts", "-n", "1", job.script(script))
    assert job.run(*words, own_tree=False, env={"SHOWN": str(job.directory)}) == 0, job.output()
    first, second = ((job.directory / rank).read_text() for rank in "01")
    assert first.startswith("15 40 (('algo-1', 40), ('algo-2', 30))")
    assert second == first.replace("15 40", "15 30")


def facts(records: int, host: str, **changes: Any) -> Facts:
    return replace(Facts(State(records, records), 4, "drop", host=host), **changes)


def test_f13_steps_of_unlike_hosts() -> None:
    """F13: all ranks conclude the same from a table; two ranks on each host share its records."""
    hosts = {"b": 100, "a": 57, "c": 64}
    table = [facts(records, host, sharded=True, tail="pad") for host, records in hosts.items() for _ in range(2)]
    plans = [settle(table, rank, "x") for rank in range(6)]
    assert [(plan.rank, plan.world, plan.records) for plan in plans][:4] == [
        (0, 2, 100),
        (1, 2, 100),
        (0, 2, 57),
        (1, 2, 57),
    ]
    assert {plan.steps() for plan in plans} == {13}
    assert {plan.state for plan in plans} == {plans[0].state}
    assert plans[0].state.hosts == (("a", 57), ("b", 100), ("c", 64))
    assert [plans[0].position_after(step) for step in (0, 1, 12, 13)] == [0, 8, 96, 100]
    dropped = settle([replace(one, tail="drop") for one in table], 0, "x")
    assert (dropped.steps(), dropped.steps(16), dropped.steps(60)) == (7, 5, 0)
    # Which host has which files makes no difference to where they are.
    moved = [replace(one, host={"a": "b", "b": "a"}.get(one.host, one.host)) for one in table]
    assert settle(moved, 0, "x").state.fingerprint == plans[0].state.fingerprint
    # Extents follow from each host's records; those of the first are taken.
    extents = [
        replace(one, state=replace(one.state, shuffling=Shuffling("blocks", one.state.records, 2))) for one in table
    ]
    assert {settle(extents, rank, "x").state.shuffling.extent for rank in range(6)} == {57}


def test_an_empty_channel_is_an_error() -> None:
    """F10: with one rank or many."""
    with pytest.raises(DataError, match="'train' has no records; give it files"):
        settle([facts(0, "a")] * 2, 0, "train")


def test_without_others_nothing_is_exchanged() -> None:
    plan = Agreement("train").settle(lambda: facts(10, ""))
    assert (plan.steps(), plan.rank, plan.world) == (2, 0, 1)
    assert Agreement("train").exchange(b"x") == [b"x"]
    with pytest.raises(UsageError, match="rank is 2 and world_size 2"):
        Agreement("train", 2, 2)


def test_ranks_that_can_not_ask_each_other(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Said once; an error only where the answer matters."""
    for name in ("LAUNCHER_RUN_DIR", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for _ in range(2):
        assert Agreement("apart", 0, 2).settle(lambda: facts(16, "")).steps() == 2
        assert Agreement("apart", 1, 2).settle(lambda: facts(16, "")).rank == 1
    assert capsys.readouterr().err.count("do not compare what they have of channel 'apart'") == 1
    with pytest.raises(UsageError, match=r"files of its own in channel 'apart'.*not started by the launcher; start"):
        Agreement("apart", 0, 2).settle(lambda: facts(16, "", sharded=True))
    with pytest.raises(UsageError, match="or pass store="):
        Agreement("apart", 0, 2).exchange(b"")

    def fails() -> Facts:
        raise LauncherError("found nothing")

    with pytest.raises(LauncherError, match=r"^found nothing$"):
        Agreement("apart", 0, 2).settle(fails)
