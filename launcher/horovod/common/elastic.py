"""Training that survives the loss of ranks: state that is committed, and a loop that goes back to it.

The launcher restarts all ranks after one has failed (``--max-restarts``), where Horovod would keep the others. So that
they go on where they were, commits are also kept in the job's run directory while restarts are left, by the first rank
of each host; the restarted job begins with the last one.
"""

from __future__ import annotations

import copy
import functools
import os
import pickle
import sys

from launcher.collectives.place import read_place
from launcher.errors import OutputError
from launcher.horovod.common.exceptions import HorovodInternalError, HostsUpdatedInterrupt

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

# Failures in a row without a commit in between that end the attempts: what fails at once will fail again.
_FRUITLESS = 3


class State:
    """What training has reached. Subclasses say how it is saved, restored and sent around.

    Args:
        bcast_object: sends rank 0's object to all.
        get_rank: this rank's number.
    """

    def __init__(self, bcast_object: Callable[..., Any], get_rank: Callable[[], int]) -> None:
        self._bcast_object = bcast_object
        self._rank = get_rank
        self._reset_callbacks: list[Callable[[], Any]] = []
        self._updates: list[tuple[float, int]] = []
        self._last_update = 0.0
        self._commits = 0

    def register_reset_callbacks(self, callbacks: Sequence[Callable[[], Any]]) -> None:
        """Functions to call when the ranks have changed, to set another learning rate, say."""
        self._reset_callbacks.extend(callbacks)

    def on_reset(self) -> None:
        """Called when the ranks have met again."""
        self._updates.clear()
        self.reset()
        for callback in self._reset_callbacks:
            callback()

    def on_hosts_updated(self, timestamp: float, update_res: int) -> None:
        """Notes that hosts have come (1) or gone (2); the next commit interrupts training for it."""
        self._updates.append((timestamp, update_res))

    def commit(self) -> None:
        """Saves the state, to go back to after a failure. All ranks must call it, at the same step.

        Raises:
            HostsUpdatedInterrupt: see check_host_updates.
            OutputError: the commit cannot be written for a restart.
        """
        self.save()
        self._commits += 1
        self._keep()
        self.check_host_updates()

    def check_host_updates(self) -> None:
        """Interrupts training, on all ranks alike, when rank 0 was told of a change of hosts.

        The launcher changes hosts by restarting the job only.

        Raises:
            HostsUpdatedInterrupt: there was such a change.
        """
        latest, kinds = self._last_update, 0
        for timestamp, kind in self._updates:
            if timestamp > self._last_update:
                latest, kinds = max(latest, timestamp), kinds | kind
        self._updates.clear()
        before, self._last_update, kinds = self._bcast_object((self._last_update, latest, kinds))
        if self._last_update > before:
            raise HostsUpdatedInterrupt(skip_sync=kinds == 2)

    def save(self) -> None:
        """Keeps a copy of the state in memory."""
        raise NotImplementedError

    def restore(self) -> None:
        """Goes back to the copy."""
        raise NotImplementedError

    def sync(self) -> None:
        """Makes everybody's state that of rank 0."""
        raise NotImplementedError

    def reset(self) -> None:
        """What must be made anew when the ranks have changed."""

    def saved(self) -> Any:
        """The copy, as what can be pickled; None for a state that does not survive a restart."""
        return None

    def load(self, saved: Any) -> None:
        """Takes what :meth:`saved` gave for the copy."""

    def _keep(self) -> None:
        path = _kept_path()
        place = read_place(os.environ)
        if not path or place is None or place.rank != place.local_ranks[0]:
            return
        content = self.saved()
        if content is None:
            return
        try:
            with open(f"{path}.part", "wb") as file:
                pickle.dump((self._commits, content), file)
            os.replace(f"{path}.part", path)
        except OSError as error:
            raise OutputError(
                f"elastic state {path}: {error.strerror}; make room there, or leave out --max-restarts"
            ) from error

    def _take_up(self) -> None:
        """In a restarted job: rank 0 loads the last commit, for sync to send around."""
        if os.environ.get("LAUNCHER_ATTEMPT", "0") == "0" or self._rank() != 0 or self._commits:
            return
        path = _kept_path(restarts_left=False)
        try:
            with open(path, "rb") as file:
                self._commits, content = pickle.load(file)  # noqa: S301 - our own file, in a folder of this user's
        except FileNotFoundError:
            print("[launcher] horovod: restarted before the first commit; training begins anew", file=sys.stderr)
            return
        self.load(content)
        self.restore()
        print(f"[launcher] horovod: restarted from commit {self._commits}", file=sys.stderr, flush=True)


def _kept_path(restarts_left: bool = True) -> str:
    """Where commits are kept on this host; "" when no restart can use them."""
    directory = os.environ.get("LAUNCHER_RUN_DIR", "")
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS") or 0) - int(os.environ.get("LAUNCHER_ATTEMPT") or 0)
    return os.path.join(directory, "horovod-commit") if directory and (restarts > 0 or not restarts_left) else ""


class ObjectState(State):
    """State of plain objects, each an attribute by its keyword."""

    def __init__(self, bcast_object: Callable[..., Any], get_rank: Callable[[], int], **kwargs: Any) -> None:
        super().__init__(bcast_object, get_rank)
        self._saved_state: dict[str, Any] = kwargs
        self._set_attributes()
        self._saved_state = copy.deepcopy(kwargs)

    def save(self) -> None:
        self._saved_state = {name: copy.deepcopy(getattr(self, name)) for name in self._saved_state}

    def restore(self) -> None:
        self._set_attributes()

    def sync(self) -> None:
        if self._saved_state:
            current = {name: getattr(self, name) for name in self._saved_state}
            self._saved_state = self._bcast_object(current)
            self._set_attributes()

    def saved(self) -> Any:
        return self._saved_state

    def load(self, saved: Any) -> None:
        self._saved_state = saved

    def _set_attributes(self) -> None:
        for name, value in self._saved_state.items():
            setattr(self, name, copy.deepcopy(value))


def run_fn(func: Callable[..., Any], reset: Callable[[], None]) -> Callable[..., Any]:
    """``func(state, ...)`` that is called again after a failed collective, from the last commit.

    Args:
        reset: meets the ranks anew.

    Raises:
        HorovodInternalError: it failed three times with no commit in between.
    """

    @functools.wraps(func)
    def wrapper(state: State, *args: Any, **kwargs: Any) -> Any:
        state._take_up()
        skip_sync, fruitless, commits = False, 0, -1
        while True:
            try:
                if not skip_sync:
                    state.sync()
                return func(state, *args, **kwargs)
            except HorovodInternalError as error:
                fruitless = fruitless + 1 if state._commits == commits else 1
                commits = state._commits
                if fruitless >= _FRUITLESS:
                    raise
                print(f"[launcher] horovod: back to commit {commits}: {error}", file=sys.stderr, flush=True)
                state.restore()
                skip_sync = False
            except HostsUpdatedInterrupt as interrupt:
                skip_sync = interrupt.skip_sync
            reset()
            state.on_reset()

    return wrapper
