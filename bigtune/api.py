"""The stages of a run for Python, each with a bar on standard error; the command line and the demo call the same.

    from bigtune import api
    from bigtune.runfile import load_run

    run = load_run("recipes/gsm8k.yaml", ["train.steps=20"])
    api.train(run, ranks=2)
    api.merge(run.output, Path("models/gsm8k"))
    report = api.evaluate(run, Path("models/gsm8k"))

They work on this host. Each raises a `BigtuneError` for what the user can mend.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigtune.errors import ConfigError, LaunchError
from bigtune.progress import bar

if TYPE_CHECKING:
    from bigtune.bench.result import Result
    from bigtune.checkpoint.verify import Verdict
    from bigtune.config import Run
    from bigtune.data.manifest import Manifest
    from bigtune.evaluate.chat import Chat, Sampling
    from bigtune.evaluate.load import Loaded
    from bigtune.evaluate.report import Report
    from bigtune.launch.hosts import Host
    from bigtune.launch.link import Way
    from bigtune.report.inspection import Inspection


def prepare(run: "Run", keep: str | None = None) -> "Manifest":
    """Make the document store of a run, unless it is there already.

    Args:
        keep: the fingerprint of documents that a checkpoint goes on with; a store of them is not replaced.
    """
    from bigtune.data import prepare as stage
    from bigtune.data.store import Store
    from bigtune.data.stream import RowStream
    from bigtune.model.vocabulary import vocabulary_of

    if run.data.stream:
        raise ConfigError("'data.stream': true reads the sources while training: there is nothing to prepare")
    with bar("prepare") as shown:
        model_path = vocabulary_of(run.model, run.output).folder
        manifest = stage.prepare(run.data, model_path, run.store, shown.advance_to, keep, run.held_out)
    rows = RowStream(Store.open(run.store), run.data, run.train.seed, run.train.epochs)
    print(f"prepare: {manifest.summary()}\n{rows.summary()}", file=sys.stderr)
    return manifest


def inspect(run: "Run", samples: int = 3, rows: int = 1, ranks: int = 2) -> "Inspection":
    """Look at what a run trains on, prepared first if it is not; a run that training would refuse can be seen too.

    Args:
        samples: documents to read.
        rows: packed rows to read.
        ranks: data ranks that the batches are dealt to.
    """
    from bigtune.report import data as stage
    from bigtune.report.inspection import Wishes

    with bar("prepare") as shown:
        return stage.inspect(run, Wishes(samples, rows, ranks), shown.advance_to)


def train(
    run: "Run",
    ranks: int | None = None,
    resume: str | None = None,
    oversubscribe: bool = False,
    new_data: bool = False,
) -> bool:
    """Prepare, then train on workers of this host, from the run's latest checkpoint if it has one.

    Args:
        ranks: workers; None for one a GPU, or one with all cores.
        resume: "latest", "step-N" or a checkpoint's path.
        oversubscribe: allow more ranks than cores.
        new_data: go on with other documents than the checkpoint's, from the next epoch on.

    Returns:
        Whether the run is done; False if it was interrupted, saved, and goes on when called again.

    Raises:
        BigtuneError: before any worker starts where possible, else what the first failing worker says.
    """
    from bigtune.checkpoint.folder import latest_step
    from bigtune.launch.attempt import worker_arguments
    from bigtune.launch.local import check_ranks, default_ranks, launch
    from bigtune.launch.supervise import Restarts
    from bigtune.train.lock import RunLock

    ranks = ranks or default_ranks()
    check_ranks(ranks, oversubscribe)
    _checked(run, resume, new_data)  # before anything is written
    with RunLock(run.output):  # the first worker takes it after this
        make_ready(run, resume, new_data)
    restarts = Restarts(run.launch.max_restarts, lambda _: latest_step(run.output / "checkpoints"))
    return launch(ranks, worker_arguments(run.output, resume, new_data), run.output, restarts)


def make_ready(run: "Run", resume: str | None = None, new_data: bool = False) -> str | None:
    """What is done once a host before its workers start: the run is checked as a whole, documents are prepared,
    DeepSpeed's operators built, and the resolved run file is written where workers read it.

    Returns:
        The fingerprint of the documents; None where they are streamed.
    """
    from bigtune.runfile import to_yaml
    from bigtune.train.ops import ensure_ops, needed_ops
    from bigtune.train.start import documents_of

    preset, start = _checked(run, resume, new_data)
    documents = None if run.data.stream else prepare(run, None if new_data else documents_of(start)).fingerprint
    ensure_ops(needed_ops(preset, run.optim), _note)
    try:
        run.output.mkdir(parents=True, exist_ok=True)
        (run.output / "run.yaml").write_text(to_yaml(run), encoding="utf-8")
    except OSError as error:
        raise LaunchError(f"output: {run.output.absolute()} cannot be written: {error.strerror}") from None
    return documents


def _checked(run: "Run", resume: str | None, new_data: bool) -> "tuple[dict[str, Any], Path | None]":
    """The preset, and the checkpoint to go on from, of a run whose parts go together."""
    from bigtune.train.ds_config import read_preset
    from bigtune.train.start import find_start
    from bigtune.train.support import check

    preset = read_preset(run.deepspeed)
    start = find_start(run, resume, new_data)
    check(run, preset)
    return preset, start


def launch(
    run: "Run",
    hosts: "Sequence[Host]",
    way: "Way",
    resume: str | None = None,
    new_data: bool = False,
    exclude_bad: bool = False,
    every_rank: bool = False,
) -> bool:
    """Train on several hosts, each reached in the same way, after a look at all of them.

    Args:
        hosts: with the ranks of each; see `bigtune.launch.hosts`.
        way: by ssh, pdsh or srun; see `bigtune.launch.link`.
        exclude_bad: go on without hosts that cannot be reached or used, instead of naming them and ending.
        every_rank: show what all ranks print, not the first alone.

    Returns:
        As `train`.

    Raises:
        LaunchError: a host cannot be used, or the rank that failed first, on which host, and why.
    """
    from bigtune.launch.remote import Wishes
    from bigtune.launch.remote import launch as stage

    return stage(run, hosts, way, Wishes(resume, new_data, exclude_bad, every_rank))


def bench(
    run_file: Path,
    sweep: Sequence[str] = (),
    ranks: Sequence[int] = (),
    overrides: Sequence[str] = (),
    steps: int = 10,
    warm_up: int = 3,
    output: Path | None = None,
) -> "Iterator[Result]":
    """Measure how fast a run trains on this host, case after case; a case is measured when it is asked for, and written
    to `output`/bench.jsonl as it ends.

    Args:
        sweep: each as `key=value,value`; the cases are the product of all, and of `ranks`.
        ranks: workers; none for one a GPU, or one with all cores.
        overrides: of the run file, as `--set` takes them.
        steps: of each case that are measured, 3 or more, after `warm_up` that are left out, 1 or more.
        output: default: runs/bench/ and the run file's name.

    Raises:
        ConfigError: the run file or the sweep is wrong. A case that is has a reason in place of figures.
    """
    from bigtune.bench.result import results_folder
    from bigtune.bench.session import Session, Wishes
    from bigtune.bench.sweep import cases_of
    from bigtune.launch.local import default_ranks

    cases = cases_of(sweep, ranks or [default_ranks()])
    folder = output or results_folder(run_file)
    return Session(run_file, overrides, Wishes(steps, warm_up), folder).measure(cases)


def merge(
    checkpoint: Path,
    output: Path,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    adapter: bool = False,
    base: Path | None = None,
    workers: int | None = None,
) -> Path:
    """Merge a checkpoint of bigtune's or of DeepSpeed's ZeRO-3 (the folder of a step, or the one that it lies in for
    the latest) into a model folder. A merge that was interrupted goes on when it is called again.

    Args:
        adapter: of a LoRA run, write the adapter alone, as peft loads it.
        base: the base model's folder, if it moved since a LoRA run; the folder of config and tokenizer, if a checkpoint
            of DeepSpeed's has none.
        workers: threads; None for one a core.
    """
    from bigtune.checkpoint import merge as stage

    size = stage.parse_size(max_shard_size)
    with bar("merge") as shown:
        return stage.merge(checkpoint, output, dtype, size, shown.advance_to, adapter, base, workers, _note)


def verify(path: Path, workers: int | None = None) -> "Verdict":
    """Read a checkpoint, all of a run's or a merged model against the checksums that were written with it.

    Args:
        workers: threads; None for one a core.
    """
    from bigtune.checkpoint import verify as stage

    with bar("verify") as shown:
        return stage.verify(path, workers, shown.advance_to)


def evaluate(run: "Run", model: Path) -> "Report":
    """Score a model on the run's held-out rows.

    Args:
        model: its folder, an adapter's, a checkpoint's, or a run's for the latest checkpoint.

    Raises:
        ConfigError: the run file has no evaluate section.
    """
    return evaluate_shots(run, model, ())[0]


def evaluate_shots(run: "Run", model: Path, shots: Sequence[int]) -> "list[Report]":
    """The same with each of these numbers of examples before a question; with the run file's alone where there are
    none."""
    from bigtune.data.holdout import bound_of
    from bigtune.evaluate import run as stage

    if run.evaluate is None:
        raise ConfigError("the run file has no evaluate section; add evaluate: {sources: [{path: …}]}")
    sections = [run.evaluate.model_copy(update={"shots": count}) for count in shots] or [run.evaluate]
    asks_for_training_rows = any(
        section.sources is None or (section.shots and section.shots_from is None) for section in sections
    )
    below = bound_of(run.data, run.store) if asks_for_training_rows else 0
    loaded = _loaded(model, run.model.trust_remote_code)
    reports = []
    for section in sections:
        with bar("evaluate") as shown:

            def advance(stage: str, done: int, total: int, shown: Any = shown) -> None:
                shown.advance_to(done, total, stage)

            reports.append(stage.evaluate(section, run.data, loaded, run.train.seed, advance, below))
    return reports


def chat(
    model: Path, sampling: "Sampling | None" = None, system: str = "", seed: int = 0, trusted: bool = False
) -> "Chat":
    """Begin a conversation with a model.

    Args:
        model: as `evaluate` takes it.
        trusted: whether code of the model's folder may run.
    """
    from bigtune.evaluate.chat import Chat, Sampling

    return Chat(_loaded(model, trusted), sampling or Sampling(), system, seed)


def _loaded(model: Path, trusted: bool) -> "Loaded":
    """A model for inference, merged for the time of loading where it is a checkpoint."""
    from bigtune.evaluate.load import load, whole

    with whole(model, merge) as folder:
        return load(folder, trusted=trusted, name=str(model))


def _note(line: str) -> None:
    print(line, file=sys.stderr)
