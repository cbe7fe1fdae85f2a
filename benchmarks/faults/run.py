"""How long until a fault is found, and until the run goes on? On a real cluster of this machine (tests/cluster).

    python benchmarks/faults/run.py --result benchmarks/faults/result.json

Two nodes with a rank each train a tiny Llama over ssh, with launch.max_restarts; in a step of its own choice each
fault happens `--rounds` times, each time to a new run on a new cluster. It needs root and Debian's packages that
tests/cluster/cluster.py names.
"""

import json
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click

from bigtune.bench.machine import machine
from tests.cluster.cluster import Cluster, missing
from tests.cluster.conftest import Job, until
from tests.tiny import tiny_model, write_rows

FOUND = "starting again"


def kill_rank(job: Job) -> None:
    """A worker is killed, as for want of memory."""
    job.cluster.run("n2", ["kill", "-9", str(job.workers()["n2"][0])])


def stop_rank(job: Job) -> None:
    """A worker stands still."""
    job.cluster.run("n2", ["kill", f"-{signal.SIGSTOP}", str(job.workers()["n2"][0])])


def cut_off(job: Job) -> None:
    """A node's network cable is pulled."""
    job.cluster.link("n2", up=False)


def cut_off_first(job: Job) -> None:
    """The same of the node that has rank 0."""
    job.cluster.link("n1", up=False)


def cut_power(job: Job) -> None:
    """A node goes dark."""
    job.cluster.kill("n2")


def kill_launcher(job: Job) -> None:
    """The launcher is killed; there is no next step, and what counts is when the last worker is gone."""
    job.signal(signal.SIGKILL)


FAULTS: dict[str, Callable[[Job], None]] = {
    "a rank is killed": kill_rank,
    "a rank stands still": stop_rank,
    "a node is cut off": cut_off,
    "rank 0's node is cut off": cut_off_first,
    "a node loses power": cut_power,
    "the launcher is killed": kill_launcher,
}


@click.command()
@click.option("--rounds", default=3, show_default=True)
@click.option("--result", type=click.Path(path_type=Path), help="Write the figures here, as JSON.")
def main(rounds: int, result: Path | None) -> None:
    """Measure each fault and print its figures."""
    if why := missing():
        raise click.ClickException(f"no cluster: {why}")
    figures = {}
    with tempfile.TemporaryDirectory() as work:
        parts = Path(work)
        tiny_model(parts / "model")
        write_rows(parts / "rows.jsonl", 80)
        for name, fault in FAULTS.items():
            runs = [measure(fault, parts, parts / f"{fault.__name__}-{number}") for number in range(rounds)]
            figures[name] = {key: [run[key] for run in runs] for key in runs[0]}
            for key, seconds in figures[name].items():
                click.echo(
                    f"{name}: {key} {statistics.median(seconds):.1f} s ({min(seconds):.1f} to {max(seconds):.1f})"
                )
    if result:
        result.write_text(json.dumps({"seconds": figures, "machine": machine()}, indent=1) + "\n")


def measure(fault: Callable[[Job], None], parts: Path, folder: Path) -> dict[str, float]:
    """Seconds from one fault to its detection, and from there to the next step."""
    cluster = Cluster.start(2, slurm=False)
    try:
        job = Job(cluster, folder)
        job.write(
            parts, train={"steps": 2000, "global_batch": 4, "precision": "float32"}, checkpoint={"every_steps": 5},
            launch={"max_restarts": 1},
        )  # fmt: skip
        job.start()
        job.reach(12)
        began = time.monotonic()
        fault(job)
        if fault is kill_launcher:
            until(lambda: not any(job.workers().values()), job.log)
            return {"to the end of all workers": round(time.monotonic() - began, 2)}
        until(lambda: FOUND in job.log.read_text(), job.log)
        found = time.monotonic()
        step = job.metrics()[-1]["step"]
        until(lambda: "going on from" in job.log.read_text(), job.log)
        job.reach(step + 1)
        return {"to detection": round(found - began, 2), "to the next step": round(time.monotonic() - found, 2)}
    finally:
        cluster.down()


if __name__ == "__main__":
    main()
