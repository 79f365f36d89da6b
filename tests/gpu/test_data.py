"""Batches of a loader on a GPU, copied there or made there, against those of the same loader on the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.torch]

WAYS: dict[str, dict[str, Any]] = {
    "copied": {"device": "cuda"},
    "copied, not pinned": {"device": "cuda", "pin": False},
    "copied, by two threads": {"device": "cuda", "threads": 2},
    "cached": {"device": "cuda:0", "device_cache": True},
}
FEW, MANY = 1000, 70_001  # records whose order is a table, and a network


def write(folder: Path, records: int) -> Path:
    """Fields of several types and lengths: rows that go by 16, 8, 4, 2 bytes and by single ones."""
    import numpy

    folder.mkdir()
    random = numpy.random.default_rng(records)
    shapes = [("wide", "<f4", (32,)), ("values", "<f4", (33,)), ("image", "u1", (5, 3)), ("half", "<f2", (3,))]
    array: Any = numpy.zeros(records, dtype=[*shapes, ("label", "<i8"), ("flag", "?"), ("long", "<f8", (127,))])
    for name in array.dtype.names:
        part = array[name]
        part[...] = random.integers(0, 2 if name == "flag" else 7, part.shape)
    numpy.save(folder / "records.npy", array)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    folder = tmp_path_factory.mktemp("data")

    def find(records: int) -> Path:
        path = folder / str(records)
        return path if path.exists() else write(path, records)

    return find


def make(path: Path, batch: int, way: dict[str, Any], **options: Any) -> Any:
    from launcher.data import Loader

    return Loader(path, batch, allow_empty=True, progress=False, **{"output": "torch", "pin": False, **options, **way})


def assert_same(batch: dict[str, Any], wanted: dict[str, Any]) -> None:
    import torch

    assert list(batch) == list(wanted)
    for name, column in wanted.items():
        assert batch[name].device.type == "cuda"
        assert batch[name].dtype == column.dtype
        assert torch.equal(batch[name].cpu(), column), name


def host_batches(loader: Any) -> Iterator[dict[str, Any]]:
    """Batches that stay as they are."""
    return ({name: column.clone() for name, column in batch.items()} for batch in loader)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tail", ["drop", "pad", "short"])
@pytest.mark.parametrize(("records", "shuffle"), [(FEW, "full"), (MANY, "full"), (FEW, "none"), (FEW, "blocks")])
def test_batches_are_the_hosts(data: Callable[[int], Path], way: str, tail: str, records: int, shuffle: str) -> None:
    """Two epochs on each of three ranks; batches are looked at when the epoch is over."""
    batch = records // 11
    options: dict[str, Any] = {"shuffle": shuffle, "tail": tail, "seed": 3, "world_size": 3, "record_numbers": True}
    if shuffle == "blocks":
        options |= {"extent": 7, "window": 3, "lanes": 2}
    for rank in range(3):
        host = make(data(records), batch, {}, rank=rank, **options)
        loader = make(data(records), batch, WAYS[way], rank=rank, **options)
        assert len(loader) == len(host)
        for _ in range(2):
            wanted = list(host_batches(host))
            found = list(loader)
            for one, other in zip(found, wanted, strict=True):
                assert_same(one, other)
            assert loader.state_dict() == host.state_dict()
        counts = ("batches", "records", "substituted")
        assert [loader.statistics()[name] for name in counts] == [host.statistics()[name] for name in counts]
        host.close()
        loader.close()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("records", [FEW, MANY])
def test_a_state_goes_on_anywhere(data: Callable[[int], Path], way: str, records: int) -> None:
    """Taken on the device in the middle of an epoch, where copies are ahead, for another batch and world on the host,
    and back."""
    with (
        make(data(records), 40, WAYS[way], tail="pad", seed=1) as loader,
        make(data(records), 24, {}, tail="pad", rank=1, world_size=2) as host,
    ):
        batches = iter(loader)
        for _ in range(5):
            next(batches)
        state = loader.state_dict()
        assert state["position"] == 200
        with make(data(records), 24, WAYS[way], tail="pad", rank=1, world_size=2) as other:
            for one in (host, other):
                one.load_state_dict(state)
            for found, wanted in zip(other, host_batches(host), strict=True):
                assert_same(found, wanted)
            assert other.state_dict() == host.state_dict()


@pytest.mark.parametrize("way", WAYS)
def test_transforms(data: Callable[[int], Path], way: str) -> None:
    from launcher.data import Cast, Normalise, OneHot

    def double(batch: dict[str, Any]) -> dict[str, Any]:
        return {**batch, "values": batch["values"] * 2}

    changes = [Normalise("values", 1.0, 2.0), OneHot("label", 7), Cast("image", "float32"), double]
    with (
        make(data(FEW), 64, WAYS[way], transform=changes) as loader,
        make(data(FEW), 64, {}, transform=changes) as host,
    ):
        for found, wanted in zip(loader, host_batches(host), strict=True):
            assert_same(found, wanted)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shuffle", ["full", "none"])
def test_substitutes_are_masked(data: Callable[[int], Path], way: str, shuffle: str) -> None:
    from launcher.data import OneHot

    options: dict[str, Any] = {"transform": OneHot("label", 5), "on_bad": "substitute", "tail": "pad"}
    options["shuffle"] = shuffle
    with make(data(FEW), 37, WAYS[way], **options) as loader, make(data(FEW), 37, {}, **options) as host:
        for found, wanted in zip(loader, host_batches(host), strict=True):
            assert_same(found, wanted)
            assert not wanted["mask"].all()


@pytest.mark.parametrize("way", [way for way in WAYS if way != "cached"])
def test_an_error_comes_at_its_batch(data: Callable[[int], Path], way: str) -> None:
    from launcher.data import OneHot
    from launcher.errors import DataError

    options: dict[str, Any] = {"transform": OneHot("label", 6), "shuffle": "none"}
    with make(data(FEW), 1, WAYS[way], **options) as loader, make(data(FEW), 1, {}, **options) as host:
        for one in (loader, host):
            with pytest.raises(DataError, match="out of the range"):
                list(one)
        assert loader.state_dict() == host.state_dict()


@pytest.mark.parametrize("way", [way for way in WAYS if way != "cached"])
def test_columns_of_any_length_are_copied(tmp_path: Path, way: str) -> None:
    import torch

    for number in range(50):
        (tmp_path / f"{number:02}.bin").write_bytes(bytes([number]) * (number * 7 % 23))
    with (
        make(tmp_path, 4, WAYS[way], format="files", tail="pad") as loader,
        make(tmp_path, 4, {}, format="files", tail="pad") as host,
    ):
        for found, wanted in zip(loader, host, strict=True):
            assert torch.equal(found["data"].values.cpu(), wanted["data"].values)
            assert torch.equal(found["data"].offsets.cpu(), wanted["data"].offsets)
            assert torch.equal(found["mask"].cpu(), wanted["mask"])


@pytest.mark.parametrize("way", WAYS)
def test_work_on_other_streams(data: Callable[[int], Path], way: str) -> None:
    """The GPU is behind all the time, and batches are dropped before it has read them: memory must wait for it."""
    import torch

    streams = [torch.cuda.Stream() for _ in range(2)]
    with make(data(MANY), 3000, WAYS[way]) as loader, make(data(MANY), 3000, {}) as host:
        wanted = [float(batch["long"].sum()) for batch in host]
        sums = []
        batches = iter(loader)
        for step in range(len(wanted)):
            with torch.cuda.stream(streams[step % 2]):
                batch = next(batches)
                torch.cuda._sleep(3_000_000)  # some ms: cycles
                sums.append(batch["long"].sum())
                del batch
        assert [float(found) for found in sums] == wanted


def test_the_cache_may_go_before_the_gpu_has_read_it(data: Callable[[int], Path]) -> None:
    import torch

    with make(data(MANY), 60_000, {}) as host:
        wanted = next(host_batches(host))
    stream = torch.cuda.Stream()
    loader = make(data(MANY), 60_000, WAYS["cached"])
    with torch.cuda.stream(stream):
        batches = iter(loader)
        torch.cuda._sleep(100_000_000)
        batch = next(batches)
    loader.close()
    rest = [torch.full((1 << 20,), 255, dtype=torch.uint8, device="cuda") for _ in range(200)]  # memory that is free
    stream.synchronize()
    assert_same(batch, wanted)
    del rest


def test_a_set_that_does_not_fit(tmp_path: Path) -> None:
    import numpy
    import torch

    from launcher.errors import UsageError

    total = torch.cuda.mem_get_info(0)[1]
    records = total // 4096 + 1
    header = tmp_path / "records.npy"
    with header.open("wb") as stream:
        described = {"descr": "|u1", "fortran_order": False, "shape": (records, 4096)}
        numpy.lib.format.write_array_header_1_0(stream, described)
        stream.truncate(stream.tell() + records * 4096)  # nothing is written
    with (
        make(tmp_path, 256, WAYS["cached"]) as loader,
        pytest.raises(UsageError, match=rf"{records} records take {-(-records * 4096 >> 20)} MiB of GPU memory"),
    ):
        next(iter(loader))


def test_fields_that_no_gpu_holds(tmp_path: Path) -> None:
    from launcher.errors import UsageError

    (tmp_path / "one.bin").write_bytes(b"one")
    with pytest.raises(UsageError, match="'data' is ragged"):
        make(tmp_path, 1, WAYS["cached"], format="files")
