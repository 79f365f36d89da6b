"""Sleep; with the argument ``exit3``, rank 1 notes the time and ends with code 3 once the benchmark says go."""

import os
import sys
import time

from meet import RANK, tell, wait_for_go

tell("ready", str(os.getpid()))
if sys.argv[1:] == ["exit3"] and RANK == 1:
    wait_for_go()
    tell("failed", str(time.monotonic_ns()))
    sys.exit(3)
time.sleep(600)
