"""Where a run starts from: the beginning, or a checkpoint that fits it."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bigtune.checkpoint.layout import latest, read_json, step_folder
from bigtune.config import Run
from bigtune.errors import CheckpointError, ConfigError
from bigtune.runfile import load_run

MAY_CHANGE = (
    "train.steps", "train.epochs", "train.micro_batch", "train.activation_checkpointing", "train.max_skipped_steps",
    "train.step_timeout_seconds", "checkpoint", "evaluate", "output",
    "data.store", "data.sources", "data.workers", "data.on_bad_row", "data.min_supervised",
)  # fmt: skip
"""What may differ from the run file in the checkpoint: none of it changes the meaning of the state. What sources
change in the documents is seen by their fingerprint."""


def find_start(run: Run, resume: str | None, new_data: bool = False) -> Path | None:
    """The checkpoint to go on from; None for the beginning.

    Args:
        resume: "latest", "step-N" or a path; None for the latest if the output folder has one.
        new_data: let the data differ from the checkpoint's.

    Raises:
        CheckpointError: there is no such checkpoint, or it belongs to another base model.
        ConfigError: the run file differs from the checkpoint's in a way that matters.
    """
    checkpoints = run.output / "checkpoints"
    if resume is None or resume == "latest":
        folder = latest(checkpoints)
        if folder is None and resume == "latest":
            raise CheckpointError(f"--resume latest: {checkpoints.absolute()} holds no checkpoint")
    else:
        named = step_folder(checkpoints, int(resume[5:])) if resume[:5] == "step-" and resume[5:].isdigit() else None
        folder = named or Path(resume)
        if not (folder / "layout.json").is_file():
            raise CheckpointError(f"--resume {resume}: {folder.absolute()} is no checkpoint")
    if folder is not None:
        _check_same_run(run, folder, (*MAY_CHANGE, "data") if new_data else MAY_CHANGE)
        if run.adapter:
            _check_same_base(run.model.path, folder)
    return folder


def documents_of(checkpoint: Path | None) -> str | None:
    """The fingerprint of the documents that a checkpoint was trained on.

    Raises:
        CheckpointError: its data.json is missing or broken.
    """
    return read_json(checkpoint, "data.json").get("documents") if checkpoint else None


def _check_same_run(run: Run, folder: Path, may_change: Sequence[str]) -> None:
    before = dict(_leaves(load_run(folder / "run.yaml").model_dump(mode="json")))
    now = dict(_leaves(run.model_dump(mode="json")))
    changed = [
        f"{key}: {before.get(key)} → {now.get(key)}"
        for key in {**before, **now}
        if before.get(key) != now.get(key)
        and not any(key == allowed or key.startswith(allowed + ".") for allowed in may_change)
    ]
    if changed:
        raise ConfigError(
            f"{run.output}: holds a run with other settings ({'; '.join(changed)}); "
            "change them back to go on with it, or give another output"
        )


def _check_same_base(model_path: Path, folder: Path) -> None:
    from bigtune.checkpoint.base import Base  # imports torch

    base = Base.read(folder)
    if base is None:
        raise CheckpointError(f"{folder}: lacks adapter.json; resume from another step")
    base.shards(folder, model_path)


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
