"""Make an environment with the contenders of this benchmark, for ``run.py --peer-env DIR``.

    python benchmarks/data/install_peers.py DIR

About 4 GB (2 GB with a torch for CPUs) and three minutes. What is there already is not installed again. For the
reader over libprotobuf the system needs ``protoc`` and its headers (Debian: protobuf-compiler, libprotobuf-dev).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import venv
from pathlib import Path

PACKAGES = (
    "torch==2.13.0",
    "numpy",
    "nvidia-dali-cuda120==2.4.0",  # runs without a GPU
    "litdata==0.2.76",
    "webdataset==1.0.2",
    "mosaicml-streaming==0.13.0",
    "grain==0.2.18",
    "array-record==0.8.6",
    "spdl-io==0.8.0",
    "spdl-core==0.8.0",
    "pandas==3.1.1",
    "pyarrow==26.0.1",
    "protobuf==7.36.2",
)


def main() -> None:
    """Installs them with pip, which says what went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="of the environment; made when it is not there")
    directory = parser.parse_args().directory.resolve()
    python = directory / "bin" / "python"
    if not python.exists():
        venv.create(directory, with_pip=True)
    command = [str(python), "-m", "pip", "install", "--quiet", *PACKAGES]
    print("+", *command, file=sys.stderr, flush=True)
    sys.exit(subprocess.run(command, check=False).returncode)


if __name__ == "__main__":
    main()
