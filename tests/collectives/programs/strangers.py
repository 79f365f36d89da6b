"""Stores that put something between a rank and the one that it is about to connect to."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import socket
import struct
from typing import Any


class Disturbed:
    """The store of the last rank: between rank 0's address and its use, others connect there."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self._store, self._rank, self._size = store, rank, size
        self.seen: list[str] = []
        self.kept: list[socket.socket] = []

    def set(self, key: str, value: bytes) -> None:
        self._store.set(key, value)

    def get(self, key: str) -> bytes:
        value = self._store.get(key)
        if key.endswith("sockets/0") and not self.seen:
            told = json.loads(value)
            group = hashlib.blake2b(key.removesuffix("/sockets/0").encode(), digest_size=24).hexdigest().encode()
            asks = bytes.fromhex(told["asks"])

            def hello(rank: int, stream: int, streams: int, secret: bytes, name: bytes = group) -> bytes:
                words = b"LNCHLEG1" + struct.pack("<IIIxxxx", rank, stream, streams)
                return (words + secret + name.ljust(64, b"\0")).ljust(256, b"\0")

            for what, data in {
                "noise": os.urandom(256),
                "zeroes": bytes(4096),
                "another secret": hello(self._rank, 0, 2, os.urandom(16)),
                "another group": hello(self._rank, 0, 2, asks, b"x"),
                "itself": hello(0, 0, 2, asks),
                "no such rank": hello(self._size, 0, 2, asks),
                "no such stream": hello(self._rank, 3, 2, asks),
                "too many streams": hello(self._rank, 0, 1 << 30, asks),
            }.items():
                with socket.create_connection((told["address"], told["port"]), 10) as stranger:
                    stranger.sendall(data)
                    try:
                        self.seen.append(f"{what}: {stranger.recv(1)!r}")
                    except ConnectionResetError:
                        self.seen.append(f"{what}: b''")
            for data in (b"", b"LNCHLEG1"):  # who says nothing more
                self.kept.append(socket.create_connection((told["address"], told["port"]), 10))
                self.kept[-1].sendall(data)
        return value


class Misled:
    """A store that says a port where nobody listens."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def set(self, key: str, value: bytes) -> None:
        self._store.set(key, value)

    def get(self, key: str) -> bytes:
        value = self._store.get(key)
        if not key.endswith("sockets/0"):
            return value
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        return json.dumps({**json.loads(value), "port": port}).encode()


class Exhausted:
    """A store after which a process has as many descriptors left as its rank says."""

    def __init__(self, store: Any, rank: int) -> None:
        self._store, self._rank = store, rank
        self._limits = resource.getrlimit(resource.RLIMIT_NOFILE)

    def set(self, key: str, value: bytes) -> None:
        self._store.set(key, value)

    def get(self, key: str) -> bytes:
        value: bytes = self._store.get(key)
        if "/sockets/" in key:
            free = [os.dup(0) for _ in range(self._rank + 1)]
            resource.setrlimit(resource.RLIMIT_NOFILE, (free[-1], self._limits[1]))
            for one in free:
                os.close(one)
        return value

    def restore(self) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, self._limits)
