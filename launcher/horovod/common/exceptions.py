"""Errors of Horovod's API."""

from __future__ import annotations

from launcher.errors import LauncherError


class HorovodInternalError(LauncherError, RuntimeError):
    """A collective failed: the ranks asked for different things, or one of them is gone.

    ``elastic.run`` goes back to the last commit on it. Where a rank is gone, ``__cause__`` is the CollectiveError that
    names it.
    """


class HostsUpdatedInterrupt(LauncherError, RuntimeError):
    """The set of ranks has changed. ``elastic.run`` begins again with the state as it is.

    Attributes:
        skip_sync: no rank is new, so the state need not be sent around.
    """

    def __init__(self, skip_sync: bool = False) -> None:
        self.skip_sync = skip_sync
        super().__init__("the ranks of the job have changed")
