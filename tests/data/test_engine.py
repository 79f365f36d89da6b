"""Batches are lent: what is kept stays, what is dropped is used again, and nothing is left behind."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from launcher import _data
from launcher.data import Loader
from launcher.data.fields import DTYPES
from launcher.errors import DataError

numpy = pytest.importorskip("numpy")

COUNT = 4000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """4000 records: 8 int32 with the record's number."""
    path = tmp_path / "numbers.npy"
    numpy.save(path, numpy.repeat(numpy.arange(COUNT, dtype=numpy.int32), 8).reshape(COUNT, 8))
    return path


def load(path: Path, batch_size: int = 8, **options: Any) -> Loader:
    return Loader(path, batch_size, **{"progress": False, **options})


@pytest.mark.parametrize("threads", [0, 2])
def test_batches_that_are_kept_are_not_overwritten_f19(path: Path, threads: int) -> None:
    kept = []
    with load(path, threads=threads, ring_limit=1000) as loader:
        for batch in loader:
            kept.append((batch, batch["values"].copy()))
        assert loader.statistics()["lent"] == 500
    assert len(kept) == 500
    assert all((batch["values"] == copy).all() for batch, copy in kept)
    kept[0][0]["values"][:] = 0  # they are the user's


def whole(values: Any) -> Any:
    return values


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize(
    "part",
    [
        whole,
        lambda values: values[3:5, 1],
        lambda values: values[3:5][::-1].T,
        lambda values: memoryview(values)[2:],
        lambda values: numpy.from_dlpack(values).reshape(-1),
        lambda values: values.view(numpy.uint8)[1],
    ],
    ids=["whole", "view", "view of a view", "memoryview", "dlpack", "bytes"],
)
def test_a_part_of_a_batch_keeps_it(path: Path, part: Callable[[Any], Any], threads: int) -> None:
    with load(path, threads=threads) as loader:
        batches = iter(loader)
        kept = part(next(batches)["values"])
        before = numpy.array(kept)
        for _ in zip(range(50), batches, strict=False):
            assert (numpy.asarray(kept) == before).all()
        assert 1 <= loader.statistics()["lent"] <= 3
        del kept
        next(batches)
        next(batches)
        assert loader.statistics()["slots"] <= 6


def test_memory_is_used_again(path: Path) -> None:
    addresses = set()
    with load(path) as loader:
        for batch in loader:
            addresses.add(batch["values"].ctypes.data)
        assert loader.statistics()["slots"] == len(addresses) == 2


def test_shapes_set_by_the_user_are_the_users(path: Path) -> None:
    """What is lent is a view: its metadata can be changed in place and is forgotten with it."""
    with load(path) as loader:
        for batch in loader:
            assert batch["values"].shape == (8, 8)
            batch["values"].shape = (64,)
            batch["values"].flags.writeable = False


@pytest.mark.parametrize("threads", [0, 1])
def test_over_the_limit_it_waits_and_says_so_f19(
    path: Path, threads: int, wait_until: Callable[..., Any], capfd: pytest.CaptureFixture[str]
) -> None:
    said = ""

    def has_said() -> bool:
        nonlocal said
        said += capfd.readouterr().err
        return "the loader waits" in said

    with load(path, threads=threads, ring=2, ring_limit=3, ring_wait=math.inf) as loader:
        for _ in range(2):  # of the second epoch it is told as well
            said = ""
            batches = iter(loader)
            kept = [next(batches) for _ in range(3)]
            copies = [batch["values"].copy() for batch in kept]

            def drop_one(kept: list[dict[str, Any]] = kept) -> None:
                wait_until(has_said, "a word about it")
                del kept[0]

            other = threading.Thread(target=drop_one)
            other.start()
            kept.append(next(batches))
            other.join()
            assert said.count("[launcher]") == 1 and "keeps 3 batches, as many as ring_limit" in said
            assert all((batch["values"] == copy).all() for batch, copy in zip(kept, copies[1:], strict=False))
            kept.clear()
            assert sum(1 for _ in batches) == 500 - 4


@pytest.mark.parametrize("threads", [0, 2])
def test_what_is_kept_for_good_ends_the_wait_f19(path: Path, threads: int, capfd: pytest.CaptureFixture[str]) -> None:
    """list(loader): 1000 batches are kept, and 64 are all that there is memory for to begin with."""
    for _ in range(2):  # the second loader says it again
        with load(path, 4, threads=threads, ring_wait=0.05) as loader:
            kept = [(batch["values"], batch["values"].copy()) for batch in loader]
            assert loader.statistics()["lent"] == len(kept) == 1000
            assert all((values == copy).all() for values, copy in kept)
            assert sorted(int(row[0]) for values, _ in kept for row in values) == list(range(COUNT))
            said = capfd.readouterr().err
            assert said.count("keeps 64 batches") == 1 and said.count("beyond ring_limit from now on") == 1
            kept.clear()
            assert len(list(loader)) == 1000  # and does not wait again
            assert capfd.readouterr().err == ""
            batches = iter(loader)
            next(batches), next(batches)
            assert loader.statistics()["slots"] <= 6  # what was dropped is given back


@pytest.mark.parametrize("threads", [0, 1])
def test_a_ring_of_one_grows(path: Path, threads: int) -> None:
    with load(path, threads=threads, ring=1, ring_limit=1, ring_wait=0) as loader:
        kept = [(batch["values"], batch["values"].copy()) for batch in loader]
        assert len(kept) == 500 and all((values == copy).all() for values, copy in kept)


def test_a_wait_can_be_interrupted(path: Path) -> None:
    def on_alarm(number: int, frame: FrameType | None) -> None:
        raise TimeoutError("enough")

    before = signal.signal(signal.SIGALRM, on_alarm)
    try:
        with load(path, ring=1, ring_limit=1) as loader:
            batches = iter(loader)
            kept = next(batches)
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(TimeoutError, match="enough"):
                next(batches)
            assert kept is not None
    finally:
        signal.signal(signal.SIGALRM, before)


def thread_count() -> int:
    return len(os.listdir("/proc/self/task"))


def test_an_exception_in_the_loop_ends_the_threads_f19(path: Path) -> None:
    before = thread_count()
    with pytest.raises(ZeroDivisionError), load(path, threads=4) as loader:
        for _ in loader:
            assert thread_count() == before + 4
            raise ZeroDivisionError
    assert thread_count() == before
    loader = load(path, threads=3)
    next(iter(loader))
    assert thread_count() == before + 3
    del loader
    assert thread_count() == before


def test_reuse_gives_the_same_arrays(path: Path) -> None:
    with load(path, reuse=True, shuffle="none", tail="pad") as loader:
        seen = []
        for step, batch in enumerate(loader):
            assert batch["values"][0, 0] == step * 8 and batch["mask"].all()
            seen.append(batch)
        assert len({id(batch["values"]) for batch in seen}) == 1
    with load(path, 300, reuse=True, tail="short") as loader:
        assert [len(batch["values"]) for batch in loader] == [300] * 13 + [100]
        assert [len(batch["values"]) for batch in loader] == [300] * 13 + [100]


def test_one_thread_at_a_time(path: Path) -> None:
    """A loader that two threads iterate gives each batch to one of them, or says that it will not."""
    with load(path) as loader:
        batches = iter(loader)
        outcomes: list[object] = []

        def use() -> None:
            try:
                while True:
                    outcomes.append(int(next(batches)["values"][0, 0]))
            except (StopIteration, ValueError, RuntimeError) as error:
                outcomes.append(type(error))

        users = [threading.Thread(target=use) for _ in range(2)]
        for user in users:
            user.start()
        for user in users:
            user.join()
        numbers = [outcome for outcome in outcomes if isinstance(outcome, int)]
        assert len(numbers) == len(set(numbers)) == 500


def run(program: str, path: Path, *prefix: str) -> str:
    """The output of a program that has LOADER arguments to make a loader of ``path``."""
    done = subprocess.run(
        [*prefix, sys.executable, "-c", textwrap.dedent(program), str(path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("threads", [0, 2])
def test_a_child_of_fork_is_refused_f18(path: Path, threads: int) -> None:
    program = f"""
        import os, sys
        from launcher.data import Loader
        from launcher.errors import UsageError
        loader = Loader(sys.argv[1], 8, threads={threads})
        batches = iter(loader)
        kept = next(batches)
        child = os.fork()
        if child == 0:
            try:
                next(batches)
            except UsageError as error:
                print("refused:", error, flush=True)
            del kept
            print("own:", sum(1 for _ in Loader(sys.argv[1], 8, threads={threads})), flush=True)
            sys.exit(0)
        assert os.waitpid(child, 0)[1] == 0
        print("parent:", sum(1 for _ in batches))
    """
    out = run(program, path)
    assert "refused: this loader was made before fork()" in out
    assert "own: 500" in out and "parent: 499" in out


def test_memory_stays_flat_and_none_is_shared_f18(path: Path) -> None:
    """F18: large batches with four threads, no /dev/shm; 100 epochs leave private memory as it was."""
    program = """
        import sys
        from launcher.data import Loader
        def private():
            with open("/proc/self/status") as file:
                return next(int(line.split()[1]) for line in file if line.startswith("RssAnon"))
        loader = Loader(sys.argv[1], 256, threads=4, progress=False)
        for epoch in range(120):
            for batch in loader:
                batch["values"][0, 0] = 1
            if epoch == 19:
                begin = private()
        print(private() - begin)
        with open("/proc/self/maps") as file:
            assert "/dev/shm" not in file.read()
    """
    assert int(run(program, path)) <= 1024  # KiB


def test_batches_larger_than_the_shared_memory_f18(as_root: None, tmp_path: Path) -> None:
    """F18: 256 x 100 KiB and 4 threads, with 64 MB of /dev/shm, of which nothing is used."""
    mount = ("unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"', "sh")
    if subprocess.run([*mount, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("needs mounts of its own: unshare -m, and mount in it")
    path = tmp_path / "large.npy"
    array = numpy.lib.format.open_memmap(path, "w+", numpy.int32, (1280, 25 * 1024))
    array[:, 0] = numpy.arange(1280)  # the rest are holes
    array.flush()
    program = """
        import os, sys
        from launcher.data import Loader
        def used():
            now = os.statvfs("/dev/shm")
            return os.listdir("/dev/shm"), now.f_blocks - now.f_bfree, now.f_files - now.f_ffree
        before, size = used(), os.statvfs("/dev/shm")
        assert size.f_blocks * size.f_frsize == 64 << 20, size
        loader = Loader(sys.argv[1], 256, threads=4, progress=False)
        for epoch in range(2):
            seen = []
            for batch in loader:
                assert batch["values"].nbytes == 256 * 100 * 1024 and used() == before
                seen += batch["values"][:, 0].tolist()
            assert sorted(seen) == list(range(1280)), epoch
        loader.close()
        assert used() == before
        print("whole", loader.statistics()["threads"])
    """
    assert run(program, path, *mount) == "whole 4\n"


def test_an_error_of_a_thread_comes_at_its_batch(path: Path) -> None:
    with load(path, threads=2, shuffle="none") as loader:
        batches = iter(loader)
        for _ in range(3):
            next(batches)
        path.write_bytes(path.read_bytes()[:-4000])
        with pytest.raises(DataError, match=r"numbers\.npy"):
            list(batches)


def test_threads_that_are_never_waited_for_end_with_the_process(path: Path) -> None:
    program = """
        import sys
        from launcher.data import Loader
        loader = Loader(sys.argv[1], 8, threads=4)
        batches = iter(loader)
        kept = next(batches)
        print("done")
    """
    assert run(program, path) == "done\n"


def test_close_waits_for_what_reads_the_memory(path: Path) -> None:
    """What a batch's fence stands for is over when close() returns, whether the batch was dropped or not."""
    begun: list[Copying] = []

    class Copying:
        """As a CUDA event: over when somebody has waited for it."""

        def __init__(self) -> None:
            self.over = False
            begun.append(self)

        def query(self) -> bool:
            return self.over

        def synchronize(self) -> None:
            self.over = True

    source = _data.fixed_source([_data.File(path)], [128], 32, [("values", DTYPES.index("int32"), [8], 0)])
    epoch = dict.fromkeys(("shuffle", "seed", "epoch", "base", "rank", "tail"), 0)
    epoch |= dict.fromkeys(("extent", "window", "lanes", "world"), 1)
    epoch |= {"records": COUNT, "batch": 8, "agreed_steps": -1}
    engine = _data.Engine(source, epoch, [None, None, None], fence=Copying)
    dropped = engine.next()
    kept = engine.next()
    del dropped
    last = engine.next()
    assert [copying.over for copying in begun] == [False]
    engine.close()
    assert [copying.over for copying in begun] == [True] * 3
    assert kept is not None and last is not None
    assert (kept["values"][:, 0] == range(8, 16)).all() and (last["values"][:, 0] == range(16, 24)).all()
