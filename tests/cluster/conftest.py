"""One cluster of two nodes for all tests, and runs to start on it."""

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bigtune.runfile import to_yaml
from tests import processes
from tests.cluster.cluster import LOGIN, Cluster, missing
from tests.tiny import tiny_model, tiny_run, write_rows

REQUIRED = "BIGTUNE_CLUSTER"
"""Set to `required`, as .ci/run does, a machine that cannot have a cluster fails instead of saying so."""
BIGTUNE = (sys.executable, "-m", "bigtune.cli")
SECONDS = 180.0


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    why = missing()
    if why is not None:
        if os.environ.get(REQUIRED) == "required":
            pytest.fail(f"no cluster: {why}")
        pytest.skip(f"no cluster: {why}")
    found = Cluster.start(2)
    yield found
    found.down()


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and rows."""
    folder = tmp_path_factory.mktemp("parts")
    tiny_model(folder / "model")
    write_rows(folder / "rows.jsonl", 80)
    return folder


@dataclass(frozen=True)
class Job:
    """A run file for the cluster, and what came of it."""

    cluster: Cluster
    folder: Path

    @property
    def run_file(self) -> Path:
        return self.folder / "run.yaml"

    @property
    def output(self) -> Path:
        return self.folder / "run"

    @property
    def log(self) -> Path:
        """What the launcher printed."""
        return self.folder / "launcher.log"

    def write(self, parts: Path, **changes: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        run = tiny_run(self.folder, **{
            "model": {"path": str(parts / "model")},
            "data": {"sources": [{"path": str(parts / "rows.jsonl")}], "sequence_length": 96},
            "train": {"steps": 12, "global_batch": 4, "precision": "float32"},
            "checkpoint": {"every_steps": 5, "keep_last": 3},
            **changes,
        })  # fmt: skip
        self.run_file.write_text(to_yaml(run))
        (self.folder / "hosts").write_text("".join(f"{name} slots=1\n" for name in self.cluster.nodes))

    def launch(self, *options: str, **environment: str) -> Any:
        """`bigtune launch` on the login host, to its end; by ssh, if nothing else is said."""
        how = options if "--slurm" in options else ("--hostfile", str(self.folder / "hosts"), *options)
        return self.cluster.run(
            LOGIN, [*BIGTUNE, "launch", str(self.run_file), *how], self.folder, environment=environment
        )

    def start(self, *options: str, command: Sequence[str] | None = None, **environment: str) -> Any:
        """The same, in the background."""
        how = options if "--slurm" in options else ("--hostfile", str(self.folder / "hosts"), *options)
        words = command or [*BIGTUNE, "launch", str(self.run_file), *how]
        return self.cluster.popen(LOGIN, words, self.log, self.folder, environment)

    def signal(self, number: int) -> None:
        """To the launcher itself, on the login host."""
        for process in self.cluster.processes(LOGIN, f"bigtune.cli launch {self.run_file}"):
            self.cluster.run(LOGIN, ["kill", f"-{number}", str(process)])

    def metrics(self) -> list[dict[str, Any]]:
        path = self.output / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def losses(self) -> dict[int, float]:
        return {line["step"]: line["loss"] for line in self.metrics()}

    def reach(self, step: int) -> None:
        """Wait until it has done so many steps."""
        until(lambda: any(line["step"] >= step for line in self.metrics()), self.log)

    def workers(self) -> dict[str, list[int]]:
        """What of this run is alive on each host, by the hosts' own numbers."""
        return {name: self.cluster.processes(name, f"bigtune.train.*{self.folder}/") for name in self.cluster.nodes}

    def nothing_left(self, seconds: float = 15.0) -> None:
        """Workers and agents are gone in that time."""
        until(lambda: not any(self.workers().values()), self.log, seconds)


@pytest.fixture
def job(cluster: Cluster, parts: Path, tmp_path: Path) -> Iterator[Job]:
    found = Job(cluster, tmp_path)
    found.write(parts)
    yield found
    found.nothing_left()


@pytest.fixture(scope="session")
def alone(cluster: Cluster, parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The run of 12 steps by two ranks of one host."""
    found = Job(cluster, tmp_path_factory.mktemp("alone"))
    found.write(parts)
    done = cluster.run(LOGIN, [*BIGTUNE, "train", str(found.run_file), "--ranks", "2"], found.folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return found


@pytest.fixture(scope="session")
def together(cluster: Cluster, parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The same by two hosts that nothing happens to, started by ssh."""
    found = Job(cluster, tmp_path_factory.mktemp("together"))
    found.write(parts)
    done = found.launch()
    assert done.returncode == 0, done.stdout + done.stderr
    found.log.write_text(done.stdout + done.stderr)
    return found


def until(what: Callable[[], Any], log: Path | None = None, seconds: float = SECONDS) -> None:
    """Wait for something, or fail with what a log says."""
    processes.until(what, seconds, lambda: log.read_text() if log and log.exists() else "too late")
