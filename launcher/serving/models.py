"""The models of a server: one, or those that the multi-model API has loaded."""

from __future__ import annotations

import asyncio
import os

from launcher.serving.failures import InvocationError
from launcher.serving.pool import Pool

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from launcher.serving.settings import Settings

MOST_LISTED = 100
_MOST_NAME = 1024
_LOST = ("retry-after", "1")


def is_number(text: str) -> bool:
    """Whether it is a whole number of a page: digits, and not thousands of them."""
    return text.isascii() and text.isdecimal() and len(text) < 10


class Models:
    """Loaded models by name, each with workers of its own: unloading ends them, and so frees what they held."""

    def __init__(self, settings: Settings, make: Callable[[str, str, Callable[[int, str], None]], Pool]) -> None:
        """``make(name, model_dir, on_fatal)`` makes the workers of a model; they are not started yet."""
        self._settings, self._make = settings, make
        self._pools: dict[str, Pool] = {}
        self._urls: dict[str, str] = {}
        self._ending: set[Pool] = set()  # their workers' ends are still to be heard
        self._closing: set[asyncio.Task[None]] = set()

    def pools(self) -> list[Pool]:
        """All of them, with those that are ending."""
        return [*self._pools.values(), *self._ending]

    async def load(self, name: str, url: str) -> None:
        """Loads a model; returns when a worker can answer.

        Raises:
            InvocationError: 400 a name or place that is none; 409 it is loaded, or being loaded; 507 it does not fit
                into memory; 500 its code failed.
        """
        if not name or len(name) > _MOST_NAME or not name.isprintable() or "/" in name:
            raise InvocationError(400, f"model_name {name[:100]!r}: expected a name without slashes", "BadInput")
        directory = url.removeprefix("file://")
        if not os.path.isdir(directory):
            raise InvocationError(
                400, f"url {url!r}: no such directory; the platform unpacks models itself", "BadInput"
            )
        if name in self._pools:
            raise InvocationError(409, f"model {name} is already loaded", "ModelAlreadyLoaded")
        pool = self._pools[name] = self._make(name, directory, lambda code, line: self._failed(name))
        self._urls[name] = url
        pool.start()
        assert pool.first_ready is not None
        try:
            await pool.first_ready
        except InvocationError as error:
            await self._close(name, pool)
            full = pool.out_of_memory
            raise InvocationError(507 if full else 500, str(error), "" if full else "ModelNotLoaded") from error

    async def unload(self, name: str) -> None:
        """Unloads a model; returns when its processes have ended.

        Raises:
            InvocationError: 404, there is none of this name.
        """
        await self._close(name, self.get(name))

    def get(self, name: str) -> Pool:
        """The workers of a model.

        Raises:
            InvocationError: 404, there is none of this name.
        """
        pool = self._pools.get(name)
        if pool is None:
            raise InvocationError(404, f"model {name} is not loaded", "ModelNotFound")
        return pool

    def describe(self, name: str) -> dict[str, str]:
        """As the multi-model API has it."""
        self.get(name)
        return {"modelName": name, "modelUrl": self._urls[name]}

    def list(self, limit: int, token: str) -> dict[str, object]:
        """A page of the loaded models, by name.

        Raises:
            InvocationError: 400, a page that is none.
        """
        if not 1 <= limit <= MOST_LISTED:
            raise InvocationError(400, f"limit {limit}: expected 1 to {MOST_LISTED}", "BadInput")
        if token and not is_number(token):
            raise InvocationError(400, f"next_page_token {token!r}: expected one that a page has given", "BadInput")
        names, begin = sorted(self._pools), int(token or 0)
        page: dict[str, object] = {"models": [self.describe(name) for name in names[begin : begin + limit]]}
        if begin + limit < len(names):
            page["nextPageToken"] = str(begin + limit)
        return page

    def _failed(self, name: str) -> None:
        """A model whose workers die is no reason to end the others: it is gone, and can be loaded again."""
        pool = self._pools.get(name)
        if pool is not None and pool.was_ready:
            task = asyncio.ensure_future(self._close(name, pool))
            self._closing.add(task)  # the loop itself holds tasks only weakly
            task.add_done_callback(self._closing.discard)

    async def _close(self, name: str, pool: Pool) -> None:
        if self._pools.get(name) is pool:
            del self._pools[name], self._urls[name]
        self._ending.add(pool)
        try:
            await pool.close(self._settings.drain_s)
        finally:
            self._ending.discard(pool)
