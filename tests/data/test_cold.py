"""Sets that are larger than the memory there is, and not in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ..faults.test_memory import MIB, Group, memory_group

numpy = pytest.importorskip("numpy")

RECORDS, RECORD_BYTES = 30_000, 4096
LOADING = """
import json, resource, sys
from launcher.data.loader import Loader

def from_disk():
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt

with Loader(sys.argv[1], 64, tail="short", fields=["number"]) as loader:
    before = from_disk()
    numbers = sorted(int(number) for batch in loader for number in batch["number"])
    after = from_disk()
    maps = open("/proc/self/smaps").read()
print(json.dumps([numbers == list(range(len(numbers))), len(numbers), after - before, " rr" in maps]))
"""


@pytest.fixture
def group(as_root: None, wait_until: Callable[..., Any]) -> Iterator[Group]:
    """A limit of memory of which half is less than the set."""
    yield from memory_group("cold", 200 * MIB, wait_until)


def test_a_disk_is_asked_for_many_records_at_a_time(group: Group, tmp_path: Path) -> None:
    """Not for one page after the other, each when it is touched."""
    path = tmp_path / "set.npy"
    dtype = numpy.dtype({"names": ["number"], "formats": ["i8"], "offsets": [0], "itemsize": RECORD_BYTES})
    values = numpy.zeros(RECORDS, dtype)
    values["number"] = numpy.arange(RECORDS)
    numpy.save(path, values)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command = [*group.wrapper, sys.executable, "-c", LOADING, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    all_once, count, waits, scattered = json.loads(done.stdout)
    assert (all_once, count, scattered) == (True, RECORDS, True)
    assert waits < RECORDS // 3
