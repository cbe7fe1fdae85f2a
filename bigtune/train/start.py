"""Where a run starts from: the beginning, or a checkpoint that is whole and fits it.

This is what one host sees, from names and sizes, before the ranks meet; `settle` is what they find together.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bigtune.checkpoint.folder import latest, latest_step, read_json, step_folder, steps_in
from bigtune.checkpoint.manifest import FILE, Manifest, missing_or_cut
from bigtune.config import Run
from bigtune.errors import CheckpointError, ConfigError
from bigtune.runfile import load_run

FREE = (
    "train.steps", "train.epochs", "train.micro_batch", "train.activation_checkpointing", "train.max_skipped_steps",
    "train.step_timeout_seconds", "train.time_limit_minutes", "checkpoint", "evaluate", "launch", "output",
    "data.store", "data.sources", "data.workers", "data.on_bad_row", "data.min_supervised",
)  # fmt: skip
"""What may differ from the run file in the checkpoint: none of it changes the meaning of the state. What sources
change in the documents is seen by their fingerprint."""
FIXED = {
    "model": "the saved state is another model's",
    "adapter": "the saved state is another adapter's",
    "optim.name": "the saved state is another optimizer's",
    "data": "the position in the data would mean other rows; --new-data begins the next epoch with them",
    "train.seed": "the position in the data would mean other rows; --new-data begins the next epoch with them",
}
"""What would make the result meaningless. All the rest changes what a run computes from here on, which is done where
--resume asks for it."""


def find_start(run: Run, resume: str | None, new_data: bool = False) -> Path | None:
    """The checkpoint to go on from, as far as this host can see; None for the beginning.

    Args:
        resume: "latest", "step-N" or a path; None for the latest if the output folder has one.
        new_data: let the data differ from the checkpoint's.

    Raises:
        CheckpointError: there is no such checkpoint, none is whole, or it belongs to another base model.
        ConfigError: the run file differs from the checkpoint's in a way that matters.
    """
    problems = {}
    for folder in _candidates(run, resume):
        problem = _seen_problem(folder)
        if problem is None:
            changes_since(run, folder, resume is not None, new_data)
            return folder
        problems[folder] = problem
    if problems:
        raise none_whole(problems)
    return None


def _candidates(run: Run, resume: str | None) -> list[Path]:
    """The folders that `resume` may mean, the first choice first: the one that is named; else the one that `latest`
    names, and all that are older.

    Raises:
        CheckpointError: it means none.
    """
    checkpoints = run.output / "checkpoints"
    if resume is not None and resume != "latest":
        folder = named(run, resume)
        if not (folder / FILE).is_file():
            raise CheckpointError(f"--resume {resume}: {folder.absolute()} is no checkpoint")
        return [folder]
    newest = latest(checkpoints)
    if newest is None and resume == "latest":
        raise CheckpointError(f"--resume latest: {checkpoints.absolute()} holds no checkpoint")
    return _down_from(checkpoints, latest_step(checkpoints))


def _down_from(checkpoints: Path, newest: int | None) -> list[Path]:
    return [folder for step, folder in reversed(steps_in(checkpoints).items()) if newest is not None and step <= newest]


def named(run: Run, resume: str) -> Path:
    """The folder that `step-N` or a path means."""
    if resume[:5] == "step-" and resume[5:].isdecimal():
        return step_folder(run.output / "checkpoints", int(resume[5:]))
    return Path(resume)


def _seen_problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint, from its manifest and the sizes of its files; other hosts may have some."""
    try:
        manifest = Manifest.read(folder)
    except CheckpointError as error:
        return str(error)
    found = missing_or_cut(folder, manifest)
    if manifest.disks:
        found = {name: problem for name, problem in found.items() if (folder / name).exists()}
    return "; ".join(f"{name} {problem}" for name, problem in found.items()) or None


def none_whole(problems: Mapping[Path, str]) -> CheckpointError:
    """Of checkpoints, the first choice first, with what is wrong with each."""
    folder, problem = next(iter(problems.items()))
    others = f", nor is any of the {len(problems) - 1} before" if len(problems) > 1 else ""
    return CheckpointError(
        f"{folder} is not whole ({problem}){others}; bring the files back, resume from another step, or give another "
        "output to begin anew"
    )


def documents_of(checkpoint: Path | None) -> str | None:
    """The fingerprint of the documents that a checkpoint was trained on.

    Raises:
        CheckpointError: its data.json is missing or broken.
    """
    return read_json(checkpoint, "data.json").get("documents") if checkpoint else None


def changes_since(run: Run, folder: Path, on_purpose: bool, new_data: bool) -> list[str]:
    """What the run file says otherwise than the checkpoint's does, as `key: before → now`.

    Args:
        on_purpose: whether the user named the checkpoint to go on from.

    Raises:
        ConfigError: it would make the result meaningless, or changes it and is not asked for.
        CheckpointError: the base model of a LoRA run is gone or another.
    """
    before = dict(_leaves(load_run(folder / "run.yaml").model_dump(mode="json")))
    now = dict(_leaves(run.model_dump(mode="json")))
    changed = {
        key: f"{key}: {before.get(key)} → {now.get(key)}"
        for key in {**before, **now}
        if before.get(key) != now.get(key) and not _within(key, FREE)
    }
    refused = {key: _within(key, FIXED) for key in changed}
    if new_data:
        refused = {key: group for key, group in refused.items() if group not in ("data", "train.seed")}
    for key, group in refused.items():
        if group:
            raise ConfigError(
                f"{run.output}: its checkpoints cannot go on with {changed[key]}: {FIXED[group]}; change it back, or "
                "give another output"
            )
    if changed and not on_purpose and not new_data:
        raise ConfigError(
            f"{run.output}: holds a run with other settings ({'; '.join(changed.values())}); change them back, go on "
            f"with the new ones by --resume latest, or give another output"
        )
    if run.adapter:
        _check_same_base(run.model.path, folder)
    return list(changed.values())


def _within(key: str, names: Iterable[str]) -> str | None:
    return next((name for name in names if key == name or key.startswith(f"{name}.")), None)


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
