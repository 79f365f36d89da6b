"""What the rank scripts share: who am I, and files through which a rank and the benchmark tell each other things."""

import os
import time

HERE = os.environ["LAUNCH_BENCH_DIR"]
RANK = int(os.environ.get("RANK") or os.environ["OMPI_COMM_WORLD_RANK"])


def tell(name: str, text: str) -> None:
    """Write ``name.<rank>`` in one step, so that a reader sees all of it or nothing."""
    path = os.path.join(HERE, f"{name}.{RANK}")
    with open(path + ".partial", "w") as stream:
        stream.write(text)
    os.rename(path + ".partial", path)


def wait_for_go() -> None:
    """Return when the benchmark has made the file ``go``."""
    path = os.path.join(HERE, "go")
    while not os.path.exists(path):
        time.sleep(0.001)
