"""Runs on two hosts: however they are started, they learn what one host does."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.cluster import LOGIN, Cluster
from tests.cluster.conftest import BIGTUNE, Job, until

ROOT = Path(__file__).parents[2]


def finish_slurm(job: Job, submitted: "subprocess.CompletedProcess[str]") -> str:
    """Wait for a job to leave the queue; what it printed."""
    assert submitted.returncode == 0, submitted.stderr
    number = submitted.stdout.split()[1].rstrip(":")
    output = job.folder / f"slurm-{number}.out"
    until(lambda: not job.cluster.run(LOGIN, ["squeue", "-h", "-j", number]).stdout.strip(), output)
    return output.read_text()


def bare(job: Job) -> list[str]:
    """DeepSpeed's own command."""
    return [
        str(Path(sys.executable).parent / "deepspeed"), "--hostfile", str(job.folder / "hosts"), "--launcher", "pdsh",
        "--force_multi", "--module", "bigtune.train", str(job.run_file),
    ]  # fmt: skip


def alike_but_for_rounding(found: dict[int, float], expected: dict[int, float]) -> None:
    """Other numbers of ranks sum in another order; Adam, which divides by small gradients, lets that grow."""
    assert found.keys() == expected.keys()
    for step, loss in expected.items():
        assert found[step] == pytest.approx(loss, rel=1e-6 if step <= 2 else 1e-4)


def test_two_hosts_learn_what_one_does(together: Job, alone: Job) -> None:
    """But for rounding: on one host gradients are summed in shared memory, in another order."""
    assert together.losses() == pytest.approx(alone.losses(), rel=1e-6) and len(together.losses()) == 12
    said = together.log.read_text()
    assert "preflight: 2 of 2 hosts, 2 ranks" in said and "all-reduce over 10." in said
    assert "shared by all hosts" in said and "train: done, 12 steps" in said


def test_under_slurm_the_losses_are_the_same(job: Job, together: Job) -> None:
    said = finish_slurm(job, job.launch("--slurm", "--nodes", "2", "--time", "10"))
    assert job.losses() == together.losses() and len(job.losses()) == 12, said
    assert "train: done, 12 steps" in said


@pytest.mark.slow
def test_over_pdsh_the_losses_are_the_same(job: Job, together: Job) -> None:
    done = job.launch("--launcher", "pdsh")
    assert done.returncode == 0, done.stdout + done.stderr
    assert job.losses() == together.losses()
    assert not list((job.output / "launch").iterdir())  # orders had the environment in them


@pytest.mark.slow
def test_in_an_allocation_steps_start_at_once(job: Job, together: Job) -> None:
    words = ["salloc", "-N2", "--exclusive", *BIGTUNE, "launch", str(job.run_file), "--slurm"]
    done = job.cluster.run(LOGIN, words, job.folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert job.losses() == together.losses()


@pytest.mark.slow
def test_srun_alone_gives_workers_their_ranks(job: Job, together: Job) -> None:
    words = ["srun", "-N2", "--ntasks-per-node=1", "--exclusive", sys.executable, "-m", "bigtune.train"]
    done = job.cluster.run(LOGIN, [*words, str(job.run_file)], job.folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert job.losses() == together.losses()


@pytest.mark.slow
def test_hosts_may_have_several_ranks_and_other_numbers_of_them(job: Job, together: Job) -> None:
    (job.folder / "hosts").write_text("n1 slots=2\nn2 slots=1\n")
    done = job.launch()
    assert done.returncode == 0 and "preflight: 2 of 2 hosts, 3 ranks" in done.stderr
    alike_but_for_rounding(job.losses(), together.losses())


@pytest.mark.slow
def test_srun_alone_with_several_tasks_a_node(job: Job, together: Job) -> None:
    words = ["srun", "-N2", "--ntasks-per-node=2", "--exclusive", sys.executable, "-m", "bigtune.train"]
    done = job.cluster.run(LOGIN, [*words, str(job.run_file)], job.folder)
    assert done.returncode == 0 and "on 4 ranks" in done.stdout, done.stdout + done.stderr
    alike_but_for_rounding(job.losses(), together.losses())


@pytest.mark.slow
def test_bare_deepspeed_with_a_hostfile(job: Job, together: Job) -> None:
    done = job.cluster.run(LOGIN, bare(job), job.folder, environment={"PDSH_RCMD_TYPE": "ssh", "DS_ACCELERATOR": "cpu"})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert job.losses() == together.losses()


@pytest.mark.slow
def test_torchrun_on_each_host(job: Job, together: Job, cluster: Cluster) -> None:
    torchrun = str(Path(sys.executable).parent / "torchrun")
    words = [torchrun, "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-endpoint=n1:29600"]
    words += ["-m", "bigtune.train", str(job.run_file)]
    other = cluster.popen("n2", words, job.folder / "n2.log", job.folder)
    done = cluster.run("n1", words, job.folder)
    assert done.returncode == 0 and other.wait(60) == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert job.losses() == together.losses()


@pytest.mark.slow
def test_the_scripts_to_copy_run_as_they_are(job: Job, together: Job, parts: Path) -> None:
    launchers = str(ROOT / "launchers")
    (job.folder / "sweep").write_text("optim.learning_rate=1e-3\ntrain.steps=4 optim.learning_rate=2e-3\n")
    words = ["--parsable", "--time=5", f"{launchers}/slurm.sbatch", str(job.run_file)]
    sweep = ["--parsable", "--time=5", "--array=1-2", f"{launchers}/slurm-array.sbatch", str(job.run_file)]
    sweep += [str(job.folder / "sweep"), str(job.folder / "swept")]
    for each in (words, sweep):
        done = job.cluster.run(LOGIN, ["sbatch", *each], job.folder, environment={"BIGTUNE_LAUNCHERS": launchers})
        assert done.returncode == 0, done.stderr
        until(lambda: not job.cluster.run(LOGIN, ["squeue", "-h"]).stdout.strip())
    said = "".join(path.read_text() for path in job.folder.glob("slurm-*.out"))
    assert job.losses() == together.losses(), said
    assert [len((job.folder / "swept" / n / "metrics.jsonl").read_text().splitlines()) for n in ("1", "2")] == [
        12,
        4,
    ], said


@pytest.mark.slow
def test_all_ranks_can_be_shown_each_by_host_and_rank(job: Job) -> None:
    done = job.launch("--logs", "all")
    assert "[n1 rank 0] train: done, 12 steps" in done.stdout and "[n2 rank 1] train: done" in done.stdout


@pytest.mark.slow
def test_bare_deepspeed_ends_on_all_hosts_with_one_rank(job: Job, parts: Path) -> None:
    """DeepSpeed's own launcher ends nothing elsewhere; the workers do, which miss each other."""
    job.write(parts, train={"steps": 2000, "global_batch": 4, "precision": "float32"})
    process = job.start(command=bare(job), PDSH_RCMD_TYPE="ssh", DS_ACCELERATOR="cpu")
    job.reach(3)
    worker = job.cluster.processes("n2", f"-m bigtune.train --local_rank.*{job.folder}/")[-1]  # not its launcher
    job.cluster.run("n2", ["kill", "-9", str(worker)])
    job.nothing_left(15)
    assert process.wait(60) != 0
    assert "rank 1 on n2 is lost: its process ended" in job.log.read_text()


@pytest.mark.slow
def test_bare_deepspeed_ends_where_one_host_lacks_the_run_file(job: Job) -> None:
    """Again its launcher would have the others wait."""
    run_file = job.cluster.disk / "run.yaml"
    job.cluster.run("n1", ["cp", str(job.run_file), str(run_file)])
    command = [*bare(job)[:-1], str(run_file)]
    process = job.start(command=command, PDSH_RCMD_TYPE="ssh", DS_ACCELERATOR="cpu")
    assert process.wait(120) != 0
    assert f"Error: rank 0: n2: {run_file}: no such run file" in job.log.read_text()


@pytest.mark.slow
def test_the_environment_is_carried_and_shows_in_no_command_line(job: Job) -> None:
    process = job.start(HF_TOKEN="a-secret-of-a-test")
    job.reach(1)
    for name in job.cluster.nodes:
        assert not job.cluster.processes(name, "a-secret-of-a-test")
        worker = job.workers()[name][0]
        environ = job.cluster.run(name, ["cat", f"/proc/{worker}/environ"]).stdout
        assert "HF_TOKEN=a-secret-of-a-test" in environ
    assert process.wait(120) == 0
