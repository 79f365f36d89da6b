"""Make the environments of this benchmark's contenders, for ``run.py --peer-env DIR``.

    python benchmarks/serving/install_peers.py DIR [--only NAME,...] [--again]

One environment a contender, since their requirements exclude one another; all with the Python that runs this. About
2 GB and five minutes. What is there already is not installed again, but for this project's own, which is built anew
from the checkout. Java and wrk come from Debian's packages where they are missing and this is root.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
# What a peer imports but does not declare is named here: the reference's server, setuptools below 81 (the last with
# pkg_resources), pyyaml.
PEERS: dict[str, tuple[str, ...]] = {
    "reference": ("sagemaker-inference==1.10.1", "multi-model-server==1.1.11", "numpy", "setuptools<81"),
    "gunicorn": ("gunicorn==27.0.1", "flask==3.1.3", "numpy"),
    "litserve": ("litserve==0.2.19", "numpy"),
    "torchserve": ("torchserve==0.12.0", "torch-model-archiver==0.12.0", "torch==2.13.0", "pyyaml", "numpy"),
}
OURS = "launcher"
OUR_PACKAGES = ("uvicorn>=0.54", "httptools", "uvloop", "numpy")
TOOLS = {"java": ("openjdk-17-jre-headless", "default-jre-headless"), "wrk": ("wrk",)}


def run(*command: str | Path, **more: object) -> None:
    """Runs a command, or raises with its error."""
    print("+", *command, file=sys.stderr, flush=True)
    subprocess.run([str(word) for word in command], check=True, **more)  # type: ignore[call-overload]


def install_tool(program: str, packages: tuple[str, ...]) -> None:
    """Installs the first of these Debian packages that can be, unless the program is there."""
    if shutil.which(program):
        return
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        raise OSError(f"{program} is not there (Debian: {packages[0]}), and only root can install it with apt-get")
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    run("apt-get", "update", "-qq", env=quiet)
    for package in packages:
        try:
            run("apt-get", "install", "-y", "-qq", "--no-install-recommends", package, env=quiet, stdout=sys.stderr)
            return
        except subprocess.CalledProcessError as error:
            last = error
    raise last


def make_environment(directory: Path) -> Path:
    """Its Python."""
    python = directory / "bin" / "python"
    if not python.exists():
        venv.create(directory, with_pip=True)
    return python


def install_ours(python: Path, copy: Path) -> None:
    """Builds from a copy of the checkout: nothing is left in the checkout, and nobody's build there is in the way.

    The copy is kept, for what is compiled in it.
    """
    run(python, "-m", "pip", "install", "--quiet", *OUR_PACKAGES)
    listing = subprocess.run(
        ["git", "-C", str(CHECKOUT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    copy.mkdir(exist_ok=True)
    for old in copy.iterdir():
        if old.name != "build":
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    for name in filter(None, listing.split("\0")):
        if (CHECKOUT / name).is_file() and not name.startswith(("tests/", "benchmarks/", "docs/")):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(CHECKOUT / name, copy / name)
    environ = {**os.environ, "CMAKE_ARGS": os.environ.get("CMAKE_ARGS", "-DLAUNCHER_CUDA=OFF")}
    run(python, "-m", "pip", "uninstall", "--quiet", "--yes", OURS)
    run(python, "-m", "pip", "install", "--quiet", f"{copy}[serve]", env=environ)


def installed(python: Path) -> str:
    """What is in an environment."""
    listed = subprocess.run([str(python), "-m", "pip", "freeze", "--all"], capture_output=True, text=True, check=False)
    lines = [line for line in listed.stdout.split("\n") if line and not line.startswith("pip==")]
    return ", ".join(line.partition(" @ ")[0] if " @ " in line else line for line in lines)


def first_line(*command: str) -> str:
    """Of what a command prints."""
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    return next(iter((said.stdout + said.stderr).splitlines()), "?")


def main() -> None:
    """Installs what is not there; ends with 1 when a part failed, after having tried the others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="of the environments; made when it is not there")
    parser.add_argument("--only", help="comma-separated: " + ", ".join((OURS, *PEERS)))
    parser.add_argument("--again", action="store_true", help="removes these environments first")
    args = parser.parse_args()
    directory = args.directory.resolve()
    wanted = [name for name in (args.only or ",".join((OURS, *PEERS))).split(",") if name]
    if unknown := [name for name in wanted if name not in (OURS, *PEERS)]:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join((OURS, *PEERS))}")
    directory.mkdir(parents=True, exist_ok=True)
    failed: dict[str, str] = {}
    for program, packages in TOOLS.items():
        try:
            install_tool(program, packages)
        except (subprocess.CalledProcessError, OSError) as error:
            failed[program] = str(error)
    for name in wanted:
        place = directory / name
        if args.again:
            shutil.rmtree(place, ignore_errors=True)
        try:
            done = place / "installed"  # written last: an environment that was left half made is made on
            if name == OURS:
                install_ours(make_environment(place), directory / "source")
            elif not done.exists() or done.read_text().split() != list(PEERS[name]):
                run(make_environment(place), "-m", "pip", "install", "--quiet", *PEERS[name])
                done.write_text("\n".join(PEERS[name]) + "\n")
        except (subprocess.CalledProcessError, OSError) as error:
            failed[name] = str(error)
    for name in wanted:
        if (python := directory / name / "bin" / "python").exists():
            print(f"{name}: {first_line(str(python), '--version')}; {installed(python)}")
    if shutil.which("java"):
        print(f"java: {first_line('java', '-version')}")
    if shutil.which("wrk"):
        print(f"wrk: {first_line('wrk', '-v')}")
    for name, why in failed.items():
        print(f"{name}: NOT INSTALLED: {why}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
