"""Stateful sessions: which worker has one, and how long it lives.

The client opens one with ``X-Amzn-SageMaker-Session-Id: NEW_SESSION`` and sends the id that it is given from then on;
what the session holds is in the memory of one worker (``context.session``), so its requests all go there.
"""

from __future__ import annotations

import os
import time

from launcher.serving.failures import InvocationError

NEW = "NEW_SESSION"
CLOSE = "CLOSE"


class Sessions:
    """The sessions of one server. ``ttl_s``: life after the last request."""

    def __init__(self, ttl_s: float) -> None:
        self._ttl_s = ttl_s
        self._open: dict[str, tuple[int, float]] = {}  # id -> serial of its worker, when it ends

    def open(self, home: int) -> str:
        """A new session of the worker with this serial; its id, which is not to be guessed."""
        session_id = os.urandom(16).hex()
        self._open[session_id] = (home, time.time() + self._ttl_s)
        return session_id

    def find(self, session_id: str) -> int:
        """The worker of a session, whose life begins anew.

        Raises:
            InvocationError: 404, there is no such session, or it has ended.
        """
        home, end_s = self._open.get(session_id, (-1, 0.0))
        if end_s < time.time():
            raise InvocationError(404, "no such session, or it has expired", "SessionNotFound")
        self._open[session_id] = (home, time.time() + self._ttl_s)
        return home

    def close(self, session_id: str) -> None:
        """Forgets a session."""
        self._open.pop(session_id, None)

    def expired(self) -> list[tuple[str, int]]:
        """Sessions whose life is over, and their workers; they are forgotten."""
        now = time.time()
        over = [(session_id, home) for session_id, (home, end_s) in self._open.items() if end_s < now]
        for session_id, _ in over:
            del self._open[session_id]
        return over

    def header(self, session_id: str) -> str:
        """The value of ``X-Amzn-SageMaker-New-Session-Id``."""
        end = time.gmtime(self._open[session_id][1])
        return f"{session_id}; Expires={time.strftime('%Y-%m-%dT%H:%M:%SZ', end)}"
