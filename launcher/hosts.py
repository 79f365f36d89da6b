"""Which hosts form the job, which of them this one is, and who said so. Texts in, one record out; starts nothing."""

from __future__ import annotations

from launcher.errors import UsageError
from launcher.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from typing import Any

    from launcher.container import ResourceConfig
    from launcher.job import Setting

ALONE = "this host alone"
# More than any cluster has: a mistyped range must not fill the memory.
_MOST_HOSTS = 1 << 16
_NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-_")


class HostList(Record):
    """The hosts of one job.

    Attributes:
        hosts: names in the order of host ranks; the first is the leader.
        host: this one's.
        source: who said so, for people.
        slots: ranks of each host; empty when the source does not say, and each host counts its own.
        addresses: name -> address (or other name) to use instead of resolving the name.
        named: False when the names are made up and only the leader's address is known.
    """

    hosts: tuple[str, ...]
    host: str
    source: str
    slots: tuple[int, ...] = ()
    addresses: dict[str, str] = {}
    named: bool = True

    @property
    def host_rank(self) -> int:
        """This host's place in ``hosts``."""
        return self.hosts.index(self.host)

    @property
    def leader(self) -> str:
        """The first host."""
        return self.hosts[0]

    def slots_or(self, counted: int) -> tuple[int, ...]:
        """Ranks of each host, ``counted`` (this host's own count) for all where the source does not say."""
        return self.slots or (counted,) * len(self.hosts)


class Here(Record):
    """What tells this host from others. All but the name are asked for only when the name does not tell.

    Attributes:
        hostname: what the kernel calls it.
        full_name: () -> its name with the domain.
        addresses: () -> its numeric addresses.
        resolve: name -> numeric addresses, none when it does not resolve.
    """

    hostname: str
    full_name: Callable[[], str]
    addresses: Callable[[], Sequence[str]]
    resolve: Callable[[str], Sequence[str]]


def here() -> Here:
    """This very host."""
    import os

    hostname = os.uname().nodename

    def full_name() -> str:
        from launcher import interfaces

        return interfaces.full_name(hostname)

    def addresses() -> list[str]:
        from launcher import interfaces

        return [address for _, address in interfaces.addresses()]

    def resolve(name: str) -> list[str]:
        from launcher import interfaces

        return interfaces.resolve(name)

    return Here(hostname=hostname, full_name=full_name, addresses=addresses, resolve=resolve)


def find(
    settings: Mapping[str, Setting],
    resources: ResourceConfig | None,
    training: Sequence[str],
    environ: Mapping[str, str],
    here: Here,
) -> HostList:
    """The hosts that form this job, from the strongest source that there is.

    In this order: ``--hosts``, ``--hostfile``, the container's ``resourceconfig.json``, Slurm, torchrun's options and
    variables (``PET_*``), an indexed Kubernetes job, else this host alone.

    Args:
        settings: those of the options; absent ones count as not given.
        resources: the container's own list; None where the launcher makes the job tree.
        training: the hosts of the instance groups that train together; a host outside of them trains alone.

    Raises:
        UsageError: a list that cannot be used, no telling which of the hosts this is, or not as many as ``nnodes``.
    """
    if _value(settings, "standalone"):
        host = resources.current_host if resources else _value(settings, "host") or _DEFAULT_NAME
        return HostList((host,), host, f"{ALONE} ({_label(settings, 'standalone')})")
    found = (
        _from_option(settings, here)
        or _from_hostfile(settings, here)
        or (_from_container(settings, resources, training) if resources else None)
        or _from_slurm(settings, environ)
        or _from_torchrun(settings, environ, here)
        or _alone(settings, environ)
    )
    _check_count(settings, found)
    return _with_addresses(settings, found)


def fewest(settings: Mapping[str, Setting], found: HostList) -> int:
    """With how many hosts the job may run: ``min_hosts``, else MIN of ``nnodes`` MIN:MAX, else all of them.

    Raises:
        UsageError: more than there are.
    """
    asked = int(_value(settings, "min_hosts") or 0)
    if asked > len(found.hosts):
        label = _label(settings, "min_hosts")
        raise UsageError(f"{label} is {asked}, but there are {len(found.hosts)} hosts (from {found.source})")
    nnodes = str(_value(settings, "nnodes"))
    if not asked and ":" in nnodes and len(found.hosts) > 1:
        asked = _bounds(nnodes)[0]
    return asked or len(found.hosts)


def slots(found: HostList, counted: int, nproc_per_node: Setting) -> tuple[int, ...]:
    """Ranks of each host: the list's own, else this host's count for all of them.

    Raises:
        UsageError: the list and ``nproc_per_node`` both say how many, and differ.
    """
    here = found.slots_or(counted)[found.host_rank]
    if found.slots and nproc_per_node.source != "default" and counted != here:
        raise UsageError(
            f"nproc_per_node is {counted} (from {nproc_per_node.source}), but {found.source} gives {found.host} "
            f"{here} slots; leave one of the two out"
        )
    return found.slots_or(counted)


# ---- the parsers: text of one source -> (host, slots or 0) pairs


def parse_hosts(text: str, source: str) -> list[tuple[str, int]]:
    """``a:8,b:8``: names, IPv4 addresses, ``[IPv6]``, each with its slots or without (0)."""
    return _checked([_entry(piece.strip(), source) for piece in text.split(",")], source)


def parse_hostfile(text: str, path: str) -> list[tuple[str, int]]:
    """A host a line, ``a slots=8`` (Open MPI, DeepSpeed) or ``a:8`` (MPICH); ``#`` begins a comment."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        where = f"{path}, line {number}"
        host, count = _entry(words[0], where)
        for word in words[1:]:
            name, equals, value = word.partition("=")
            if not equals or name.replace("-", "_") not in ("slots", "max_slots"):
                raise UsageError(f"{where}: found {word!r}; expected HOST slots=N, or HOST:N")
            number_of_slots = _slot_count(value, where)
            if name == "slots":
                if count:
                    raise UsageError(f"{where}: slots are given twice")
                count = number_of_slots
        found.append((host, count))
    return _checked(found, path)


def parse_slurm(text: str) -> list[str]:
    """Slurm's node lists: ``n[001-003,7],m1``, with any number of brackets in a name.

    Raises:
        UsageError: what is not such a list.
    """
    found: list[str] = []
    for piece in _split_outside_brackets(text):
        found += _expand(piece, text)
        if len(found) > _MOST_HOSTS:
            raise _slurm_error(text, f"more than {_MOST_HOSTS} hosts")
    return [host for host, _ in _checked([(name, 0) for name in found], "Slurm's node list")]


def _entry(text: str, where: str) -> tuple[str, int]:
    host, colon, count = text, "", ""
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        colon, count = rest[:1], rest[1:]
        if not bracket or (rest and colon != ":"):
            raise UsageError(f"{where}: found {text!r}; expected [IPv6 address] or [IPv6 address]:SLOTS")
        from launcher.interfaces import is_numeric

        if ":" not in host or not is_numeric(host):
            raise UsageError(f"{where}: {host!r} in brackets is not an IPv6 address")
    else:
        host, colon, count = text.partition(":")
        if ":" in count:
            raise UsageError(f"{where}: found {text!r}; expected HOST or HOST:SLOTS, an IPv6 address in brackets")
        _check_name(host, text, where)
    return host, _slot_count(count, where) if colon else 0


def _check_name(host: str, text: str, where: str) -> None:
    if not host:
        raise UsageError(f"{where}: found {text!r}; expected the name or address of a host")
    if not _NAME_CHARACTERS.issuperset(host) or host[0] == "-":
        raise UsageError(f"{where}: {host!r} is not the name or address of a host")


def _slot_count(text: str, where: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) <= 1 << 16):
        raise UsageError(f"{where}: {text!r} slots; expected a number above 0")
    return int(text)


def _checked(entries: list[tuple[str, int]], source: str) -> list[tuple[str, int]]:
    if not entries:
        raise UsageError(f"{source}: no hosts in it")
    seen: set[str] = set()
    for host, _ in entries:
        if host.lower() in seen:
            raise UsageError(f"{source}: {host} is there twice; name each host once, with all its slots")
        seen.add(host.lower())
    with_slots = [host for host, count in entries if count]
    if with_slots and len(with_slots) < len(entries):
        without = next(host for host, count in entries if not count)
        raise UsageError(f"{source}: {with_slots[0]} has slots, {without} has none; give all hosts slots, or none")
    return entries


def _split_outside_brackets(text: str) -> list[str]:
    pieces, depth = [""], 0
    for character in text.strip():
        depth += {"[": 1, "]": -1}.get(character, 0)
        if depth not in (0, 1):
            raise _slurm_error(text, "brackets do not match")
        if character == "," and not depth:
            pieces.append("")
        else:
            pieces[-1] += character
    if depth:
        raise _slurm_error(text, "brackets do not match")
    return pieces


def _expand(piece: str, text: str) -> list[str]:
    """``r[1-2]n[01-02]`` as r1n01, r1n02, r2n01, r2n02."""
    head, bracket, rest = piece.partition("[")
    if not bracket:
        if not piece or not _NAME_CHARACTERS.issuperset(piece):
            raise _slurm_error(text, f"found {piece!r}")
        return [piece]
    inside, _, tail = rest.partition("]")
    tails = _expand(tail, text) if tail else [""]
    found: list[str] = []
    for part in inside.split(","):
        low, dash, high = part.partition("-")
        if not low.isdigit() or (dash and not high.isdigit()) or not part.isascii():
            raise _slurm_error(text, f"found {part!r} in brackets")
        first, last = int(low), int(high or low)
        if last < first or (last - first + 1) * len(tails) + len(found) > _MOST_HOSTS:
            raise _slurm_error(text, f"the range {part!r} is not one")
        found += [f"{head}{number:0{len(low)}d}{end}" for number in range(first, last + 1) for end in tails]
    return found


def _slurm_error(text: str, problem: str) -> UsageError:
    shown = text if len(text) < 200 else text[:200] + "..."
    return UsageError(f"Slurm's node list {shown!r}: {problem}; expected names such as n[001-003,7],m1")


# ---- the sources

_DEFAULT_NAME = "algo-1"  # what the platform calls its first host


def _value(settings: Mapping[str, Setting], name: str) -> Any:
    return settings[name].value if name in settings else ""


def _label(settings: Mapping[str, Setting], name: str) -> str:
    """What an error calls a setting, by where it came from."""
    source = settings[name].source
    spelled = name.replace("_", "-")
    if source == "command line":
        return f"option --{spelled}"
    return source if source.startswith("environment ") else f"{name} in {source}"


def _from_option(settings: Mapping[str, Setting], here: Here) -> HostList | None:
    text = str(_value(settings, "hosts"))
    if not text:
        return None
    label = _label(settings, "hosts")
    return _listed(parse_hosts(text, label), label, settings, here)


def _from_hostfile(settings: Mapping[str, Setting], here: Here) -> HostList | None:
    path = str(_value(settings, "hostfile"))
    if not path:
        return None
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or "not a text file"
        raise UsageError(f"{_label(settings, 'hostfile')}: cannot read {path}: {reason}") from None
    label = f"hostfile {path}"
    return _listed(parse_hostfile(text, label), label, settings, here)


def _listed(entries: list[tuple[str, int]], source: str, settings: Mapping[str, Setting], here: Here) -> HostList:
    hosts = tuple(host for host, _ in entries)
    given = str(_value(settings, "host"))
    if given and given not in hosts:
        raise UsageError(f"{_label(settings, 'host')} is {given!r}, which is not in {source}: {_some(hosts)}")
    host = given or which(hosts, here, source)
    return HostList(hosts, host, source, tuple(count for _, count in entries if count))


def _from_container(
    settings: Mapping[str, Setting], resources: ResourceConfig, training: Sequence[str]
) -> HostList | None:
    host, source = resources.current_host, resources.file.rpartition("/")[2]
    given = str(_value(settings, "host"))
    if given and given != host:
        raise UsageError(f"{_label(settings, 'host')} is {given!r}, but {resources.file} says that this is {host}")
    if host in training:
        return HostList(tuple(training), host, source)
    if len(resources.hosts) > 1:
        source += f": of {len(resources.hosts)} hosts, this one does not train with others"
    return HostList((host,), host, source)


def _from_slurm(settings: Mapping[str, Setting], environ: Mapping[str, str]) -> HostList | None:
    # A step's own list is shorter than its job's when srun was told so.
    names = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    text = next((environ[name] for name in names if environ.get(name)), "")
    if not text or _outside_of_srun(environ):
        return None
    per_node = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE", "")
    counts = {piece.partition("(")[0] for piece in per_node.split(",")} - {""}
    if counts - {"1"} or environ.get("SLURM_LOCALID", "0") != "0":
        raise UsageError(
            f"Slurm starts several tasks on a host (tasks per node: {per_node or 'more than 1'}); the launcher starts "
            "the ranks itself: use srun --ntasks-per-node=1, and --nproc-per-node for the number of ranks"
        )
    hosts = tuple(parse_slurm(text))
    given, name, index = str(_value(settings, "host")), environ.get("SLURMD_NODENAME", ""), environ.get("SLURM_NODEID")
    if (given or name) in hosts:
        return HostList(hosts, given or name, "Slurm")
    if not given and index and index.isdecimal() and int(index) < len(hosts):
        return HostList(hosts, hosts[int(index)], "Slurm")
    raise UsageError(
        f"this host is not in Slurm's node list ({_some(hosts)}): looked for "
        + (
            f"--host {given}"
            if given
            else f"SLURMD_NODENAME {name or '(not set)'}, SLURM_NODEID {index or '(not set)'}"
        )
        + "; --host names it"
    )


def _outside_of_srun(environ: Mapping[str, str]) -> bool:
    """In a batch script or under salloc: nobody starts a launcher on the other hosts of the allocation."""
    return "SLURM_JOB_ID" in environ and not (environ.get("SLURM_STEP_ID") or environ.get("SLURM_STEP_NODELIST"))


def _from_torchrun(settings: Mapping[str, Setting], environ: Mapping[str, str], here: Here) -> HostList | None:
    """torchrun's static and c10d command lines, and indexed Kubernetes jobs, which differ in who numbers the hosts."""
    nnodes = str(_value(settings, "nnodes"))
    count = _bounds(nnodes)[1] if nnodes else 1
    if count < 2:
        return None
    endpoint, master = str(_value(settings, "rdzv_endpoint")), str(_value(settings, "master_addr"))
    leader = (_address_of(endpoint) if endpoint else "") or master
    rank_text = str(_value(settings, "node_rank"))
    index = environ.get("JOB_COMPLETION_INDEX", "")
    if not rank_text and index:
        return _from_kubernetes(
            settings, count, _host_rank(index, count, "environment JOB_COMPLETION_INDEX"), leader, here
        )
    if not rank_text and not leader:
        return None
    hosts = tuple(f"host-{number}" for number in range(count))
    if rank_text:
        rank = _host_rank(rank_text, count, _label(settings, "node_rank"))
    elif _is_here(leader, here):
        rank = 0
    elif count == 2:
        rank = 1
    else:
        raise UsageError(
            f"nnodes is {nnodes} and the first host is {leader}, but which of the others this one is, nothing says; "
            "give --node-rank (1, 2, ...) or --hosts"
        )
    if rank and not leader:
        raise UsageError(
            f"nnodes is {nnodes} and node_rank is {rank}, but nothing says where the first host is; "
            "give --master-addr or --rdzv-endpoint"
        )
    return _made_up(settings, hosts, rank, leader, _torchrun_label(settings))


def _torchrun_label(settings: Mapping[str, Setting]) -> str:
    names = ("nnodes", "node_rank", "rdzv_endpoint", "master_addr")
    given = [name for name in names if _value(settings, name)]
    if all(settings[name].source.startswith("environment PET_") for name in given):
        return "PET_*"
    return "torchrun's options (" + ", ".join("--" + name.replace("_", "-") for name in given) + ")"


def _from_kubernetes(settings: Mapping[str, Setting], count: int, rank: int, leader: str, here: Here) -> HostList:
    """Pods of an indexed job are called JOB-INDEX, and with a headless service JOB-INDEX.SERVICE resolves."""
    source = "Kubernetes index"
    job, dash, last = here.hostname.partition(".")[0].rpartition("-")
    is_pod_name = bool(job and dash) and last == str(rank)
    if leader:
        names = tuple(f"{job if is_pod_name else 'host'}-{number}" for number in range(count))
        return _made_up(settings, names, rank, leader, source)
    service = here.full_name().partition(".")[2].partition(".")[0] if is_pod_name else ""
    if not service:
        raise UsageError(
            f"JOB_COMPLETION_INDEX is {rank} of {count} hosts, but the host name {here.hostname!r} does not tell where "
            "the first one is: give the job a headless service (spec.subdomain), or --master-addr"
        )
    hosts = tuple(f"{job}-{number}.{service}" for number in range(count))
    return _numbered(settings, HostList(hosts, hosts[rank], source))


def _made_up(settings: Mapping[str, Setting], hosts: tuple[str, ...], rank: int, leader: str, source: str) -> HostList:
    addresses = {hosts[0]: leader} if leader else {}
    return _numbered(settings, HostList(hosts, hosts[rank], source, addresses=addresses, named=False))


def _numbered(settings: Mapping[str, Setting], found: HostList) -> HostList:
    given = str(_value(settings, "host"))
    if given and given != found.host:
        label = _label(settings, "host")
        raise UsageError(f"{label} is {given!r}, but by {found.source} this is {found.host}; leave one of the two out")
    return found


def _alone(settings: Mapping[str, Setting], environ: Mapping[str, str]) -> HostList:
    host = str(_value(settings, "host")) or _DEFAULT_NAME
    hint = ""
    if environ.get("SLURM_JOB_NODELIST") and _outside_of_srun(environ):
        hint = " (in a Slurm job, but not started by srun)"
    return HostList((host,), host, ALONE + hint)


def _host_rank(text: str, count: int, label: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) < count):
        raise UsageError(f"{label} is {text!r}; expected a number from 0 to {count - 1}, as nnodes is {count}")
    return int(text)


def _address_of(endpoint: str) -> str:
    """The host of ``HOST:PORT``, ``[IPv6]:PORT`` or ``HOST``. The port is torchrun's own store's, not ours."""
    if endpoint.startswith("["):
        return endpoint[1:].partition("]")[0]
    return endpoint.partition(":")[0] if endpoint.count(":") == 1 else endpoint


def _bounds(nnodes: str) -> tuple[int, int]:
    low, _, high = nnodes.partition(":")
    if not (nnodes.isascii() and low.isdigit() and (high.isdigit() or high == "") and not nnodes.endswith(":")):
        raise UsageError(f"nnodes is {nnodes!r}; expected N or MIN:MAX")
    bounds = int(low), int(high or low)
    if not 0 < bounds[0] <= bounds[1] <= _MOST_HOSTS:
        raise UsageError(f"nnodes is {nnodes!r}; expected N or MIN:MAX, with 0 < MIN <= MAX")
    return bounds


def _check_count(settings: Mapping[str, Setting], found: HostList) -> None:
    nnodes = str(_value(settings, "nnodes"))
    if not nnodes:
        return
    low, high = _bounds(nnodes)
    if not low <= len(found.hosts) <= high:
        hint = "; name them by --hosts, or by --node-rank and --master-addr" if found.source.startswith(ALONE) else ""
        raise UsageError(
            f"nnodes is {nnodes}, but the host list has {len(found.hosts)}: {_some(found.hosts)} (from {found.source})"
            + hint
        )


def _with_addresses(settings: Mapping[str, Setting], found: HostList) -> HostList:
    given: dict[str, str] = _value(settings, "host_addresses") or {}
    if not given:
        return found
    for name in given:
        if name not in found.hosts:
            raise UsageError(
                f"{_label(settings, 'host_addresses')}: {name} is not one of the hosts, {_some(found.hosts)} "
                f"(from {found.source})"
            )
    from launcher.record import replace

    return replace(found, addresses={**found.addresses, **given})


# ---- which of them this host is


def which(hosts: Sequence[str], here: Here, source: str) -> str:
    """The entry that is this host: by its name, short or full, else by an address of its own.

    Raises:
        UsageError: none is, or several are.
    """
    short = here.hostname.partition(".")[0]
    for names in ({here.hostname}, {short}):
        if found := [host for host in hosts if host in names]:
            return found[0]
    from launcher.interfaces import canonical, is_loopback, is_numeric

    if "." not in here.hostname:
        by_name = [host for host in hosts if not is_numeric(host) and host.partition(".")[0] == short]
        if by_name:
            return _only(by_name, here, source)
    own = {canonical(address) for address in here.addresses()}

    def is_own(addresses: Iterable[str]) -> bool:
        return any(address in own or is_loopback(address) for address in map(canonical, addresses))

    numeric = [host for host in hosts if is_numeric(host)]
    if by_address := [host for host in numeric if is_own([host])]:
        return _only(by_address, here, source)
    resolved: dict[str, Sequence[str]] = {}
    for host in hosts:
        if host not in numeric:
            resolved[host] = here.resolve(host)
            if is_own(resolved[host]):
                return host
    meant = [f"{host} ({', '.join(found) or 'does not resolve'})" for host, found in resolved.items()]
    raise UsageError(
        f"this host is none of those in {source}: {_some([*numeric, *meant])}; tried its name {here.hostname} and its "
        f"addresses {_some(sorted(own))}; --host names it"
    )


def _only(found: list[str], here: Here, source: str) -> str:
    if len(found) > 1:
        raise UsageError(f"{source}: {_some(found)} are all this host, {here.hostname}; --host says which one it is")
    return found[0]


def _is_here(address: str, here: Here) -> bool:
    from launcher.interfaces import canonical, is_loopback

    if address in (here.hostname, here.hostname.partition(".")[0]):
        return True
    own = {canonical(one) for one in here.addresses()}
    found = {canonical(address), *map(canonical, here.resolve(address))}
    return bool(found & own) or any(map(is_loopback, found))


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:6])
    return shown if len(names) <= 6 else f"{shown} and {len(names) - 6} more"
