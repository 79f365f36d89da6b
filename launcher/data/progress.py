"""Steps and samples of this rank's loaders, as its supervisor sees them."""

from __future__ import annotations

import os

from launcher.collectives.place import status_page
from launcher.rank.context import Context

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_totals = [0, 0]  # steps and samples of all loaders of this process: the page has one number of each


def reporter() -> Callable[[int], None] | None:
    """What tells the supervisor of one more step with so many samples: a store into a mapped page. None without one.

    A script that tells its steps itself (Context.step()) knows better, and is left to it.
    """
    page = status_page(os.environ)
    if page is None:
        return None
    store = page.step

    def report(samples: int) -> None:
        _totals[0] += 1
        _totals[1] += samples
        if not Context.tells_steps:
            store(_totals[0], _totals[1])

    return report
