"""Which hosts a run has, and how many ranks each: hostfiles, and filters as DeepSpeed's launcher takes them.

worker-1 slots=4      # a name that ssh knows, and its ranks: one a GPU, or so many on its cores
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bigtune.errors import LaunchError

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*|[0-9A-Fa-f:]+")
"""A host's name or address: nothing that a shell or ssh could take for something else. Users and ports are told in
ssh's own configuration."""


@dataclass(frozen=True, slots=True)
class Host:
    """A host and the slots that the run has on it: the numbers of its GPUs, or of ranks on its cores."""

    name: str
    slots: tuple[int, ...]


def read_hostfile(path: Path) -> list[Host]:
    """The hosts of a file, in its order.

    Raises:
        LaunchError: it cannot be read, names no host or one twice, or a line is no `name slots=N`.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise LaunchError(f"--hostfile {path}: cannot be read: {reason}") from None
    found: dict[str, int] = {}
    hosts: list[Host] = []
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        where = f"{path}, line {number}"
        slots = re.fullmatch(r"slots=(\d+)", words[1]) if len(words) == 2 else None
        if slots is None:
            raise LaunchError(f"{where}: '{line.strip()}'; write a host as: NAME slots=N")
        name = check_name(words[0], where)
        if name in found:
            raise LaunchError(f"{where}: {name} is on line {found[name]} already; give a host one line with all slots")
        if int(slots[1]) == 0:
            raise LaunchError(f"{where}: {name} has no slots; give it one or more, or leave it out")
        found[name] = number
        hosts.append(Host(name, tuple(range(int(slots[1])))))
    if not hosts:
        raise LaunchError(f"--hostfile {path}: names no host; write one a line: NAME slots=N")
    return hosts


def check_name(name: str, where: str) -> str:
    """A host's name, where it is one.

    Raises:
        LaunchError: it has spaces, quotes or the like, or begins as an option would.
    """
    if not NAME.fullmatch(name):
        raise LaunchError(f"{where}: {name!r} is no name of a host")
    return name


def select(hosts: Sequence[Host], include: str | None, exclude: str | None) -> list[Host]:
    """What is left of hosts by a filter, as DeepSpeed writes them: `NAME[:SLOT,SLOT…][@NAME…]`.

    Raises:
        LaunchError: both are given, a filter names a host or slot that is not there, or nothing is left.
    """
    if include and exclude:
        raise LaunchError("--include and --exclude: give one of them")
    if include:
        wanted = _parse(include, "--include", hosts)
        found = [replace(host, slots=wanted[host.name]) for host in hosts if host.name in wanted]
    else:
        unwanted = _parse(exclude, "--exclude", hosts) if exclude else {}
        found = [
            replace(host, slots=tuple(slot for slot in host.slots if slot not in unwanted.get(host.name, ())))
            for host in hosts
        ]
    found = [host for host in found if host.slots]
    if not found:
        raise LaunchError(f"--exclude {exclude}: leaves no host")
    return found


def limit(hosts: Sequence[Host], ranks: int | None) -> list[Host]:
    """The first hosts that have room for so many ranks together; all without a number.

    Raises:
        LaunchError: there are more ranks than slots.
    """
    if ranks is None:
        return list(hosts)
    slots = sum(len(host.slots) for host in hosts)
    if ranks > slots:
        raise LaunchError(f"--ranks {ranks}: the hosts have {slots} slots together; give at most that many")
    found = []
    for host in hosts:
        if ranks:
            found.append(replace(host, slots=host.slots[:ranks]))
            ranks -= len(found[-1].slots)
    return found


def _parse(text: str, option: str, hosts: Sequence[Host]) -> dict[str, tuple[int, ...]]:
    """The slots that a filter names, by host; all where it names none."""
    known = {host.name: host.slots for host in hosts}
    found: dict[str, tuple[int, ...]] = {}
    for word in text.split("@"):
        name, colon, numbers = word.strip().partition(":")
        if name not in known:
            raise LaunchError(f"{option} {text}: there is no host '{name}' (there are: {', '.join(known)})")
        if name in found:
            raise LaunchError(f"{option} {text}: names {name} twice")
        try:
            slots = tuple(int(number) for number in numbers.split(",")) if colon else known[name]
        except ValueError:
            raise LaunchError(f"{option} {text}: write slots as NAME:0,1") from None
        missing = [slot for slot in slots if slot not in known[name]]
        if missing:
            raise LaunchError(f"{option} {text}: {name} has no slot {missing[0]} (it has {len(known[name])})")
        found[name] = slots
    return found
