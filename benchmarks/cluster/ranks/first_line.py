"""Note the time of the first line, and end."""

import time

NOW = time.monotonic_ns()

from meet import tell  # noqa: E402 - after the line that is timed

tell("first", str(NOW))
