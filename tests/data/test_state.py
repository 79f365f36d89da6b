"""Saved states: what they hold, what they are refused for, and which file that names."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest

from launcher import _data
from launcher.data.order import Shuffling, choose
from launcher.data.state import State, first_difference, from_dict, marks, resume
from launcher.errors import DataError, UsageError
from launcher.record import replace

FILES = [(f"part-{number:02}.rec", 1000 + number, 10) for number in range(12)]
NOW = State(fingerprint=0xFEDCBA9876543210, records=120, seed=7, files=12, marks=marks(FILES))
SAVED = replace(NOW, seed=42, epoch=3, position=50).to_dict()


def changed(files: list[tuple[str, int, int]]) -> State:
    return replace(
        NOW, fingerprint=1, records=sum(records for *_, records in files), files=len(files), marks=marks(files)
    )


def test_a_state_is_small_plain_and_comes_back() -> None:
    typical = State(fingerprint=2**64 - 1, records=1_000_000, seed=42, epoch=12, position=512_000)
    one_file = replace(typical, files=1, marks=marks(FILES[:1]))
    blocks = replace(one_file, shuffling=Shuffling("blocks", 8192, 32, 4))
    hosts = replace(one_file, hosts=(("algo-1", 600_000), ("algo-2", 400_000)))
    for state, most in ((typical, 150), (one_file, 170), (blocks, 220), (hosts, 230)):
        text = json.dumps(state.to_dict())
        assert len(text) <= most
        assert from_dict(json.loads(text)) == state


def test_a_state_goes_on_where_it_was() -> None:
    state = resume(json.loads(json.dumps(SAVED)), NOW)
    assert (state.seed, state.epoch, state.position) == (42, 3, 50)
    assert state.fingerprint == NOW.fingerprint
    # The order is the saved one's, whatever the loader was made with.
    blocks = replace(NOW, shuffling=Shuffling("blocks", 5, 2, 2), position=1).to_dict()
    assert resume(blocks, NOW).shuffling == Shuffling("blocks", 5, 2, 2)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("version", 2, r"version 2, this launcher reads version 1"),
        ("version", None, r"version None"),
        ("order", 0, r"'order' is 0; expected a whole number of at least 1"),
        ("order", 99, r"version 99 of the order, this launcher has version 1; resume with the launcher that saved it"),
        ("data", "xyz", r"'data' is 'xyz'; expected 16 hexadecimal digits"),
        ("data", None, r"'data' is None; expected a text"),
        ("position", -1, r"'position' is -1"),
        ("position", 121, r"position is 121, beyond its 120 records"),
        ("seed", 2**64, r"'seed' is 18446744073709551616"),
        ("epoch", 1.5, r"'epoch' is 1.5"),
        ("records", True, r"'records' is True"),
        ("shuffle", "some", r"'shuffle' is 'some'; expected one of none, full, blocks"),
        ("shuffle", "blocks", r"'extent' is None"),
        ("hosts", ["a"], r"'hosts' is \['a'\]; expected records by host"),
    ],
)
def test_a_state_that_is_none_is_refused(field: str, value: object, message: str) -> None:
    saved = {**SAVED, field: value}
    with pytest.raises(UsageError, match=message):
        resume(saved, NOW)
    with pytest.warns(RuntimeWarning, match=r"begins anew \(strict=False\)"):
        assert resume(saved, NOW, strict=False).position == 0


def test_what_is_no_dict_is_refused() -> None:
    nothing: Any = None
    with pytest.raises(UsageError, match="the state is NoneType; expected the dict"):
        resume(nothing, NOW)


@pytest.mark.parametrize(
    ("files", "file", "exactly", "by_marks"),
    [
        ([*FILES[:4], ("part-04.rec", 9, 10), *FILES[5:]], "part-04.rec", "had 1004 bytes and has 9", "is another"),
        ([*FILES[:4], (*FILES[4][:2], 11), *FILES[5:]], "part-04.rec", "had 10 records and has 11", "is another"),
        ([*FILES[:4], ("part-03b", 1, 1), *FILES[4:]], "part-03b", "is new", "12 files and are 13; this is the first"),
        (FILES[:11], "part-11.rec", "is gone", "12 files and are 11; the last ones are gone"),
        ([*FILES, ("q", 1, 1)], "q", "is new", "this is the first new one"),
        ([("a", 1, 1), *FILES[1:]], "a", "is new", "is another"),
    ],
)
def test_f15_the_first_file_that_differs_is_named(
    files: list[tuple[str, int, int]], file: str, exactly: str, by_marks: str
) -> None:
    """F15: by both tables exactly, and by what a state of 200 bytes has of them."""
    now = changed(files)
    with pytest.raises(DataError, match=exactly) as caught:
        resume(SAVED, now, directory="/opt/ml/input/data/train/", files=files, saved_files=FILES)
    assert caught.value.file == f"/opt/ml/input/data/train/{file}"
    assert caught.value.problem == "changed"
    assert str(caught.value).startswith(caught.value.file)
    with pytest.raises(DataError, match=by_marks) as caught:
        resume(SAVED, now, files=files)
    assert caught.value.file == ("" if "last ones are gone" in by_marks else file)


def test_f15_of_many_files_a_few_are_named() -> None:
    """F15: a state has 16 marks; of 1600 files each is for a hundred."""
    files = [(f"{number:04}", 1, 1) for number in range(1600)]
    then = replace(NOW, files=1600, marks=marks(files), records=1600)
    files[733] = ("0733", 2, 1)
    with pytest.raises(DataError, match=r"the first that differs is among 0700 .. 0799"):
        resume(then.to_dict(), replace(changed(files), records=1600), files=files)


def test_f15_another_format_of_the_same_files() -> None:
    """F15: only the fingerprint differs."""
    with pytest.raises(DataError, match="format, or what is read of them, is not") as caught:
        resume(SAVED, replace(NOW, fingerprint=1), files=FILES, saved_files=FILES)
    assert caught.value.file == ""
    with pytest.raises(DataError, match="format, or what is read of them, is not"):
        resume(SAVED, replace(NOW, fingerprint=1), files=FILES)


def test_f15_not_strict_begins_the_epoch_anew_and_says_so() -> None:
    """F15: the saved epoch and seed, from its first record, with this loader's order."""
    with pytest.warns(RuntimeWarning, match=r"part-00.rec.*epoch 3 begins anew"):
        state = resume(SAVED, changed([("part-00.rec", 1, 1)]), strict=False, files=[("part-00.rec", 1, 1)])
    assert (state.seed, state.epoch, state.position, state.fingerprint) == (42, 3, 0, 1)


def test_names_that_are_no_utf8_are_compared_as_bytes() -> None:
    strange = b"\xff".decode(errors="surrogateescape")
    assert marks([(strange, 1, 1)])
    assert first_difference([(strange, 1, 1)], [("\U0001f600", 1, 1)]) == ("\U0001f600", "this file is new")


def test_f16_another_number_of_hosts_is_refused_unless_asked_for() -> None:
    """F16: with files of its own on each host, a position is worth nothing on other hosts."""
    table = [("algo-1", 11, 10), ("algo-2", 12, 11), ("algo-3", 13, 3)]
    three = State(
        fingerprint=5,
        records=24,
        epoch=2,
        position=2,
        files=3,
        marks=marks(table),
        hosts=tuple((host, records) for host, _, records in table),
    )
    two = replace(three, fingerprint=6, epoch=0, position=0, files=2, marks=marks(table[:2]), hosts=three.hosts[:2])
    with pytest.raises(UsageError, match=r"3 hosts \(algo-1: 10, .*\), this job is on 2 hosts .*'epoch_restart'"):
        resume(three.to_dict(), two)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = resume(three.to_dict(), two, on_reshard="epoch_restart")
        assert (state.epoch, state.position, state.hosts) == (2, 0, two.hosts)
        assert resume(three.to_dict(), three).position == 2
    with pytest.raises(UsageError, match="this job is on hosts that all had the same files"):
        resume(three.to_dict(), NOW)
    with pytest.raises(DataError, match="host algo-2 had 11 records and has 12"):
        resume(three.to_dict(), replace(three, fingerprint=7, hosts=(("algo-1", 10), ("algo-2", 12), ("algo-3", 3))))
    other = [*table[:2], ("algo-3", 99, 3)]
    with pytest.raises(DataError, match="host algo-3 has other files"):
        resume(three.to_dict(), replace(three, fingerprint=7, marks=marks(other)))
    with pytest.raises(UsageError, match="on_reshard is 'maybe'"):
        resume(three.to_dict(), two, on_reshard="maybe")


def test_which_order_a_channel_gets() -> None:
    resident = {"remote": False, "records": 1_000_000, "nbytes": 1024 * 1_000_000}
    remote = {**resident, "remote": True}
    assert choose("auto", **resident) == Shuffling("full")
    assert choose("auto", **remote) == Shuffling("blocks", 16384, 16, 1)
    assert choose("blocks", **resident, readers=3, extent=10) == Shuffling("blocks", 10, 16, 3)
    assert choose("auto", **remote, readers=3, lanes=1, window=2) == Shuffling("blocks", 16384, 2, 1)
    assert choose("none", **remote) == Shuffling("none")
    assert choose("blocks", remote=False, records=3, nbytes=3 << 30).extent == 1
    for arguments, message in (
        ({"shuffle": "yes"}, "shuffle is 'yes'; expected 'auto', 'none', 'full', 'blocks'"),
        ({"shuffle": "blocks", "window": 0}, "window is 0"),
        ({"shuffle": "full", "lanes": 2}, "lanes is for shuffle='blocks'"),
    ):
        with pytest.raises(UsageError, match=message):
            choose(**resident, **arguments)
    order = Shuffling("blocks", 10, 3, 2).order(1, 2, 100)
    assert order.fill(0, 100) == _data.Order(2, 1, 2, 100, 10, 3, 2).fill(0, 100)
