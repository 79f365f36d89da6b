"""Ranks of a Horovod job: which controller the installed Horovod was built with, and its variables for each rank.

With the MPI controller the ranks are those of the MPI engine. With the Gloo controller they are started like any
others; they find each other through the store of :mod:`launcher.cluster.kvstore`, which the variables point to.
Horovod is never imported here: that would load the framework it was built for.
"""

from __future__ import annotations

import os
import sys

from launcher.errors import UsageError
from launcher.record import Record, replace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import BinaryIO

    from launcher.engines.torch import RankLaunch, Rendezvous
    from launcher.topology import RankPlace, Topology

GLOO, MPI = "gloo", "mpi"
# One library for each framework that Horovod was built for; all of them are built with the same controllers.
_LIBRARIES = (("torch", "mpi_lib_v2"), ("tensorflow", "mpi_lib"), ("mxnet", "mpi_lib"))
# Virtual tables of the two controller classes: the library has one exactly if it has the class.
_CONTROLLERS = {
    GLOO: b"\0_ZTVN7horovod6common14GlooControllerE\0",
    MPI: b"\0_ZTVN7horovod6common13MPIControllerE\0",
}
# Ranks import for unequal times, and a lost one is seen by the launcher; Horovod's own 30 s would end a slow start.
_TIMEOUT_S = 300


class Build(Record):
    """What an installed Horovod can do.

    Attributes:
        library: path of the compiled library that was read.
        controllers: of ``gloo`` and ``mpi``, those it was built with.
        mpi_library: the MPI library that it is linked with, as ``libmpi.so.40``; "" without MPI.
    """

    library: str
    controllers: tuple[str, ...]
    mpi_library: str


def installed(python: str, environ: Mapping[str, str]) -> Build:
    """The Horovod that ranks run by the interpreter ``python`` would import.

    Reads a few kilobytes of its library. Another interpreter than this one is asked where it looks for modules.

    Raises:
        UsageError: there is none, or none of its libraries was built, or one is not what a Linux linker makes.
    """
    same = os.path.realpath(python) == os.path.realpath(sys.executable) and _prefix(python) == _prefix(sys.executable)
    for directory in sys.path if same else _search_path(python, environ):
        package = os.path.join(directory or os.curdir, "horovod")
        if not os.path.isfile(os.path.join(package, "__init__.py")):
            continue
        library = _library(package)
        if library is None:
            raise UsageError(
                f"engine horovod: the package {package} has no compiled library; "
                "install it again, with HOROVOD_WITH_PYTORCH=1 to see why the build fails"
            )
        return read_build(library)
    raise UsageError(
        f"engine horovod: {python} finds no package horovod; install it, or choose another --engine, "
        "with --horovod-compat for scripts that use horovod.torch"
    )


def read_build(library: str) -> Build:
    """What the compiled library at this path says of itself.

    Raises:
        UsageError: it cannot be read, is no ELF file of this kind of machine, or has no controller.
    """
    try:
        with open(library, "rb") as file:
            names, needed = _dynamic_names(file)
    except (OSError, ValueError) as error:
        raise UsageError(f"engine horovod: cannot read {library}: {error}; install horovod again") from None
    controllers = tuple(name for name, symbol in _CONTROLLERS.items() if symbol in names)
    if not controllers:
        raise UsageError(
            f"engine horovod: {library} was built with neither Gloo nor MPI; "
            "install horovod again with HOROVOD_WITH_GLOO=1 or HOROVOD_WITH_MPI=1"
        )
    return Build(library, controllers, next((name for name in needed if name.startswith("libmpi.so")), ""))


def choose_controller(asked: str, build: Build, environ: Mapping[str, str], mpirun: str) -> str:
    """The controller of the job, ``gloo`` or ``mpi``.

    In this order: the option, the variable HOROVOD_CONTROLLER, and what Horovod itself would take, MPI if it was
    built with it; but with no ``mpirun`` at hand Gloo, if it was built with that too.

    Args:
        asked: the option's value, with ``auto`` for no wish.
        mpirun: the mpirun that would be used, "" for none. All hosts must choose alike, though only the first needs
            one: of several, each gives a name here.

    Raises:
        UsageError: what was asked for is not in this build.
    """
    source, wish = "--horovod-controller", asked
    if wish == "auto" and environ.get("HOROVOD_CONTROLLER"):
        source, wish = "HOROVOD_CONTROLLER", environ["HOROVOD_CONTROLLER"].lower()
    if wish == "auto":
        preferred = (MPI, GLOO) if mpirun or GLOO not in build.controllers else (GLOO,)
        return next(name for name in preferred if name in build.controllers)
    if wish not in build.controllers:
        raise UsageError(
            f"{source} is {wish!r}, but {build.library} was built with {' and '.join(build.controllers)} only; "
            f"ask for that, or install horovod again with HOROVOD_WITH_{wish.upper()}=1"
        )
    return wish


def place_variables(place: RankPlace, topology: Topology) -> dict[str, str]:
    """Horovod's names for a rank's place. "Cross" counts the ranks that have this local rank, one a host."""
    holders = [host for host, slots in enumerate(topology.slots) if slots > place.local_rank]
    return {
        "HOROVOD_HOSTNAME": place.host,
        "HOROVOD_RANK": str(place.rank),
        "HOROVOD_SIZE": str(topology.world_size),
        "HOROVOD_LOCAL_RANK": str(place.local_rank),
        "HOROVOD_LOCAL_SIZE": str(topology.slots[place.host_rank]),
        "HOROVOD_CROSS_RANK": str(holders.index(place.host_rank)),
        "HOROVOD_CROSS_SIZE": str(len(holders)),
    }


def with_gloo(
    launch: RankLaunch, place: RankPlace, topology: Topology, store: Rendezvous, interface: str
) -> RankLaunch:
    """A rank's launch with the variables of the Gloo controller.

    Args:
        store: where the key-value store listens; an IPv4 address or a name that has one, as Horovod's client wants.
        interface: network interface for the ranks' connections; "" lets Gloo choose by the host's name. A value of
            the user's own wins.
    """
    environ = _environ(launch, place, topology)
    environ.update(
        HOROVOD_CONTROLLER=GLOO,
        HOROVOD_CPU_OPERATIONS=GLOO,
        HOROVOD_GLOO_RENDEZVOUS_ADDR=store.address,
        HOROVOD_GLOO_RENDEZVOUS_PORT=str(store.port),
    )
    if interface:
        environ.setdefault("HOROVOD_GLOO_IFACE", interface)
    environ.setdefault("HOROVOD_GLOO_TIMEOUT_SECONDS", str(_TIMEOUT_S))
    return replace(launch, environ=environ)


def with_mpi(launch: RankLaunch, place: RankPlace, topology: Topology) -> RankLaunch:
    """A rank's launch with the variables of the MPI controller, which learns the ranks' places from MPI itself."""
    return replace(launch, environ={**_environ(launch, place, topology), "HOROVOD_CONTROLLER": MPI})


def _environ(launch: RankLaunch, place: RankPlace, topology: Topology) -> dict[str, str]:
    environ = {**launch.environ, **place_variables(place, topology)}
    # Its elastic mode asks a driver of its own for new ranks. Here the whole group is started again instead.
    environ.pop("HOROVOD_ELASTIC", None)
    return environ


# ---- where it is, and what its library says


def _prefix(python: str) -> str:
    """The directory that makes an interpreter's environment: links to one binary may be of several environments."""
    return os.path.realpath(os.path.dirname(python))


def _search_path(python: str, environ: Mapping[str, str]) -> list[str]:
    import subprocess

    command = (python, "-c", "import sys; print('\\n'.join(sys.path[1:]))")
    try:
        done = subprocess.run(command, env=dict(environ), capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise UsageError(f"engine horovod: cannot ask {python} where it looks for modules: {error}") from None
    return done.stdout.splitlines()


def _library(package: str) -> str | None:
    for framework, stem in _LIBRARIES:
        directory = os.path.join(package, framework)
        names = sorted(os.listdir(directory)) if os.path.isdir(directory) else []
        for name in names:
            if name.endswith(".so") and name.partition(".")[0] == stem:
                return os.path.join(directory, name)
    return None


_TABLE_LIMIT = 64 << 20
_LOAD, _DYNAMIC = 1, 2
_NEEDED, _STRINGS, _STRINGS_SIZE = 1, 5, 10


def _dynamic_names(file: BinaryIO) -> tuple[bytes, list[str]]:
    """The table of names for the dynamic linker, and the libraries that it is to load, of a 64-bit ELF file.

    The program headers lead there; section headers may be stripped.

    Raises:
        ValueError: saying what is not as it should be.
    """
    import struct

    def read(offset: int, size: int) -> bytes:
        if size > _TABLE_LIMIT or offset >> 62:
            raise ValueError(f"a table of {size} bytes at {offset}")
        file.seek(offset)
        data = file.read(size)
        if len(data) != size:
            raise ValueError("it is cut short")
        return data

    header = read(0, 64)
    if header[:6] != b"\x7fELF\x02\x01":
        raise ValueError("it is not a 64-bit little-endian ELF file")
    table, entry_size, count = struct.unpack_from("<32xQ14xHH", header)
    if entry_size != 56:
        raise ValueError(f"program headers of {entry_size} bytes")
    segments = [struct.unpack("<II6Q", read(table + entry_size * index, 56)) for index in range(count)]
    dynamic = next((segment for segment in segments if segment[0] == _DYNAMIC), None)
    if dynamic is None:
        raise ValueError("it has no dynamic section")
    entries = list(struct.iter_unpack("<qQ", read(dynamic[2], dynamic[5] // 16 * 16)))
    values = dict(entries)
    if _STRINGS not in values or _STRINGS_SIZE not in values:
        raise ValueError("it has no table of names")
    address = values[_STRINGS]
    for kind, _, offset, start, _, size, _, _ in segments:
        if kind == _LOAD and start <= address < start + size:
            names = read(offset + address - start, values[_STRINGS_SIZE])
            needed = [value for tag, value in entries if tag == _NEEDED]
            return names, [names[at : names.find(b"\0", at)].decode(errors="replace") for at in needed]
    raise ValueError("its table of names is in no segment")
