"""Note the time of the first line, and end."""

import os
import time

NOW = time.monotonic_ns()

rank = os.environ.get("RANK") or os.environ["OMPI_COMM_WORLD_RANK"]
with open(os.path.join(os.environ["LAUNCH_BENCH_DIR"], f"first.{rank}"), "w") as stream:
    stream.write(str(NOW))
