"""Where the event loop meets the worker processes: their connections, and what the guardian says of their ends."""

from __future__ import annotations

import asyncio
import socket
from typing import cast

from launcher.serving import wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from launcher.serving.link import Worker
    from launcher.serving.pool import Pool
    from launcher.serving.processes import Death, Processes

_MOST_ANSWER_BYTES = 1 << 33


class Hub:
    """Brings frames and ends of processes to the workers of all pools.

    Args:
        pools: those that there are now.
        on_guardian_lost: called when the guardian has ended, and so every worker.
    """

    def __init__(
        self, processes: Processes, pools: Callable[[], list[Pool]], on_guardian_lost: Callable[[], None]
    ) -> None:
        self.processes, self.pools, self._on_guardian_lost = processes, pools, on_guardian_lost
        self._listening: asyncio.AbstractServer | None = None

    async def open(self) -> None:
        """From now on workers are heard."""
        loop = asyncio.get_running_loop()
        self.processes.on_death = self._worker_died
        loop.add_reader(self.processes.guardian.fileno(), self._read_guardian)
        sock = socket.socket(fileno=self.processes.listener.detach())
        self._listening = await loop.create_unix_server(lambda: WorkerConnection(self), sock=sock)

    def close(self) -> None:
        """No worker is heard any more."""
        if self._listening is not None:
            self._listening.close()
        asyncio.get_running_loop().remove_reader(self.processes.guardian.fileno())

    def worker(self, slot: int) -> Worker | None:
        """The worker in this slot."""
        return next((pool.workers[slot] for pool in self.pools() if slot in pool.workers), None)

    def _read_guardian(self) -> None:
        self.processes.read()
        if self.processes.guardian.closed:
            asyncio.get_running_loop().remove_reader(self.processes.guardian.fileno())
            self._on_guardian_lost()

    def _worker_died(self, slot: int, death: Death) -> None:
        worker = self.worker(slot)
        if worker is None:
            self.processes.release(slot)  # of a model that was unloaded
        else:
            worker.died(death)


class WorkerConnection(asyncio.Protocol):
    """A connection from a process that says that it is a worker."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._splitter = wire.Splitter(_MOST_ANSWER_BYTES)
        self._worker: Worker | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Who it is comes with its first frame."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is one in all but name

    def data_received(self, data: bytes) -> None:
        """Frames."""
        worker = self._worker
        try:
            frames = self._splitter.feed(data)
        except wire.WireError as error:
            self._drop(str(error))
            return
        for frame in frames:
            if worker is None:
                worker = self._worker = self._identify(frame)
                if worker is None:
                    return
            else:
                worker.take(frame)

    def connection_lost(self, exc: Exception | None) -> None:
        """It has ended, or is about to."""
        if self._worker is not None:
            self._worker.disconnected()

    def _identify(self, frame: wire.Frame) -> Worker | None:
        assert self._transport is not None
        peer: socket.socket = self._transport.get_extra_info("socket")
        uid = int.from_bytes(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[4:8], "little")
        token = frame.texts[0] if frame.texts else ""
        worker = None
        if frame.kind == wire.HELLO and self._hub.processes.is_worker(token, uid):
            worker = self._hub.worker(frame.id)
        if worker is None:
            self._drop("it is none of our workers")
            return None
        worker.connected(self._transport)
        return worker

    def _drop(self, why: str) -> None:
        self._hub.processes.say(f"WARNING: a connection to the workers' socket was refused: {why}")
        if self._transport is not None:
            self._transport.abort()
        if self._worker is not None:
            self._worker.kill("it did not speak the workers' protocol")
