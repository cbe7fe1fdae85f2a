"""A run on several hosts: looked at, made ready, trained, and its hosts left as they were."""

import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bigtune.config import Run
from bigtune.dist import CHILD, JOB
from bigtune.errors import LaunchError, UnfitError
from bigtune.launch.attempt import Command, worker_arguments
from bigtune.launch.check import RUN
from bigtune.launch.fleet import Fleet, Outcome
from bigtune.launch.hosts import Host
from bigtune.launch.interrupts import Interrupts
from bigtune.launch.link import Way
from bigtune.launch.plan import Plan
from bigtune.launch.preflight import arrange, latest_of, look, measure
from bigtune.launch.supervise import Restarts, note, supervise
from bigtune.runfile import to_yaml
from bigtune.train.console import SCREEN

READY_SECONDS = 24 * 3600.0
"""For documents to be prepared."""
OWN = (
    "HOME", "HOSTNAME", "HOST", "USER", "LOGNAME", "SHELL", "SHLVL", "PWD", "OLDPWD", "TERM", "TMPDIR", "DISPLAY", "_",
    "MAIL", "LS_COLORS", "DBUS_SESSION_BUS_ADDRESS",
)  # fmt: skip
OWN_PREFIXES = ("SSH_", "SLURM", "PMI", "XDG_", "TMUX", "BASH_FUNC_", "CUDA_VISIBLE", "SRUN_")
"""What belongs to a host or a session, and is not carried to others."""


@dataclass(frozen=True, slots=True)
class Wishes:
    """How a run is launched; see `bigtune.api.launch`."""

    resume: str | None = None
    new_data: bool = False
    exclude_bad: bool = False
    every_rank: bool = False


def launch(run: Run, hosts: Sequence[Host], way: Way, wishes: Wishes) -> bool:
    """See `bigtune.api.launch`."""
    told = {RUN: to_yaml(run)}
    words = worker_arguments(run.output, wishes.resume, wishes.new_data)
    environment = {CHILD: "1", JOB: secrets.token_hex(4), **({SCREEN: "all"} if wishes.every_rank else {})}
    command = Command(["bigtune.train", *words], run.output.absolute(), environment)
    with Fleet(way, str(Path.cwd()), carried(os.environ)) as fleet:
        unreached = fleet.reach(hosts)
        found = look(fleet, [host for host in hosts if host.name in fleet.links], run)
        found.bad |= {lost.host.name: f"cannot be reached: {lost.why}" for lost in unreached}
        hosts = _without(fleet, hosts, found.bad, wishes.exclude_bad)
        devices = {name: fact.get("gpus", ()) for name, fact in found.facts.items()}
        note(*found.lines)
        hosts = _measured(fleet, hosts, devices, wishes.exclude_bad)
        hosts = _made_ready(fleet, hosts, told, wishes)

        def plan(left: Sequence[Host]) -> Plan:
            return _arranged(fleet, left, devices, exclude_bad=True)

        def latest(left: Sequence[Host]) -> int | None:
            return latest_of(fleet, left[0], told)

        restarts = Restarts(run.launch.max_restarts, latest)
        with Interrupts() as interrupts:  # till here Ctrl-C ends it as it stands
            return supervise(fleet, hosts, plan, command, interrupts, restarts, wishes.every_rank)


def carried(environment: Mapping[str, str]) -> dict[str, str]:
    """What workers elsewhere get of an environment: it goes through the agents' input, so that none of it shows among
    the words of a process."""
    return {
        name: value
        for name, value in environment.items()
        if name not in OWN and not name.startswith(OWN_PREFIXES)
    }  # fmt: skip


def _arranged(fleet: Fleet, hosts: Sequence[Host], devices: Mapping[str, Sequence[str]], exclude_bad: bool) -> Plan:
    """A plan for the hosts that reach the first one."""
    while True:
        try:
            return arrange(fleet, hosts, devices)
        except UnfitError as error:
            hosts = _without(fleet, hosts, error.bad, exclude_bad)


def _measured(
    fleet: Fleet, hosts: Sequence[Host], devices: Mapping[str, Sequence[str]], exclude_bad: bool
) -> Sequence[Host]:
    """The hosts over which an all-reduce works."""
    while True:
        plan = _arranged(fleet, hosts, devices, exclude_bad)
        try:
            note(*measure(fleet, plan))
            return plan.hosts
        except UnfitError as error:
            hosts = _without(fleet, plan.hosts, error.bad, exclude_bad)


def _made_ready(fleet: Fleet, hosts: Sequence[Host], told: Mapping[str, str], wishes: Wishes) -> Sequence[Host]:
    """Prepare on the first host, then on the others; the hosts that have the same documents.

    Raises:
        LaunchError: what the first host says is wrong.
    """
    first, *others = hosts

    def ask(place: str, some: Sequence[Host]) -> dict[str, Outcome]:
        words = [place, wishes.resume or "", "new" if wishes.new_data else "same"]
        return fleet.everywhere(some, [sys.executable, "-m", "bigtune.launch.ready", *words], told, READY_SECONDS)

    prepared = ask("first", [first])[first.name]
    if prepared.code != 0:
        raise LaunchError(f"{first.name}: {prepared.last}")
    bad = {}
    for name, outcome in ask("other", others).items():
        if outcome.code != 0:
            bad[name] = outcome.last
        elif outcome.last != prepared.last:
            bad[name] = f"its documents are other ones than {first.name}'s; compare the files of data there"
    return _without(fleet, hosts, bad, wishes.exclude_bad)


def _without(fleet: Fleet, hosts: Sequence[Host], bad: Mapping[str, str], exclude_bad: bool) -> list[Host]:
    """The hosts that can be used.

    Raises:
        LaunchError: one cannot, and nobody said to go on without; or none can.
    """
    left = [host for host in hosts if host.name not in bad]
    told = [f"{name}: {why}" for name, why in bad.items()]
    if told and (not exclude_bad or not left):
        mend = " (--exclude-bad goes on with the others)" if left else ""
        raise LaunchError("\n".join(told) + mend)
    note(*(f"left out: {line}" for line in told))
    for name in bad:
        if name in fleet.links:
            fleet.drop(fleet.links[name].host, "left out")
    return left
