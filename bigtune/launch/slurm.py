"""Slurm: a script for sbatch made and submitted, and the hosts of an allocation that this process is in.

    bigtune launch RUN.yaml --slurm --nodes 4     on a login host: sbatch
    bigtune launch RUN.yaml --slurm               in an allocation (salloc, or the script): an srun a host

Slurm tells the script that its time is nearly up, or that it is preempted, by SIGTERM; the workers then finish their
step and save, and the job is put into the queue again, where it goes on by itself.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bigtune.errors import LaunchError
from bigtune.launch.hosts import Host
from bigtune.launch.link import Way

WARNING_SECONDS = 180
"""Before the time limit, at which Slurm asks a run to save; a quarter of a shorter one."""
LOOK_SECONDS = 10.0
TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d+))?(?::(?P<third>\d+))?")
WORD = re.compile(r"[\w@%+:.,=/\-\[\]()*]+")
"""What an option of sbatch may hold without being read as anything else."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a job asks Slurm for; what is None is left to Slurm."""

    nodes: int = 1
    ranks_per_node: int | None = None
    partition: str | None = None
    account: str | None = None
    time: str | None = None
    gpus_per_node: str | None = None
    cpus_per_node: int | None = None
    name: str | None = None
    more: Sequence[str] = ()
    """Options of sbatch as they are: `--qos=high`."""


def render(asked: Asked, run_file: Path, arguments: Sequence[str]) -> str:
    """The script: its options for sbatch, and one command on the first host.

    Raises:
        LaunchError: an option holds what Slurm, or the shell, could read as something else.
    """
    output = "slurm-%j.out"
    options = {
        "job-name": asked.name or run_file.stem,
        "nodes": asked.nodes,
        "ntasks-per-node": 1,
        "partition": asked.partition,
        "account": asked.account,
        "time": asked.time,
        "gpus-per-node": asked.gpus_per_node,
        "cpus-per-task": asked.cpus_per_node,
        "output": output,
        "open-mode": "append",
        "signal": f"B:TERM@{_warning(asked.time)}",
    }
    lines = [f"#SBATCH --{name}={_word(name, value)}" for name, value in options.items() if value is not None]
    lines += [f"#SBATCH {_option(text)}" for text in asked.more]
    if asked.cpus_per_node is None and asked.gpus_per_node is None:
        lines.append("#SBATCH --exclusive")
    lines += ["#SBATCH --requeue", "#SBATCH --no-kill"]
    words = [sys.executable, "-m", "bigtune.cli", "launch", str(run_file), "--slurm", *arguments]
    if asked.ranks_per_node:
        words += ["--ranks-per-node", str(asked.ranks_per_node)]
    return "\n".join([
        "#!/usr/bin/env bash",
        *lines,
        "",
        "# The launcher takes Slurm's signals itself, so it replaces the shell.",
        f"cd {shlex.quote(str(Path.cwd()))} || exit 1",
        f"exec {shlex.join(words)}",
        "",
    ])  # fmt: skip


def submit(script: str) -> str:
    """Give a script to sbatch.

    Returns:
        The job's number.

    Raises:
        LaunchError: there is no sbatch here, or what it says.
    """
    if shutil.which("sbatch") is None:
        raise LaunchError("--slurm: there is no sbatch on this host; submit from a login host, or see --dry-run")
    done = subprocess.run(["sbatch", "--parsable"], input=script, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LaunchError(f"--slurm: {_said(done.stderr)}")
    return done.stdout.strip().partition(";")[0]


def in_allocation(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process may start steps of a job."""
    return "SLURM_JOB_ID" in environment and "SLURM_JOB_NODELIST" in environment


def allocated(ranks_per_node: int | None, environment: Mapping[str, str] = os.environ) -> list[Host]:
    """The hosts of the allocation and the ranks of each: one a GPU, or as many as are asked for, or one.

    Raises:
        LaunchError: Slurm does not know the job's hosts.
    """
    ranks = ranks_per_node or _gpus(environment) or 1
    return [Host(name, tuple(range(ranks))) for name in _host_names(environment["SLURM_JOB_NODELIST"])]


def srun(environment: Mapping[str, str] = os.environ) -> Way:
    """A step a host, with all that the job has there. Each may end without the others."""
    cores = re.match(r"\d+", environment.get("SLURM_JOB_CPUS_PER_NODE", ""))
    share = [f"--cpus-per-task={cores[0]}"] if cores else []
    options = ["--overlap", "--nodes=1", "--ntasks=1", "--unbuffered", "--quiet", "--no-kill", *share, "--nodelist"]
    return Way(("srun", *options), deserted=(sys.executable, "-m", "bigtune.launch.slurm"))


def requeue(environment: Mapping[str, str] = os.environ) -> bool:
    """Put this job into the queue again, where Slurm has not done so or taken it away; tells whether it will run."""
    if _shown(environment).get("JobState") != "RUNNING":
        return False
    return subprocess.run(["scontrol", "requeue", environment["SLURM_JOB_ID"]], check=False).returncode == 0


def requeue_if_deserted(environment: Mapping[str, str] = os.environ) -> None:
    """Put this job into the queue again once Slurm has given up the host that its launcher ran on.

    --no-kill has Slurm keep a job that lost a host, so that a run can go on without it; but a job that lost its first
    host would keep the others until its time is up, and nothing would run on them.
    """
    while (job := _shown(environment)).get("JobState", "RUNNING") == "RUNNING":  # or Slurm does not answer
        if "NodeList" in job and job["BatchHost"] not in _host_names(job["NodeList"]):
            requeue(environment)
            return
        time.sleep(LOOK_SECONDS)


def _shown(environment: Mapping[str, str]) -> dict[str, str]:
    """What Slurm says of this job; nothing where it does not answer."""
    asked = ["scontrol", "show", "job", "--oneliner", environment["SLURM_JOB_ID"]]
    words = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.split()
    return {name: value for name, equals, value in (word.partition("=") for word in words) if equals}


def _host_names(listed: str) -> list[str]:
    """`n[1-3]` in full.

    Raises:
        LaunchError: Slurm does not know them.
    """
    asked = ["scontrol", "show", "hostnames", listed]
    names = subprocess.run(asked, capture_output=True, text=True, check=False)
    if names.returncode:
        raise LaunchError(f"--slurm: {_said(names.stderr)}")
    return names.stdout.split()


def _warning(time: str | None) -> int:
    """Seconds before a limit; Slurm writes one as MINUTES, MINUTES:SECONDS, HOURS:MINUTES:SECONDS or DAYS-HOURS:…"""
    found = TIME.fullmatch(time or "")
    if found is None:
        return WARNING_SECONDS  # of the partition's limit, or what Slurm will say is none
    days, *parts = (int(part) if part else None for part in found.groups())
    first, second, third = parts
    assert first is not None
    hours = days is not None or third is not None
    minutes = 1440 * (days or 0) + (60 * first + (second or 0) if hours else first)
    seconds = 60 * minutes + (third or 0 if hours else second or 0)
    return min(WARNING_SECONDS, seconds // 4)


def _gpus(environment: Mapping[str, str]) -> int | None:
    found = re.search(r"(\d+)$", environment.get("SLURM_GPUS_ON_NODE", ""))
    return int(found[1]) if found else None


def _word(name: str, value: object) -> str:
    text = str(value)
    if not WORD.fullmatch(text):
        raise LaunchError(f"--{name} {text!r}: Slurm takes no spaces, quotes or other such signs here; leave them out")
    return text


def _option(text: str) -> str:
    if not text.startswith("-") or not WORD.fullmatch(text):
        raise LaunchError(f"--sbatch {text!r}: give one option of sbatch, as in --sbatch --qos=high")
    return text


def _said(stderr: str) -> str:
    """Slurm's own words."""
    return "; ".join(line.strip() for line in stderr.splitlines() if line.strip()) or "it gave no reason"


if __name__ == "__main__":
    requeue_if_deserted()
