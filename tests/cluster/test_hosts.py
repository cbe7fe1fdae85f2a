"""Hosts that are not fit, and orders that make no sense: one line each, before anything starts."""

import sys
from pathlib import Path

import pytest

from tests.cluster.cluster import LOGIN, Cluster
from tests.cluster.conftest import Job


def refused(job: Job, *options: str) -> str:
    """The one line that is said."""
    done = job.launch(*options)
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr, done.stderr
    job.nothing_left(0.5)
    return str(done.stderr.strip().splitlines()[-1])


def test_a_host_that_ssh_does_not_know(job: Job) -> None:
    (job.folder / "hosts").write_text("n1 slots=1\nn9 slots=1\n")
    said = refused(job)
    assert said.startswith("Error: n9: cannot be reached: ssh: Could not resolve hostname n9")
    assert said.endswith("(--exclude-bad goes on with the others)")


def test_without_a_key(job: Job) -> None:
    said = refused(job, "--ssh", "ssh -F none -o StrictHostKeyChecking=no", "--include", "n1")
    assert "n1: cannot be reached: " in said and "Permission denied (publickey" in said


@pytest.mark.slow
def test_a_node_without_the_data_is_named_and_can_be_left_out(job: Job, parts: Path, cluster: Cluster) -> None:
    rows = cluster.disk / "rows.jsonl"
    text = (parts / "rows.jsonl").read_text()
    cluster.run("n1", ["sh", "-c", f"cp {parts}/rows.jsonl {rows}"])
    job.write(parts, data={"sources": [{"path": str(rows)}], "sequence_length": 96})
    assert f"n2: {rows}: no such file" in refused(job)
    done = job.launch("--exclude-bad")
    assert done.returncode == 0 and "left out: n2: " in done.stderr and len(job.losses()) == 12
    cluster.run("n2", ["sh", "-c", f"head -n 70 {parts}/rows.jsonl > {rows}"])
    assert f"n2: has other files of sources than n1 ({rows})" in refused(job)
    assert text


@pytest.mark.slow
def test_two_versions_of_a_package(job: Job, cluster: Cluster) -> None:
    import torch

    version = next(Path(torch.__file__).parents[1].glob("torch-*.dist-info")) / "METADATA"
    other = job.folder / "METADATA"
    other.write_text(version.read_text().replace("\nVersion: ", "\nVersion: 1"))
    assert cluster.run("n2", ["mount", "--bind", str(other), str(version)]).returncode == 0
    try:
        said = refused(job)
    finally:
        cluster.run("n2", ["umount", str(version)])
    assert "n2: has torch 1" in said and ", n1 has " in said


@pytest.mark.slow
def test_a_host_that_reaches_the_first_alone_fails_in_the_all_reduce_and_can_be_left_out(
    parts: Path, tmp_path: Path, cluster: Cluster
) -> None:
    three = Cluster.start(3, slurm=False)
    try:
        job = Job(three, tmp_path)
        job.write(parts)
        for name in ("n2", "n3"):  # the switch keeps them from each other
            three.run(LOGIN, ["bridge", "link", "set", "dev", f"to-{name}", "isolated", "on"])
        said = refused(job)
        done = job.launch("--exclude-bad")
        assert said.startswith("Error: n3: an all-reduce with n1 and 1 other fails: ")
        assert done.returncode == 0 and "left out: n3: an all-reduce with n1" in done.stderr
        assert len(job.losses()) == 12
    finally:
        three.down()


@pytest.mark.slow
def test_hosts_with_disks_of_their_own(job: Job, together: Job, parts: Path, cluster: Cluster) -> None:
    output = cluster.disk / "run"
    job.write(parts, output=str(output), checkpoint={"every_steps": 5, "replicas": 1})
    done = job.launch()
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"output {output}: of each host its own" in done.stderr
    losses = cluster.run("n1", ["cat", str(output / "metrics.jsonl")]).stdout
    (job.output).mkdir(exist_ok=True)
    (job.output / "metrics.jsonl").write_text(losses)
    assert job.losses() == together.losses()
    for name in cluster.nodes:
        found = cluster.run(name, ["ls", str(output / "checkpoints" / "step-12")]).stdout.split()
        assert f"rank-0000{name == 'n2':d}-of-00002.safetensors" in found


@pytest.mark.parametrize(
    ("hosts", "options", "said"),
    [
        ("n1 slots=1\nn1 slots=1\n", (), "line 2: n1 is on line 1 already"),
        ("n1 slots=0\n", (), "n1 has no slots"),
        ("n1 slots=1\n", ("--ranks", "2"), "--ranks 2: the hosts have 1 slots"),
        ("n1 slots=1\n", ("--include", "n7"), "no host 'n7'"),
    ],
)
def test_hostfiles_that_make_no_sense(job: Job, hosts: str, options: tuple[str, ...], said: str) -> None:
    (job.folder / "hosts").write_text(hosts)
    assert said in refused(job, *options)


def test_more_ranks_than_a_host_has_cores(job: Job) -> None:
    (job.folder / "hosts").write_text("n1 slots=999\n")
    assert "n1: has " in refused(job) and "cores for 999 ranks" in refused(job)


def test_a_partition_that_does_not_exist_is_told_in_slurms_words(job: Job) -> None:
    assert "invalid partition specified: nowhere" in refused(job, "--slurm", "--partition", "nowhere")


@pytest.mark.parametrize("name", ["two words", "it's", "a;touch x", "a\nb", "$(touch x)", '"'])
def test_what_a_shell_could_read_is_refused_in_a_name(job: Job, name: str) -> None:
    for option in ("--job-name", "--account", "--partition"):
        assert "Slurm takes no spaces, quotes" in refused(job, "--slurm", option, name)
    assert not (job.folder / "x").exists()


@pytest.mark.slow
def test_a_path_with_signs_of_the_shell_is_quoted(cluster: Cluster, parts: Path, tmp_path: Path, together: Job) -> None:
    job = Job(cluster, tmp_path / "it's; $(touch x) two")
    job.write(parts)
    done = job.launch()
    assert done.returncode == 0, done.stdout + done.stderr
    assert job.losses() == together.losses() and not (job.folder / "x").exists()


@pytest.mark.slow
def test_srun_and_a_launcher_that_both_deal_out_ranks(job: Job) -> None:
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", "1", "--module", "bigtune.train"]
    words = ["srun", "-N2", "--ntasks-per-node=1", "--exclusive", *launcher, str(job.run_file)]
    done = job.cluster.run(LOGIN, words, job.folder, environment={"DS_ACCELERATOR": "cpu"})
    assert done.returncode != 0
    assert "srun started 2 tasks, and each of them a launcher that deals out ranks" in done.stdout + done.stderr
