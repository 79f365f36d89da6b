"""What every rank of the test job does: one check after another; how each ended is in ``DIRECTORY/rankN.json``."""

from __future__ import annotations

import json
import sys
import time
import traceback

import horovod.torch as hvd
import ranks_collectives  # noqa: F401 - its checks are entered by importing it
import ranks_training  # noqa: F401
from ranks_common import CHECKS, DIRECTORY, RANK


def main() -> None:
    results: dict[str, str] = {}
    for name, function in CHECKS.items():
        began = time.monotonic()
        try:
            function()
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc()
            print(f"{name}\n{results[name]}", flush=True)
        if "-v" in sys.argv:
            print(f"{name} {time.monotonic() - began:.3f} s", flush=True)
        (DIRECTORY / f"rank{RANK}.json").write_text(json.dumps(results))
    hvd.shutdown()


if __name__ == "__main__":
    main()
