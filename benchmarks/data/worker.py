"""One rank of a contender: waits for orders on a socket, and times loading with the one loop that serves all.

    python worker.py CONFIG        (JSON: socket, rank, core, adapter, options, scratch)
    python worker.py prepare JSON  (adapter, options, set, data: makes the contender's own format, once)

Runs in the contender's own environment, which need not have ``launcher``; needs NumPy.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Rows, Set

CHECKED = 3  # batches whose values are compared
_PR_SET_PDEATHSIG = 1


def memory_bytes() -> dict[str, int]:
    """This process's and its children's: anonymous and shared memory (a page divided by its users), /dev/shm mapped."""
    found = {"private": 0, "shm": 0}
    pids, at = [os.getpid()], 0
    while at < len(pids):
        pid, at = pids[at], at + 1
        try:
            for task in Path(f"/proc/{pid}/task").iterdir():
                pids += [int(word) for word in (task / "children").read_text().split()]
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith(("Pss_Anon:", "Pss_Shmem:")):
                    found["private"] += int(line.split()[1]) * 1024
            for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                if " /dev/shm/" in line:
                    begin, _, end = line.split()[0].partition("-")
                    found["shm"] += int(end, 16) - int(begin, 16)
        except OSError:
            continue  # it ended in between
    return found


class Rank:
    """Carries out orders with one adapter."""

    def __init__(self, adapter: Any, rank: int, base: int) -> None:
        self.adapter, self.rank, self.base = adapter, rank, base
        self.batches: Iterator[Any] | None = None
        self.batch_records = 0
        self.held: Any = None

    def _place(self, order: dict[str, Any]) -> tuple[Set, Path, int, int]:
        return Set(**order["set"]), Path(order["data"]), self.rank, order["world"]

    def close(self, order: dict[str, Any] | None = None) -> None:
        """Lets go of the loader."""
        self.held = self.batches = None
        self.adapter.close()
        gc.collect()

    def open(self, order: dict[str, Any]) -> dict[str, Any]:
        """Opens the loader, checks what its first batches hold, and tells their labels."""
        self.close()
        which = Set(**order["set"])
        self.batch_records = which.batch
        self.adapter.open(*self._place(order))
        self.batches = self.adapter.batches()
        if not self.adapter.checked:
            return {"labels": []}
        rows, labels = Rows(which), []
        for _ in range(CHECKED):
            values, found = self.adapter.arrays(next(self.batches))
            if found.shape != (which.batch,) or values.shape != (which.batch, which.width):
                raise AssertionError(f"a batch of shape {values.shape} with labels {found.shape}")
            if values.dtype != np.dtype(which.dtype) or not np.array_equal(values, rows.values(found)):
                raise AssertionError("values that are not those of the labels")
            labels += found.tolist()
        if len(set(labels)) != len(labels) or (labels == sorted(labels)) == order["shuffled"]:
            raise AssertionError("a record twice, or not the order that was asked for")
        return {"labels": labels}

    def window(self, order: dict[str, Any]) -> dict[str, Any]:
        """Times ``count`` steps after ``lead`` steps that are not timed.

        Numbers, not times: some loaders' ranks wait for each other at the end of an epoch.
        """
        assert self.batches is not None
        batches, now = self.batches, time.perf_counter
        batch = None
        for _ in range(order["lead"]):
            batch = next(batches)
        begin = now()
        for _ in range(order["count"]):
            batch = next(batches)
        seconds = now() - begin
        self.held = batch  # a user's loop has the last one, too
        return {"records": order["count"] * self.batch_records * self.adapter.batches_a_step, "seconds": seconds}

    def memory(self, order: dict[str, Any]) -> dict[str, Any]:
        """What this rank holds above the process that had imported NumPy and torch."""
        found = memory_bytes()
        return {"private": found["private"] - self.base, "shm": found["shm"]}

    def first(self, order: dict[str, Any]) -> dict[str, Any]:
        """From nothing to the first batch, ms, several times; also from ``state`` on, in turn, where there is one."""
        found: dict[str, list[float]] = {"ms": []}
        states: list[tuple[str, dict[str, Any]]] = [("ms", {})]
        if "state" in order:
            states.append(("resumed_ms", {"state": order["state"]}))
        for _ in range(order["times"]):
            for name, given in states:
                self.close()
                begin = time.perf_counter()
                self.adapter.open(*self._place(order), **given)
                self.held = next(self.adapter.batches())
                found.setdefault(name, []).append((time.perf_counter() - begin) * 1e3)
        self.close()
        return found

    def state(self, order: dict[str, Any]) -> dict[str, Any]:
        """The state of a loader that has delivered ``position`` records."""
        self.close()
        self.adapter.open(*self._place(order))
        found = self.adapter.state(order["position"])
        self.close()
        return {"state": found}

    def epochs(self, order: dict[str, Any]) -> dict[str, Any]:
        """Memory after some epochs, and after as many again as were asked for."""
        self.close()
        which = Set(**order["set"])
        self.adapter.open(*self._place(order))
        batches = self.adapter.batches()
        steps = which.records // which.batch // order["world"]
        found, ring = [], 0
        for epochs in (order["before"], order["epochs"]):
            for _ in range(epochs * steps):
                self.held = next(batches)
            gc.collect()
            found.append(memory_bytes())
            ring = ring or self.adapter.ring_bytes()
        self.close()
        return {
            "over": found[0]["private"] - self.base - ring,
            "growth": found[1]["private"] - found[0]["private"],
            "shm": found[1]["shm"],
        }

    def task(self, order: dict[str, Any]) -> dict[str, Any]:
        """What only some adapters can: parsing, listing."""
        result: dict[str, Any] = getattr(self.adapter, order["task"])(order, self.rank)
        return result


def prepare(given: dict[str, Any]) -> None:
    """Makes the contender's own format of a set."""
    adapter = importlib.import_module(f"adapters.{given['adapter']}").Adapter(given["options"])
    adapter.prepare(Set(**given["set"]), Path(given["data"]))


def main() -> None:
    """Does as told until there are no more orders."""
    if sys.argv[1] == "prepare":
        prepare(json.loads(sys.argv[2]))
        return
    config = json.loads(sys.argv[1])
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.sched_setaffinity(0, {config["core"]})
    link = socket.socket(fileno=config["socket"])
    lines = link.makefile("r", encoding="utf-8")

    def say(value: object) -> None:
        link.sendall(json.dumps(value).encode() + b"\n")

    try:
        if config["options"].get("torch", True):
            import torch

            torch.set_num_threads(1)
        gc.collect()
        base = memory_bytes()["private"]
        module = importlib.import_module(f"adapters.{config['adapter']}")
        rank = Rank(module.Adapter(config["options"]), config["rank"], base)
    except Exception as error:  # whatever a contender raises is the answer: it cannot run here
        say({"error": f"{type(error).__name__}: {error}"})
        raise
    say({"version": rank.adapter.version})
    for line in lines:
        order = json.loads(line)
        try:
            answer = getattr(rank, order["do"])(order) or {}
        except Exception as error:  # the same: a cell that failed is reported, and the contender is left out
            say({"error": f"{type(error).__name__}: {error}"})
            raise
        say(answer)
    rank.close()
    sys.stdout.flush()
    if not rank.adapter.ends_itself:
        os._exit(0)  # some libraries' teardown waits for what has gone already


if __name__ == "__main__":
    main()
