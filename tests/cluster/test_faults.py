"""What fails on a real cluster: found in seconds, told in one line, and the run goes on where it may."""

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.cluster import LOGIN, Cluster
from tests.cluster.conftest import Job, until

LONG = {"train": {"steps": 4000, "global_batch": 4, "precision": "float32"}, "checkpoint": {"every_steps": 5}}
RESTARTS = {"launch": {"max_restarts": 2}}
DETECTED, GONE = 30.0, 15.0
"""Seconds from a fault to the last line; from any end until no worker is left."""


@pytest.fixture
def plugged(cluster: Cluster) -> Iterator[None]:
    """Every cable is in again afterwards."""
    yield
    for name in cluster.nodes:
        cluster.link(name, up=True)
    until(lambda: all(cluster.run(LOGIN, ["ssh", name, "true"]).returncode == 0 for name in cluster.nodes))


def kill_worker(job: Job, host: str, number: int = signal.SIGKILL) -> None:
    worker = job.workers()[host][0]
    job.cluster.run(host, ["kill", f"-{number}", str(worker)])


def test_a_killed_rank_ends_all_and_is_named(job: Job, parts: Path) -> None:
    job.write(parts, **LONG)
    process = job.start()
    job.reach(7)
    began = time.monotonic()
    kill_worker(job, "n2")
    assert process.wait(60) == 1
    assert time.monotonic() - began < DETECTED
    last = job.log.read_text().splitlines()[-1]
    assert last.startswith("Error: rank 1 on n2: ended by signal 9 (SIGKILL) without a word (out of memory?)")
    stacks = (job.output / "logs" / "failure-1" / "rank-0-n1.log").read_text()
    assert "most recent call first" in stacks
    why = (job.output / "logs" / "failure-1" / "why.txt").read_text().splitlines()
    assert why[0].startswith("first: rank 1 on n2: ")
    for line in why[1:]:  # both, with what their last step gave
        assert json.loads(line.partition("its last step: ")[2])["step"] >= 7
    job.nothing_left(GONE)


@pytest.mark.slow
def test_after_a_killed_rank_the_run_goes_on_and_ends_as_if_nothing_had_been(
    job: Job, together: Job, parts: Path
) -> None:
    job.write(parts, **RESTARTS)
    process = job.start()
    job.reach(6)
    kill_worker(job, "n2")
    assert process.wait(180) == 0, job.log.read_text()
    assert job.losses() == together.losses()
    assert "starting again from the latest checkpoint (1 of 2" in job.log.read_text()


@pytest.mark.slow
def test_a_rank_that_hangs_is_found_by_its_silence(job: Job, parts: Path) -> None:
    job.write(parts, **LONG)
    process = job.start()
    job.reach(3)
    kill_worker(job, "n2", signal.SIGSTOP)
    assert process.wait(60) == 1
    assert "rank 1 on n2: it gave no sign of life for 15 s" in job.log.read_text()


@pytest.mark.slow
def test_a_node_that_is_cut_off_is_left_out_and_the_others_go_on(job: Job, parts: Path, plugged: None) -> None:
    job.write(parts, **LONG, **RESTARTS)
    process = job.start()
    job.reach(7)
    began = time.monotonic()
    job.cluster.link("n2", up=False)
    until(lambda: "starting again" in job.log.read_text(), job.log, 60)
    detected = time.monotonic() - began
    step = job.metrics()[-1]["step"]
    job.reach(step + 3)
    again = time.monotonic() - began - detected
    print(f"cut off: {detected:.1f} s to detect, {again:.1f} s to the next step")
    said = job.log.read_text()
    assert "rank 1 on n2: no sign of life for 10 s" in said and "n2: cannot be reached" in said
    until(lambda: not job.workers()["n2"], job.log, GONE)
    job.signal(signal.SIGINT)
    assert process.wait(60) == 130


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_saves_and_goes_on_exactly(job: Job, together: Job, parts: Path, number: int) -> None:
    process = job.start()
    job.reach(3)
    job.signal(number)
    assert process.wait(60) == 130, job.log.read_text()
    job.nothing_left(GONE)
    assert job.launch().returncode == 0
    assert job.losses() == together.losses()


@pytest.mark.slow
def test_if_the_launcher_is_killed_nothing_is_left_and_another_run_goes_on(job: Job, parts: Path) -> None:
    job.write(parts, **LONG)
    other = Job(job.cluster, job.folder.with_name(job.folder.name + "-other"))
    other.write(parts, **LONG)
    process, beside = job.start(), other.start()
    job.reach(2)
    other.reach(2)
    job.signal(signal.SIGKILL)
    assert process.wait(30) != 0
    job.nothing_left(GONE)
    step = other.metrics()[-1]["step"]
    other.reach(step + 5)
    other.signal(signal.SIGINT)
    assert beside.wait(60) == 130
    other.nothing_left(GONE)


@pytest.mark.slow
def test_a_mistake_in_the_data_is_not_tried_again(job: Job, parts: Path) -> None:
    rows = job.folder / "rows.jsonl"
    rows.write_text((parts / "rows.jsonl").read_text() + '{"instruction": 3}\n')
    job.write(parts, **RESTARTS, data={"sources": [{"path": str(rows)}], "sequence_length": 96, "stream": True})
    done = job.launch()
    assert done.returncode == 1 and "starting again" not in done.stderr
    assert f"{rows}" in done.stderr.splitlines()[-1] and "row 81" in done.stderr.splitlines()[-1]


# Slurm


def submit(job: Job, *options: str) -> str:
    done = job.launch("--slurm", "--nodes", "2", *options)
    assert done.returncode == 0, done.stderr
    return str(done.stdout.split()[1].rstrip(":"))


def state(job: Job, number: str) -> str:
    return job.cluster.run(LOGIN, ["squeue", "-h", "-j", number, "-o", "%T"]).stdout.strip()


@pytest.mark.slow
def test_a_requeued_job_goes_on_exactly(job: Job, together: Job) -> None:
    number = submit(job)
    job.reach(3)
    done = job.cluster.run(LOGIN, ["scontrol", "requeue", number])
    assert done.returncode == 0, done.stderr
    until(lambda: not state(job, number), job.folder / f"slurm-{number}.out")
    assert job.losses() == together.losses()
    assert "going on from" in (job.folder / f"slurm-{number}.out").read_text()


@pytest.mark.slow
def test_a_time_limit_saves_and_queues_the_job_again(job: Job, parts: Path) -> None:
    job.write(parts, **LONG)
    number = submit(job, "--time", "2")
    said = job.folder / f"slurm-{number}.out"
    until(lambda: said.exists() and "in the queue again" in said.read_text(), said, 180)
    step = job.metrics()[-1]["step"]
    job.reach(step + 3)
    job.cluster.run(LOGIN, ["scancel", number])
    until(lambda: not state(job, number), said, 60)
    job.nothing_left(GONE)
    assert state(job, number) == "" and "going on from" in said.read_text()
    whole = Job(job.cluster, job.folder.with_name(job.folder.name + "-whole"))
    whole.write(parts, **LONG)
    process = whole.start()
    whole.reach(step + 3)
    whole.signal(signal.SIGINT)
    assert process.wait(60) == 130
    steps = range(1, step + 4)
    found, expected = job.losses(), whole.losses()
    assert [found[step] for step in steps] == [expected[step] for step in steps]


@pytest.mark.slow
def test_scancel_leaves_nothing_and_queues_nothing(job: Job, parts: Path) -> None:
    job.write(parts, **LONG)
    number = submit(job)
    job.reach(3)
    job.cluster.run(LOGIN, ["scancel", number])
    until(lambda: not state(job, number), job.folder / f"slurm-{number}.out", 60)
    job.nothing_left(GONE)


@pytest.mark.slow
def test_a_preempted_job_goes_on_after_the_urgent_one(job: Job, together: Job) -> None:
    number = submit(job)
    job.reach(3)
    urgent = job.cluster.run(LOGIN, ["srun", "-N2", "--exclusive", "-p", "urgent", "sleep", "1"])
    assert urgent.returncode == 0, urgent.stderr
    until(lambda: not state(job, number), job.folder / f"slurm-{number}.out")
    assert job.losses() == together.losses()


@pytest.fixture
def own(cluster: Cluster) -> Iterator[Cluster]:
    """A cluster of three nodes, to lose some."""
    found = Cluster.start(3)
    yield found
    found.down()


@pytest.mark.slow
def test_a_job_goes_on_without_a_node_that_slurm_gives_up(own: Cluster, parts: Path, tmp_path: Path) -> None:
    job = Job(own, tmp_path)
    job.write(parts, **LONG, **RESTARTS)
    number = submit(job)
    said = job.folder / f"slurm-{number}.out"
    job.reach(7)
    own.kill("n2")
    until(lambda: "n2: cannot be reached" in said.read_text(), said, 60)
    until(lambda: "down" in own.run(LOGIN, ["sinfo", "-h", "-n", "n2", "-o", "%T"]).stdout, said, 90)
    step = job.metrics()[-1]["step"]
    job.reach(step + 10)
    assert state(job, number) == "RUNNING" and "on 1 rank" in said.read_text()


@pytest.mark.slow
def test_a_job_whose_first_node_dies_goes_on_elsewhere(own: Cluster, parts: Path, tmp_path: Path) -> None:
    """Slurm itself would keep the other node for it, with nothing on it, until its time is up."""
    job = Job(own, tmp_path)
    job.write(parts, **LONG)
    number = submit(job)
    said = job.folder / f"slurm-{number}.out"
    job.reach(7)
    own.kill("n1")
    until(lambda: not job.workers()["n2"], said, GONE)
    until(lambda: "going on from" in said.read_text(), said)
    step = job.metrics()[-1]["step"]
    job.reach(step + 3)
    assert job.workers()["n2"] and job.workers()["n3"]
