"""What the collectives give on this machine: ``python -m launcher bench collectives``, or :func:`run` from Python.

Each rank rewrites its buffer, all meet at a barrier, then the call is timed: what a bucket of gradients looks like. All
contenders are measured in turn, round after round, in the same processes; MPI in a job of its own, since its program
starts its ranks. A time is the median over the calls, of the slowest rank, then over the rounds.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import time
from abc import ABC, abstractmethod

from launcher.collectives import plot
from launcher.errors import JobFailed, LauncherError, OutputError, UsageError, of_machine
from launcher.record import Record, as_dict

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    from launcher.collectives.group import Group
    from launcher.options import CommandLine

    Call = Callable[[], object]

ANY, REGISTERED, GLOO, MPI, LIMIT = "any tensor", "registered", "Gloo", "MPI", "memory limit"
SIZES = "1K,8K,64K,256K,1M,4M,16M,64M"
ROUNDS = 3
SECONDS = 0.05
OUTPUT = "bench-collectives"
_MOST_RANKS = 8
_FEWEST_CALLS, _MOST_CALLS = 5, 2000
_UNITS = {"K": 10, "M": 20, "G": 30}
_BYTE = 0x3F  # four of them are a float32 of 0.747


class Cell(Record):
    """One contender at one size: time of a call in us, and bytes of the message over that time in GB/s (10^9)."""

    name: str
    nbytes: int
    time_us: float
    gb_per_s: float


class Report(Record):
    """What :func:`run` found.

    Attributes:
        ranks: how many there were, all on this machine.
        cores: that this process may use.
        ping_ns: one-way time of a flag between two ranks' cores; 0: not measured.
        cells: by size, then contender.
        absent: contender -> why it was not measured.
    """

    ranks: int
    cores: int
    ping_ns: float
    cells: tuple[Cell, ...]
    absent: dict[str, str]

    @property
    def names(self) -> list[str]:
        """The contenders that were measured."""
        return list(dict.fromkeys(cell.name for cell in self.cells))

    @property
    def series(self) -> dict[str, list[tuple[float, float]]]:
        """Contender -> (bytes, GB/s), for a chart."""
        return {
            name: [
                (float(cell.nbytes), cell.gb_per_s) for cell in self.cells if cell.name == name and cell.gb_per_s > 0
            ]
            for name in self.names
        }

    def table(self) -> str:
        """The numbers for people."""
        names = self.names
        sizes = list(dict.fromkeys(cell.nbytes for cell in self.cells))
        found = {(cell.name, cell.nbytes): cell for cell in self.cells}
        lines = [
            f"allreduce (sum, float32) of {self.ranks} ranks on {self.cores} cores of this machine; each buffer is "
            "rewritten before each call",
            "",
            " " * 9 + "".join(f"{name:>23}" for name in names),
            f"{'size':>9}" + f"{'us':>13}{'GB/s':>10}" * len(names),
        ]
        for size in sizes:
            row = f"{plot.size_text(size):>9}"
            for name in names:
                cell = found.get((name, size))
                row += f"{cell.time_us:>13,.2f}{_rate(cell.gb_per_s):>10}" if cell else f"{'-':>13}{'-':>10}"
            lines.append(row)
        lines += [
            "",
            f"{LIMIT}: all ranks copy a message in their own memory at once; any allreduce moves as many bytes",
        ]
        if self.ping_ns > 0:
            lines.append(f"a flag takes {self.ping_ns:.0f} ns from one core to another")
        if self.ranks > self.cores:
            lines.append(f"{self.ranks} ranks share {self.cores} cores: what waits keeps others from working")
        return "\n".join([*lines, *(f"{name}: not measured: {why}" for name, why in self.absent.items())])


def _rate(gb_per_s: float) -> str:
    return f"{gb_per_s:.2f}" if gb_per_s >= 0.1 else f"{gb_per_s:.4f}"


def parse_sizes(text: str) -> list[int]:
    """Bytes of ``1K,64K,25M``, ascending. Raises UsageError: each has to be a multiple of 64, from 64 to 16 GiB."""
    found = set()
    for word in text.upper().replace(" ", "").split(","):
        shift = _UNITS.get(word[-1:], 0)
        digits = word[:-1] if shift else word
        size = int(digits) << shift if digits.isdecimal() else 0
        if not 64 <= size <= 16 << 30 or size % 64:
            raise UsageError(
                f"--sizes is {text!r}, where {word!r} is no size; expected multiples of 64 bytes such as 1K,64K,25M"
            )
        found.add(size)
    return sorted(found)


def run(
    sizes: str | Sequence[int] = SIZES,
    nproc: int | None = None,
    *,
    seconds: float = SECONDS,
    rounds: int = ROUNDS,
    peers: Sequence[str] = (GLOO, MPI),
) -> Report:
    """Starts ranks on this machine and measures them.

    Args:
        sizes: of the messages, in bytes or as ``1K,64K,25M``.
        nproc: ranks; None: one for each core that this process may use, from 2 to 8.
        seconds: that a contender gets for a size in a round.
        peers: who is measured beside ours, of ``Gloo`` (needs torch) and ``MPI`` (needs mpi4py and an mpirun).

    Raises:
        UsageError: a size or a number makes no sense.
        LauncherError: the ranks could not be started, or failed.
        OSError: there is no place for temporary files.
    """
    chosen = parse_sizes(sizes if isinstance(sizes, str) else ",".join(map(str, sizes)))
    cores = len(os.sched_getaffinity(0))
    ranks = min(max(cores, 2), _MOST_RANKS) if nproc is None else nproc
    if not 2 <= ranks <= 1024 or seconds <= 0 or rounds < 1:
        raise UsageError(f"{ranks} ranks, {rounds} rounds of {seconds:g} s; expected 2 to 1024 ranks, and both above 0")
    absent: dict[str, str] = {}
    own = [ANY, REGISTERED, *([GLOO] if GLOO in peers and _importable("torch", GLOO, absent) else []), LIMIT]
    found = _job(_measure, (chosen, own, seconds, rounds), ranks)
    ping_ns = max(answer["ping_ns"] for answer in found)
    times = _slowest([answer["times"] for answer in found])
    if MPI in peers and _importable("mpi4py", MPI, absent):
        try:
            found = _job(_measure_mpi, (chosen, seconds, rounds), ranks, engine="mpi")
            times |= _slowest([answer["times"] for answer in found])
        except (JobFailed, UsageError) as error:
            absent[MPI] = str(error).partition("\n")[0]
    order = [name for name in (ANY, REGISTERED, GLOO, MPI, LIMIT) if any(key[0] == name for key in times)]
    cells = tuple(
        Cell(name, size, times[name, size], size / times[name, size] / 1e3)
        for size in chosen
        for name in order
        if (name, size) in times
    )
    return Report(ranks, cores, ping_ns, cells, absent)


def bench(line: CommandLine, log: Callable[[str], None]) -> str:
    """Carries out ``bench collectives``; the text to show.

    Raises:
        UsageError: no such benchmark, or an option that has no meaning here.
        LauncherError: the ranks could not be started, or failed.
        OutputError: the chart cannot be written.
    """
    if line.script != "collectives" or line.script_args:
        what = " ".join((line.script, *line.script_args)) or "nothing"
        raise UsageError(f"bench measures `collectives`, not {what!r}: python -m launcher bench collectives [options]")
    extra = [name for name in line.given if name != "nproc_per_node"]
    if extra:
        name = extra[0].replace("_", "-")
        raise UsageError(f"--{name} has no meaning for bench, which takes --sizes, --nproc, --output and --json")
    given = line.given.get("nproc_per_node")
    if given is not None and not str(given).isdecimal():
        raise UsageError(f"--nproc is {given!r}; for bench expected a number of ranks")
    try:
        report = run(line.sizes or SIZES, None if given is None else int(str(given)))
    except OSError as error:
        raise of_machine(error) from error
    files, note = draw(report, line.output or OUTPUT)
    if line.as_json:
        return json.dumps({**as_dict(report), "files": files}, indent=2)
    if note:
        log(note)
    return f"{report.table()}\nchart: {', '.join(files)}"


def draw(report: Report, output: str) -> tuple[list[str], str]:
    """Writes ``output``.svg, and .png where matplotlib is installed; the files, and what there is to say about it.

    Raises:
        OutputError: a file cannot be written.
    """
    stem = output[:-4] if output.endswith((".svg", ".png")) else output
    title = f"Allreduce of float32, {report.ranks} ranks on {report.cores} cores"
    try:
        with open(stem + ".svg", "w", encoding="utf-8") as file:
            file.write(plot.svg(title, report.series, strong=(ANY, REGISTERED), limits=(LIMIT,)))
        made = plot.png(stem + ".png", title, report.series, strong=(ANY, REGISTERED), limits=(LIMIT,))
    except OSError as error:
        raise OutputError(
            f"cannot write {error.filename or stem}: {error.strerror}; --output names another place"
        ) from error
    if made:
        return [stem + ".svg", stem + ".png"], ""
    return [stem + ".svg"], "no PNG of the chart: matplotlib is not installed (pip install matplotlib)"


# ---- starting ranks


def _importable(module: str, name: str, absent: dict[str, str]) -> bool:
    import importlib.util

    if importlib.util.find_spec(module) is not None:
        return True
    absent[name] = f"{module} is not installed"
    return False


def _job(function: Callable[..., Any], args: tuple[Any, ...], ranks: int, **settings: Any) -> list[dict[str, Any]]:
    """Runs ``function`` in ranks of a job of this host alone, whose files go away with it; what they returned."""
    import tempfile

    from launcher.api import launch
    from launcher.container import make_job_tree

    host = os.uname().nodename
    with tempfile.TemporaryDirectory(prefix="launcher-bench-") as base:
        make_job_tree(base, {}, {}, host=host, hosts=[host])
        result = launch(function, args, nproc=ranks, base_dir=base, standalone=True, **settings)
    return result.values


def _slowest(answers: list[dict[tuple[str, int], list[float]]]) -> dict[tuple[str, int], float]:
    """Of each round the slowest rank, then the median over the rounds; us."""
    return {
        key: _median([max(times) for times in zip(*(one[key] for one in answers), strict=True)]) for key in answers[0]
    }


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


# ---- in the ranks


class _Contender(ABC):
    """Memory and a call on it. ``sums``: the call leaves the sum of all ranks in the memory."""

    sums = True

    def memory(self, nbytes: int) -> mmap.mmap | int:
        """Ordinary memory; an address when it is not Python's to give back."""
        return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    @abstractmethod
    def call(self, memory: Any, address: int, count: int) -> Call:
        """The call to time."""

    def release(self, address: int) -> None:  # noqa: B027 - most have nothing to give back
        """Only memory of a group needs it."""

    def close(self) -> None:  # noqa: B027 - most have nothing to end
        """Ends what runs beside the calls."""


class _Ours(_Contender):
    def __init__(self, group: Group, registered: bool) -> None:
        self._group, self._registered = group, registered

    def memory(self, nbytes: int) -> mmap.mmap | int:
        return self._group.allocate(nbytes) if self._registered else super().memory(nbytes)

    def call(self, memory: Any, address: int, count: int) -> Call:
        from functools import partial

        return partial(self._group.allreduce, address, address, count, 0)

    def release(self, address: int) -> None:
        if self._registered:
            self._group.release(address)


class _Gloo(_Contender):
    def __init__(self) -> None:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        dist.init_process_group("gloo")
        self._torch, self._group = torch, dist.group.WORLD
        self._options = dist.AllreduceOptions()
        self._destroy = dist.destroy_process_group

    def call(self, memory: Any, address: int, count: int) -> Call:
        tensors = [self._torch.frombuffer(memory, dtype=self._torch.float32, count=count)]
        group, options = self._group, self._options
        return lambda: group.allreduce(tensors, options).wait()

    def close(self) -> None:
        # Its threads let go of the last tensors some time after the call, and die with SIGABRT if they do while the
        # interpreter ends; with the last reference to the group they are joined.
        self._group = None
        self._destroy()


class _Mpi(_Contender):
    def __init__(self, world: Any) -> None:
        self._world = world

    def call(self, memory: Any, address: int, count: int) -> Call:
        from functools import partial

        from mpi4py import MPI as mpi

        return partial(self._world.Allreduce, mpi.IN_PLACE, [memory, count, mpi.FLOAT], mpi.SUM)


class _Copy(_Contender):
    """Reads and writes a message, as each rank of any allreduce has to, and nothing else."""

    sums = False

    def __init__(self) -> None:
        self._target: mmap.mmap | None = None

    def call(self, memory: Any, address: int, count: int) -> Call:
        from functools import partial

        self._target = mmap.mmap(-1, count * 4, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return partial(ctypes.memmove, _address(self._target), address, count * 4)


class _Meeting:
    """A barrier, and rank 0's word, over our own group or MPI."""

    def __init__(self, barrier: Call, agree: Callable[[int], int]) -> None:
        self.barrier, self.agree = barrier, agree


def _measure(sizes: list[int], names: list[str], seconds: float, rounds: int) -> dict[str, Any]:
    """What a rank of the launcher does. Times in us, one a round."""
    from launcher.collectives.group import join

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    group = join("bench", rank, size)
    word = ctypes.c_int64()
    at = ctypes.addressof(word)

    def agree(value: int) -> int:
        word.value = value
        group.broadcast(at, 1, 8, 0)  # int64
        return word.value

    makers: dict[str, Callable[[], _Contender]] = {
        ANY: lambda: _Ours(group, False),
        REGISTERED: lambda: _Ours(group, True),
        GLOO: _Gloo,
        LIMIT: _Copy,
    }
    contenders = {name: makers[name]() for name in names}
    times = _all(contenders, sizes, seconds, rounds, _Meeting(group.barrier, agree), size)
    ping_ns = float(group.statistics().get("ping_ns", 0.0))
    group.barrier()
    for contender in contenders.values():
        contender.close()
    group.close()
    return {"times": times, "ping_ns": ping_ns}


def _measure_mpi(sizes: list[int], seconds: float, rounds: int) -> dict[str, Any]:
    """What a rank of MPI does."""
    from mpi4py import MPI as mpi

    world = mpi.COMM_WORLD
    meeting = _Meeting(world.Barrier, world.bcast)
    return {"times": _all({MPI: _Mpi(world)}, sizes, seconds, rounds, meeting, world.size), "ping_ns": 0.0}


def _all(
    contenders: Mapping[str, _Contender],
    sizes: Sequence[int],
    seconds: float,
    rounds: int,
    meeting: _Meeting,
    ranks: int,
) -> dict[tuple[str, int], list[float]]:
    times: dict[tuple[str, int], list[float]] = {}
    for nbytes in sizes:
        for _ in range(rounds):
            for name, contender in contenders.items():
                times.setdefault((name, nbytes), []).append(_time(contender, nbytes, seconds, meeting, ranks))
    return times


def _time(contender: _Contender, nbytes: int, seconds: float, meeting: _Meeting, ranks: int) -> float:
    """Median time of a call, us; the first of them is checked, and not counted."""
    memory = contender.memory(nbytes)
    address = memory if isinstance(memory, int) else _address(memory)
    call, count = contender.call(memory, address, nbytes // 4), nbytes // 4
    now = time.perf_counter_ns

    def once() -> int:
        ctypes.memset(address, _BYTE, nbytes)
        meeting.barrier()
        begin = now()
        call()
        return now() - begin

    once()
    if contender.sums:
        _check(address, count, ranks)
    begin = now()
    once()
    spent = max(now() - begin, 1)
    calls = meeting.agree(min(_MOST_CALLS, max(_FEWEST_CALLS, int(seconds * 1e9 / spent))))
    found = [float(once()) for _ in range(calls)]
    meeting.barrier()
    contender.release(address)
    return _median(found) / 1e3


def _check(address: int, count: int, ranks: int) -> None:
    """Raises LauncherError unless the first, middle and last elements are the sum."""
    values = (ctypes.c_float * count).from_address(address)
    one = ctypes.c_float.from_buffer_copy(bytes([_BYTE] * 4)).value
    for index in (0, count // 2, count - 1):
        if abs(values[index] - ranks * one) > 1e-5 * ranks:
            raise LauncherError(f"element {index} of {count} is {values[index]}, not {ranks * one}; please report this")


def _address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
