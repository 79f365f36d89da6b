"""The workers of one model, and the requests that wait for them.

All in the server's event loop: a request waits in a queue, goes to a worker that has room, and ends in an answer, an
error, or a stream of pieces. A worker is there for its own requests only: when it dies, they fail and no others.
"""

from __future__ import annotations

import asyncio
import collections
import itertools
import time

from launcher.serving import wire
from launcher.serving.failures import InvocationError
from launcher.serving.link import LOADING, READY, Worker
from launcher.serving.processes import Death

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from launcher.serving.exchange import Entry
    from launcher.serving.handler import WorkerPlan
    from launcher.serving.processes import Processes
    from launcher.serving.settings import Settings

# A worker that was told to give up a request and does not is killed after this.
_CANCEL_GRACE_S = 2.0
_BACKOFF_S = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
# A worker that answers quicker than this is given its next request while it has one: it need not wait for us.
_QUICK_S = 0.002
_QUICK_BYTES = 1 << 16
# When it takes so long after all, the next request goes to another worker that is free.
_STUCK_S = 0.02
# Names of the user's own counts: one made of each request's data must not fill the memory.
_MOST_COUNTS = 1000
_USUAL = 0.05  # share of the newest answer in what is usual
_LOST_HEADER = ("retry-after", "1")
# Of workers, whatever model they are of: a slot is given again, a serial never.
_SERIALS = itertools.count(1)


def _ending() -> InvocationError:
    return InvocationError(503, "the server is ending", headers=(_LOST_HEADER,))


class Pool:
    """The workers of one model.

    Args:
        size: workers.
        gpus: that there are, by the names that CUDA_VISIBLE_DEVICES has for them.
        on_fatal: called with an exit code and a line when this model can not be served any more.
    """

    def __init__(
        self,
        settings: Settings,
        processes: Processes,
        plan: WorkerPlan,
        size: int,
        gpus: tuple[str, ...],
        on_fatal: Callable[[int, str], None],
    ) -> None:
        self.settings, self.processes, self.plan, self.size = settings, processes, plan, size
        self._gpus, self._on_fatal = gpus, on_fatal
        self.workers: dict[int, Worker] = {}
        self._queue: collections.deque[Entry] = collections.deque()
        self._bound = 0  # requests that wait for the worker of their session
        self._ids = 0
        self.counts: dict[str, float] = {}  # of the user's
        self.deaths_in_row = 0
        self.deaths = 0
        self.was_ready = False
        self.out_of_memory = False  # why it could not be loaded
        self.first_ready: asyncio.Future[None] | None = None
        self._closing = False
        self._ended: asyncio.Future[None] | None = None
        self._batch_timer: asyncio.TimerHandle | None = None
        self._stuck_timer: asyncio.TimerHandle | None = None
        self._usual_s = 1.0  # for an answer

    # ---- workers

    def start(self, slots: Sequence[int] = ()) -> None:
        """Starts all workers, or takes those that were started with its plan already, in ``slots``."""
        self.first_ready = asyncio.get_running_loop().create_future()
        for number in range(self.size):
            if slots:
                self._add(slots[number], number)
            else:
                self._spawn(number)

    def _spawn(self, number: int) -> None:
        if not self._closing:
            self._add(self.processes.spawn(self.plan, number, self._gpus), number)

    def _add(self, slot: int, number: int) -> None:
        worker = self.workers[slot] = Worker(self, slot, number, next(_SERIALS))
        self._watch_loading(worker)

    def _watch_loading(self, worker: Worker) -> None:
        limit_s = self.settings.startup_timeout_s
        if worker.state == LOADING and limit_s:
            worker.loading_timer = asyncio.get_running_loop().call_later(
                limit_s, worker.kill, f"the model was not loaded within {limit_s:g} s"
            )

    def is_ready(self, worker: Worker, line: str) -> None:
        """A worker has loaded the model."""
        if not self.was_ready:
            self.was_ready = True
            self.processes.say(f"{self._name()}ready: {line}")
        if self.first_ready is not None and not self.first_ready.done():
            self.first_ready.set_result(None)
        self._dispatch()

    def could_not_load(self, worker: Worker, frame: wire.Frame) -> None:
        """A worker has found that it can not load the model; it is about to end."""
        kind, message, place, traceback = (*frame.texts, "", "", "", "")[:4]
        if traceback:
            self.processes.say(traceback.rstrip())
        told = message if kind == "ContractError" else f"{kind}: {message}"
        self.out_of_memory = kind == "MemoryError"
        worker.reason = f"{self._name()}the model could not be loaded: {told}" + (
            f" ({place})" if place and traceback else ""
        )
        if not self.was_ready:
            # The next one would fail as this one did.
            self._give_up(frame.number or 1, worker.reason)

    def _name(self) -> str:
        return f"model {self.plan.model_name}: " if self.plan.model_name else ""

    def died(self, worker: Worker, death: Death) -> None:
        """A worker's process has ended."""
        self.workers.pop(worker.slot, None)
        if not self.workers and self._ended is not None and not self._ended.done():
            self._ended.set_result(None)
        loading = worker.state == LOADING
        for entry in worker.bound:
            entry.fail(InvocationError(404, "the session was lost with its worker", "SessionNotFound"))
        self._bound -= len(worker.bound)
        worker.bound.clear()
        worker.gone(death)
        if self._closing:
            return
        self._dispatch()  # what it was sent ahead
        if worker.retiring:
            self._spawn(worker.number)
            return
        self.deaths += 1
        self.deaths_in_row += 1
        what = f"{self._name()}worker {worker.number} (pid {death.pid}) {death.text}" + (
            f": {worker.reason}" if worker.reason else ""
        )
        self.out_of_memory = self.out_of_memory or death.out_of_memory
        if self.deaths_in_row >= self.settings.crash_limit or (loading and not self.was_ready):
            told = worker.reason or what
            more = f"; {self.deaths_in_row} workers in a row have died" if self.deaths_in_row > 1 else ""
            self._give_up(death.code or 1, told + more)
            return
        delay_s = _BACKOFF_S[min(self.deaths_in_row - 1, len(_BACKOFF_S) - 1)]
        self.processes.say(f"WARNING: {what}; another is started" + (f" in {delay_s:g} s" if delay_s else ""))
        asyncio.get_running_loop().call_later(delay_s, self._spawn, worker.number)

    def _give_up(self, code: int, line: str) -> None:
        if self._closing:
            return
        self._closing = True
        error = InvocationError(503, line, "ModelNotServed")
        if self.first_ready is not None and not self.first_ready.done():
            self.first_ready.set_exception(error)
            self.first_ready.exception()  # whoever waits for it is told; there may be nobody
        self._fail_waiting(error)
        self._on_fatal(code, line)

    def _fail_waiting(self, error: InvocationError) -> None:
        for entry in (*self._queue, *(entry for worker in self.workers.values() for entry in worker.bound)):
            entry.fail(error)
        self._queue.clear()
        for worker in self.workers.values():
            worker.bound.clear()
        self._bound = 0

    def count(self, texts: tuple[str, ...]) -> None:
        """Adds what a user's function has counted: names and numbers in turn."""
        for name, value in zip(texts[::2], texts[1::2], strict=True):
            if name in self.counts or len(self.counts) < _MOST_COUNTS:
                self.counts[name] = self.counts.get(name, 0.0) + float(value)

    @property
    def ready(self) -> int:
        """Workers that could answer."""
        return sum(worker.state == READY for worker in self.workers.values())

    @property
    def waiting(self) -> int:
        """Requests that wait for a worker."""
        return len(self._queue) + self._bound

    @property
    def in_hand(self) -> int:
        """Requests that workers have."""
        return sum(len(worker.entries) for worker in self.workers.values())

    def look_at_memory(self) -> None:
        """Replaces workers that hold more memory than they may, one at a time, and only when they are idle."""
        limit = self.settings.max_worker_mb << 20
        if any(worker.retiring for worker in self.workers.values()):
            return
        for worker in self.workers.values():
            if worker.state == READY and not worker.entries:
                held = self.processes.memory_bytes(worker.slot)
                if held > limit:
                    self.processes.say(
                        f"worker {worker.number} holds {held >> 20} MiB, more than {self.settings.max_worker_mb}: "
                        "another takes its place"
                    )
                    worker.retiring = True
                    worker.send(wire.STOP)
                    return

    def lose_all(self, why: str) -> None:
        """Takes it that every worker has ended: there is nobody any more who would tell."""
        self._closing = True
        self._fail_waiting(InvocationError(503, why))
        for worker in list(self.workers.values()):
            worker.bury(Death(0, 128 + 9, why, False))

    async def close(self, limit_s: float) -> None:
        """Ends all workers, after what they have in hand, or ``limit_s``."""
        self._closing = True
        self._fail_waiting(_ending())
        for worker in self.workers.values():
            if worker.state == LOADING:
                worker.kill("the server is ending")  # it has nothing in hand, and may load for minutes
            else:
                worker.send(wire.STOP)
        if self.first_ready is not None and not self.first_ready.done():
            self.first_ready.set_exception(InvocationError(503, f"{self._name()}it was unloaded while it was loaded"))
            self.first_ready.exception()  # there may be nobody who waits for it
        if self.workers:
            if self._ended is None:
                self._ended = asyncio.get_running_loop().create_future()
            await asyncio.wait([self._ended], timeout=limit_s)
        for worker in self.workers.values():
            worker.kill("the server is ending")

    # ---- requests

    def submit(self, entry: Entry) -> None:
        """Puts a request into the queue; its future has the reply.

        Raises:
            InvocationError: 503, the queue is full or there is nobody to answer.
        """
        if self._closing:
            raise _ending()
        if self.waiting >= self.settings.queue:
            raise InvocationError(
                503,
                f"{self.waiting} requests are waiting already; more workers, or a longer --queue, take more",
                "QueueFull",
                (_LOST_HEADER,),
            )
        entry.timer = asyncio.get_running_loop().call_later(self.settings.timeout_s, self._too_late, entry)
        if not entry.home:
            self._queue.append(entry)
        else:
            worker = self._find(entry.home)
            if worker is None or worker.state != READY:
                entry.over()
                raise InvocationError(404, "the session was lost with its worker", "SessionNotFound")
            worker.bound.append(entry)
            self._bound += 1
        self._dispatch()

    def extend(self, entry: Entry) -> None:
        """An answer has begun to come in pieces: it may take longer."""
        entry.over()
        loop = asyncio.get_running_loop()
        entry.timer = loop.call_later(self.settings.stream_timeout_s, self._too_late, entry)

    def heard(self, entry: Entry) -> None:
        """Somebody has said something in a conversation: its time begins again."""
        if entry.worker is not None and entry.id in entry.worker.entries:
            self.extend(entry)

    def hang_up(self, entry: Entry) -> None:
        """The client of a conversation has gone: the handler may come to its end by itself, for a moment."""
        entry.given_up = True
        worker = entry.worker
        if worker is not None and entry.id in worker.entries:
            worker.send(wire.MESSAGES_END, entry.id)
            asyncio.get_running_loop().call_later(_CANCEL_GRACE_S, worker.send, wire.CANCEL, entry.id)

    def give_up(self, entry: Entry) -> None:
        """The client has gone."""
        worker = entry.worker
        if worker is not None and entry in worker.not_begun():
            worker.take_back(entry)
            entry.fail(InvocationError(499, "the client has gone"))
        elif worker is not None:
            entry.given_up = True
            worker.send(wire.CANCEL, entry.id)
        elif self._take_out(entry):
            entry.fail(InvocationError(499, "the client has gone"))

    def answered(self) -> None:
        """A worker has ended a request, whatever the answer was: it works."""
        self.deaths_in_row = 0
        if self._queue or self._bound:
            self._dispatch()

    def took(self, seconds: float) -> None:
        """How long a worker had a request."""
        self._usual_s += (seconds - self._usual_s) * _USUAL

    def again(self, entries: Sequence[Entry]) -> None:
        """Puts requests that no worker has begun before those that wait."""
        for entry in reversed(entries):
            if entry.worker is not None:
                entry.worker.entries.pop(entry.id, None)
                entry.worker, entry.ahead = None, False
            if self._closing:
                entry.fail(_ending())
            else:
                self._queue.appendleft(entry)

    def close_session(self, home: int, session_id: str) -> None:
        """Lets a worker forget a session."""
        worker = self._find(home)
        if worker is not None:
            worker.send(wire.CLOSE_SESSION, texts=(session_id,))

    def pick(self) -> int:
        """Serial of the worker for a new session: the one with the least to do.

        Raises:
            InvocationError: 503, there is none.
        """
        able = [worker for worker in self.workers.values() if worker.state == READY and not worker.retiring]
        if not able:
            raise InvocationError(503, "no worker is ready", headers=(_LOST_HEADER,))
        return min(able, key=lambda worker: len(worker.entries) + len(worker.bound)).serial

    def _find(self, serial: int) -> Worker | None:
        return next((worker for worker in self.workers.values() if worker.serial == serial), None)

    def _take_out(self, entry: Entry) -> bool:
        """Whether it was waiting."""
        if entry.home:
            worker = self._find(entry.home)
            if worker is None or entry not in worker.bound:
                return False
            worker.bound.remove(entry)
            self._bound -= 1
        elif entry in self._queue:
            self._queue.remove(entry)
        else:
            return False
        return True

    def _too_late(self, entry: Entry) -> None:
        entry.timer = None
        limit_s = self.settings.timeout_s if entry.stream is None else self.settings.stream_timeout_s
        worker = entry.worker
        if worker is None or entry in worker.not_begun():
            if worker is None:
                self._take_out(entry)
            else:
                worker.take_back(entry)
            entry.fail(
                InvocationError(503, f"no worker was free within {limit_s:g} s", "QueueTimeout", (_LOST_HEADER,))
            )
            return
        left_s = entry.sent_s + limit_s - time.monotonic()
        if entry.stream is None and left_s > 0:  # it has waited: the handler has its time all the same
            entry.timer = asyncio.get_running_loop().call_later(left_s, self._too_late, entry)
            return
        entry.fail(InvocationError(504, f"the handler has not answered within {limit_s:g} s"))
        if entry.stream is not None and entry.stream.on_late is not None:
            entry.stream.on_late()
        # A handler that waits for its client, or for others, can give the request up; any other has to be ended.
        if worker.capacity > 1 or entry.stream is not None:
            worker.send(wire.CANCEL, entry.id)
            asyncio.get_running_loop().call_later(_CANCEL_GRACE_S, self._still_there, worker, entry)
        else:
            worker.kill(f"the handler has not answered within {limit_s:g} s")

    def _still_there(self, worker: Worker, entry: Entry) -> None:
        if entry.id in worker.entries:
            worker.kill("the handler did not give up a request that took too long")

    def _dispatch(self) -> None:
        if self._bound:
            for worker in self.workers.values():
                while worker.bound and worker.has_room():
                    self._bound -= 1
                    self._send(worker, worker.bound.popleft())
        while self._queue:
            free = self._free()
            if free is None:
                self._send_ahead()
                return
            if self.settings.batch_size == 1:
                self._send(free, self._queue.popleft())
            elif not self._send_together(free):
                return

    def _free(self) -> Worker | None:
        best = None
        for worker in self.workers.values():
            if worker.has_room() and (best is None or len(worker.entries) < len(best.entries)):
                best = worker
        return best

    def _send(self, worker: Worker, entry: Entry, ahead: bool = False) -> None:
        entry.worker = worker
        entry.sent_s = time.monotonic()
        # Another one when it is sent again: what is still said of the first is nobody's then.
        self._ids = entry.id = self._ids % 0xFFFF_FFFF + 1
        worker.entries[entry.id] = entry
        entry.ahead = ahead
        worker.send(wire.REQUEST, entry.id, int(entry.talk is not None), entry.texts, entry.body)
        if not ahead:
            entry.body = b""

    def _send_ahead(self) -> None:
        """Sends the next request of each worker that answers quickly, where all are busy."""
        if self._usual_s > _QUICK_S or self.settings.batch_size > 1:
            return
        for worker in self.workers.values():
            if not self._queue or len(self._queue[0].body) > _QUICK_BYTES or self._queue[0].talk is not None:
                return
            if worker.is_quick():
                self._send(worker, self._queue.popleft(), ahead=True)
                if self._stuck_timer is None:
                    self._stuck_timer = asyncio.get_running_loop().call_later(_STUCK_S, self._look_for_stuck)

    def _look_for_stuck(self) -> None:
        """Takes requests that were sent ahead from workers that are not so quick to ones that are free."""
        self._stuck_timer = None
        now_s = time.monotonic()
        left = False
        for worker in self.workers.values():
            for entry in worker.not_begun():
                left = True
                if now_s - next(iter(worker.entries.values())).sent_s > _STUCK_S and self._free() is not None:
                    worker.take_back(entry)
                    self.again([entry])
                    self._dispatch()
        if left and self._stuck_timer is None:
            self._stuck_timer = asyncio.get_running_loop().call_later(_STUCK_S, self._look_for_stuck)

    def _send_together(self, worker: Worker) -> bool:
        """Sends what waits and is alike, up to the batch size; False when it is better to wait for more."""
        first = self._queue[0]
        if first.talk is not None:  # there is none like it
            self._send(worker, self._queue.popleft())
            return True
        alike = [entry for entry in self._queue if entry.key == first.key]
        alike = alike[: self.settings.batch_size]
        left_s = first.queued_s + self.settings.batch_delay_s - time.monotonic()
        if len(alike) < self.settings.batch_size and left_s > 0:
            if self._batch_timer is None:
                self._batch_timer = asyncio.get_running_loop().call_later(left_s, self._batch_is_due)
            return False
        for entry in alike:
            self._queue.remove(entry)
        if len(alike) > 1:
            worker.send(wire.TOGETHER, number=len(alike))
        for entry in alike:
            self._send(worker, entry)
        return True

    def _batch_is_due(self) -> None:
        self._batch_timer = None
        self._dispatch()
