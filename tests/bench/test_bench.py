"""`bigtune bench` as a user meets it: real runs, what stands in the table, what is left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import psutil
import pytest

from bigtune.bench import trial
from bigtune.bench.figures import Figures
from bigtune.bench.largest import Need
from bigtune.bench.machine import OthersLoad, commit
from bigtune.bench.result import Result, read_results
from bigtune.bench.session import Session, Wishes
from bigtune.bench.sweep import Case
from bigtune.bench.trial import Trial
from bigtune.config import Run
from bigtune.data.prepare import prepare
from bigtune.runfile import load_run
from tests.tiny import tiny_model, write_rows

COMMAND = [sys.executable, "-m", "bigtune.cli", "bench"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run file with its model and data, of a run that goes on for epochs."""
    folder = tmp_path_factory.mktemp("bench")
    tiny_model(folder / "model")
    tree = {
        "model": {"path": str(folder / "model")},
        "data": {"sources": [{"path": str(write_rows(folder / "rows.jsonl"))}], "sequence_length": 96},
        "train": {"epochs": 1, "global_batch": 4, "precision": "float32"},
        "checkpoint": {"every_steps": 1},
        "output": str(folder / "run"),
    }
    (folder / "tiny.yaml").write_text(json.dumps(tree), encoding="utf-8")
    return folder


@dataclass(frozen=True)
class Benched:
    """A benchmark of one case that is measured and one that is refused."""

    folder: Path
    done: "subprocess.CompletedProcess[str]"


def bench(folder: Path, *arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=folder)


@pytest.fixture(scope="module")
def benched(base: Path) -> Benched:
    options = ("--ranks", "1", "--steps", "4", "--warm-up", "2", "--html", base / "page.html")
    return Benched(base, bench(base, base / "tiny.yaml", "--sweep", "micro_batch=2", "name=muon,adamw", *options))


def test_one_case_is_measured_and_the_other_has_its_reason(benched: Benched) -> None:
    assert benched.done.returncode == 0, benched.done.stderr
    assert "Traceback" not in benched.done.stdout + benched.done.stderr
    refused, measured = read_results(benched.folder / "runs" / "bench" / "tiny").values()
    assert refused.reason.startswith("optim.name: muon is refused with zero3") and refused.figures is None
    assert "optim.name: muon is refused" in " ".join(benched.done.stdout.split())
    figures = measured.figures
    assert figures and (measured.reason, measured.note) == ("", "")
    assert figures.tokens_per_second > figures.supervised_tokens_per_second > 0
    assert len(figures.steps["seconds"]) == 4
    assert figures.first_step_seconds and figures.first_step_seconds > figures.step_seconds["median"]
    assert sum(phase["share"] for phase in figures.phases.values()) <= 1 + 1e-9
    assert {"parameters", "gradients", "optimizer", "activations"} <= figures.memory_gib.keys()
    assert (measured.precision, measured.micro_batch) == ("float32", 2)
    assert 0 < measured.mfu["exact"]["measured"] < measured.mfu["palm"]["measured"] < 1
    assert measured.machine["torch"] and measured.load_average is not None
    assert "<svg" in (benched.folder / "page.html").read_text(encoding="utf-8")


def test_the_figures_are_those_of_the_run_s_own_metrics(benched: Benched) -> None:
    folder = benched.folder / "runs" / "bench" / "tiny" / "case-02"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    (measured,) = (each for each in read_results(folder.parent).values() if each.figures)
    assert measured.figures and measured.figures.first_step_seconds
    again = Figures.of(lines, 2, 1, measured.figures.first_step_seconds).to_json()
    assert json.dumps(again) == json.dumps(measured.figures.to_json())


def test_no_checkpoint_is_written_and_the_run_s_own_folder_is_left_alone(benched: Benched) -> None:
    assert not (benched.folder / "run").exists()
    assert list((benched.folder / "runs").rglob("step-*")) == []
    assert sum(path.stat().st_size for path in (benched.folder / "runs").rglob("*")) < 2**20
    assert len(list((benched.folder / "runs" / "bench" / "tiny" / "data").glob("*/manifest.json"))) == 1


def test_compared_with_itself_nothing_changed(benched: Benched) -> None:
    folder = benched.folder / "runs" / "bench" / "tiny"
    done = bench(benched.folder, "--compare", folder, folder / "bench.jsonl", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    (change,) = found["changes"]
    assert (change["ratio"], change["verdict"]) == (1, "no difference beyond the noise")
    assert list(found["unmeasured"]) == ["train.micro_batch=2 optim.name=muon, ranks 1"]
    assert (found["machine"], found["run_file"], found["only_before"]) == ([], [], [])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("none.yaml",), "none.yaml: no such run file"),
        (("tiny.yaml", "micro_bach=1"), "--sweep micro_bach: no key of the run file; near are train.micro_batch"),
        (("tiny.yaml", "--ranks", "x"), "--ranks x: write numbers from 1"),
        (("--compare", "a", "b"), "--compare a: cannot be read"),
    ],
)
def test_a_mistake_is_one_line_before_anything_runs(base: Path, arguments: tuple[str, ...], said: str) -> None:
    done = bench(base, *arguments, "--output", "untouched")
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"Error: {said}")
    assert not (base / "untouched").exists()


def test_a_sweep_of_which_nothing_is_measured_fails(base: Path) -> None:
    cores = len(os.sched_getaffinity(0))
    done = bench(base, "tiny.yaml", "deepspeed=zero9", "--ranks", str(cores + 1), "--output", "none", "--json")
    assert done.returncode == 1
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["reason"].startswith(f"--ranks {cores + 1}: this host has")


def test_ctrl_c_keeps_what_there_is_and_leaves_nothing_running(base: Path) -> None:
    options = ["name=muon,adamw", "--steps", "100000", "--ranks", "1", "--output", "stopped"]
    with subprocess.Popen(
        [*COMMAND, "tiny.yaml", *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=base
    ) as process:
        ends = time.monotonic() + 120
        while not list(base.glob("stopped/case-02/metrics.jsonl")):
            assert process.poll() is None and time.monotonic() < ends, process.communicate()
            time.sleep(0.1)
        started = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in out + err
    assert "muon is refused" in " ".join(out.split())
    assert len((base / "stopped" / "bench.jsonl").read_text().splitlines()) == 1
    assert len(started) >= 3  # the command, the launcher, the worker
    _, alive = psutil.wait_procs(started, timeout=10)
    assert alive == []


def test_documents_that_the_run_has_prepared_are_read_and_never_replaced(base: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    changes = [f"data.sources.0.path={rows}", f"output={tmp_path / 'run'}"]
    session, case = Session(base / "tiny.yaml", changes, Wishes(), tmp_path / "bench"), Case({}, 1)
    shared = session._run_of(case, tmp_path / "case", 2).store
    assert shared.is_relative_to(tmp_path / "bench" / "data")
    run = load_run(base / "tiny.yaml", changes)
    prepare(run.data, run.model.path, run.store)
    assert session._run_of(case, tmp_path / "case", 2).store == run.store
    longer = Case({"data.sequence_length": 128}, 1)
    assert session._run_of(longer, tmp_path / "case", 2).store == run.store
    write_rows(rows, count=50)
    assert session._run_of(case, tmp_path / "case", 2).store == shared


# ------------------------------------------------------------------------------------------------ memory


def test_a_run_that_takes_the_last_memory_is_ended_before_the_host_is(tmp_path: Path) -> None:
    with mock.patch.object(trial, "LEAST_FREE", 2.0):  # twice what the host has
        reason = trial._call(["demo", "--output", str(tmp_path)], tmp_path / "log")
    assert Trial(reason).out_of_memory and "of the host's memory were left" in reason


@pytest.mark.parametrize(
    ("reason", "memory"),
    [
        ("rank 0: out of memory with train.micro_batch 8, at 50% of the forward pass", True),
        ("rank 1: OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", True),
        ("a worker ended by signal 9 without a word (out of memory?); see logs", True),
        ("RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory: you tried", True),
        ("optim.name: muon is refused with zero3", False),
        ("a worker ended by signal 15", False),
        ("", False),
    ],
)
def test_what_was_missing_is_told_from_the_words(reason: str, memory: bool) -> None:
    assert Trial(reason).out_of_memory == memory


def test_the_reason_is_the_last_word_on_it(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("Error: first\nnoise\nError: rank 0: second\nmore noise\n")
    assert trial._reason(1, log) == "rank 0: second"
    log.write_text("Traceback\nKeyError: 'x'\n")
    assert trial._reason(1, log) == f"KeyError: 'x'; see {log}"
    assert trial._reason(-9, log) == f"ended by signal 9 (out of memory?); see {log}"
    log.write_text("")
    assert trial._reason(3, log) == f"ended with code 3; see {log}"


class Limited(Session):
    """A session whose runs need so many GiB a row, on a host that has as many as it says."""

    def __init__(self, base: Path, rows_that_fit: int) -> None:
        super().__init__(base / "tiny.yaml", ["train.global_batch=64"], Wishes(), base / "limited")
        self.tried: list[tuple[int, int]] = []
        self.fit = rows_that_fit

    def _try(self, case: Case, run: Run) -> Trial:
        self.tried.append((run.train.micro_batch, run.train.steps or 0))
        fits = run.train.micro_batch <= self.fit - (run.train.steps == 13)  # of many steps one takes more
        return Trial("" if fits else "out of memory with train.micro_batch")

    def _one(self, case: Case, folder: Path, micro_batch: int | None = None) -> Result:
        trial = self._try(case, self._run_of(case, folder, 13, micro_batch))
        return Result(case, trial.reason, micro_batch=micro_batch)


def test_the_largest_micro_batch_has_passed_the_whole_measurement(base: Path) -> None:
    session = Limited(base, rows_that_fit=6)
    result = session._search(Case({"train.micro_batch": "max"}, 2), base / "limited")
    assert (result.micro_batch, result.reason) == (5, "")
    assert session.tried == [(1, 2), (2, 2), (4, 2), (8, 2), (6, 2), (7, 2), (6, 13), (5, 2), (5, 13)]
    assert [bool(each["reason"]) for each in result.tries] == [False, False, False, False, True, True, True]


def test_it_is_never_larger_than_a_rank_has_rows(base: Path) -> None:
    session = Limited(base, rows_that_fit=1000)
    assert session._search(Case({"train.micro_batch": "max"}, 3), base / "limited").micro_batch == 22


def test_where_none_fits_the_reason_is_that_of_one_row(base: Path) -> None:
    result = Limited(base, rows_that_fit=0)._search(Case({"train.micro_batch": "max"}, 1), base / "limited")
    assert result.reason == "no micro batch fits; of 1: out of memory with train.micro_batch"


def test_what_would_surely_not_fit_is_not_tried(base: Path) -> None:
    session, case = Session(base / "tiny.yaml", [], Wishes(), base / "guarded"), Case({"train.micro_batch": 4}, 1)
    session._needs["as the run file, ranks 1"] = {1: Need(2.0, 1.0), 2: Need(10.0**6, 1.0)}
    with mock.patch("bigtune.bench.session.try_run", side_effect=AssertionError("was tried")):
        found = session._try(case, session._run_of(case, base / "guarded", 2))
    assert found.out_of_memory
    assert found.reason.startswith("out of memory, not tried: by what micro_batch 2 took, 4 needs 2999996.0 GiB")


# --------------------------------------------------------------------------------------------- the machine


def test_a_busy_process_of_another_is_seen() -> None:
    """One that is no child of this process's when its time is taken: it has not ended."""
    others = OthersLoad()
    if others.share() is None and psutil.cpu_times().user == 0:
        pytest.skip("the system tells no processor times")
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        time.sleep(1.0)
        seen = others.share()
        busy.kill()
    assert seen is not None and seen > 0.2 / len(os.sched_getaffinity(0))


def test_the_benchmark_itself_needs_no_torch() -> None:
    """Its memory is the runs' own."""
    code = (
        "import sys\nfrom bigtune.bench import command, machine, page, session, table\nfound = machine.machine()\n"
        "print(found['gpu'] is None and 'torch' in sys.modules, found['cores'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == f"False {len(os.sched_getaffinity(0))}\n", done.stderr


def test_the_commit_is_that_of_the_checkout() -> None:
    root = Path(__file__).parents[2]
    head = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True)
    assert (commit() or "").removesuffix("-dirty") == (head.stdout.strip() if head.returncode == 0 else "")
