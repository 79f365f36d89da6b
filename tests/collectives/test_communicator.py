"""``launcher.Communicator`` as its users see it: arrays of several libraries, shapes, mistakes, groups, memory."""

from __future__ import annotations

import copy
import importlib.util
import os
import signal
from typing import Any

import pytest

from launcher.errors import CollectiveError

needs_torch = pytest.mark.torch


def test_arrays_that_are_given_and_returned(ranks: Any) -> None:
    shown = ranks.run(
        2,
        """
        class Foreign:  # with nothing but the array interface
            def __init__(self, array):
                self.array = array
                self.__array_interface__ = array.__array_interface__

        class Tensor:  # with nothing but DLPack
            def __init__(self, array):
                self.array = array
            def __dlpack__(self, **options):
                return self.array.__dlpack__(**options)
            def __dlpack_device__(self):
                return self.array.__dlpack_device__()

        with Communicator() as comm:
            seen = {}
            array = np.full((2, 3), RANK + 1.0)
            out = np.empty_like(array)
            same = comm.allreduce(array, out=out)
            seen["out"] = same is out and out.tolist() == [[3.0] * 3] * 2 and array[0, 0] == RANK + 1
            seen["in place"] = comm.allreduce(array) is array and array.tolist() == [[3.0] * 3] * 2
            for kind in (Foreign, Tensor):
                held = kind(np.full(3, RANK + 1, np.int16))
                seen[kind.__name__] = comm.allreduce(held) is held and held.array.tolist() == [3] * 3
            seen["scalar"] = comm.all_gather(np.float32(RANK + 0.5)).tolist() == [0.5, 1.5]
            seen["kind"] = comm.all_gather(np.zeros((1, 2), np.float16)).dtype == np.float16
            seen["empty"] = comm.allreduce(np.zeros((0, 3))).shape == (0, 3)
            seen["bool"] = comm.allreduce(np.array([RANK == 0, False])).tolist() == [True, False]
            seen["average"] = comm.allreduce(np.array([RANK, -3 * RANK]), "average").tolist() == [0, -1]
            seen["scaled"] = comm.allreduce(np.ones(2), prescale=RANK + 1, postscale=0.5).tolist() == [1.5] * 2
            seen["max"] = comm.allreduce(np.array([RANK], np.uint8), ReduceOp.MAX).tolist() == [1]
            counts = [1, 3]
            part = comm.reduce_scatter(np.ones((4, 2), np.int32), counts=counts)
            seen["uneven reduce_scatter"] = part.tolist() == [[2, 2]] * counts[RANK]
            whole = comm.all_gather(np.full((counts[RANK], 2), RANK), counts=counts)
            seen["uneven all_gather"] = whole[:, 0].tolist() == [0, 1, 1, 1]
            sent = [2, 1] if RANK == 0 else [0, 3]
            got = comm.all_to_all(np.arange(3) + 10 * RANK, send_counts=sent)
            seen["uneven all_to_all"] = got.tolist() == ([0, 1] if RANK == 0 else [2, 10, 11, 12])
            target = np.empty(sum(sent), np.int64)
            seen["known all_to_all"] = comm.all_to_all(
                np.arange(2) + 10 * RANK, receive_counts=[1, 1], out=np.empty(2, np.int64)
            ).tolist() == [RANK, 10 + RANK]
            frozen = np.arange(3.0) + RANK
            frozen.flags.writeable = False
            seen["read-only source"] = comm.allreduce(frozen, out=np.empty(3)).tolist() == [1.0, 3.0, 5.0]
            seen["read-only root"] = RANK != 0 or comm.broadcast(frozen) is frozen
            if RANK == 1:
                seen["read-only root"] = comm.broadcast(np.empty(3)).tolist() == [0.0, 1.0, 2.0]
            gathered = np.empty((2, 2))
            gathered[RANK] = RANK
            comm.all_gather(gathered[RANK : RANK + 1], out=gathered)
            seen["gathered in place"] = gathered.tolist() == [[0.0, 0.0], [1.0, 1.0]]
        show(seen)
        """,
    )
    assert all(one and all(one.values()) for one in shown), shown


@needs_torch
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="not installed: torch")
def test_tensors(ranks: Any) -> None:
    shown = ranks.run(
        2,
        """
        import torch
        class Tensor:
            def __init__(self, tensor):
                self.tensor = tensor
            def __dlpack__(self, **options):
                return self.tensor.__dlpack__(**options)
            def __dlpack_device__(self):
                return self.tensor.__dlpack_device__()

        with Communicator() as comm:
            seen = {}
            tensor = torch.full((2, 3), RANK + 1.0, dtype=torch.bfloat16)
            seen["in place"] = comm.allreduce(tensor) is tensor and bool((tensor == 3).all())
            parts = comm.all_gather(torch.tensor([RANK]))
            seen["all_gather"] = isinstance(parts, torch.Tensor) and parts.tolist() == [0, 1]
            seen["reduce_scatter"] = comm.reduce_scatter(torch.ones(4, dtype=torch.float16)).tolist() == [2, 2]
            held = Tensor(torch.full((3,), RANK + 1, dtype=torch.bfloat16))
            comm.allreduce(held)
            seen["bfloat16 through DLPack"] = held.tensor.tolist() == [3.0] * 3
            shared = comm.empty((2, 2), torch.bfloat16)
            shared += RANK
            seen["shared"] = comm.allreduce(shared).tolist() == [[1.0, 1.0]] * 2
            seen["mixed"] = comm.allreduce_coalesced([torch.ones(3), np.ones(2)])[0].tolist() == [2.0] * 3
            wrong = []
            for bad in (torch.ones(4, 4).t(), torch.ones(2, dtype=torch.complex64), torch.ones(2).to("meta")):
                try:
                    comm.allreduce(bad)
                except (TypeError, ValueError) as error:
                    wrong.append(f"{type(error).__name__}: {error}")
        show([seen, wrong])
        """,
    )
    for seen, wrong in shown:
        assert all(seen.values()), seen
        assert [text.split(";")[0] for text in wrong] == [
            "ValueError: array is not C-contiguous (strides (1, 4))",
            "TypeError: array has dtype torch.complex64",
            "ValueError: array is on meta",
        ]


def test_mistakes_are_told_and_cost_nothing(ranks: Any) -> None:
    # The other rank does nothing meanwhile: what was refused must not have been sent.
    shown = ranks.run(
        2,
        """
        comm = Communicator()
        frozen = np.zeros(3)
        frozen.flags.writeable = False
        array = np.zeros(4)
        calls = [
            lambda: comm.allreduce([1.0, 2.0]),
            lambda: comm.allreduce(np.zeros((4, 4))[:, 0]),
            lambda: comm.allreduce(frozen),
            lambda: comm.allreduce(np.zeros(3, np.complex64)),
            lambda: comm.allreduce(np.zeros(3, ">f4")),
            lambda: comm.allreduce(np.array(["a"])),
            lambda: comm.allreduce(array, "mean"),
            lambda: comm.allreduce(array, 9),
            lambda: comm.allreduce(array, "bit_and"),
            lambda: comm.allreduce(np.zeros(3, np.int8), prescale=0.5),
            lambda: comm.allreduce(np.zeros(3, bool), "average"),
            lambda: comm.allreduce(array, out=np.zeros(5)),
            lambda: comm.allreduce(array[:3], out=array[1:]),
            lambda: comm.reduce_scatter(np.zeros((3, 2))),
            lambda: comm.reduce_scatter(np.zeros((3, 2)), counts=[1, 1]),
            lambda: comm.all_gather(np.zeros((3, 2)), counts=[1, 3, 3]),
            lambda: comm.all_gather(np.zeros((3, 2)), counts=[2, 2]),
            lambda: comm.broadcast(array, root=2),
            lambda: comm.reduce(array, -1),
            lambda: comm.all_to_all(np.zeros(3)),
            lambda: comm.all_to_all_async(np.zeros(2), send_counts=[1, 1]),
            lambda: comm.all_to_all(array, out=array),
            lambda: comm.group([0, 0]),
            lambda: comm.group([1 - RANK]),
            lambda: comm.group([RANK, 7]),
            lambda: comm.split(-2),
            lambda: comm.empty(3, "complex64"),
            lambda: comm.empty(3, "bfloat16"),
            lambda: setattr(comm, "timeout_s", 0),
        ]
        told = []
        for index, call in enumerate(calls):
            try:
                call()
                told.append(f"{index} was not refused")
            except (TypeError, ValueError) as error:
                told.append(f"{type(error).__name__}: {error}")
        comm.barrier()
        works = comm.allreduce(np.ones(2)).tolist()
        comm.close()
        show([told, works])
        """,
    )
    expected = [
        "TypeError: array is of type list; expected a NumPy array, a CPU tensor, or an object with __dlpack__",
        "ValueError: array is not C-contiguous (strides (32,)); pass numpy.ascontiguousarray(array)",
        "ValueError: array is read-only and would be written to; pass array.copy(), or out=",
        "TypeError: array has dtype complex64; expected one of float32",
        "TypeError: array has dtype >f4; expected one of float32",
        "TypeError: array has dtype <U1; expected one of float32",
        "ValueError: op is 'mean'; expected one of sum, average",
        "ValueError: 9 is not a valid ReduceOp",
        "ValueError: op 'bit_and' is for integers and bool; the array is of float64",
        "ValueError: prescale and postscale are for floating point; the array is of int8",
        "ValueError: an average of bool is not defined",
        "ValueError: out is of shape (5,) and type float64; expected (4,) and float64",
        "ValueError: out overlaps array in part",
        "ValueError: array has 3 rows, which 2 ranks can not share evenly; pass counts",
        "ValueError: counts is [1, 1], 2 rows in all; array has 3",
        "ValueError: counts is [1, 3, 3]; expected one number for each of 2 ranks, none negative",
        "ValueError: counts[{rank}] is 2, but array has 3 rows on this rank",
        "ValueError: root is 2; expected a rank from 0 to 1",
        "ValueError: root is -1; expected a rank from 0 to 1",
        "ValueError: array has 3 rows, which 2 ranks can not share evenly; pass counts",
        "ValueError: all_to_all_async needs receive_counts where send_counts is given; all_to_all does not",
        "ValueError: out overlaps array; pass memory of its own, or no out",
        "ValueError: ranks is [0, 0]; expected different numbers, rank {rank} (this one) among them",
        "ValueError: ranks is [{other}]; expected different numbers, rank {rank} (this one) among them",
        "ValueError: ranks is [{rank}, 7]; expected numbers from 0 to 1",
        "ValueError: color is -2; expected None or a number that is not negative",
        "TypeError: the new array has dtype complex64",
        "TypeError: NumPy has no bfloat16 of its own: import ml_dtypes first, or pass torch.bfloat16",
        "ValueError: timeout_s is 0; expected more than 0 seconds",
    ]
    for rank, (told, works) in enumerate(shown):
        for text, begin in zip(told, expected, strict=True):
            assert text.startswith(begin.format(rank=rank, other=1 - rank))
        assert works == [2.0, 2.0]


def test_groups_of_some_ranks(ranks: Any) -> None:
    shown = ranks.run(
        4,
        """
        with Communicator() as world:
            pair = world.group([2, 0]) if RANK in (0, 2) else world.group([1, 3])
            again = world.group([2, 0]) if RANK in (0, 2) else world.group([1, 3])
            seen = [pair.ranks, pair.rank, pair.all_gather(np.array([RANK])).tolist()]
            seen.append(again.allreduce(np.array([RANK])).tolist())
            part = world.split(RANK % 2 if RANK < 3 else None, key=-RANK)
            seen.append(part and part.all_gather(np.array([RANK])).tolist())
            inner = pair.group([pair.rank])
            seen.append(inner.all_gather(np.array([RANK])).tolist())
            for one in (inner, part, again, pair):
                if one is not None:
                    one.close()
            seen.append(world.allreduce(np.array([1])).tolist())
        show(seen)
        """,
    )
    assert shown == [
        [[2, 0], 1, [2, 0], [2], [2, 0], [0], [4]],
        [[1, 3], 0, [1, 3], [4], [1], [1], [4]],
        [[2, 0], 0, [2, 0], [2], [2, 0], [2], [4]],
        [[1, 3], 1, [1, 3], [4], None, [3], [4]],
    ]
    assert ranks.left() == []


def test_shared_memory_is_used_and_given_back(ranks: Any) -> None:
    shown = ranks.run(
        2,
        """
        import gc
        def mapped():
            with open("/proc/self/smaps_rollup") as file:
                return next(int(line.split()[1]) for line in file if line.startswith("Rss"))
        with Communicator() as comm:
            first = comm.empty((1 << 20,))
            seen = {"zeroed": not first.any(), "writable": first.flags.writeable}
            seen["aligned"] = first.ctypes.data % 4096 == 0
            first[:] = RANK + 1
            for _ in range(3):
                comm.allreduce(first, "average")
            seen["value"] = float(first[-1]) == 1.5
            seen["in place"] = comm.statistics()["calls"]["shared"]
            part = first[: 1 << 18]
            comm.allreduce(part)
            seen["part"] = comm.statistics()["calls"]["shared"]
            before = mapped()
            for turn in range(40):  # 640 MB, if none came back
                array = comm.empty((4 << 20,))
                array[:] = 1
                comm.allreduce(array)
                del array
            gc.collect()
            comm.barrier()
            seen["grown_kib"] = mapped() - before
        first[0] = 7  # after close
        seen["after"] = float(first[0])
        show(seen)
        """,
    )
    for seen in shown:
        assert seen["zeroed"] and seen["writable"] and seen["aligned"] and seen["value"]
        assert (seen["in place"], seen["part"]) == (3, 4)
        assert seen["grown_kib"] < 100_000
        assert seen["after"] == 7.0


def test_asynchronous_calls_keep_their_order(ranks: Any) -> None:
    shown = ranks.run(
        2,
        """
        with Communicator() as comm:
            arrays = [np.full(50_000, float(index)) for index in range(20)]
            works = [comm.allreduce_async(array) for array in arrays]
            told = []
            works[3].add_done_callback(lambda work: told.append(float(work.wait()[0])))
            plain = comm.allreduce(np.ones(3)).tolist()  # after all of them
            seen = [all(work.done() for work in works), plain, [float(work.wait()[-1]) for work in works], told]
            others = [
                comm.allreduce_coalesced_async([np.ones(2), np.ones(3, np.int8)]),
                comm.reduce_scatter_async(np.ones((2, 2))),
                comm.all_gather_async(np.array([RANK])),
                comm.broadcast_async(np.array([RANK]), root=1),
                comm.reduce_async(np.array([1 + RANK]), root=0),
                comm.all_to_all_async(np.array([[RANK, 0], [RANK, 1]])),
            ]
            last = comm.barrier_async()
            seen.append([np.asarray(other.wait()).tolist() if other is not others[0] else
                         [part.tolist() for part in other.wait()] for other in others if other.wait() is not None])
            last.wait()
            forgotten = [comm.allreduce_async(np.ones(1000)) for _ in range(10)]
        seen.append(all(work.done() for work in forgotten))
        show(seen)
        """,
    )
    for rank, (done, plain, values, told, others, forgotten) in enumerate(shown):
        assert done and forgotten and plain == [2.0] * 3
        assert values == [2.0 * index for index in range(20)]
        assert told == [6.0]
        expected: list[Any] = [[[2.0, 2.0], [2, 2, 2]], [[2.0, 2.0]], [0, 1], [1]]
        expected += [[3]] if rank == 0 else []
        assert others == [*expected, [[0, rank], [1, rank]]]


def test_one_who_fails_is_named_to_the_others(ranks: Any) -> None:
    outcomes = ranks.start(
        3,
        """
        with Communicator(timeout_s=20) as comm:
            try:
                comm.barrier()
                if RANK == 2:
                    raise KeyError("the data is not there")
                comm.allreduce(np.ones(10))
            except CollectiveError as error:
                try:
                    comm.barrier()
                except CollectiveError as later:
                    show([told(error), told(later)])
        """,
    ).wait()
    assert [outcome.code for outcome in outcomes] == [0, 0, 1], outcomes
    for outcome in outcomes[:2]:
        (reason, culprit, host, operation, sequence, text), later = outcome.shown
        assert (reason, culprit, host) == ("left", 2, "algo-1")
        assert (operation, sequence) in (("allreduce", 2), ("barrier", 1))
        assert "KeyError: 'the data is not there'" in text
        assert later[1] == 2 or later[0] == "closed"


def test_a_signal_ends_the_wait(ranks: Any, wait_until: Any) -> None:
    """Ctrl-C, and a handler that raises, come out of a call that waits; the others are told."""
    ranks.start(
        2,
        """
        comm = Communicator(timeout_s=25)
        comm.barrier()
        try:
            if RANK == 1:
                mark("waits")
                comm.broadcast(np.ones(3), root=0)
            else:
                mark("waits")
                wait_for(lambda: os.path.exists(os.path.join(os.environ["MARKS"], "go.0")))
                comm.allreduce(np.ones(100))
        except KeyboardInterrupt:
            show("interrupted")
        except CollectiveError as error:
            show(told(error))
        """,
    )
    wait_until(
        lambda: ranks.page(1)["collective_enter_ns"] and ranks.page(1)["operation"] == "broadcast", "rank 1 waits"
    )
    ranks.processes[1].send_signal(signal.SIGINT)
    ranks.processes[1].wait(20)
    (ranks.marks / "go.0").touch()
    outcomes = ranks.wait()
    assert outcomes[1].shown == "interrupted", outcomes
    reason, culprit, _, operation, _, text = outcomes[0].shown
    assert (reason, culprit) in (("interrupted", 1), ("left", 1), ("lost", 1)), text
    assert operation in ("allreduce", "broadcast")


def test_after_fork_the_child_is_refused(ranks: Any) -> None:
    shown = ranks.run(
        2,
        """
        comm = Communicator()
        comm.allreduce_async(np.ones(2)).wait()
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                comm.allreduce(np.ones(2))
                text = "was not refused"
            except CollectiveError as error:
                text = f"{error.reason}: {error}"
            os.write(write, text.encode())
            os._exit(0)
        os.waitpid(child, 0)
        seen = [os.read(read, 4096).decode(), comm.allreduce(np.ones(2)).tolist()]
        comm.close()
        show(seen)
        """,
    )
    for text, after in shown:
        assert text.startswith("closed: ") and "forked" in text
        assert after == [2.0, 2.0]


def test_the_error_survives_pickling() -> None:
    error = CollectiveError("rank 3 is gone", "lost", 3, "algo-2", "allreduce", 812)
    again = copy.copy(error)  # by the same protocol
    assert (str(again), again.reason, again.rank, again.host) == ("rank 3 is gone", "lost", 3, "algo-2")
    assert (again.operation, again.sequence, again.exit_code) == ("allreduce", 812, 69)


def test_one_process_is_a_job_of_one(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    from launcher import Communicator

    for name in list(os.environ):
        if name.startswith("LAUNCHER_") or name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with Communicator() as comm:
        assert (comm.rank, comm.size, comm.ranks) == (0, 1, (0,))
        assert comm.allreduce(np.array([3, 5]), "average").tolist() == [3, 5]
        assert comm.all_to_all(np.arange(4)).tolist() == [0, 1, 2, 3]
        assert comm.split(1).size == 1
        comm.timeout_s = 5
        assert comm.timeout_s == 5.0
        assert repr(comm) == "Communicator('world', rank 0 of 1)"
    assert "closed" in repr(comm)
    with pytest.raises(CollectiveError, match="was closed; no work is taken any more"):
        comm.barrier()
    comm.close()
