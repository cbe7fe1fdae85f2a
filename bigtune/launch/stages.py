"""What a command of the run file does before, between and around the stages, on this host.

The demo and the command line share it.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bigtune.config import Run
from bigtune.data.store import Manifest
from bigtune.dist import PREPARED
from bigtune.errors import ConfigError, LaunchError
from bigtune.launch.local import check_ranks, default_ranks, launch
from bigtune.progress import bar

if TYPE_CHECKING:
    from bigtune.evaluate.report import Report


def prepare_documents(run: Run) -> Manifest:
    """The document store of a run, with a bar."""
    from bigtune.data.prepare import prepare

    with bar("prepare") as shown:
        manifest = prepare(run.data, run.model.path, run.store, shown.advance_to)
    print(f"prepare: {manifest.summary()}", file=sys.stderr)
    return manifest


def train_here(
    run: Run,
    run_file: str | Path,
    overrides: Sequence[str] = (),
    ranks: int | None = None,
    resume: str | None = None,
    oversubscribe: bool = False,
) -> int:
    """Prepare, then train on workers of this host; the exit code of the command.

    Raises:
        BigtuneError: before any worker starts where possible, else what the first failing worker says.
    """
    from bigtune.train.ds_config import read_preset
    from bigtune.train.ops import ensure_ops, needed_ops
    from bigtune.train.start import find_start

    ranks = ranks or default_ranks()
    check_ranks(ranks, oversubscribe)
    preset = read_preset(run.deepspeed)
    find_start(run, resume)
    prepare_documents(run)
    ensure_ops(needed_ops(preset, run.optim), lambda line: print(line, file=sys.stderr))
    try:
        run.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LaunchError(f"output: {run.output.absolute()} cannot be written: {error.strerror}") from None
    arguments = [str(run_file), *(f"--set={item}" for item in overrides)]
    return launch(ranks, arguments + ([f"--resume={resume}"] if resume else []), run.output, {PREPARED: "1"})


def merge_checkpoint(checkpoint: Path, output: Path, dtype: str | None = None, shard_size: str = "5GB") -> Path:
    """Merge a checkpoint into a model folder, with a bar."""
    from bigtune.checkpoint.merge import merge, parse_size

    with bar("merge") as shown:
        return merge(checkpoint, output, dtype, parse_size(shard_size), shown.advance_to)


def evaluate_model(run: Run, model: Path) -> "Report":
    """Score a model folder on the run's held-out rows, with a bar.

    Raises:
        ConfigError: the run file has no evaluate section.
    """
    from bigtune.evaluate.run import evaluate

    if run.evaluate is None:
        raise ConfigError("the run file has no evaluate section; add evaluate: {sources: [{path: …}]}")
    with bar("evaluate") as shown:
        return evaluate(
            run.evaluate, run.data, model, run.train.seed,
            progress=lambda stage, done, total: shown.advance_to(done, total, stage),
        )  # fmt: skip
