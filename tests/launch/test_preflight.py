"""What the facts of hosts say of them; hosts that are really asked are in tests/cluster."""

from pathlib import Path
from typing import Any

import pytest

from bigtune.config import Run
from bigtune.launch.hosts import Host
from bigtune.launch.preflight import Found, judge
from bigtune.launch.remote import carried
from tests.tiny import tiny_run

HOSTS = [Host("a", (0, 1)), Host("b", (0, 1))]


def fact(**changes: Any) -> dict[str, Any]:
    return {
        "problems": [], "versions": {"Python": "3.11.7", "torch": "2.13.0"}, "cores": 8, "gpus": [], "gpu_gib": [],
        "memory_gib": 64.0,
        "free_gib": 500.0, "model": {"config.json": 1, "a.safetensors": 9}, "model_gib": 2.0,
        "sources": {"x": 5}, "time": 0.0,
        **changes,
    }  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return tiny_run(tmp_path, optim={"name": "adamw"})


def told(run: Run, **changes: Any) -> Found:
    """Two hosts, of which the second is different."""
    return judge(HOSTS, {"a": fact(), "b": fact(**changes)}, run)


def test_hosts_that_are_alike_are_fit(run: Run) -> None:
    found = told(run)
    assert found.bad == {}
    assert found.lines == ["preflight: 2 of 2 hosts, 4 ranks; Python 3.11.7, torch 2.13.0"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"versions": {"Python": "3.12.0", "torch": "2.13.0"}}, "has Python 3.12.0, a has 3.11.7"),
        ({"model": {"config.json": 1}}, "has other files of model than a (a.safetensors)"),
        ({"sources": {"x": 6}}, "has other files of sources than a (x)"),
        ({"cores": 1}, "has 1 core for 2 ranks; lower its slots"),
        ({"gpus": ["0"]}, "has 1 GPU for slot 1; lower its slots"),
        ({"memory_gib": 7.0}, "has 7.0 GiB of memory free, its ranks' states alone take 8.0"),
        ({"free_gib": 5.0}, "has 5.0 GiB of disk free, its part of a checkpoint takes 6.0"),
        ({"problems": ["/x: no such file", "second"]}, "/x: no such file; second"),
    ],
)
def test_one_that_is_not_is_told_why(run: Run, changes: dict[str, Any], said: str) -> None:
    found = told(run, **changes)
    assert found.bad == {"b": said}
    assert found.lines[0].startswith("preflight: 1 of 2 hosts, 2 ranks")


def test_states_are_of_the_optimizer_and_on_gpus_or_not(run: Run) -> None:
    def bad(run: Run, **changes: Any) -> str:
        return told(run, gpus=["0", "1"], **changes).bad.get("b", "")

    assert bad(run, gpu_gib=[80.0, 3.5]) == "has 3.5 GiB free on GPU 1, a rank's states alone take 4.0"
    assert bad(run, gpu_gib=[80.0, 80.0], memory_gib=1.0) == ""
    frugal = run.model_copy(update={"optim": run.optim.model_copy(update={"name": "adamw_8bit"})})
    assert bad(frugal, gpu_gib=[80.0, 3.5]) == ""
    offloaded = run.model_copy(update={"deepspeed": "zero3_offload"})
    assert bad(offloaded, gpu_gib=[80.0, 3.5]) == ""
    assert "7.0 GiB of memory free" in bad(offloaded, gpu_gib=[80.0, 3.5], memory_gib=7.0)


def test_a_host_is_measured_by_the_first_that_is_fit(run: Run) -> None:
    other = {"Python": "3.12.0", "torch": "2.13.0"}
    hosts = [*HOSTS, Host("c", (0,))]
    facts = {"a": fact(problems=["no"], versions=other), "b": fact(), "c": fact()}
    assert set(judge(hosts, facts, run).bad) == {"a"}


def test_what_belongs_to_a_session_is_not_carried() -> None:
    own = {"HOME": "/root", "SSH_AUTH_SOCK": "x", "SLURM_JOB_ID": "1", "CUDA_VISIBLE_DEVICES": "0", "PWD": "/"}
    theirs = {"HF_TOKEN": "t", "LD_LIBRARY_PATH": "/l", "NCCL_DEBUG": "INFO", "PATH": "/bin"}
    assert carried(own | theirs) == theirs
