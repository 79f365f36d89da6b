"""A folder with many files, listed with their sizes by what Python has."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapters.base import Base


def walk(root: str) -> int:
    """os.walk and os.stat."""
    found = []
    for folder, _, names in os.walk(root):
        found += [(os.path.join(folder, name), os.stat(os.path.join(folder, name)).st_size) for name in names]
    return len(sorted(found))


def rglob(root: str) -> int:
    """Path.rglob and Path.stat."""
    return len(sorted((str(path), path.stat().st_size) for path in Path(root).rglob("*") if path.is_file()))


class Adapter(Base):
    """options: ``way``: walk or rglob."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        self.version = f"Python {platform.python_version()}"

    def listing(self, order: Mapping[str, Any], rank: int) -> dict[str, Any]:
        """Lists and sorts: seconds, and how many files."""
        begin = time.perf_counter()
        files = {"walk": walk, "rglob": rglob}[self.options["way"]](order["root"])
        return {"seconds": time.perf_counter() - begin, "files": files}
