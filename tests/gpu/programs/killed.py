"""Two ranks on one GPU; rank 1 ends by SIGKILL between two calls, and rank 0 shows what it was told."""

import json
import os
import signal
import sys

import torch

from launcher import CollectiveError
from launcher._native import LocalGroup
from launcher.collectives.cuda_ipc import IpcAllreduce

directory, rank, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
group = LocalGroup(directory, "killed", rank, size, timeout_s=60.0)
ipc = IpcAllreduce(group, 0, staging_bytes=1 << 16)
tensor = torch.ones(1000, device="cuda:0")
told = None
try:
    for _ in range(4):
        ipc.allreduce(tensor, algorithm="one_shot")
        ipc.synchronize()
        if rank == 1:
            print(json.dumps("gone"), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
except CollectiveError as error:
    told = [error.reason, error.rank]
print(json.dumps(told), flush=True)
os._exit(0)
