"""Faces for torch: tensors of the loader's memory, DataLoader, a sampler."""

from __future__ import annotations

import itertools
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

numpy = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")

from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

from launcher.data import Loader, sampler, torch_dataset  # noqa: E402
from launcher.errors import DataError, UsageError  # noqa: E402

pytestmark = pytest.mark.torch


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "numbers.npy"
    numpy.save(path, numpy.repeat(numpy.arange(1000, dtype=numpy.float32), 4).reshape(1000, 4))
    return path


@pytest.mark.parametrize("threads", [0, 2])
def test_tensors_share_memory_and_keep_it(path: Path, threads: int) -> None:
    with Loader(path, 8, output="torch", threads=threads, tail="pad", record_numbers=True, ring_limit=200) as loader:
        kept: list[tuple[Any, Any]] = []
        pointers = set()
        for step, batch in enumerate(loader):
            assert batch["values"].dtype == torch.float32 and batch["values"].shape == (8, 4)
            assert batch["mask"].dtype == torch.bool and batch["record"].dtype == torch.int64
            assert (batch["values"][:, 0] == batch["record"]).all()
            pointers.add(batch["values"].data_ptr())
            if step % 10 == 0:
                kept.append((batch["values"][1:3].T, batch["values"][1:3].T.clone()))  # the tensor itself is dropped
        assert all((tensor == copy).all() for tensor, copy in kept)
        assert len(kept) < len(pointers) <= len(kept) + 4
        batch["values"].add_(1)


def test_bfloat16_is_torchs(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    values = torch.arange(32, dtype=torch.float32).to(torch.bfloat16)
    path.write_bytes(values.view(torch.int16).numpy().tobytes())
    with Loader(path, 8, format="fixed", fields={"x": ("bfloat16", 4)}, shuffle="none", output="torch") as loader:
        (batch,) = loader
    assert batch["x"].dtype == torch.bfloat16 and (batch["x"].reshape(-1) == values).all()


def test_a_dataset_for_dataloader(path: Path) -> None:
    dataset = torch_dataset(path, 100, seed=3)
    batches = DataLoader(dataset, batch_size=None)
    assert len(batches) == 10
    first = [int(number) for batch in batches for number in batch["values"][:, 0]]
    assert sorted(first) == list(range(1000))
    dataset.set_epoch(0)
    assert [int(number) for batch in batches for number in batch["values"][:, 0]] == first
    dataset.set_epoch(0)
    for step, _ in enumerate(dataset):
        if step == 3:
            break
    other = torch_dataset(path, 50, seed=3)
    other.load_state_dict(dataset.state_dict())
    assert [int(number) for batch in other for number in batch["values"][:, 0]] == first[400:]
    with pytest.raises(UsageError, match="num_workers=0"):
        iter(DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context="spawn"))


def test_a_dataset_of_batches_is_not_batched_again(path: Path) -> None:
    dataset = torch_dataset(path, 100)
    for options in ({}, {"batch_size": 4}):
        with pytest.raises(UsageError, match="the items of this dataset are batches: pass batch_size=None to DataLoad"):
            next(iter(DataLoader(dataset, **options)))
    assert next(iter(DataLoader(dataset, batch_size=None)))["values"].shape == (100, 4)
    assert next(iter(torch_dataset(path, 100, output="torch")))["values"].shape == (100, 4)
    with pytest.raises(UsageError, match="output is given; a dataset for DataLoader has torch tensors"):
        torch_dataset(path, 100, output="numpy")


def test_a_stream_for_the_cpu_is_torchs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, data = tmp_path / "input/config", tmp_path / "input/data"
    config.mkdir(parents=True)
    data.mkdir()
    channel = {"TrainingInputMode": "Pipe", "ContentType": "text/csv"}
    (config / "inputdataconfig.json").write_text(json.dumps({"train": channel}))
    monkeypatch.setenv("SAGEMAKER_BASE_DIR", str(tmp_path))
    os.mkfifo(data / "train_0")
    writer = threading.Thread(target=(data / "train_0").write_text, args=("1,2\n3,4\n",))
    writer.start()
    with Loader("train", numpy.int64(2), device="cpu", shuffle="none", timeout_s=30) as loader:
        (batch,) = loader
        writer.join()
    assert torch.equal(batch["values"], torch.tensor([[1.0, 2.0], [3.0, 4.0]]))


def test_what_a_sampler_can_not_be_of_is_refused() -> None:
    for arguments, words in (
        ((-3, 2, 0), "dataset is -3; expected a whole number of at least 0"),
        ((None, 2, 0), "dataset is None; expected one that has a length"),
        ((10, 2, 0, True, -1), "seed is -1"),
    ):
        with pytest.raises(UsageError, match=words):
            sampler(*arguments)  # type: ignore[arg-type]
    one = sampler(numpy.int64(10), numpy.int64(2), numpy.int64(0), seed=numpy.int64(3))
    one.set_epoch(numpy.int64(1))
    with pytest.raises(UsageError, match="epoch is 'x'"):
        one.set_epoch("x")  # type: ignore[arg-type]
    other = sampler(10, 2, 0, seed=3)
    other.set_epoch(1)
    assert list(one) == list(other)


@pytest.mark.parametrize(("ranks", "records"), [(1, 10), (3, 100), (8, 5), (20, 3001)])
@pytest.mark.parametrize("drop_last", [True, False])
def test_a_sampler_deals_as_distributed_sampler_does(ranks: int, records: int, drop_last: bool) -> None:
    from torch.utils.data.distributed import DistributedSampler

    ours = [sampler(records, ranks, rank, drop_last=drop_last) for rank in range(ranks)]
    theirs = [DistributedSampler(range(records), ranks, rank, drop_last=drop_last) for rank in range(ranks)]
    assert [len(one) for one in ours] == [len(one) if records >= ranks or not drop_last else 0 for one in theirs]
    dealt = [list(one) for one in ours]
    assert [len(indices) for indices in dealt] == [records // ranks if drop_last else -(-records // ranks)] * ranks
    everything = [index for step in zip(*dealt, strict=True) for index in step]
    assert len(set(everything)) == min(records, len(everything))
    if not drop_last and records >= ranks:
        assert everything[records:] == everything[: len(everything) - records]
    again = [list(one) for one in ours]  # another epoch
    if records > 100:
        assert again != dealt
    for one in ours:
        one.set_epoch(0)
    assert [list(one) for one in ours] == dealt
    plain = [list(sampler(records, ranks, rank, shuffle=False)) for rank in range(ranks)]
    assert plain[0] == [position % records for position in range(0, -(-records // ranks) * ranks, ranks)]


def test_a_sampler_goes_on_with_other_ranks() -> None:
    before = [sampler(1000, 4, rank, seed=5) for rank in range(4)]
    taken = list(itertools.chain.from_iterable(itertools.islice(iter(one), 77) for one in before))
    state = before[0].state_dict(samples=77)
    after = [sampler(1000, 3, rank, seed=5, drop_last=False) for rank in range(3)]
    for one in after:
        one.load_state_dict(state)
        one.set_epoch(0)
    rest = [list(one) for one in after]
    assert len(rest[0]) == len(rest[2]) == -(-(1000 - 4 * 77) // 3)
    assert set(taken).isdisjoint(rest[0]) and set(taken) | set(itertools.chain.from_iterable(rest)) == set(range(1000))
    with pytest.raises(DataError, match="1000 records and are 999"):
        sampler(999, 1, 0).load_state_dict(state)


def test_a_sampler_in_dataloader() -> None:
    dataset = TensorDataset(torch.arange(50))
    loader = DataLoader(dataset, batch_size=5, sampler=sampler(dataset))
    assert sorted(int(number) for (batch,) in loader for number in batch) == list(range(50))


def test_memory_is_pinned_where_there_is_cuda(path: Path) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="no CUDA device"):
            list(Loader(path, 8, output="torch", pin=True))
        return
    with Loader(path, 8, output="torch", pin=True, record_numbers=True) as loader:
        copies = []
        for batch in loader:
            assert batch["values"].is_pinned()
            copies.append((batch["values"].to("cuda", non_blocking=True), batch["record"].clone()))
            del batch
        assert all((copy[:, 0].cpu() == numbers).all() for copy, numbers in copies)
