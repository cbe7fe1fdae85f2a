"""The command line as a user meets it: processes, exit codes, what is printed where, and what is left running."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner

from bigtune.cli import main
from tests.disk import fill, small_disk
from tests.tiny import tiny_model, write_rows

CORES = len(os.sched_getaffinity(0))
COMMAND = [sys.executable, "-m", "bigtune.cli"]
needs_two_cores = pytest.mark.skipif(CORES < 2, reason="two ranks need two cores")


def bigtune(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=240, **options)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and data, as a user has them."""
    folder = tmp_path_factory.mktemp("base")
    tiny_model(folder / "model")
    write_rows(folder / "rows.jsonl")
    write_rows(folder / "held.jsonl", count=6)
    return folder


def run_file(base: Path, folder: Path, **changes: Any) -> Path:
    """A run file of `base` with its output in `folder`. Changes are of `train`."""
    tree = {
        "model": {"path": str(base / "model")},
        "data": {"sources": [{"path": str(base / "rows.jsonl")}], "sequence_length": 96},
        "optim": {"learning_rate": 3e-3},
        "train": {"steps": 4, "global_batch": 4, "precision": "float32"} | changes,
        "evaluate": {"sources": [{"path": str(base / "held.jsonl")}], "max_new_tokens": 4},
        "output": str(folder / "run"),
    }
    path = folder / "run.yaml"
    path.write_text(json.dumps(tree), encoding="utf-8")  # JSON is YAML
    return path


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl so far."""
    path = folder / "run" / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


# --------------------------------------------------------------------------------------------------- help


def test_help_is_instant_since_it_imports_no_torch() -> None:
    code = (
        "import sys\nfrom bigtune.cli import main\nmain(['--help'], standalone_mode=False)\n"
        "print([name for name in ('torch', 'transformers', 'deepspeed', 'pyarrow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[0].startswith("Usage:")
    assert done.stdout.splitlines()[-1] == "[]"
    for name in main.commands:
        assert re.search(rf"^  {name} ", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("name", sorted(main.commands))
def test_the_help_of_every_command_shows_an_example_that_it_accepts(name: str) -> None:
    shown = CliRunner().invoke(main, [name, "--help"]).output
    example = shown.split("Example:\n")[1].strip()
    assert example.startswith(f"bigtune {name} ")
    command = main.commands[name]
    command.make_context(name, example.split()[2:])  # raises UsageError where it would be refused


def test_the_version_is_printed() -> None:
    from bigtune import __version__

    assert __version__ in CliRunner().invoke(main, ["--version"]).output


# ---------------------------------------------------------------------------------------------- mistakes


def mistake(*arguments: str | Path) -> str:
    """The one line that a mistake is answered with."""
    done = bigtune(*arguments)
    assert done.returncode not in (0, 130)
    assert "Traceback" not in done.stdout + done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: ")
    return line


@pytest.mark.parametrize("command", ["prepare", "train"])
def test_a_missing_run_file(tmp_path: Path, command: str) -> None:
    assert f"{tmp_path / 'none.yaml'}: no such run file" in mistake(command, tmp_path / "none.yaml")


def test_an_unknown_key(base: Path, tmp_path: Path) -> None:
    line = mistake("train", run_file(base, tmp_path, step=3))
    assert "unknown key 'train.step'; did you mean 'steps'?" in line
    assert "did you mean 'seed'" in mistake("prepare", run_file(base, tmp_path), "--set", "train.sed=3")


@pytest.mark.parametrize("command", ["prepare", "train"])
def test_a_missing_model_folder(base: Path, tmp_path: Path, command: str) -> None:
    line = mistake(command, run_file(base, tmp_path), "--set", f"model.path={tmp_path / 'none'}")
    assert f"{tmp_path / 'none'}: no such model folder; correct model.path" in line


@pytest.mark.parametrize("command", ["prepare", "train"])
def test_a_missing_data_file(base: Path, tmp_path: Path, command: str) -> None:
    line = mistake(command, run_file(base, tmp_path), "--set", f"data.sources.0.path={tmp_path / 'none.jsonl'}")
    assert str(tmp_path / "none.jsonl") in line


@pytest.mark.parametrize(
    ("row", "complaint"),
    [('{"instruction": "Say', "JSON"), ('{"instruction": "Say.", "output": ""}', "empty")],
    ids=["broken", "empty answer"],
)
def test_a_bad_row_is_named_by_file_and_row(base: Path, tmp_path: Path, row: str, complaint: str) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", count=3)
    rows.write_text(rows.read_text() + row + "\n")
    for command in ("prepare", "train"):
        line = mistake(command, run_file(base, tmp_path), "--set", f"data.sources.0.path={rows}")
        assert re.search(rf"{re.escape(str(rows))}\D+4\b", line)
        assert complaint in line


def test_more_ranks_than_cores(base: Path, tmp_path: Path) -> None:
    line = mistake("train", run_file(base, tmp_path), "--ranks", str(CORES + 1))
    assert f"--ranks {CORES + 1}: this host has" in line
    assert not (tmp_path / "run").exists()


def test_a_preset_that_is_not_there(base: Path, tmp_path: Path) -> None:
    assert "no preset or file 'zero9'" in mistake("train", run_file(base, tmp_path), "--set", "deepspeed=zero9")


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ("optim.name=muon", "optim.name: muon is refused with zero3: "),
        ("optim.learning_rate=0", "'optim.learning_rate' is 0; input should be greater than 0"),
        ("optim.learning_rate=.inf", "'optim.learning_rate' is inf; input should be a finite number"),
        ("optim={name: sgd, betas: [0.9, 0.95]}", "'optim': betas is no setting of sgd, which has momentum; remove it"),
    ],
)
def test_an_optimizer_that_cannot_work(base: Path, tmp_path: Path, setting: str, complaint: str) -> None:
    assert complaint in mistake("train", run_file(base, tmp_path), "--set", setting)
    assert not (tmp_path / "run").exists()


def test_resuming_what_is_not_there(base: Path, tmp_path: Path) -> None:
    line = mistake("train", run_file(base, tmp_path), "--resume", "step-3")
    assert "--resume step-3" in line
    assert "is no checkpoint" in line


@pytest.mark.slow
def test_a_broken_model_is_the_first_failing_workers_one_line(base: Path, tmp_path: Path) -> None:
    """Found in a worker only: its message comes through, and neither its traceback nor the launcher's noise."""
    shutil.copytree(base / "model", tmp_path / "model")
    next((tmp_path / "model").glob("*.safetensors")).unlink()
    done = bigtune("train", run_file(base, tmp_path), "--set", f"model.path={tmp_path / 'model'}")
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert done.stderr.splitlines()[-1].startswith("Error: rank 0: ")
    assert "the index names files that are missing" in done.stderr.splitlines()[-1]


def test_merging_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    line = mistake("merge", tmp_path, "--output", tmp_path / "merged")
    assert f"{tmp_path}: no checkpoint here" in line


def test_evaluating_without_an_evaluate_section(base: Path, tmp_path: Path) -> None:
    line = mistake("evaluate", run_file(base, tmp_path), "--model", base / "model", "--set", "evaluate=null")
    assert "has no evaluate section" in line


# ------------------------------------------------------------------------------------------------ the chain


@dataclass(frozen=True)
class Chain:
    """A run that was prepared and trained on two ranks."""

    folder: Path
    run: Path
    prepared: "subprocess.CompletedProcess[str]"
    trained: "subprocess.CompletedProcess[str]"


@pytest.fixture(scope="module")
def chain(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    if CORES < 2:
        pytest.skip("two ranks need two cores")
    folder = tmp_path_factory.mktemp("chain")
    run = run_file(base, folder)
    prepared = bigtune("prepare", run)
    before = store_times(folder)
    trained = bigtune("train", run, "--ranks", "2")
    assert store_times(folder) == before  # what is prepared is not prepared again
    return Chain(folder, run, prepared, trained)


def store_times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (folder / "run" / "data").iterdir()}


def test_preparing_and_training_say_what_they_do(chain: Chain) -> None:
    assert (chain.prepared.returncode, chain.prepared.stdout) == (0, "")
    assert "40 documents of 40 rows" in chain.prepared.stderr
    assert "rows of 96 tokens" in chain.prepared.stderr
    assert "dropped 3 (documents longer than 96 tokens)" in chain.prepared.stderr
    assert chain.trained.returncode == 0, chain.trained.stderr
    out = chain.trained.stdout
    threads = "1 thread" if CORES // 2 == 1 else f"{CORES // 2} threads"  # each rank has cores of its own
    head = rf"^train: 4 steps of 4 rows of 96 tokens .* on 2 ranks, cpu, float32, {threads} a rank$"
    assert re.search(head, out, re.MULTILINE)
    assert re.search(r"^train: done, 4 steps, last loss \d", out, re.MULTILINE)
    assert [line["step"] for line in metrics(chain.folder)] == [1, 2, 3, 4]
    logs = chain.folder / "run" / "logs"
    assert sorted(path.name for path in logs.iterdir()) == ["rank-0.log", "rank-0.step", "rank-1.log", "rank-1.step"]
    last, tokens = metrics(chain.folder)[-1], 0
    for rank in range(2):
        own = json.loads((logs / f"rank-{rank}.step").read_text())
        assert (own["step"], own["grad_norm"]) == (4, last["grad_norm"])
        tokens += own["tokens"]
    assert tokens == last["tokens"]


def test_the_merged_model_scores_better(chain: Chain, base: Path, tmp_path: Path) -> None:
    merged = bigtune("merge", chain.folder / "run", "--output", tmp_path / "merged", "--max-shard-size", "100KB")
    assert (merged.returncode, merged.stdout.strip()) == (0, str(tmp_path / "merged"))
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 1
    done = bigtune("evaluate", chain.run, "--model", tmp_path / "merged", "--base", base / "model", "--json")
    assert done.returncode == 0, done.stderr
    loss = json.loads(done.stdout)["overall"]["held_out_loss"]
    assert loss["tuned"]["mean"] < loss["base"]["mean"] - 0.1 and loss["difference"]["high"] < 0


@pytest.mark.slow
def test_a_run_that_is_done_is_not_done_again(chain: Chain) -> None:
    again = bigtune("train", chain.run, "--ranks", "2")
    assert again.returncode == 0, again.stderr
    assert "all 4 steps were done already" in again.stdout


def test_a_changed_setting_is_refused_before_any_worker_starts(chain: Chain) -> None:
    line = mistake("train", chain.run, "--ranks", "2", "--set", "optim.learning_rate=0.1")
    assert "optim.learning_rate: 0.003 → 0.1" in line


def test_a_run_goes_on_on_other_ranks(chain: Chain, tmp_path: Path) -> None:
    shutil.copytree(chain.folder / "run", tmp_path / "run")
    done = bigtune("train", chain.run, "--ranks", "1", "--set", "train.steps=5", "--set", f"output={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert f"going on from {tmp_path / 'run' / 'checkpoints' / 'step-4'}" in done.stdout
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_other_settings_are_listed_and_taken_on_purpose(chain: Chain, tmp_path: Path) -> None:
    shutil.copytree(chain.folder / "run", tmp_path / "run")
    changed = ("train", chain.run, "--ranks", "1", "--set", "train.steps=5", "--set", f"output={tmp_path / 'run'}",
               "--set", "optim.learning_rate=0.001")  # fmt: skip
    line = mistake(*changed)
    assert "holds a run with other settings (optim.learning_rate: 0.003 → 0.001); change them back, go on" in line
    done = bigtune(*changed, "--resume", "latest")
    assert done.returncode == 0, done.stderr
    assert "step-4, with other settings: optim.learning_rate: 0.003 → 0.001" in done.stdout


@pytest.mark.slow
def test_the_form_by_hand_does_the_same(chain: Chain, base: Path, tmp_path: Path) -> None:
    """DeepSpeed's own launcher, nothing set and nothing prepared beforehand."""
    run = run_file(base, tmp_path)
    launcher = Path(sys.executable).parent / "deepspeed"
    if not launcher.exists():
        pytest.skip("DeepSpeed's launcher is not beside this Python")
    command = [sys.executable, str(launcher), "--num_accelerators", "2", "--module", "bigtune.train", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "train: done, 4 steps" in done.stdout
    results = [[(line["loss"], line["grad_norm"]) for line in metrics(folder)] for folder in (chain.folder, tmp_path)]
    assert results[0] == results[1]


# --------------------------------------------------------------------------------------------- interruption

Start = Callable[[Path], "subprocess.Popen[str]"]


def processes_of(run: Path) -> list[psutil.Process]:
    """Everything alive that was started for a run file: the command names it, its workers the resolved one."""
    names = {str(run), str(run.parent / "run" / "run.yaml")}
    found = []
    for process in psutil.process_iter():
        try:
            if names.intersection(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def wait_until(done: Callable[[], object], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, f"{what}: not in {seconds} s"
        time.sleep(0.1)


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts `bigtune train RUN --ranks 2`; whatever a failing test leaves behind is ended."""
    runs: list[Path] = []

    def begin(run: Path) -> "subprocess.Popen[str]":
        runs.append(run)
        command = [*COMMAND, "train", str(run), "--ranks", "2"]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    yield begin
    for process in [process for run in runs for process in processes_of(run)]:
        process.kill()


def train_until(start: Start, run: Path, step: int) -> "subprocess.Popen[str]":
    """A run in training, past a step."""
    process = start(run)

    def far_enough() -> bool:
        assert process.poll() is None, process.communicate()
        lines = metrics(run.parent)
        return bool(lines) and lines[-1]["step"] >= step

    wait_until(far_enough, 120, f"step {step}")
    return process


@needs_two_cores
def test_an_interrupted_run_saves_ends_and_goes_on(base: Path, tmp_path: Path, start: Start) -> None:
    run = run_file(base, tmp_path, steps=100_000)
    process = train_until(start, run, 3)
    assert len(processes_of(run)) >= 3  # the command and two workers
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in out + err
    assert "stopping: the workers finish their step and save" in err
    assert "the same command goes on from there" in out
    wait_until(lambda: not processes_of(run), 5, "the end of all processes")

    before = metrics(tmp_path)
    last = before[-1]["step"]
    assert [line["step"] for line in before] == list(range(1, last + 1))
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == f"step-{last}\n"

    process = train_until(start, run, last + 3)
    process.send_signal(signal.SIGTERM)  # what batch systems send
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"going on from {tmp_path / 'run' / 'checkpoints' / f'step-{last}'}" in out
    after = metrics(tmp_path)
    assert after[:last] == before
    assert [line["step"] for line in after] == list(range(1, len(after) + 1))
    assert after[-1]["loss"] < before[0]["loss"] - 0.1


@needs_two_cores
@pytest.mark.parametrize("processes", [1, 3], ids=["agent", "agent and workers"])
def test_an_interruption_before_the_first_step_ends_the_run_at_once(
    base: Path, tmp_path: Path, start: Start, processes: int
) -> None:
    run = run_file(base, tmp_path, steps=100_000)
    process = start(run)
    started = psutil.Process(process.pid)
    wait_until(lambda: len(started.children(recursive=True)) >= processes, 60, "the start of processes")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in out + err
    assert "Error" not in err
    wait_until(lambda: not processes_of(run), 5, "the end of all processes")
    assert metrics(tmp_path) == []


@needs_two_cores
@pytest.mark.parametrize("moment", ["starting", "training"])
def test_killing_the_command_leaves_no_worker(base: Path, tmp_path: Path, start: Start, moment: str) -> None:
    run = run_file(base, tmp_path, steps=100_000)
    if moment == "training":
        process = train_until(start, run, 2)
    else:
        process = start(run)
        wait_until(lambda: len(processes_of(run)) >= 3, 60, "the start of the workers")
    process.kill()
    process.wait()
    wait_until(lambda: not processes_of(run), 15, "the end of all processes")


@needs_two_cores
@pytest.mark.slow
def test_two_runs_do_not_share_a_folder(base: Path, tmp_path: Path, start: Start) -> None:
    run = run_file(base, tmp_path, steps=100_000)
    process = train_until(start, run, 2)
    second = bigtune("train", run)
    assert second.returncode == 1
    line = second.stderr.splitlines()[-1]
    assert line.startswith(f"Error: output: another run is training in {tmp_path / 'run'} (process ")
    assert f" on {socket.gethostname()}); wait for it" in line
    process.send_signal(signal.SIGHUP)  # what a lost ssh session sends
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on from there" in out


@needs_two_cores
@pytest.mark.slow
def test_a_save_is_made_when_asked_for(base: Path, tmp_path: Path, start: Start) -> None:
    """By a signal to the command, which goes on to the workers; the run goes on."""
    run = run_file(base, tmp_path, steps=100_000)
    process = train_until(start, run, 2)
    process.send_signal(signal.SIGUSR1)
    checkpoints = tmp_path / "run" / "checkpoints"
    wait_until(lambda: (checkpoints / "latest").exists(), 30, "the checkpoint")
    saved = (checkpoints / "latest").read_text().strip()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert bigtune("verify", checkpoints / saved).returncode == 0
    assert (checkpoints / "latest").read_text().strip() != saved


@needs_two_cores
@pytest.mark.slow
def test_a_disk_that_fills_up_between_two_saves_ends_the_run_with_one_line(
    base: Path, tmp_path: Path, start: Start
) -> None:
    with small_disk(tmp_path / "run", "1m") as disk:
        run = run_file(base, tmp_path, steps=100_000)
        process = train_until(start, run, 2)
        fill(disk)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 1
        assert "Traceback" not in out + err
        line = err.splitlines()[-1]
        assert "No space left on device; make room" in line or "without a word (the disk is full?)" in line
        wait_until(lambda: not processes_of(run), 5, "the end of all processes")


@needs_two_cores
def test_a_killed_worker_ends_the_run_with_one_line(base: Path, tmp_path: Path, start: Start) -> None:
    """As the system does where memory runs out."""
    run = run_file(base, tmp_path, steps=100_000)
    process = train_until(start, run, 2)
    workers = [p for p in processes_of(run) if "bigtune.train" in p.cmdline() and p.ppid() != process.pid]
    workers[0].kill()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in out + err
    assert err.splitlines()[-1].startswith("Error: rank 0: ended by signal 9 (SIGKILL) ")
    assert f"without a word (out of memory?); see {tmp_path / 'run' / 'logs'}" in err.splitlines()[-1]
    wait_until(lambda: not processes_of(run), 5, "the end of all processes")


@needs_two_cores
def test_a_worker_that_is_killed_while_others_wait_for_it_takes_them_along(
    base: Path, tmp_path: Path, start: Start
) -> None:
    """At once: one that waits for another to come up runs no Python that a signal could reach, and DeepSpeed's launcher
    gives it 30 s."""
    run = run_file(base, tmp_path, steps=100_000)
    process = start(run)

    def workers() -> list[psutil.Process]:
        return [p for p in processes_of(run) if "bigtune.train" in p.cmdline() and p.ppid() != process.pid]

    wait_until(lambda: len(workers()) == 2, 60, "the start of workers")
    first = min(workers(), key=lambda worker: worker.pid)
    first.suspend()  # so that it surely does not come up
    other = max(workers(), key=lambda worker: worker.pid)
    wait_until(lambda: other.num_threads() > 1 and other.cpu_percent(0.5) < 5, 60, "a worker that waits")
    first.kill()
    wait_until(lambda: not other.is_running() or other.status() == psutil.STATUS_ZOMBIE, 15, "the end of the other")
    assert process.wait(15) == 1
