"""The loader: every record once, on any number of ranks, from any place on; what it says when it can not."""

from __future__ import annotations

import itertools
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.data import Cast, Loader, Normalise, OneHot
from launcher.errors import DataError, UsageError

numpy = pytest.importorskip("numpy")

FIELDS = {"values": ("float32", (3,)), "label": "int64"}
STRIDE = 20


def records(count: int, begin: int = 0) -> Any:
    """Record r is r, r + 0.5, -r and the label r."""
    table = numpy.zeros(count, [("values", "<f4", 3), ("label", "<i8")])
    numbers = numpy.arange(begin, begin + count)
    table["values"] = numpy.stack([numbers, numbers + 0.5, -numbers], 1)
    table["label"] = numbers
    return table


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of 103 records in three files, one of them empty."""
    path = tmp_path / "data"
    path.mkdir()
    (path / "a.bin").write_bytes(records(40).tobytes())
    (path / "b.bin").write_bytes(b"")
    (path / "c.bin").write_bytes(records(63, 40).tobytes())
    return path


def load(path: Path, batch_size: int = 4, **options: Any) -> Loader:
    return Loader(path, batch_size, **{"format": "fixed", "fields": FIELDS, "progress": False, **options})


def labels(batches: Iterator[dict[str, Any]] | Loader) -> list[int]:
    """The labels of all rows that count."""
    found = []
    for batch in batches:
        assert (batch["values"][:, 1] == batch["label"] + 0.5).all()
        found += batch["label"][batch["mask"] if "mask" in batch else slice(None)].tolist()
    return found


def test_an_epoch_has_each_record_once_and_the_next_another_order(folder: Path) -> None:
    with load(folder, tail="short", seed=7) as loader:
        assert (len(loader), loader.records, loader.epoch) == (26, 103, 0)
        assert [(field.name, field.dtype, field.shape) for field in loader.fields] == [
            ("values", "float32", (3,)),
            ("label", "int64", ()),
        ]
        first, second = labels(loader), labels(loader)
        assert sorted(first) == sorted(second) == list(range(103))
        assert first != second and first != sorted(first)
        assert loader.epoch == 2
        loader.set_epoch(0)
        assert labels(loader) == first
    assert labels(load(folder, tail="short", seed=7)) == first
    assert labels(load(folder, tail="short", seed=8)) != first
    assert labels(load(folder, tail="short", shuffle="none")) == list(range(103))


@pytest.mark.parametrize("tail", ["drop", "pad", "short"])
@pytest.mark.parametrize("world", [1, 2, 3, 5, 8])
def test_the_ranks_shares_are_all_records_once_f13(folder: Path, world: int, tail: str) -> None:
    loaders = [load(folder, rank=rank, world_size=world, tail=tail) for rank in range(world)]
    for _ in range(2):
        assert len({len(loader) for loader in loaders}) == 1
        each = [list(loader) for loader in loaders]
        assert {len(batches) for batches in each} == {103 // (4 * world) if tail == "drop" else -(-103 // (4 * world))}
        found = sorted(itertools.chain.from_iterable(labels(iter(batches)) for batches in each))
        assert len(set(found)) == len(found) == (103 - 103 % (4 * world) if tail == "drop" else 103)
        if tail == "pad":
            assert {len(batch["label"]) for batches in each for batch in batches} == {4}


@pytest.mark.parametrize("threads", [0, 1])
@pytest.mark.parametrize(("world", "batch_size"), [(4, 3), (2, 3), (3, 4), (8, 2), (1, 50)])
def test_resumed_on_other_ranks_nothing_comes_twice_f14(
    folder: Path, world: int, batch_size: int, threads: int
) -> None:
    """F14: stopped with 4 ranks at some step; go on with another world and another batch."""
    stop = random.Random(world * 100 + batch_size).randrange(1, 8)
    before = [load(folder, 3, rank=rank, world_size=4, tail="short", threads=threads) for rank in range(4)]
    taken: list[int] = []
    states = []
    rest = []
    for loader in before:
        batches = iter(loader)
        taken += labels(itertools.islice(batches, stop))
        states.append(json.dumps(loader.state_dict()))
        rest.append([batch["label"].tolist() for batch in batches])
    assert len(set(states)) == 1 and len(states[0]) < 200
    after = [
        load(folder, batch_size, rank=rank, world_size=world, tail="short", threads=threads) for rank in range(world)
    ]
    for rank, loader in enumerate(after):
        loader.load_state_dict(json.loads(states[0]))
        loader.set_epoch(0)  # as a loop over epochs does; it stays where it is
        assert len(loader) == -(-(103 - 12 * stop) // (world * batch_size))
        found = list(loader)
        taken += labels(iter(found))
        if (world, batch_size) == (4, 3):
            assert [batch["label"].tolist() for batch in found] == rest[rank]
        assert loader.epoch == 1
    assert sorted(taken) == list(range(103))


def test_a_state_of_an_epochs_end_is_the_next_ones_begin(folder: Path) -> None:
    loader = load(folder)
    for _ in loader:
        last = loader.state_dict()  # with the last step of the epoch done
    assert loader.state_dict()["epoch"] == 1
    again = load(folder)
    again.load_state_dict(last)
    assert (again.epoch, len(again)) == (1, 25)
    assert labels(again) == labels(loader)


def test_a_second_iteration_ends_the_first(folder: Path) -> None:
    loader = load(folder)
    first = iter(loader)
    next(first)
    second = iter(loader)
    assert loader.epoch == 1
    with pytest.raises(UsageError, match="another one began"):
        next(first)
    assert len(list(second)) == 25
    third = iter(loader)
    next(third)
    loader.close()
    state = loader.state_dict()
    assert (state["epoch"], state["position"]) == (2, 4)
    with pytest.raises(UsageError, match="closed"):
        next(third)
    with pytest.raises(UsageError, match="closed"):
        iter(loader)


def test_fewer_records_than_a_step_f11(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"103 records.*8 ranks takes 160.*tail='pad'"):
        load(folder, 20, rank=0, world_size=8)
    assert list(load(folder, 20, rank=0, world_size=8, allow_empty=True)) == []
    padded = [list(load(folder, 20, rank=rank, world_size=8, tail="pad")) for rank in range(8)]
    assert [len(batches) for batches in padded] == [1] * 8
    assert [int(batches[0]["mask"].sum()) for batches in padded] == [20, 20, 20, 20, 20, 3, 0, 0]
    short = [list(load(folder, 20, rank=rank, world_size=8, tail="short")) for rank in range(8)]
    assert [batches[0]["values"].shape for batches in short][4:] == [(20, 3), (3, 3), (0, 3), (0, 3)]


def test_a_state_of_other_data_is_refused_f15(folder: Path) -> None:
    loader = load(folder)
    next(iter(loader))
    state = loader.state_dict()
    (folder / "c.bin").write_bytes(records(60, 40).tobytes())
    with pytest.raises(DataError, match=r"c\.bin: the data is not what it was") as caught:
        load(folder).load_state_dict(state)
    assert caught.value.problem == "changed"
    lenient = load(folder, strict=False)
    with pytest.warns(RuntimeWarning, match="begins anew"):
        lenient.load_state_dict(state)
    assert len(labels(lenient)) == 100
    with pytest.raises(UsageError, match="version"):
        load(folder).load_state_dict({})


@pytest.mark.parametrize("threads", [0, 1])
@pytest.mark.parametrize("cut", [STRIDE, 3 * STRIDE, 100_000])
def test_a_file_cut_while_it_is_read_is_an_error_f20(tmp_path: Path, cut: int, threads: int) -> None:
    """Within the last page, where nothing faults but the bytes read as zeros, and by many pages."""
    path = tmp_path / "a.bin"
    path.write_bytes(records(20_000).tobytes())
    loader = load(path, 8, threads=threads)
    batches = iter(loader)
    next(batches)
    with path.open("r+b") as file:
        file.truncate(20_000 * STRIDE - cut)
    with pytest.raises(DataError, match=r"a\.bin.*(cut|changed)") as caught:
        for batch in batches:
            assert (batch["values"][:, 1] == batch["label"] + 0.5).all()
    assert (caught.value.problem, caught.value.file) == ("changed", str(path))
    with pytest.raises(DataError):
        iter(loader)


def test_a_file_is_cut_before_it_is_opened_f1(folder: Path) -> None:
    with (folder / "c.bin").open("ab") as file:
        file.write(b"1234567")
    with pytest.raises(DataError, match=r"c\.bin: byte 1260: record 63: 7 bytes are left of a record of 20") as caught:
        load(folder)
    assert (caught.value.problem, caught.value.offset, caught.value.record) == ("truncated", 1260, 63)


def test_read_in_place_of_mapped_gives_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mapped = labels(load(folder, shuffle="blocks"))
    monkeypatch.setenv("LAUNCHER_DATA_ACCESS", "read")
    with load(folder) as loader:
        assert labels(loader) == mapped
        assert loader.state_dict()["shuffle"] == "blocks"
        assert loader.statistics()["threads"] == 4
        assert str(folder) not in Path("/proc/self/maps").read_text()


# --- what a batch is made of ------------------------------------------------------------------------------------------


def test_parts_of_a_record(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"header" + b"".join(bytes([r, 7, r + 1, 0, r + 2, 0, 9, 9]) for r in range(10)))
    fields = {"pair": ("uint16", 2, 2), "first": ("uint8", (), 0)}
    with load(path, 10, fields=fields, stride=8, header_bytes=6, shuffle="none") as loader:
        (batch,) = loader
    assert batch["pair"].tolist() == [[r + 1, r + 2] for r in range(10)]
    assert batch["first"].tolist() == list(range(10))
    for wrong, text in (({"a": ("uint8", 9)}, "stride is 8"), ({"a": "int128"}, "int128"), ({}, "empty")):
        with pytest.raises(UsageError, match=text):
            load(path, fields=wrong, stride=8, header_bytes=6)


def test_npy_files_are_one_array(tmp_path: Path) -> None:
    whole = numpy.arange(120, dtype=numpy.float64).reshape(20, 3, 2)
    numpy.save(tmp_path / "a.npy", whole[:7])
    numpy.save(tmp_path / "b.npy", whole[7:])
    with Loader(tmp_path, 20, shuffle="none") as loader:
        (batch,) = loader
    assert batch["values"].dtype == numpy.float64 and (batch["values"] == whole).all()


def test_a_structured_npy_file_has_its_fields(tmp_path: Path) -> None:
    dtype = numpy.dtype([("x", "<f4", (2, 2)), ("y", "u1"), ("at", [("row", "<i2"), ("on", "?")])], align=True)
    table = numpy.zeros(9, dtype)
    table["x"] = numpy.arange(36).reshape(9, 2, 2)
    table["at"]["row"], table["at"]["on"] = numpy.arange(9), numpy.arange(9) % 2
    numpy.save(tmp_path / "a.npy", table)
    with Loader(tmp_path / "a.npy", 9, shuffle="none", fields=["at.row", "x", "at.on"]) as loader:
        (batch,) = loader
    assert list(batch) == ["at.row", "x", "at.on"]
    assert (batch["x"] == table["x"]).all() and (batch["at.row"] == table["at"]["row"]).all()
    assert batch["at.on"].dtype == bool and (batch["at.on"] == table["at"]["on"]).all()


@pytest.mark.parametrize(
    ("array", "text"),
    [
        (numpy.asfortranarray(numpy.zeros((4, 3))), "Fortran order"),
        (numpy.zeros(4, ">f4"), "big-endian"),
        (numpy.zeros(4, "U3"), "dtype '<U3'"),
        (numpy.zeros(()), "no dimensions"),
        (numpy.zeros((4, 0)), "no bytes"),
    ],
)
def test_npy_files_that_have_no_records(tmp_path: Path, array: Any, text: str) -> None:
    numpy.save(tmp_path / "a.npy", array)
    with pytest.raises(DataError, match=text) as caught:
        Loader(tmp_path / "a.npy", 2)
    assert caught.value.file == str(tmp_path / "a.npy")


def test_npy_files_that_are_damaged_f1(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    numpy.save(path, numpy.zeros((100, 10), numpy.float32))
    whole = path.read_bytes()
    for content, problem, offset in (
        (whole[:-50], "truncated", 128 + 98 * 40),
        (whole + b"more", "malformed", 128 + 4000),
        (whole[:60], "truncated", 60),
        (whole[:9], "truncated", 9),
        (b"\x93NUMPY\x07" + whole[7:], "malformed", 6),
        (whole.replace(b"'shape'", b"'shepe'"), "malformed", 10),
        (whole.replace(b"(100, 10)", b"(-10, 10)"), "malformed", 10),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError) as caught:
            Loader(path, 2)
        assert (caught.value.problem, caught.value.offset) == (problem, offset)


def test_files_of_different_fields_do_not_mix_f9(tmp_path: Path) -> None:
    numpy.save(tmp_path / "a.npy", numpy.zeros((4, 3), numpy.float32))
    numpy.save(tmp_path / "b.npy", numpy.zeros((4, 2), numpy.float32))
    with pytest.raises(DataError, match=r"b\.npy: its records are of 8 bytes .* those of .*a\.npy of 12") as caught:
        Loader(tmp_path, 2)
    assert caught.value.problem == "mismatch"


def test_transforms(folder: Path) -> None:
    calls: list[set[str]] = []

    def own(batch: dict[str, Any]) -> dict[str, Any]:
        calls.append(set(batch))
        return {"sum": batch["values"].sum(1), **batch}

    transform = [
        Normalise("values", [1.0, 2.0, 3.0], 2.0),
        OneHot("label", 103, "uint8"),
        Cast("values", "float64"),
        own,
    ]
    with load(folder, 103, transform=transform, shuffle="none", record_numbers=True) as loader:
        (batch,) = loader
    expected = (records(103)["values"] - [1.0, 2.0, 3.0]) / 2.0
    assert batch["values"].dtype == numpy.float64 and (batch["values"] == expected).all()
    assert (batch["label"] == numpy.eye(103, dtype=numpy.uint8)).all()
    assert (batch["sum"] == expected.sum(1)).all() and calls == [{"values", "label", "record"}]
    assert batch["record"].tolist() == list(range(103))
    whole = load(folder, transform=Normalise("values", 1, numpy.array([2.0])), shuffle="none")
    assert next(iter(whole))["values"][3].tolist() == [1.0, 1.25, -2.0]
    for wrong in (
        OneHot("none", 3),
        Normalise("values", [1, 2]),
        Normalise("label", 0, 0),
        Cast("label", "float16"),
        3,
    ):
        with pytest.raises(UsageError, match="transform"):
            load(folder, transform=wrong)
    with pytest.raises(UsageError, match="native ones come first"):
        load(folder, transform=[own, Cast("label", "int32")])


@pytest.mark.parametrize("threads", [0, 1])
def test_a_neighbour_stands_in_for_a_bad_record_f9(
    folder: Path, capfd: pytest.CaptureFixture[str], threads: int
) -> None:
    options: dict[str, Any] = {"transform": OneHot("label", 100), "tail": "short"}  # 100, 101 and 102 are no class
    with pytest.raises(DataError, match=r"record 6[012]: a value is out of the range") as caught:
        list(load(folder, **options))
    assert (caught.value.problem, caught.value.file) == ("mismatch", str(folder / "c.bin"))
    with load(folder, on_bad="substitute", threads=threads, **options) as loader:
        batches = list(loader)
        assert loader.statistics()["substituted"] == 3
    assert len(batches) == 26
    masks = numpy.concatenate([batch["mask"] for batch in batches])
    classes = numpy.concatenate([batch["label"].argmax(1) for batch in batches])
    assert (~masks).sum() == 3 and (classes[~masks] == 0).all()  # after the last record comes the first
    assert sorted(classes[masks].tolist()) == list(range(100))
    assert "3 records could not be read" in capfd.readouterr().err
    with pytest.raises(DataError, match="more than 2 records"):
        list(load(folder, on_bad="substitute", bad_limit=2, **options))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": True}, "batch_size is True"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "seed is"),
        ({"tail": "keep"}, "tail is 'keep'; expected 'drop', 'pad', 'short'"),
        ({"shuffle": "some"}, "shuffle is 'some'"),
        ({"output": "jax"}, "output is 'jax'"),
        ({"on_bad": "ignore"}, "on_bad is 'ignore'"),
        ({"ring": 0}, "ring is 0"),
        ({"ring_limit": 2}, "ring_limit is 2"),
        ({"ring_wait": -1}, "ring_wait is -1; expected seconds"),
        ({"ring_wait": "5"}, "ring_wait is '5'; expected seconds"),
        ({"threads": -1}, "threads is -1"),
        ({"rank": 0}, "go together"),
        ({"rank": 3, "world_size": 3}, "rank is 3; expected 0 to 2"),
        ({"extent": 0, "shuffle": "blocks"}, "extent is 0"),
        ({"no_such_option": 1}, "no_such_option"),
        ({"fields": {"mask": ("uint8", 20)}, "tail": "pad"}, "field 'mask'"),
    ],
)
def test_wrong_arguments(folder: Path, options: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        load(folder, **options)


def test_numbers_may_be_numpys(folder: Path) -> None:
    given = {"seed": 3, "rank": 1, "world_size": 2, "ring": 2, "ring_limit": 8, "threads": 0, "bad_limit": 1}
    found = []
    for number in (int, numpy.int64, numpy.uint8):
        options: dict[str, Any] = {name: number(value) for name, value in given.items()}
        with load(folder, number(4), shuffle="blocks", extent=number(3), window=number(2), **options) as loader:
            loader.set_epoch(number(2))
            found.append((labels(loader), loader.state_dict()))
    assert found[0] == found[1] == found[2]
    json.dumps(found)
    with pytest.raises(UsageError, match="epoch is"):
        loader.set_epoch(numpy.int64(-1))  # type: ignore[arg-type]


def test_statistics_can_be_asked_after_the_end(folder: Path) -> None:
    never, loader = load(folder), load(folder)
    assert never.statistics()["batches"] == 0
    list(loader)
    before = loader.statistics()
    for one in (never, loader):
        one.close()
        one.close()
    assert loader.statistics() == before and before["batches"] == 25
    assert never.statistics()["batches"] == 0


def test_the_environment_says_which_rank_this_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "5")
    loader = load(folder)
    assert (loader.rank, loader.world_size, len(loader)) == (2, 5, 5)
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UsageError, match="WORLD_SIZE is 'two'"):
        load(folder)


def test_steps_are_told_to_the_supervisor(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from launcher.rank.status import create_page

    page = create_page(str(tmp_path / "page"), 0)
    monkeypatch.setenv("LAUNCHER_STATUS_PAGE", page.path)

    def seen() -> tuple[int, int]:
        shown = page.snapshot()
        return shown["step"], shown["samples"]

    list(load(folder, progress=True))
    begin = seen()
    assert begin[0] >= 25
    batches = iter(load(folder, progress=True))
    for _ in range(3):
        next(batches)
    assert seen() == (begin[0] + 3, begin[1] + 12)


def flags_of(path: Path) -> set[str]:
    """What this process has told the kernel of a mapped file's pages (VmFlags of proc(5))."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    next(line for line in lines if line.endswith(str(path)))
    return set(next(line for line in lines if line.startswith("VmFlags:")).split()[1:])


def test_a_set_is_kept_in_huge_pages_where_memory_allows(tmp_path: Path) -> None:
    small, large = tmp_path / "small.npy", tmp_path / "large.npy"
    numpy.save(small, records(100_000))
    with load(small, format="auto", fields=None) as loader:
        next(iter(loader))
        assert "hg" in flags_of(small) and "rr" not in flags_of(small)
    # Of a set that no memory holds, only what is touched is to be read: it is sparse, and stays so.
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    numpy.lib.format.open_memmap(large, "w+", records(0).dtype, (2 * memory // STRIDE,)).flush()
    before = large.stat().st_blocks
    with load(large, format="auto", fields=None) as loader:
        next(iter(loader))
        assert "rr" in flags_of(large) and "hg" not in flags_of(large)
    with load(large, format="auto", fields=None, shuffle="none") as loader:
        next(iter(loader))
        assert not {"rr", "hg"} & flags_of(large)
    assert large.stat().st_blocks == before
