"""``launcher.collectives.executor``: order, who runs the work, errors, ends. Without ranks, but for the last."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
import weakref
from typing import Any

import pytest

from launcher.collectives.executor import Executor
from launcher.errors import CollectiveError


@pytest.fixture
def executor() -> Any:
    one = Executor("test")
    yield one
    one.close(5)


def held(executor: Executor) -> tuple[threading.Event, Any]:
    """A piece of work that the executor's thread is in, until the event is set."""
    begun, go = threading.Event(), threading.Event()

    def work() -> str:
        begun.set()
        assert go.wait(20)
        return "held"

    pending = executor.submit(work)
    assert begun.wait(20)
    return go, pending


def test_work_is_done_in_order_and_gives_its_value(executor: Executor) -> None:
    done: list[int] = []
    works = [executor.submit(lambda index=index: done.append(index) or index) for index in range(200)]
    assert works[150].wait() == 150
    assert executor.run(lambda: len(done)) == 200
    assert done == list(range(200))
    assert all(work.done() and work.exception() is None for work in works)
    executor.drain()


def test_a_waiter_does_what_nobody_has_begun(executor: Executor) -> None:
    here = threading.get_ident()
    assert executor.run(threading.get_ident) == here
    go, first = held(executor)  # in the executor's thread
    second = executor.submit(threading.get_ident)
    go.set()
    assert first.wait() == "held"
    assert second.wait() in (here, executor._thread.ident)  # type: ignore[union-attr]
    # With a limit the waiter leaves it to the thread, since it could not come back from it in time.
    assert executor.submit(threading.get_ident).wait(timeout=20) != here


def test_work_goes_on_without_a_waiter(executor: Executor, wait_until: Any) -> None:
    work = executor.submit(threading.get_ident)
    wait_until(work.done, "work that nobody waits for")
    assert work.wait() != threading.get_ident()


def test_a_limit_on_waiting(executor: Executor) -> None:
    go, work = held(executor)
    behind = executor.submit(lambda: "behind")
    for call in (work.wait, behind.wait, executor.drain):
        with pytest.raises(TimeoutError, match=r"not finished in 0\.01 s; it goes on"):
            call(timeout=0.01)
    assert not work.done() and not behind.done()
    go.set()
    assert behind.wait(timeout=20) == "behind"


def test_many_threads_wait(executor: Executor) -> None:
    go, work = held(executor)
    behind = [executor.submit(lambda index=index: index) for index in range(8)]
    seen: list[Any] = []
    threads = [threading.Thread(target=lambda one=one: seen.append(one.wait())) for one in [work, *behind, *behind]]
    for thread in threads:
        thread.start()
    go.set()
    for thread in threads:
        thread.join(20)
    assert sorted(map(str, seen)) == sorted(map(str, ["held", *range(8), *range(8)]))


def test_submitting_from_many_threads(executor: Executor) -> None:
    total: list[int] = []
    together: set[int] = set()

    def work() -> None:
        together.add(1)
        total.append(len(together))
        together.discard(1)

    def user() -> None:
        for turn in range(300):
            if turn % 3 == 0:
                executor.run(work)
            elif turn % 3 == 1:
                executor.submit(work).wait()
            else:
                executor.submit(work)

    threads = [threading.Thread(target=user) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    executor.drain(20)
    assert total == [1] * 1200


def test_callbacks(executor: Executor) -> None:
    told: list[Any] = []
    go, work = held(executor)
    work.add_done_callback(lambda one: told.append((one is work, one.done(), one.wait())))
    assert told == []
    go.set()
    executor.drain()
    assert told == [(True, True, "held")]
    work.add_done_callback(lambda one: told.append("at once"))
    assert told[1:] == ["at once"]


def test_after_an_error_all_later_work_has_it(executor: Executor) -> None:
    given_up: list[str] = []
    executor._abort = given_up.append
    done: list[int] = []
    first = executor.submit(lambda: done.append(1))
    go, _ = held(executor)
    second = executor.submit(lambda: {}["rank"])
    third = executor.submit(lambda: done.append(3))
    go.set()
    first.wait()
    for work in (second, third):
        with pytest.raises(KeyError, match="rank"):
            work.wait()
        assert work.exception() is second.exception()
    with pytest.raises(KeyError):
        executor.run(lambda: done.append(4))
    with pytest.raises(KeyError):
        executor.submit(lambda: done.append(5)).wait()
    assert done == [1]
    assert given_up == ["KeyError: 'rank'"]  # so that the other ranks do not wait


def test_a_broken_group_is_not_given_up_again() -> None:
    given_up: list[str] = []
    executor = Executor("test", given_up.append)

    def lost() -> None:
        raise CollectiveError("rank 1 is gone", "lost", 1)

    with pytest.raises(CollectiveError, match="rank 1 is gone"):
        executor.run(lost)
    with pytest.raises(CollectiveError, match="rank 1 is gone"):
        executor.submit(int).wait()
    executor.close()
    assert given_up == []


def test_work_that_is_submitted_from_inside_is_done_at_once(executor: Executor) -> None:
    """A callback may begin the next collective and wait for it; what was submitted before comes first."""
    order: list[str] = []
    go, first = held(executor)

    def callback(one: Any) -> None:
        order.append("callback")
        assert executor.submit(lambda: order.append("from inside") or 7).wait() == 7
        assert executor.run(lambda: 8) == 8

    first.add_done_callback(callback)
    second = executor.submit(lambda: order.append("second"))
    go.set()
    second.wait()
    executor.drain()
    assert order == ["callback", "second", "from inside"]


def test_work_must_not_wait_for_later_work(executor: Executor) -> None:
    begun, go = threading.Event(), threading.Event()
    later: list[Any] = []

    def work() -> None:
        begun.set()
        assert go.wait(20)
        later[0].wait()

    one = executor.submit(work)
    assert begun.wait(20)
    later.append(executor.submit(int))
    go.set()
    with pytest.raises(RuntimeError, match="comes after it"):
        one.wait()


def test_close_finishes_the_work_and_takes_no_more() -> None:
    executor = Executor("test")
    done: list[int] = []
    for index in range(10):
        executor.submit(lambda index=index: done.append(index))
    executor.close()
    assert done == list(range(10))
    assert not executor._thread.is_alive()  # type: ignore[union-attr]
    for call in (executor.submit, executor.run):
        with pytest.raises(CollectiveError, match="launcher-test: the executor was closed") as caught:
            call(int)
        assert caught.value.reason == "closed"
    executor.close()


def test_closing_does_not_wait_for_ever() -> None:
    go = threading.Event()
    executor = Executor("test", lambda reason: go.set())
    executor.submit(lambda: go.wait(20))
    with pytest.raises(TimeoutError):
        executor.close(0.05)
    assert go.is_set()  # the group was given up, which ended the work
    assert not executor._thread.is_alive()  # type: ignore[union-attr]


def test_buffers_are_let_go_when_their_work_is_done(executor: Executor) -> None:
    class Buffer:
        pass

    buffer = Buffer()
    gone = weakref.ref(buffer)
    work = executor.submit(lambda buffer=buffer: None)
    del buffer
    work.wait()
    gc.collect()
    assert gone() is None


PROGRAM = """
import os, sys, threading, time
from launcher.collectives.executor import Executor
given_up = threading.Event()
executor = Executor("test", lambda reason: given_up.set())
executor.submit(lambda: os.write(1, b"done\\n"))
executor.submit(lambda: {work})
os.write(1, b"end\\n")
"""


@pytest.mark.parametrize("work", [r"time.sleep(0.05) or os.write(1, b'last\n')", "sys.exit(3)", "1 / 0"])
def test_the_interpreter_ends_after_forgotten_work(work: str) -> None:
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM.format(work=work)],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    lines = done.stdout.split()
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(lines[:2]) == ["done", "end"]
    assert lines[2:] == (["last"] if "last" in work else [])
    assert time.monotonic() - begun < 25


def test_an_error_does_not_wait_for_forgotten_work(ranks: Any) -> None:
    """Rank 0 fails with work that rank 1 does not join before it is told."""
    outcomes = ranks.start(
        2,
        """
        import launcher.collectives.executor as executor
        executor._EXIT_S = 1000.0
        comm = Communicator(timeout_s=1000)
        first = int(comm.broadcast(np.array([os.getpid()]))[0])
        if RANK == 0:
            comm.allreduce_async(np.ones(100_000))
            raise ValueError("of the script")
        wait_for(lambda: not os.path.exists(f"/proc/{first}"))
        try:
            comm.barrier()
        except CollectiveError as error:
            show(told(error))
        """,
    ).wait()
    assert [outcome.code for outcome in outcomes] == [1, 0], outcomes
    assert "ValueError: of the script" in outcomes[0].output


def test_the_interpreter_ends_while_a_collective_waits(ranks: Any) -> None:
    """Rank 0 ends with work that rank 1 never joins: neither hangs, and nothing crashes in the interpreter's end."""
    outcomes = ranks.start(
        2,
        """
        import launcher.collectives.executor as executor
        executor._EXIT_S = 0.2
        comm = Communicator(timeout_s=25)
        first = int(comm.broadcast(np.array([os.getpid()]))[0])
        if RANK == 0:
            comm.allreduce_async(np.ones(100_000))
        else:
            wait_for(lambda: not os.path.exists(f"/proc/{first}"))
            try:
                comm.barrier()
            except CollectiveError as error:
                show(told(error))
        """,
    ).wait()
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    assert outcomes[0].output == ""
    reason, culprit, *_ = outcomes[1].shown
    assert reason in ("left", "lost", "mismatch") and culprit == 0
