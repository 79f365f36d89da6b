"""What the rank scripts share: files in a directory that all hosts see, named after host and local rank."""

import os
import time

HERE = os.environ["CLUSTER_BENCH_DIR"]
HOST = os.uname().nodename
LOCAL_RANK = os.environ.get("LOCAL_RANK") or os.environ["OMPI_COMM_WORLD_LOCAL_RANK"]


def tell(name: str, text: str) -> None:
    """Write ``name.<host>.<local rank>`` in one step, so that a reader sees all of it or nothing."""
    path = os.path.join(HERE, f"{name}.{HOST}.{LOCAL_RANK}")
    with open(path + ".partial", "w") as stream:
        stream.write(text)
    os.rename(path + ".partial", path)


def wait_for_go() -> None:
    """Return when the benchmark has made the file ``go``."""
    path = os.path.join(HERE, "go")
    while not os.path.exists(path):
        time.sleep(0.001)
