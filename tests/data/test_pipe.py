"""Pipe mode: real FIFOs, filled by real writers; and the ranks of a host that share one."""

from __future__ import annotations

import gzip
import json
import os
import signal
import struct
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.data import Loader, Normalise
from launcher.data.catalogue import open_source
from launcher.data.channel import Place
from launcher.data.pipe import Stream, StreamOptions, open_stream
from launcher.errors import DataError, UsageError

DEADLINE_S = 30.0


class Writers:
    """What fills FIFOs, as the platform does: each epoch's is made, opened and written by a thread."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "train"
        self.threads: list[threading.Thread] = []
        self.cut_off: list[int] = []  # epochs whose reader left before the end

    def fill(self, epoch: int, *pieces: bytes, path: Path | None = None) -> None:
        fifo = f"{path or self.path}_{epoch}"

        def write() -> None:
            if not os.path.exists(fifo):
                os.mkfifo(fifo)
            try:
                with open(fifo, "wb", buffering=0) as file:
                    for piece in pieces:
                        for begin in range(0, len(piece), 1 << 20):
                            file.write(piece[begin : begin + (1 << 20)])
            except BrokenPipeError:
                self.cut_off.append(epoch)

        self.threads.append(threading.Thread(target=write, daemon=True))
        self.threads[-1].start()

    def wait(self) -> None:
        for thread in self.threads:
            thread.join(DEADLINE_S)
            assert not thread.is_alive()

    def place(self, **changes: Any) -> Place:
        return Place(**{"name": "train", "path": str(self.path), "mode": "Pipe", "content_type": "text/csv", **changes})

    def open(self, batch: int = 4, *, place: Place | None = None, format_options: Any = None, **options: Any) -> Stream:
        given = {"timeout_s": DEADLINE_S, "shuffle": "none", **options}
        return open_stream(place or self.place(), StreamOptions(batch, **given), **(format_options or {}))


@pytest.fixture
def writers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Writers:
    """For the channel ``train`` of a job whose configuration says Pipe."""
    config, data = (tmp_path / "input" / name for name in ("config", "data"))
    config.mkdir(parents=True)
    data.mkdir()
    channel = {"TrainingInputMode": "Pipe", "ContentType": "text/csv"}
    (config / "inputdataconfig.json").write_text(json.dumps({"train": channel}))
    monkeypatch.setenv("SAGEMAKER_BASE_DIR", str(tmp_path))
    return Writers(data)


def csv(begin: int, end: int) -> bytes:
    return b"".join(b"%d,%d\n" % (number, 10 * number) for number in range(begin, end))


def read(stream: Stream, epoch: int = 0, position: int = 0) -> list[dict[str, Any]]:
    stream.begin(epoch, position)
    return list(rest(stream))


def rest(stream: Stream) -> Iterator[dict[str, Any]]:
    while (batch := stream.next_batch()) is not None:
        yield batch


def numbers(batches: list[dict[str, Any]]) -> list[int]:
    return [int(row[0]) for batch in batches for row in batch["values"]]


# --- waiting, ends and errors ---------------------------------------------------------------------------------------


def test_f22_a_fifo_that_is_not_there_yet_is_waited_for(writers: Writers) -> None:
    """F22: absent when the epoch begins; its writer then needs a while to come, and to send the second half."""
    stream = writers.open()
    assert not os.path.exists(f"{writers.path}_0")
    begun, half = threading.Event(), threading.Event()

    def write() -> None:
        begun.wait(DEADLINE_S)
        os.mkfifo(f"{writers.path}_0")
        with open(f"{writers.path}_0", "wb", buffering=0) as file:
            file.write(csv(0, 10))
            assert half.wait(DEADLINE_S)  # the reader has all of the first half but its last, open step
            file.write(csv(10, 18))

    thread = threading.Thread(target=write)
    thread.start()
    begun.set()
    stream.begin(0)
    first = [stream.next_batch(), stream.next_batch()]
    half.set()
    assert numbers([*first, *rest(stream)]) == list(range(16))  # type: ignore[list-item]
    thread.join(DEADLINE_S)
    stream.close()


@pytest.mark.parametrize("sent", [b"", csv(0, 6)], ids=["nothing", "some"])
def test_f22_a_writer_that_stalls_is_named(writers: Writers, sent: bytes) -> None:
    """F22: its FIFO is open and nothing comes for longer than the timeout."""
    os.mkfifo(f"{writers.path}_3")
    stream = writers.open(timeout_s=0.1)
    keeps_it_open = os.open(f"{writers.path}_3", os.O_RDWR)
    os.write(keeps_it_open, sent)
    with pytest.raises(DataError, match=r"train_3: byte \d+: channel train, epoch 3: .*0\.1 s.*alive") as caught:
        read(stream, 3)
    assert caught.value.problem == "unreadable" and caught.value.file == f"{writers.path}_3"
    os.close(keeps_it_open)
    stream.close()


def test_f22_an_epoch_that_never_comes_is_an_error(writers: Writers) -> None:
    """F22: there is no FIFO; the message says which, and what to look at."""
    stream = writers.open(timeout_s=0.05)
    with pytest.raises(DataError, match=r"train_0: .*epoch 0: the FIFO did not appear in 0\.05 s; .*Pipe"):
        stream.begin(0)
    stream.close()


def test_f22_after_an_early_end_the_next_epoch_is_another_fifo(writers: Writers) -> None:
    """F22: the writer of the epoch that was left sees a closed pipe; epoch 1 is read from <channel>_1."""
    for epoch in range(2):
        writers.fill(epoch, csv(epoch * 1000, epoch * 1000 + 400_000))
    stream = writers.open(ring_bytes=1 << 16)
    stream.begin(0)
    assert numbers([stream.next_batch()]) == [0, 1, 2, 3]  # type: ignore[list-item]
    stream.begin(1)
    assert numbers([stream.next_batch()]) == [1000, 1001, 1002, 1003]  # type: ignore[list-item]
    stream.close()
    writers.wait()
    assert sorted(writers.cut_off) == [0, 1]


def test_a_stream_without_records_is_an_error(writers: Writers) -> None:
    """F10 for a stream."""
    writers.fill(0)
    stream = writers.open()
    with pytest.raises(DataError, match=r"train_0: .*the stream has no records"):
        stream.begin(0)
    stream.close()


def test_f11_fewer_records_than_a_step(writers: Writers) -> None:
    """F11: drop is an error unless it is allowed; pad gives one step, masked."""
    for epoch in range(2):
        writers.fill(epoch, csv(0, 3))
    with Loader("train", 4) as loader, pytest.raises(DataError, match="fewer records than the 4 of one step"):
        list(loader)
    with Loader("train", 4, tail="pad", shuffle="none") as loader:
        loader.set_epoch(1)
        (batch,) = loader
        assert batch["mask"].tolist() == [True, True, True, False] and numbers([batch]) == [0, 1, 2, 0]


def test_bad_records_are_named_or_substituted(writers: Writers) -> None:
    """F9 for a stream: the FIFO, the byte and the number of the record."""
    for epoch in range(2):
        writers.fill(epoch, csv(0, 5) + b"x,1\n" + csv(6, 8))
    stream = writers.open()
    stream.begin(0)
    stream.next_batch()
    for _ in range(2):  # it stays an error
        with pytest.raises(DataError, match=r"train_0: byte 24: record 5: column 0 .* a number$") as caught:
            stream.next_batch()
    assert (caught.value.offset, caught.value.record, caught.value.file) == (24, 5, f"{writers.path}_0")
    stream.close()
    stream = writers.open(8, on_bad="substitute")
    (batch,) = read(stream, 1)
    assert numbers([batch]) == [0, 1, 2, 3, 4, 4, 6, 7] and batch["mask"].tolist() == [True] * 5 + [False] + [True] * 2
    assert stream.statistics()["substituted"] == 1 and "record 5" in stream.statistics()["first_bad"]
    stream.close()


# --- formats ----------------------------------------------------------------------------------------------------------


def recordio(payload: bytes) -> bytes:
    return struct.pack("<II", 0xCED7230A, len(payload)) + payload + b"\0" * (-len(payload) % 4)


def protobufs(rows: int) -> bytes:
    from launcher import _data

    values = np.arange(rows * 3, dtype=np.float32).reshape(rows, 3)
    labels = np.arange(rows, dtype=np.float64).reshape(rows, 1)
    fields = [(("values", 0, 0, [3]), values, None, None), (("label_values", 0, 1, [1]), labels, None, None)]
    return _data.encode_record_proto(fields, 0, rows)


def tfrecords(rows: int) -> bytes:
    from launcher import _data

    return b"".join(_data.encode_tfrecord(b"r" * number) for number in range(rows))


FORMATS: dict[str, tuple[str, Callable[[], bytes], dict[str, Any]]] = {
    "recordio": (".rec", lambda: b"".join(recordio(b"x" * n) for n in range(20)), {}),
    "recordio-protobuf": (".pbr", lambda: protobufs(20), {}),
    "tfrecord": (".tfrecord", lambda: tfrecords(20), {}),
    "fixed": (".bin", lambda: bytes(range(240)), {"fields": {"a": ("uint8", 4), "b": "int64"}}),
    "csv": (".csv", lambda: b"y,a,b\n" + b'1,2,"3"\r\n\n4,5,6\n' * 10, {"header": True, "label_size": 1}),
    "libsvm": (".libsvm", lambda: b"# made by hand\n1 1:2 3:4 # x\n-1 2:5\n" * 10, {"columns": 4, "base": 1}),
    "jsonlines": (".jsonl", lambda: b'{"a": 1, "b": [1, 2.5], "c": "text"}\n' * 20, {}),
    "lines": (".txt", lambda: b"one\n\nthree\r\n" * 7, {}),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_stream_gives_what_a_file_of_the_same_bytes_gives(
    name: str, writers: Writers, tmp_path: Path, read_all: Callable[[Any], dict[str, list[Any]]]
) -> None:
    suffix, make, options = FORMATS[name]
    content = make()
    writers.fill(0, content)
    file = tmp_path / f"whole{suffix}"
    file.write_bytes(content)
    wanted = read_all(open_source(file, format=name, **options).source)
    fields = options.get("fields")
    of_format = {key: value for key, value in options.items() if key != "fields"}
    stream = writers.open(6, format=name, tail="short", fields=fields, format_options=of_format)
    found: dict[str, list[Any]] = {key: [] for key in wanted}
    for batch in read(stream):
        for key, rows in found.items():
            rows += list(batch[key])
    assert len(next(iter(found.values()))) in (20, 21)
    for key, rows in wanted.items():
        assert all(np.array_equal(one, other) for one, other in zip(rows, found[key], strict=True)), key
    stream.close()


def test_gzip_is_undone(writers: Writers) -> None:
    """CompressionType Gzip: the objects follow each other as members; a stream that is cut is an error."""
    packed = gzip.compress(csv(0, 5)) + gzip.compress(csv(5, 12))
    writers.fill(0, packed)
    writers.fill(1, packed[:-20])
    writers.fill(2, csv(0, 12))
    stream = writers.open(compression="gzip")
    assert numbers(read(stream, 0)) == list(range(12))
    with pytest.raises(DataError, match=r"train_1: .*ends inside a gzip member"):
        read(stream, 1)
    with pytest.raises(DataError, match=r"train_2: .*gzip did not make"):
        read(stream, 2)
    stream.close()


def test_what_a_stream_can_not_do_is_refused(writers: Writers) -> None:
    cases: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("tar can not be read from a pipe", {"content_type": "application/x-tar"}, {}),
        ("pass format=", {"content_type": ""}, {}),
        ("each record is a whole object", {"record_wrapper": "RecordIO"}, {"format": "csv"}),
        ("shuffle is 'full'; .* inside a window", {}, {"shuffle": "full"}),
        ("on_bad is 'skip'", {}, {"on_bad": "skip"}),
        ("is in File mode", {"mode": "File"}, {}),
        ("batch_size is 0", {}, {"batch_size": 0}),
        ("format fixed needs fields", {}, {"format": "fixed"}),
    ]
    for text, place, options in cases:
        with pytest.raises(UsageError, match=text):
            open_stream(writers.place(**place), StreamOptions(**{"batch_size": 4, **options}))
    with pytest.raises(UsageError, match="rank 1 of 2 was asked for"):
        open_stream(writers.place(), StreamOptions(4), rank=1, world_size=2)
    with pytest.raises(UsageError, match="no option 'bogus'"):
        writers.fill(0, csv(0, 9))
        stream = writers.open(format_options={"bogus": 1})
        stream.begin(0)


# --- order and state --------------------------------------------------------------------------------------------------


def test_the_window_mixes_by_seed_and_epoch(writers: Writers) -> None:
    for epoch in (0, 1):
        writers.fill(epoch, csv(0, 600))
    for number in range(2):
        writers.fill(0, csv(0, 600), path=writers.path.with_name(f"again{number}"))
    stream = writers.open(20, shuffle="window", window=100, seed=3)
    first, second = (numbers(read(stream, epoch)) for epoch in (0, 1))
    stream.close()
    assert sorted(first) == sorted(second) == list(range(600)) and first != second
    assert all(number < 20 * (step // 20 + 1) + 100 for step, number in enumerate(first))
    orders = []
    for number, seed in enumerate((3, 4)):
        place = writers.place(path=str(writers.path.with_name(f"again{number}")))
        stream = writers.open(20, place=place, shuffle="window", window=100, seed=seed)
        orders.append(numbers(read(stream)))
        stream.close()
    assert orders[0] == first and orders[1] != first


def test_f14_a_stream_goes_on_where_its_state_was_taken(writers: Writers) -> None:
    """F14 for a stream: with another batch size, each record comes once; the epoch is read up to the place again."""
    before = Loader("train", 8, window=50, seed=1)
    writers.fill(0, csv(0, 400))
    iteration = iter(before)
    seen = [next(iteration) for _ in range(7)]
    state = json.loads(json.dumps(before.state_dict()))
    assert state["position"] == 56 and state["epoch"] == 0
    kept = numbers(seen)
    before.close()
    writers.wait()
    os.unlink(f"{writers.path}_0")

    after = Loader("train", 16, window=50, seed=1, tail="short")
    after.load_state_dict(state)
    writers.fill(0, csv(0, 400))
    writers.fill(1, csv(400, 420))
    assert sorted(kept + numbers(list(after))) == list(range(400))
    assert after.epoch == 1 and sorted(numbers(list(after))) == list(range(400, 420))
    other = {**state, "window": 60}
    with pytest.raises(UsageError, match="window 60, here it is 50; a stream goes on only as it was begun"):
        after.load_state_dict(other)
    with pytest.raises(UsageError, match="hosts 3, here it is 1"):
        after.load_state_dict({**state, "hosts": 3})
    after.close()


def test_the_loader_of_a_pipe_channel_is_a_stream(writers: Writers) -> None:
    """By the job's configuration, with the loader's own face: epochs, transforms, state."""
    for epoch in range(3):
        writers.fill(epoch, csv(0, 10))
    half = Normalise("values", mean=0, std=2)
    functions = [half, lambda batch: {**batch, "one": 1}]
    with Loader("train", 4, shuffle="none", transform=functions, label_size=1) as loader:
        with pytest.raises(TypeError, match="no len"):
            len(loader)
        batches = list(loader)
        assert [batch["label_values"][:, 0].tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7]]
        assert batches[1]["values"][:, 0].tolist() == [20, 25, 30, 35] and batches[0]["one"] == 1
        assert [field.name for field in loader.fields] == ["label_values", "values"]
        iteration = iter(loader)
        next(iteration)
        assert loader.epoch == 1 and loader.state_dict()["position"] == 4
        loader.set_epoch(2)
        assert len(list(loader)) == 2
        with pytest.raises(UsageError, match="ended when another one began"):
            next(iteration)
        with pytest.raises(UsageError, match="lanes is for channels of files"):
            Loader("train", 4, lanes=2)


# --- ranks that share a stream ----------------------------------------------------------------------------------------

RANK = """
    import json, os, sys
    from launcher.data.channel import Place
    from launcher.data.pipe import StreamOptions, open_stream

    for name, options in json.loads(sys.argv[2]).items():
        place = Place("train", sys.argv[1] + name, "Pipe", content_type="text/csv")
        stream = open_stream(place, StreamOptions(timeout_s=30, **options))
        for epoch in range(2):
            stream.begin(epoch)
            found = []
            while (batch := stream.next_batch()) is not None:
                mask = batch.get("mask", slice(None))
                found.append([int(value) for value in batch["values"][mask][:, 0]])
                print(json.dumps(found[-1]), flush=True)
            print("epoch", json.dumps([found, stream.state_dict()]), flush=True)
        stream.close()
"""


class Ranks:
    """Processes that the environment tells to be the ranks of one host; ``options``: of each, by what follows path."""

    def __init__(self, folder: Path, path: Path, *options: dict[str, dict[str, Any]]) -> None:
        folder.mkdir(mode=0o700, exist_ok=True)
        self.processes = []
        for rank, option in enumerate(options):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": len(options), "LOCAL_WORLD_SIZE": len(options)}
            environ = {name: value for name, value in os.environ.items() if not name.startswith(("LAUNCHER_", "SM_"))}
            environ |= {name: str(value) for name, value in place.items()} | {"LAUNCHER_RUN_DIR": str(folder)}
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, "-c", textwrap.dedent(RANK), str(path), json.dumps(option)],
                    env=environ,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self.processes:
            with process:
                process.kill()

    def results(self) -> list[list[Any]]:
        """What each rank has seen of each epoch: its batches, and the state after them."""
        found = []
        for process in self.processes:
            output, errors = process.communicate(timeout=DEADLINE_S)
            assert process.returncode == 0, errors
            lines = [line for line in output.splitlines() if line.startswith("epoch ")]
            found.append([json.loads(line.removeprefix("epoch ")) for line in lines])
        return found

    def errors(self) -> list[str]:
        return [process.communicate(timeout=DEADLINE_S)[1] for process in self.processes]


def test_f22_ranks_of_a_host_get_disjoint_whole_records(writers: Writers, tmp_path: Path) -> None:
    """F22 and F13 for a stream: each record on one rank, the same number of steps on all, the same state."""
    tails = ("drop", "pad", "short")
    for tail in tails:
        for epoch in range(2):
            writers.fill(epoch, csv(0, 107), path=writers.path.with_name(f"train{tail}"))
    shared = {tail: {"batch_size": 5, "tail": tail, "window": 30} for tail in tails}
    with Ranks(tmp_path / "run", writers.path, shared, shared, shared) as ranks:
        results = ranks.results()
    for number, tail in enumerate(tail for tail in tails for _ in range(2)):
        of_epoch = [result[number] for result in results]
        assert {len(batches) for batches, _ in of_epoch} == {7 if tail == "drop" else 8}
        seen = [record for batches, _ in of_epoch for batch in batches for record in batch]
        assert len(seen) == len(set(seen)) == (105 if tail == "drop" else 107)
        assert set(seen) <= set(range(107))
        assert of_epoch[0][1] == of_epoch[1][1] == of_epoch[2][1]
    assert not list((tmp_path / "run").iterdir())  # nothing is left of the meetings


def test_ranks_with_other_arguments_fail_together(writers: Writers, tmp_path: Path) -> None:
    with Ranks(tmp_path / "run", writers.path, {"": {"batch_size": 5}}, {"": {"batch_size": 6}}) as ranks:
        errors = ranks.errors()
    for text in errors:
        assert "batch_size is 6 on rank 1 and 5 on rank 0; all ranks must pass the same arguments" in text


def test_f17_the_end_of_the_rank_that_reads_ends_the_waits_of_the_others(writers: Writers, tmp_path: Path) -> None:
    """F17 for a stream: it is killed while its writer is silent; nothing is left in /dev/shm or the job's folder."""
    shm = set(os.listdir("/dev/shm"))
    os.mkfifo(f"{writers.path}_0")
    fifo = os.open(f"{writers.path}_0", os.O_RDWR)
    os.write(fifo, csv(0, 12))
    with Ranks(tmp_path / "run", writers.path, *[{"": {"batch_size": 4, "shuffle": "none"}}] * 2) as ranks:
        assert ranks.processes[1].stdout is not None
        assert json.loads(ranks.processes[1].stdout.readline()) == [4, 5, 6, 7]
        ranks.processes[0].send_signal(signal.SIGKILL)
        error = ranks.errors()[1]
    assert "CollectiveError: rank 0 on" in error and "has closed it or has ended" in error
    os.close(fifo)
    assert set(os.listdir("/dev/shm")) <= shm and not list((tmp_path / "run").iterdir())


def test_an_error_in_the_stream_reaches_every_rank(writers: Writers, tmp_path: Path) -> None:
    """F3 for a stream: all ranks see the whole steps before it, then the same error."""
    writers.fill(0, protobufs(10) + b"no frame is here")
    options = {"": {"batch_size": 4, "shuffle": "none", "format": "recordio-protobuf"}}
    with Ranks(tmp_path / "run", writers.path, options, options) as ranks:
        found = [process.communicate(timeout=DEADLINE_S) for process in ranks.processes]
    for rank, (output, errors) in enumerate(found):
        assert [json.loads(line) for line in output.splitlines()] == [[12 * rank + 3 * row for row in range(4)]]
        assert "train_0: byte" in errors and "record 10: " in errors and "DataError" in errors


@pytest.mark.torch
@pytest.mark.slow
def test_f16_hosts_with_streams_of_their_own_make_the_same_steps(job: Any) -> None:
    """F16 for streams: simulated hosts with 40 and 30 records agree on each step: drop the least, pad the most."""
    pytest.importorskip("torch", reason="torch serves the store between hosts")
    script = """
        import os, threading
        from launcher.data.channel import Place
        from launcher.data.pipe import StreamOptions, open_stream

        rank, host = int(os.environ["RANK"]), int(os.environ["GROUP_RANK"])
        for tail in ("drop", "pad"):
            path = os.path.join(os.environ["SHOWN"], f"{tail}{host}")

            def write():
                os.mkfifo(path + "_0")
                with open(path + "_0", "wb") as file:
                    file.write(b"".join(b"%d\\n" % number for number in range((40, 30)[host])))

            threading.Thread(target=write, daemon=True).start()
            place = Place("train", path, "Pipe", "ShardedByS3Key", content_type="text/csv")
            stream = open_stream(place, StreamOptions(4, tail=tail, timeout_s=60))
            stream.begin(0)
            found = []
            while (batch := stream.next_batch()) is not None:
                found.append(int(batch["mask"].sum()) if "mask" in batch else 4)
            stream.close()
            with open(os.path.join(os.environ["SHOWN"], f"{tail}.{rank}"), "w") as file:
                print(*found, file=file)
    """
    words = ("simulate", "--hosts", "2", "--dir", job.directory / "hosts", "-n", "1", job.script(script))
    assert job.run(*words, own_tree=False, env={"SHOWN": str(job.directory)}) == 0, job.output()
    shown = {name: (job.directory / name).read_text().split() for name in ("drop.0", "drop.1", "pad.0", "pad.1")}
    assert shown["drop.0"] == shown["drop.1"] == ["4"] * 7
    assert shown["pad.0"] == ["4"] * 10 and shown["pad.1"] == ["4"] * 7 + ["2", "0", "0"]
