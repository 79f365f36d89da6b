"""One rank of test_ipc.py, a process: directory, rank, size, number of its GPU, order."""

import json
import sys

from cases import run_matrix

from launcher._native import LocalGroup

directory, rank, size, device, order = sys.argv[1:]
if device == "own":
    device = rank
group = LocalGroup(directory, "matrix", int(rank), int(size), timeout_s=60.0)
found = run_matrix(group, int(device), order)
group.close()
print(json.dumps(found))
