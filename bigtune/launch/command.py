"""`bigtune launch`: which hosts, how they are reached, and what becomes of the job."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from bigtune import api
from bigtune.config import Run
from bigtune.errors import LaunchError
from bigtune.launch import slurm as batch
from bigtune.launch.hosts import Host, limit, read_hostfile, select
from bigtune.launch.link import Way, pdsh, ssh
from bigtune.process import STOPPED
from bigtune.runfile import load_run


def launch(run_file: Path, overrides: Sequence[str], hostfile: Path | None, slurm: bool, **options: Any) -> int:
    """Start a run as the command line asks; its exit code."""
    if (hostfile is None) == (not slurm):
        raise LaunchError("give --hostfile HOSTS, or --slurm; for this host alone there is `bigtune train`")
    run = load_run(run_file, overrides)  # a typo is told now, not when a job starts
    if hostfile is not None:
        return _over_ssh(run, hostfile, options)
    if batch.in_allocation() and not options["dry_run"]:
        return _in_job(run, options)
    return _submit(run_file, overrides, options)


def _over_ssh(run: Run, hostfile: Path, options: dict[str, Any]) -> int:
    hosts = _chosen(read_hostfile(hostfile), options)
    if options["dry_run"]:
        _show(hosts)
        return 0
    way = pdsh(run.output.absolute() / "launch") if options["launcher"] == "pdsh" else ssh(options["ssh_command"])
    return 0 if _train(run, hosts, way, options) else STOPPED


def _in_job(run: Run, options: dict[str, Any]) -> int:
    if _train(run, _chosen(batch.allocated(options["ranks_per_node"]), options), batch.srun(), options):
        return 0
    if batch.requeue():
        click.echo("the job is in the queue again, and goes on from there", err=True)
    return STOPPED


def _submit(run_file: Path, overrides: Sequence[str], options: dict[str, Any]) -> int:
    asked = batch.Asked(
        options["nodes"], options["ranks_per_node"], options["partition"], options["account"], options["time_limit"],
        options["gpus_per_node"], options["cpus_per_node"], options["job_name"], more=options["more"],
    )  # fmt: skip
    script = batch.render(asked, run_file.absolute(), _passed_on(overrides, options))
    if options["dry_run"]:
        click.echo(script, nl=False)
        return 0
    job = batch.submit(script)
    click.echo(f"job {job}: its words are in slurm-{job}.out; scancel {job} ends it")
    return 0


def _chosen(hosts: Sequence[Host], options: dict[str, Any]) -> list[Host]:
    return limit(select(hosts, options["include"], options["exclude"]), options["ranks"])


def _train(run: Run, hosts: Sequence[Host], way: Way, options: dict[str, Any]) -> bool:
    every_rank = options["logs"] == "all"
    return api.launch(run, hosts, way, options["resume"], options["new_data"], options["exclude_bad"], every_rank)


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
            click.echo(f"rank {rank}: {host.name}, slot {slot}")
            rank += 1
