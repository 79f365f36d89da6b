"""``launcher.Communicator``: collectives on NumPy arrays and their like, without torch."""

from __future__ import annotations

import os
import sys
import weakref
from array import array as Numbers
from collections import deque
from functools import partial

from launcher.collectives.arrays import View, element_type, product, shared_array, view
from launcher.collectives.elements import FLOATING, OPERATIONS, SIZES, DType, ReduceOp
from launcher.collectives.executor import Executor, Pending
from launcher.collectives.group import Group, join
from launcher.collectives.place import read_place

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType
    from typing import Any

_BITWISE = (ReduceOp.BIT_AND, ReduceOp.BIT_OR, ReduceOp.BIT_XOR)
_made: dict[tuple[str, tuple[int, ...]], int] = {}  # how often this process has made a group, so that names differ


class Communicator:
    """All ranks of the job, or some of them (:meth:`group`, :meth:`split`), and what they do together.

    All members call the same methods in the same order, with arrays of the same type and (where nothing else is said)
    the same size. An array is a NumPy array, a CPU tensor of torch, or an object with ``__dlpack__`` or
    ``__array_interface__``; C-contiguous, in CPU memory, of float32, float64, float16, bfloat16, int8 to int64, uint8
    to uint64 or bool. What is returned is of the same kind. float16 and bfloat16 are folded in float32 and rounded
    once. Results are the same bits on every rank and in every run.

    ``op`` is "sum", "average", "min", "max", "product", "bit_and", "bit_or", "bit_xor", or a ReduceOp. For floating
    point, ``prescale`` multiplies this rank's input and ``postscale`` the result, before the one rounding.

    Each method has a twin whose name ends in ``_async``: it returns at once, a Pending whose ``wait()`` gives what the
    method would have. Until then the arrays belong to it. Works are done in the order of the calls, those of the plain
    methods among them.

    Every method raises:
        CollectiveError: a member is gone, was not seen in time, or called something else. The communicator can not be
            used any more, by anybody.
        TypeError, ValueError: an argument that can not be used; nothing was sent.

    Args:
        timeout_s: how long a call waits for another rank, in seconds.
        leg, wire, independent: for jobs on several hosts; see launcher.collectives.hierarchy.

    Raises:
        UsageError: this process is not a rank of a job, and the environment says that there are several.
    """

    def __init__(
        self, *, timeout_s: float = 1800.0, leg: str = "auto", wire: str = "none", independent: bool = False
    ) -> None:
        place = read_place(os.environ)
        ranks = tuple(range(place.world_size if place else 1))
        self._start("world", ranks, place.rank if place else 0, timeout_s, (leg, wire, independent))

    def _start(
        self, name: str, ranks: tuple[int, ...], rank: int, timeout_s: float, ways: tuple[str, str, bool]
    ) -> None:
        number = _made.get((name, ranks), 0) + 1
        self.name = name if number == 1 else f"{name}#{number}"
        self.ranks = ranks
        self._ways = ways
        leg, wire, independent = ways
        self._group: Group = join(
            self.name,
            rank,
            len(ranks),
            ranks=ranks,
            timeout_s=timeout_s,
            leg=leg,
            wire=wire,
            independent=independent,
        )
        _made[name, ranks] = number
        self.rank, self.size = self._group.rank, self._group.size
        self._executor = Executor(self.name, self._group.abort)
        self._closed = False
        self._unused: deque[int] = deque()  # memory of arrays that are gone

    # ---- who

    def group(self, ranks: Sequence[int]) -> Communicator:
        """A communicator of some of this one's members; they, and no others, must call it.

        Args:
            ranks: numbers in this communicator, in the order that they shall have in the new one.
        """
        members = tuple(ranks)
        if self.rank not in members or len(set(members)) != len(members):
            raise ValueError(
                f"ranks is {list(members)}; expected different numbers, rank {self.rank} (this one) among them: only "
                "members make a group"
            )
        if not all(0 <= member < self.size for member in members):
            raise ValueError(f"ranks is {list(members)}; expected numbers from 0 to {self.size - 1}")
        made = Communicator.__new__(Communicator)
        in_job = tuple(self.ranks[member] for member in members)
        name = f"{self.name}/{','.join(map(str, in_job))}"
        made._start(name, in_job, members.index(self.rank), self.timeout_s, self._ways)
        return made

    def split(self, color: int | None, key: int = 0) -> Communicator | None:
        """One communicator for each color, ordered by key, then by rank; all members of this one must call it.

        None, as a color and as the result, is to be in none.
        """
        if color is not None and color < 0:
            raise ValueError(f"color is {color}; expected None or a number that is not negative")
        own, table = Numbers("q", (-1 if color is None else color, key)), Numbers("q", bytes(16 * self.size))
        source, target = own.buffer_info()[0], table.buffer_info()[0]
        self._run(lambda: self._group.all_gather(source, target, [2] * self.size, DType.int64))
        if color is None:
            return None
        colors, keys = table[::2], table[1::2]
        members = [rank for rank in range(self.size) if colors[rank] == color]
        return self.group(sorted(members, key=lambda rank: (keys[rank], rank)))

    @property
    def timeout_s(self) -> float:
        """How long a call waits for another rank, in seconds. May be set."""
        return self._group.timeout_s

    @timeout_s.setter
    def timeout_s(self, seconds: float) -> None:
        def set_timeout() -> None:
            self._group.timeout_s = seconds

        if not seconds > 0:
            raise ValueError(f"timeout_s is {seconds}; expected more than 0 seconds")
        self._run(set_timeout)

    # ---- what they do

    def allreduce(
        self,
        array: Any,
        op: str | ReduceOp = "sum",
        *,
        out: Any = None,
        prescale: float = 1.0,
        postscale: float = 1.0,
    ) -> Any:
        """Folds everybody's arrays, element by element; the result is in ``array``, or in ``out``, which is returned.

        Args:
            out: of the shape and type of ``array``.
        """
        return self._run(self._allreduce(array, op, out, prescale, postscale))

    def allreduce_async(
        self,
        array: Any,
        op: str | ReduceOp = "sum",
        *,
        out: Any = None,
        prescale: float = 1.0,
        postscale: float = 1.0,
    ) -> Pending:
        """:meth:`allreduce`, begun."""
        return self._submit(self._allreduce(array, op, out, prescale, postscale))

    def _allreduce(
        self, array: Any, op: str | ReduceOp, out: Any, prescale: float, postscale: float
    ) -> Callable[[], Any]:
        source = view(array, "array", writable=out is None)
        target = source if out is None else self._same(out, source, source.shape)
        how = _check(op, source.dtype, prescale, postscale)

        def work() -> Any:
            self._group.allreduce(source.pointer, target.pointer, source.count, source.dtype, how, prescale, postscale)
            return target.array

        return work

    def allreduce_coalesced(
        self, arrays: Sequence[Any], op: str | ReduceOp = "sum", *, prescale: float = 1.0, postscale: float = 1.0
    ) -> list[Any]:
        """:meth:`allreduce` of many arrays, in place, as one message for each type of element among them."""
        result: list[Any] = self._run(self._allreduce_coalesced(arrays, op, prescale, postscale))
        return result

    def allreduce_coalesced_async(
        self, arrays: Sequence[Any], op: str | ReduceOp = "sum", *, prescale: float = 1.0, postscale: float = 1.0
    ) -> Pending:
        """:meth:`allreduce_coalesced`, begun."""
        return self._submit(self._allreduce_coalesced(arrays, op, prescale, postscale))

    def _allreduce_coalesced(
        self, arrays: Sequence[Any], op: str | ReduceOp, prescale: float, postscale: float
    ) -> Callable[[], list[Any]]:
        views = [view(array, f"arrays[{index}]", writable=True) for index, array in enumerate(arrays)]
        by_type: dict[DType, list[View]] = {}
        for one in views:
            by_type.setdefault(one.dtype, []).append(one)
        hows = {dtype: _check(op, dtype, prescale, postscale) for dtype in by_type}

        def work() -> list[Any]:
            for dtype, parts in by_type.items():
                pointers = [part.pointer for part in parts]
                counts = [part.count for part in parts]
                self._group.allreduce_coalesced(pointers, pointers, counts, dtype, hows[dtype], prescale, postscale)
            return [one.array for one in views]

        return work

    def reduce_scatter(
        self,
        array: Any,
        op: str | ReduceOp = "sum",
        *,
        counts: Sequence[int] | None = None,
        out: Any = None,
        prescale: float = 1.0,
        postscale: float = 1.0,
    ) -> Any:
        """Folds everybody's arrays; each rank gets a part, rank r the rows (of the first dimension) that follow r-1's.

        Args:
            array: of shape (rows, ...), which is only read.
            counts: rows for each rank; without it all get the same number.
            out: of shape (counts[rank], ...); without it a new array.
        """
        return self._run(self._reduce_scatter(array, op, counts, out, prescale, postscale))

    def reduce_scatter_async(
        self,
        array: Any,
        op: str | ReduceOp = "sum",
        *,
        counts: Sequence[int] | None = None,
        out: Any = None,
        prescale: float = 1.0,
        postscale: float = 1.0,
    ) -> Pending:
        """:meth:`reduce_scatter`, begun."""
        return self._submit(self._reduce_scatter(array, op, counts, out, prescale, postscale))

    def _reduce_scatter(
        self,
        array: Any,
        op: str | ReduceOp,
        counts: Sequence[int] | None,
        out: Any,
        prescale: float,
        postscale: float,
    ) -> Callable[[], Any]:
        source = view(array, "array", writable=False)
        how = _check(op, source.dtype, prescale, postscale)
        rows, row = _rows(source)
        counts = self._shares(rows, "array") if counts is None else self._counts(counts, "counts", rows)
        shape = (counts[self.rank], *source.shape[1:])
        target = self._target(out, source, shape)
        if out is not None and target.overlaps(source):
            raise ValueError("out overlaps array; pass memory of its own, or no out")
        elements = [count * row for count in counts]

        def work() -> Any:
            self._group.reduce_scatter(source.pointer, target.pointer, elements, source.dtype, how, prescale, postscale)
            return target.array

        return work

    def all_gather(self, array: Any, *, counts: Sequence[int] | None = None, out: Any = None) -> Any:
        """Everybody's arrays one after the other, in rank order.

        Args:
            array: of shape (rows, ...); a single number counts as one row.
            counts: rows of each rank; without it all give the same number.
            out: of shape (sum(counts), ...); without it a new array.
        """
        return self._run(self._all_gather(array, counts, out))

    def all_gather_async(self, array: Any, *, counts: Sequence[int] | None = None, out: Any = None) -> Pending:
        """:meth:`all_gather`, begun."""
        return self._submit(self._all_gather(array, counts, out))

    def _all_gather(self, array: Any, counts: Sequence[int] | None, out: Any) -> Callable[[], Any]:
        source = view(array, "array", writable=False)
        rows, row = _rows(source)
        counts = [rows] * self.size if counts is None else self._counts(counts, "counts")
        if counts[self.rank] != rows:
            raise ValueError(f"counts[{self.rank}] is {counts[self.rank]}, but array has {rows} rows on this rank")
        target = self._target(out, source, (sum(counts), *source.shape[1:]))
        elements = [count * row for count in counts]
        own = target.pointer + sum(elements[: self.rank]) * SIZES[source.dtype]
        if out is not None and source.pointer != own and target.overlaps(source):
            raise ValueError("out overlaps array elsewhere than at this rank's own part; pass memory of its own")

        def work() -> Any:
            self._group.all_gather(source.pointer, target.pointer, elements, source.dtype)
            return target.array

        return work

    def broadcast(self, array: Any, root: int = 0) -> Any:
        """Rank ``root``'s array, in everybody's ``array``, which is returned."""
        return self._run(self._broadcast(array, root))

    def broadcast_async(self, array: Any, root: int = 0) -> Pending:
        """:meth:`broadcast`, begun."""
        return self._submit(self._broadcast(array, root))

    def _broadcast(self, array: Any, root: int) -> Callable[[], Any]:
        self._check_root(root)
        buffer = view(array, "array", writable=self.rank != root)

        def work() -> Any:
            self._group.broadcast(buffer.pointer, buffer.count, buffer.dtype, root)
            return buffer.array

        return work

    def reduce(
        self,
        array: Any,
        root: int = 0,
        op: str | ReduceOp = "sum",
        *,
        out: Any = None,
        prescale: float = 1.0,
        postscale: float = 1.0,
    ) -> Any:
        """:meth:`allreduce` for rank ``root`` alone: the others' arrays stay as they are, and they get None."""
        return self._run(self._reduce(array, root, op, out, prescale, postscale))

    def reduce_async(
        self,
        array: Any,
        root: int = 0,
        op: str | ReduceOp = "sum",
        *,
        out: Any = None,
        prescale: float = 1.0,
        postscale: float = 1.0,
    ) -> Pending:
        """:meth:`reduce`, begun."""
        return self._submit(self._reduce(array, root, op, out, prescale, postscale))

    def _reduce(
        self, array: Any, root: int, op: str | ReduceOp, out: Any, prescale: float, postscale: float
    ) -> Callable[[], Any]:
        self._check_root(root)
        here = self.rank == root
        source = view(array, "array", writable=here and out is None)
        target = source if out is None or not here else self._same(out, source, source.shape)
        how = _check(op, source.dtype, prescale, postscale)

        def work() -> Any:
            self._group.reduce(
                source.pointer, target.pointer, source.count, source.dtype, root, how, prescale, postscale
            )
            return target.array if here else None

        return work

    def all_to_all(
        self,
        array: Any,
        *,
        send_counts: Sequence[int] | None = None,
        receive_counts: Sequence[int] | None = None,
        out: Any = None,
    ) -> Any:
        """Sends each rank its part of ``array``, rank r the rows that follow r-1's, and gives what came, in rank order.

        Args:
            array: of shape (rows, ...).
            send_counts: rows for each rank; without it all get the same number.
            receive_counts: rows from each rank; without it the ranks tell each other first.
            out: of shape (sum(receive_counts), ...), not overlapping ``array``; without it a new array.
        """
        if receive_counts is None and send_counts is not None:
            rows, _ = _rows(view(array, "array", writable=False))
            receive_counts = self._exchange(self._counts(send_counts, "send_counts", rows))
        return self._run(self._all_to_all(array, send_counts, receive_counts, out))

    def all_to_all_async(
        self,
        array: Any,
        *,
        send_counts: Sequence[int] | None = None,
        receive_counts: Sequence[int] | None = None,
        out: Any = None,
    ) -> Pending:
        """:meth:`all_to_all`, begun. With ``send_counts`` it needs ``receive_counts``."""
        if receive_counts is None and send_counts is not None:
            raise ValueError("all_to_all_async needs receive_counts where send_counts is given; all_to_all does not")
        return self._submit(self._all_to_all(array, send_counts, receive_counts, out))

    def _all_to_all(
        self, array: Any, send_counts: Sequence[int] | None, receive_counts: Sequence[int] | None, out: Any
    ) -> Callable[[], Any]:
        source = view(array, "array", writable=False)
        rows, row = _rows(source)
        sent = self._shares(rows, "array") if send_counts is None else self._counts(send_counts, "send_counts", rows)
        received = sent if receive_counts is None else self._counts(receive_counts, "receive_counts")
        if received[self.rank] != sent[self.rank]:
            raise ValueError(
                f"receive_counts[{self.rank}] is {received[self.rank]}, but this rank sends itself "
                f"{sent[self.rank]} rows"
            )
        target = self._target(out, source, (sum(received), *source.shape[1:]))
        if target.overlaps(source):
            raise ValueError("out overlaps array; pass memory of its own, or no out")
        sent, received = [count * row for count in sent], [count * row for count in received]

        def work() -> Any:
            self._group.all_to_all(source.pointer, target.pointer, sent, received, source.dtype)
            return target.array

        return work

    def barrier(self) -> None:
        """Returns when all members have called it."""
        self._run(self._group.barrier)

    def barrier_async(self) -> Pending:
        """:meth:`barrier`, begun."""
        return self._submit(self._group.barrier)

    # ---- memory, and the rest

    def empty(self, shape: int | Sequence[int], dtype: Any = "float32") -> Any:
        """An array of zeros in memory that the ranks of a host share: messages in it are not copied.

        It pays where the same arrays are used again and again and all of a message lies in such memory on every rank.
        The memory goes with the last array on it. After os.fork() parent and child write to the same memory.

        Args:
            dtype: a name ("bfloat16" too, with ml_dtypes imported) or type of NumPy, for a NumPy array; or a type of
                torch, for a tensor.

        Raises:
            OSError: there is no memory left.
            ValueError: a shape that can not be.
        """
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        nbytes = product(shape) * SIZES[element_type(dtype)]
        if min(shape, default=0) < 0 or nbytes > sys.maxsize:
            raise ValueError(f"shape is {shape}; expected no negative number, and at most {sys.maxsize} bytes")
        address: int = self._run(lambda: self._group.allocate(max(nbytes, 1)))
        import ctypes

        buffer = (ctypes.c_char * nbytes).from_address(address)
        buffer.group = self._group  # type: ignore[attr-defined]  # the mapping is its
        weakref.finalize(buffer, self._unused.append, address).atexit = False
        return shared_array(buffer, shape, dtype)

    def statistics(self) -> dict[str, Any]:
        """Calls and bytes by the way the data went, and what was measured when the group was made; for tuning.

        ``calls`` and ``bytes`` have the keys small, pipelined, shared (in memory of :meth:`empty`) and pulled.
        """
        return self._group.statistics()

    def abort(self, reason: str) -> None:
        """Makes every other member's call fail at once, naming this rank and ``reason``. From any thread."""
        self._group.abort(reason)

    def close(self) -> None:
        """Finishes what was begun and leaves; members that still need this rank get an error.

        Memory of :meth:`empty` stays valid. A second call does nothing.
        """
        if not self._closed:
            self._closed = True
            self._executor.close()
            self._group.close()

    def __enter__(self) -> Communicator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:  # the others need not wait for what will not come
            self._group.abort(f"{type(error).__name__}: {error}")
        self.close()

    def __repr__(self) -> str:
        state = ", closed" if self._closed else ""
        return f"Communicator({self.name!r}, rank {self.rank} of {self.size}{state})"

    # ---- inside

    def _run(self, work: Callable[[], Any]) -> Any:
        if self._unused:
            self._release()
        return self._executor.run(work)

    def _submit(self, work: Callable[[], Any]) -> Pending:
        if self._unused:
            self._release()
        return self._executor.submit(work)

    def _release(self) -> None:
        # Not where an array goes: that may be in any thread, and in the middle of a call.
        while self._unused:
            self._executor.submit(partial(self._group.release, self._unused.popleft()))

    def _same(self, out: Any, source: View, shape: tuple[int, ...]) -> View:
        target = view(out, "out", writable=True)
        if target.dtype != source.dtype or target.shape != shape:
            raise ValueError(
                f"out is of shape {target.shape} and type {target.dtype.name}; expected {shape} and {source.dtype.name}"
            )
        if target.pointer != source.pointer and shape == source.shape and target.overlaps(source):
            raise ValueError("out overlaps array in part; pass the same memory or memory of its own")
        return target

    def _target(self, out: Any, source: View, shape: tuple[int, ...]) -> View:
        return view(source.make(shape), "the result", writable=True) if out is None else self._same(out, source, shape)

    def _shares(self, rows: int, what: str) -> list[int]:
        if rows % self.size:
            raise ValueError(f"{what} has {rows} rows, which {self.size} ranks can not share evenly; pass counts")
        return [rows // self.size] * self.size

    def _counts(self, counts: Sequence[int], what: str, total: int | None = None) -> list[int]:
        found = [int(count) for count in counts]
        if len(found) != self.size or min(found) < 0:
            raise ValueError(f"{what} is {found}; expected one number for each of {self.size} ranks, none negative")
        if total is not None and sum(found) != total:
            raise ValueError(f"{what} is {found}, {sum(found)} rows in all; array has {total}")
        return found

    def _check_root(self, root: int) -> None:
        if not 0 <= root < self.size:
            raise ValueError(f"root is {root}; expected a rank from 0 to {self.size - 1}")

    def _exchange(self, counts: Sequence[int]) -> list[int]:
        """What each rank sends to this one, where this one sends ``counts``."""
        sent, received = Numbers("q", counts), Numbers("q", bytes(8 * self.size))
        ones = [1] * self.size
        source, target = sent.buffer_info()[0], received.buffer_info()[0]
        self._run(lambda: self._group.all_to_all(source, target, ones, ones, DType.int64))
        return list(received)


def _rows(source: View) -> tuple[int, int]:
    """Number of rows, and of elements in a row; a single number is one row."""
    return (source.shape[0], product(source.shape[1:])) if source.shape else (1, 1)


def _check(op: str | ReduceOp, dtype: DType, prescale: float, postscale: float) -> ReduceOp:
    """The operation, if elements of this type have it."""
    found = OPERATIONS.get(op) if isinstance(op, str) else ReduceOp(op)
    if found is None:
        raise ValueError(f"op is {op!r}; expected one of {', '.join(OPERATIONS)}")
    if dtype in FLOATING:
        if found in _BITWISE:
            raise ValueError(f"op {op!r} is for integers and bool; the array is of {dtype.name}")
    elif prescale != 1.0 or postscale != 1.0:
        raise ValueError(f"prescale and postscale are for floating point; the array is of {dtype.name}")
    elif found is ReduceOp.AVERAGE and dtype is DType.bool:
        raise ValueError("an average of bool is not defined; expected another op, or another type")
    return found
