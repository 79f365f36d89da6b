"""Sleep; the first rank of the host that is named as argument notes the time and ends with 3 once told to go."""

import os
import sys
import time

from meet import HOST, LOCAL_RANK, tell, wait_for_go

tell("ready", str(os.getpid()))
if sys.argv[1:] == [HOST] and LOCAL_RANK == "0":
    wait_for_go()
    tell("failed", str(time.monotonic_ns()))
    sys.exit(3)
time.sleep(600)
