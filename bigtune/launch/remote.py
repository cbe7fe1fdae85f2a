"""A run on several hosts: looked at, made ready, trained, and its hosts left as they were."""

import json
import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bigtune.config import Run
from bigtune.dist import CHILD, JOB
from bigtune.errors import LaunchError
from bigtune.launch.attempt import Command, worker_arguments
from bigtune.launch.check import RUN
from bigtune.launch.fleet import Fleet
from bigtune.launch.hosts import Host
from bigtune.launch.interrupts import Interrupts
from bigtune.launch.link import Way
from bigtune.launch.plan import Plan
from bigtune.launch.preflight import Found, arrange, latest_of, look, measure
from bigtune.launch.supervise import Restarts, supervise
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
        hosts = _fit(fleet, hosts, found, wishes.exclude_bad)
        devices = {name: fact.get("gpus", ()) for name, fact in found.facts.items()}
        for line in (*found.lines, *measure(fleet, arrange(fleet, hosts, devices))):
            print(line, file=sys.stderr, flush=True)
        _make_ready(fleet, hosts, told, wishes)

        def plan(left: Sequence[Host]) -> Plan:
            return arrange(fleet, left, devices)

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


def _fit(fleet: Fleet, hosts: Sequence[Host], found: Found, exclude_bad: bool) -> list[Host]:
    """The hosts that can be used.

    Raises:
        LaunchError: one cannot, and nobody said to go on without; or none can.
    """
    left = [host for host in hosts if host.name not in found.bad]
    told = [f"{name}: {why}" for name, why in found.bad.items()]
    if told and (not exclude_bad or not left):
        mend = " (--exclude-bad goes on with the others)" if left else ""
        raise LaunchError("\n".join(told) + mend)
    for line in told:
        print(f"left out: {line}", file=sys.stderr, flush=True)
    for name in found.bad:
        if name in fleet.links:
            fleet.drop(fleet.links[name].host, "left out")
    return left


def _make_ready(fleet: Fleet, hosts: Sequence[Host], told: Mapping[str, str], wishes: Wishes) -> None:
    """Prepare on the first host, then on the others.

    Raises:
        LaunchError: what a host says is wrong, or that its documents are other ones.
    """
    answers: list[tuple[str, dict[str, str | None]]] = []
    for place, some in (("first", hosts[:1]), ("other", hosts[1:])):
        words = [place, wishes.resume or "", "new" if wishes.new_data else "same"]
        command = [sys.executable, "-m", "bigtune.launch.ready", *words]
        outcomes = fleet.everywhere(some, command, told, READY_SECONDS)
        for name, outcome in outcomes.items():
            if outcome.code != 0:
                raise LaunchError(f"{name}: {outcome.last}")
            answers.append((name, json.loads(outcome.last)))
    first, expected = answers[0]
    for name, answer in answers[1:]:
        if answer["documents"] != expected["documents"]:
            raise LaunchError(f"{name}: its documents are other ones than {first}'s; compare the files of data there")
