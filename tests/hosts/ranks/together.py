"""What the scripts of these tests share: who they are, and files by which they and the test tell each other things.

``/opt/ml/code`` has it on every host, so a script says ``from together import *``.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from pathlib import Path

rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
attempt = int(os.environ["LAUNCHER_ATTEMPT"])
shared = Path(os.environ["SHARED"])


def tell(name: str, text: str = "x") -> None:
    """Makes a file that all hosts see, complete as soon as it is there."""
    part = shared / f"{name}.part{rank}"
    part.write_text(text)
    part.rename(shared / name)


def wait_for(*names: str) -> None:
    """Waits until all these files are there."""
    while not all((shared / name).exists() for name in names):
        time.sleep(0.005)


def up() -> None:
    """Says that this rank is at work (file ``up<rank>`` with its pid), and waits until all are."""
    tell(f"up{attempt}-{rank}", str(os.getpid()))
    wait_for(*(f"up{attempt}-{other}" for other in range(world)))


def wait_for_end(pid: int) -> None:
    """Waits until a process of any host is gone."""
    while os.path.exists(f"/proc/{pid}"):
        time.sleep(0.005)


def meet() -> list[str]:
    """All ranks connect to rank 0 at MASTER_ADDR, MASTER_PORT, as torch's store does; what each of them said: who,
    in the order of ranks. Rank 0 returns it, the others return when rank 0 has heard all."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    said = f"{rank}/{world} {os.environ['LOCAL_RANK']}/{os.environ['LOCAL_WORLD_SIZE']} {socket.gethostname()}"
    if rank:
        with _connected(address, port) as link:
            link.sendall(said.encode() + b"\n")
            link.recv(1)
        return []
    heard = [said]
    family = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][0]
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("", port), family=family))
        links = [stack.enter_context(server.accept()[0]) for _ in range(world - 1)]
        heard += [link.makefile().readline().strip() for link in links]
    return sorted(heard, key=lambda line: int(line.partition("/")[0]))


def _connected(address: str, port: int) -> socket.socket:
    while True:
        with contextlib.suppress(ConnectionRefusedError):
            return socket.create_connection((address, port), 20)
        time.sleep(0.005)
