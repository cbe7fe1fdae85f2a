"""`bigtune launch`: which hosts, how they are reached, and what becomes of the job."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from bigtune import api
from bigtune.errors import LaunchError
from bigtune.launch import slurm
from bigtune.launch.hosts import Host, limit, read_hostfile, select
from bigtune.launch.link import Way, pdsh, ssh
from bigtune.process import STOPPED
from bigtune.runfile import load_run


def launch(run_file: Path, overrides: Sequence[str], hostfile: Path | None, slurm: bool, **options: Any) -> int:
    """Start a run as the command line asks; its exit code."""
    if (hostfile is None) == (not slurm):
        raise LaunchError("give --hostfile HOSTS, or --slurm; for this host alone there is `bigtune train`")
    if slurm:
        return _under_slurm(run_file, overrides, options)
    return _over_ssh(run_file, overrides, hostfile, options)


def _over_ssh(run_file: Path, overrides: Sequence[str], hostfile: Path | None, options: dict[str, Any]) -> int:
    assert hostfile is not None
    run = load_run(run_file, overrides)
    hosts = limit(select(read_hostfile(hostfile), options["include"], options["exclude"]), options["ranks"])
    if options["dry_run"]:
        _show(hosts)
        return 0
    way = pdsh(run.output.absolute() / "launch") if options["launcher"] == "pdsh" else ssh(options["ssh_command"])
    return 0 if _train(run_file, overrides, hosts, way, options) else STOPPED


def _under_slurm(run_file: Path, overrides: Sequence[str], options: dict[str, Any]) -> int:
    if slurm.in_allocation() and not options["dry_run"]:
        hosts = slurm.allocated(options["ranks_per_node"])
        hosts = limit(select(hosts, options["include"], options["exclude"]), options["ranks"])
        if _train(run_file, overrides, hosts, slurm.srun(), options):
            return 0
        if slurm.requeue():
            click.echo("the job is in the queue again, and goes on from there", err=True)
        return STOPPED
    load_run(run_file, overrides)  # a typo is told now, not when the job starts
    asked = slurm.Asked(
        options["nodes"], options["ranks_per_node"], options["partition"], options["account"], options["time_limit"],
        options["gpus_per_node"], options["cpus_per_node"], options["job_name"], more=options["more"],
    )  # fmt: skip
    script = slurm.render(asked, run_file.absolute(), _passed_on(overrides, options))
    if options["dry_run"]:
        click.echo(script, nl=False)
        return 0
    job = slurm.submit(script)
    click.echo(f"job {job}: its words are in slurm-{job}.out; scancel {job} ends it")
    return 0


def _train(run_file: Path, overrides: Sequence[str], hosts: Sequence[Host], way: Way, options: dict[str, Any]) -> bool:
    try:
        return api.launch(
            load_run(run_file, overrides), hosts, way, options["resume"], options["new_data"], options["exclude_bad"],
            options["logs"] == "all",
        )  # fmt: skip
    except FileNotFoundError as error:
        raise LaunchError(f"{error.filename}: there is no such program on this host") from None


def _passed_on(overrides: Sequence[str], options: dict[str, Any]) -> list[str]:
    """The options that the job's own `bigtune launch` is to have."""
    words = [word for override in overrides for word in ("--set", override)]
    for name in ("include", "exclude", "ranks", "resume"):
        if options[name] is not None:
            words += [f"--{name}", str(options[name])]
    words += [f"--{name.replace('_', '-')}" for name in ("exclude_bad", "new_data") if options[name]]
    return [*words, *(["--logs", "all"] if options["logs"] == "all" else [])]


def _show(hosts: Sequence[Host]) -> None:
    rank = 0
    for host in hosts:
        for slot in host.slots:
            print(f"rank {rank}: {host.name}, slot {slot}", file=sys.stdout)
            rank += 1
