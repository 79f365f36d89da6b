"""Import torch, note the time, and stay until the benchmark has measured the memory."""

import os
import time

import torch

NOW = time.monotonic_ns()

from meet import tell, wait_for_go  # noqa: E402 - after the line that is timed

assert torch.ones(1).item() == 1.0
tell("first", str(NOW))
tell("ready", str(os.getpid()))
wait_for_go()
