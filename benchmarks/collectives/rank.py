"""One rank of a contender: waits for orders on a socket, and times collectives with the one loop that serves all.

    python rank.py CONFIG        (JSON: socket, scratch, support, adapter, size, rank or null, cores, label, options)

Runs in the contender's own environment, which need not have ``launcher``; needs NumPy.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import json
import mmap
import os
import socket
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "RANK")
PERIOD = 13  # values of the check: small whole numbers, exact in every type also when 16 ranks' are added
SPIN, SPIN_OVERSUBSCRIBED = 20_000, 20
_SHORT_NS = 1_000_000
HALF = {"float32": 0x3F000000, "bfloat16": 0x3F003F00}  # 0.5, as often as it fits into 32 bits


class Support:
    """support.c and the page that the ranks share."""

    def __init__(self, library: str, page: Path, rank: int, size: int, cores: int) -> None:
        self._library = ctypes.CDLL(library)
        self._library.page_bytes.restype = ctypes.c_size_t
        self._library.told.restype = ctypes.c_int64
        self._library.ping.restype = ctypes.c_double
        length = -(-self._library.page_bytes() // mmap.PAGESIZE) * mmap.PAGESIZE
        fd = os.open(page, os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(fd, length)  # zeroes, and the same for every rank
        self._memory = mmap.mmap(fd, length)
        os.close(fd)
        self._page = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(self._memory)))
        self.rank, self.size = rank, size
        self._spin = SPIN if size <= cores else SPIN_OVERSUBSCRIBED
        self._barrier = self._library.barrier

    def barrier(self) -> None:
        """Returns when all ranks have called it."""
        self._barrier(self._page, self.rank, self.size, self._spin)

    def agree(self, value: int) -> int:
        """Rank 0's value, on every rank."""
        if self.rank == 0:
            self._library.tell(self._page, ctypes.c_int64(value))
        self.barrier()
        found: int = self._library.told(self._page)
        self.barrier()
        return found

    def ping(self) -> float:
        """One-way time between the cores of two ranks, ns."""
        found: float = self._library.ping(self._page, self.rank, 10, 300)
        return found

    def fill(self, buffer: np.ndarray, pattern: int) -> None:
        """Writes all of ``buffer``."""
        self._library.fill(
            ctypes.c_void_p(buffer.ctypes.data), ctypes.c_uint32(pattern), ctypes.c_size_t(buffer.nbytes)
        )

    def add_both_call(self, first: int, second: int, count: int) -> functools.partial[None]:
        """The call of ``first, second <- first + second``, float32 at these addresses."""
        addresses = (ctypes.c_void_p(first), ctypes.c_void_p(second))
        return functools.partial(self._library.add_both, *addresses, ctypes.c_size_t(count))


class DirectoryStore:
    """What ranks tell each other while a group is made: one file a key."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def _path(self, key: str) -> Path:
        return self._directory / key.replace("/", "~")

    def set(self, key: str, value: bytes) -> None:
        """Makes ``value`` visible under ``key``."""
        temporary = self._directory / f".{os.getpid()}"
        temporary.write_bytes(value)
        temporary.replace(self._path(key))

    def get(self, key: str) -> bytes:
        """Waits until ``key`` was set.

        Raises:
            TimeoutError: nobody has set it for a minute.
        """
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                return self._path(key).read_bytes()
            except FileNotFoundError:
                time.sleep(0.001)
        raise TimeoutError(f"nobody has set {key!r}")


def private_buffer(nbytes: int) -> np.ndarray:
    """Ordinary memory, as torch gives it: private, anonymous, no huge pages asked for, aligned to a page."""
    memory = mmap.mmap(-1, max(nbytes, mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(memory, dtype=np.uint8, count=nbytes)


def pattern(nbytes: int, dtype: str, factor: int) -> np.ndarray:
    """The bytes of 1, 2, ... PERIOD, 1, 2, ... times ``factor``."""
    size = 4 if dtype == "float32" else 2
    values = (np.arange(PERIOD, dtype=np.float32) + 1) * factor
    bits = values.view(np.uint32)
    one = bits if size == 4 else (bits >> 16).astype(np.uint16)
    count = nbytes // size
    block = np.tile(one, 4096)  # of many: one at a time takes longer than the rest of a check
    return np.tile(block, -(-count // block.size))[:count].view(np.uint8)


class Cell:
    """One size and type with one adapter: checked, then timed."""

    def __init__(self, adapter: Any, support: Support, nbytes: int, dtype: str) -> None:
        self.support, self.dtype = support, dtype
        self.adapter = adapter
        self.buffer: np.ndarray = adapter.buffer(nbytes)
        self.call = adapter.allreduce(self.buffer, dtype)

    def close(self) -> None:
        """Gives the memory back."""
        self.adapter.release(self.buffer)

    def check(self) -> None:
        """Raises AssertionError unless the sum is the right one, to the last bit."""
        nbytes, ranks = self.buffer.nbytes, range(1, self.support.size + 1)
        self.buffer[:] = pattern(nbytes, self.dtype, self.support.rank + 1)
        self.support.barrier()
        self.call()
        self.support.barrier()  # nobody is still reading or writing here
        if not np.array_equal(self.buffer, pattern(nbytes, self.dtype, sum(ranks))):
            raise AssertionError(f"wrong sum of {nbytes} bytes of {self.dtype}")

    def time(self, fresh: bool, seconds: float, least: int, most: int, rest_ns: int = 0) -> list[int]:
        """Times of calls, ns: back to back on the same buffer, or each on one that was just rewritten.

        ``rest_ns``: how long nothing is sent before a call on a rewritten buffer.
        """
        call, now = self.call, time.perf_counter_ns
        barrier, fill, half = self.support.barrier, self.support.fill, HALF[self.dtype]
        fill(self.buffer, 0)

        def run(count: int) -> list[int]:
            times = []
            if fresh:
                for _ in range(count):
                    rested = now() + rest_ns
                    fill(self.buffer, half)
                    while now() < rested:
                        pass  # a sleep this short would be a different one on each core
                    barrier()
                    begin = now()
                    call()
                    times.append(now() - begin)
            else:
                barrier()
                for _ in range(count):
                    begin = now()
                    call()
                    times.append(now() - begin)
            return times

        run(1)  # with faults and cold caches
        if self.support.agree(run(1)[-1]) < _SHORT_NS:
            run(20)
        times: list[int] = []
        begin, batch = now(), least
        while batch > 0:
            times += run(batch)
            spent = (now() - begin) / 1e9
            left = (seconds - spent) * len(times) / spent
            batch = self.support.agree(max(0, min(2 * len(times), int(left), most - len(times))))
        return times


def measure(adapter: Any, support: Support, order: dict[str, Any]) -> dict[str, Any]:
    """Carries out an order of one cell: its modes, one after the other."""
    cell = Cell(adapter, support, order["bytes"], order["dtype"])
    try:
        if adapter.checked:
            cell.check()
        found = {}
        for mode in order["modes"]:
            times = cell.time(mode == "fresh", order["seconds"], order["least"], order["most"], order["rest_ns"])
            ordered = sorted(times)
            found[mode] = {
                "median_us": statistics.median(ordered) / 1e3,
                "p10_us": ordered[len(ordered) // 10] / 1e3,
                "p90_us": ordered[len(ordered) * 9 // 10] / 1e3,
                "calls": len(ordered),
            }
        return found
    finally:
        cell.close()


class Link:
    """Orders in, answers out: one JSON value a line."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(path)
        self._lines = self._socket.makefile("r", encoding="utf-8")

    def say(self, value: object) -> None:
        """Sends an answer."""
        self._socket.sendall(json.dumps(value).encode() + b"\n")

    def orders(self) -> Any:
        """Each order as it comes, to the end of the benchmark."""
        for line in self._lines:
            yield json.loads(line)


def main() -> None:
    """Joins the contender's group, then does as told."""
    config = json.loads(sys.argv[1])
    known = [os.environ[name] for name in RANK_VARIABLES if name in os.environ]
    rank = config["rank"] if config["rank"] is not None else int(known[0])
    cores = config["cores"]
    if config["options"].get("pin", True):
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
    link = Link(config["socket"])
    link.say({"label": config["label"], "rank": rank, "pid": os.getpid()})
    scratch = Path(config["scratch"])
    support = Support(config["support"], scratch / "page", rank, config["size"], len(cores))
    store = DirectoryStore(scratch / "store")
    try:
        module = importlib.import_module(f"adapters.{config['adapter']}")
        adapter = module.Adapter(support, store, config["options"])
    except Exception as error:  # whatever a contender raises is the answer: it cannot run here
        link.say({"error": f"{type(error).__name__}: {error}"})
        raise
    link.say({"ready": True, "version": adapter.version})
    for order in link.orders():
        if order["do"] == "end":
            break
        try:
            if order["do"] == "cell":
                answer: object = measure(adapter, support, order)
            elif order["do"] == "ping":
                answer = support.ping() if rank < 2 else None
            else:
                answer = getattr(adapter, order["do"])(order)
        except Exception as error:  # the same: a cell that failed is reported, and the contender is left out
            link.say({"error": f"{type(error).__name__}: {error}"})
            raise
        link.say(answer)
    adapter.close()
    sys.stdout.flush()
    os._exit(0)  # some libraries' teardown waits for ranks that have gone already


if __name__ == "__main__":
    main()
