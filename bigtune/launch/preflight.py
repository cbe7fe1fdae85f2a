"""A look at all hosts before anything starts: what makes one unfit, and what a user should know of the rest."""

import json
import secrets
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bigtune.config import Run
from bigtune.errors import UnfitError, count_of
from bigtune.launch.check import RUN
from bigtune.launch.fleet import Fleet, Outcome
from bigtune.launch.hosts import Host
from bigtune.launch.plan import Plan
from bigtune.process import LOST_OTHERS
from bigtune.runfile import to_yaml
from bigtune.train.ds_config import read_preset
from bigtune.train.support import preset_of

CHECK = [sys.executable, "-m", "bigtune.launch.check"]
REDUCE = [sys.executable, "-m", "bigtune.launch.allreduce"]
FACTS_SECONDS, MEET_SECONDS, REDUCE_SECONDS = 120.0, 60.0, 180.0
CLOCK_SECONDS = 5.0
"""How far clocks may be apart before it is told; nothing here depends on them, but logs are read by them."""
SLOW = 0.25
"""Of the median bandwidth: a host below it is told."""
LEARNED_BYTES, HALF_BYTES, SAVED_BYTES = 8, 2, 4
"""Of a trained parameter on all ranks together, at least: its weight and gradient, in float32 or as a float32 weight
and both in bfloat16; a weight in bfloat16 alone; what a checkpoint has of it."""
MOMENT_BYTES = {"adamw": 8, "adam": 8, "adamw_8bit": 2, "lion_8bit": 1, "sgd": 0}
"""What the optimizer adds, in memory and in a checkpoint."""


@dataclass(slots=True)
class Found:
    """What is known of the hosts: what makes each unfit, and lines for the user."""

    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    bad: dict[str, str] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)


def look(fleet: Fleet, hosts: Sequence[Host], run: Run) -> Found:
    """Ask every host for its facts, and judge them."""
    nonce, told = secrets.token_hex(4), {RUN: to_yaml(run)}

    def ask(question: str) -> dict[str, Outcome]:
        commands = {host.name: ([*CHECK, question, nonce], {**told, "BIGTUNE_HOST": host.name}) for host in hosts}
        return fleet.each(commands, FACTS_SECONDS)

    began = time.time()
    outcomes = ask("facts")
    took = time.time() - began
    facts, bad = _answers(outcomes)
    found = judge(hosts, facts, run)
    found.bad = {**bad, **found.bad}
    seen, _ = _answers(ask("seen"))
    ask("clear")
    shared = all(set(answer.get("seen", ())) >= set(facts) for answer in seen.values())
    found.lines.append(f"output {run.output}: " + ("shared by all hosts" if shared else "of each host its own"))
    late = {name: fact["time"] - began - took / 2 for name, fact in facts.items() if "time" in fact}
    for name, seconds in late.items():
        if abs(seconds) > took / 2 + CLOCK_SECONDS:
            found.lines.append(f"note: {name}'s clock is {abs(seconds):.0f} s {'ahead' if seconds > 0 else 'behind'}")
    return found


def judge(hosts: Sequence[Host], facts: Mapping[str, dict[str, Any]], run: Run) -> Found:
    """What the facts say; the first host that is fit is what others are measured by."""
    found = Found(dict(facts))
    first = next((host.name for host in hosts if host.name in facts and not facts[host.name]["problems"]), None)
    for host in hosts:
        fact = facts.get(host.name)
        if fact is None:
            continue
        problems = list(fact["problems"])
        devices, cores = len(fact.get("gpus", ())), fact.get("cores", 0)
        if devices and max(host.slots) >= devices:
            problems.append(f"has {count_of(devices, 'GPU')} for slot {max(host.slots)}; lower its slots")
        elif "cores" in fact and not devices and len(host.slots) > cores:
            problems.append(f"has {count_of(cores, 'core')} for {len(host.slots)} ranks; lower its slots")
        if first is not None and not problems:
            problems += _differences(fact, facts[first], first)
        if not problems:
            problems += _too_small(host, hosts, fact, run)
        if problems:
            found.bad[host.name] = "; ".join(problems)
    fit = [host for host in hosts if host.name in facts and host.name not in found.bad]
    if fit:
        versions = ", ".join(f"{name} {version}" for name, version in facts[fit[0].name]["versions"].items())
        ranks = sum(len(host.slots) for host in fit)
        found.lines.append(f"preflight: {len(fit)} of {len(hosts)} hosts, {ranks} ranks; {versions}")
    return found


def arrange(fleet: Fleet, hosts: Sequence[Host], devices: Mapping[str, Sequence[str]]) -> Plan:
    """Find the address and interfaces by which all hosts reach the first, and a free port there.

    Raises:
        UnfitError: hosts that do not reach the first one where others do; or the first, where none does.
    """
    first, others = hosts[0], hosts[1:]
    answers, bad = _answers(fleet.everywhere([first], [*CHECK, "meet"], {}, MEET_SECONDS))
    if bad:
        raise UnfitError(bad)
    asked, port = answers[first.name]["ports"]
    addresses: dict[str, str | None] = answers[first.name]["addresses"]
    if not others:
        return Plan(hosts, "127.0.0.1", port, devices)
    commands: dict[str, tuple[list[str], dict[str, str]]] = {
        host.name: ([*CHECK, "reach", str(asked), *addresses], {}) for host in others
    }
    commands[first.name] = ([*CHECK, "listen", str(asked), str(len(others))], {})
    answers, bad = _answers(fleet.each(commands, MEET_SECONDS))
    if bad:
        raise UnfitError(bad)
    reached = {host.name: answers[host.name]["reached"] for host in others}
    address = max(addresses, key=lambda each: sum(each in found for found in reached.values()), default="")
    all_addresses = ", ".join(addresses) or "an address"
    far = {
        name: f"does not reach {first.name} under {address if found else all_addresses}"
        + (f", where others do, but under {', '.join(found)}" if found else "")
        + "; look at routes and firewalls between the hosts"
        for name, found in reached.items()
        if address not in found
    }
    if 1 < len(far) == len(others):
        far = {first.name: f"no other host reaches it under {all_addresses}"}
    if far:
        raise UnfitError(far)
    interfaces = {name: found[address] for name, found in reached.items()} | {first.name: addresses[address]}
    return Plan(hosts, address, port, devices, {name: found for name, found in interfaces.items() if found})


def latest_of(fleet: Fleet, host: Host, told: Mapping[str, str]) -> int | None:
    """The step of the latest checkpoint, as a host sees it; None where there is none, or it does not say."""
    answers, _ = _answers(fleet.everywhere([host], [*CHECK, "latest"], told, FACTS_SECONDS))
    found: int | None = answers.get(host.name, {}).get("latest")
    return found


def measure(fleet: Fleet, plan: Plan) -> list[str]:
    """Reduce something over all hosts, each with the first, and tell how fast.

    Raises:
        UnfitError: hosts with which it fails, or takes too long.
    """
    if len(plan.hosts) == 1:
        return []
    outcomes = _reduce(fleet, plan)
    if any(outcome.code != 0 for outcome in outcomes.values()):
        raise UnfitError(_at_fault(fleet, plan, outcomes))
    every, *pairs = json.loads(outcomes[plan.hosts[0].name].last)["gib_per_second"]
    alone = ", ".join(f"{host.name} {speed:.2f}" for host, speed in zip(plan.hosts[1:], pairs, strict=True))
    lines = [f"all-reduce over {plan.address}: {every:.2f} GiB/s; with {plan.hosts[0].name} alone: {alone}"]
    usual = statistics.median(pairs)
    for host, speed in zip(plan.hosts[1:], pairs, strict=True):
        if speed < SLOW * usual:
            lines.append(f"note: {host.name} is slow to reach: {speed:.2f} GiB/s, where others have {usual:.2f}")
    return lines


def _reduce(fleet: Fleet, plan: Plan) -> dict[str, Outcome]:
    """One rank a host, whatever its slots."""
    ones = replace(plan, hosts=[replace(host, slots=host.slots[:1]) for host in plan.hosts])
    commands = {place.host.name: (REDUCE, place.environment) for place in ones.places()}
    return fleet.each(commands, REDUCE_SECONDS, together=True)


def _at_fault(fleet: Fleet, plan: Plan, outcomes: Mapping[str, Outcome]) -> dict[str, str]:
    """Which hosts an all-reduce fails with: those that fail by themselves, or, where all miss each other, those with
    which it does not work any more as hosts join one by one."""
    alone = {
        name: f"an all-reduce fails there: {outcome.last}"
        for name, outcome in outcomes.items()
        if not outcome.unended and outcome.code not in (0, LOST_OTHERS)
    }
    if alone:
        return alone
    first, *others = plan.hosts
    joined, bad = [first], {}
    for other in others:
        tried = _reduce(fleet, replace(plan, hosts=[*joined, other]))
        failed = [outcome for outcome in tried.values() if outcome.code != 0]
        if failed:
            beside = f" and {count_of(len(joined) - 1, 'other')}" if len(joined) > 1 else ""
            bad[other.name] = f"an all-reduce with {first.name}{beside} fails: {failed[0].last}"
        else:
            joined.append(other)
    if 1 < len(bad) == len(others):
        words = bad[others[0].name].partition("fails: ")[2]
        return {first.name: f"an all-reduce with it fails from every other host; from {others[0].name}: {words}"}
    return bad or {first.name: f"an all-reduce over all hosts fails now and then: {outcomes[first.name].last}"}


def _answers(outcomes: Mapping[str, Outcome]) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """What hosts answered, and why others did not."""
    answers, bad = {}, {}
    for name, outcome in outcomes.items():
        try:
            found = json.loads(outcome.last)
            if outcome.code == 0 and isinstance(found, dict):
                answers[name] = found
                continue
        except ValueError:
            pass
        bad[name] = outcome.last
    return answers, bad


def _differences(fact: Mapping[str, Any], first: Mapping[str, Any], name: str) -> list[str]:
    """What must be the same on all hosts, and is not."""
    found = [
        f"has {what} {fact['versions'][what]}, {name} has {version}"
        for what, version in first["versions"].items()
        if fact["versions"][what] != version
    ]
    for what in ("model", "sources"):
        here, there = fact[what], first[what]
        if here != there:
            other = sorted(file for file in {*here, *there} if here.get(file) != there.get(file))
            found.append(f"has other files of {what} than {name} ({other[0]})")
    return found


def _too_small(host: Host, hosts: Sequence[Host], fact: Mapping[str, Any], run: Run) -> list[str]:
    """What a host lacks for its share of the run's state, at the least that can be."""
    ranks = sum(len(other.slots) for other in hosts)
    trained = 0.0 if run.adapter else fact["model_gib"] / 2 / ranks  # 10^9 of a rank: files of bfloat16, at least
    moments = MOMENT_BYTES.get(run.optim.name, 0)
    offloaded = preset_of(read_preset(run.deepspeed)) == "zero3_offload"
    on_gpu = HALF_BYTES if offloaded else LEARNED_BYTES + moments
    on_host = LEARNED_BYTES + moments if offloaded or not fact["gpus"] else 0
    found = []
    for slot in host.slots if fact["gpus"] else ():
        free = fact["gpu_gib"][slot]
        if free < on_gpu * trained:
            found.append(f"has {free:.1f} GiB free on GPU {slot}, a rank's states alone take {on_gpu * trained:.1f}")
    needs = on_host * trained * len(host.slots)
    if fact["memory_gib"] < needs:
        found.append(f"has {fact['memory_gib']:.1f} GiB of memory free, its ranks' states alone take {needs:.1f}")
    needs = (SAVED_BYTES + moments) * trained * len(host.slots) if run.checkpoint.enabled else 0.0
    if fact["free_gib"] < needs:
        found.append(f"has {fact['free_gib']:.1f} GiB of disk free, its part of a checkpoint takes {needs:.1f}")
    return found
