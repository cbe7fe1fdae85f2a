"""Every cell of the table of preset × optimizer: what it says yes to works, what it refuses is told."""

import shutil
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file

from bigtune.checkpoint.layout import MASTER, Layout
from bigtune.checkpoint.merge import merge
from bigtune.config import OPTIMIZERS, Optim, Run
from bigtune.data.prepare import prepare
from bigtune.errors import ConfigError
from bigtune.train.ds_config import preset_folder, read_preset
from bigtune.train.support import PRESETS, TRAIN, check, preset_of
from tests.tiny import tiny_model, tiny_run, write_rows
from tests.training import differing, metrics, step, train

CELLS = [(preset, name) for name in TRAIN for preset in PRESETS]
SUPPORTED = [(preset, name) for preset, name in CELLS if not TRAIN[name][PRESETS.index(preset)]]
REFUSED = [cell for cell in CELLS if cell not in SUPPORTED]
RATES = {"sgd": 0.1, "lion_8bit": 3e-4}


QUICK = {
    ("zero3", "adamw_8bit"), ("zero3", "sgd"), ("zero3_offload", "adamw"), ("zero2", "lion_8bit"), ("zero2", "adam"),
}  # fmt: skip
"""Each preset and each optimizer once; the other cells take longer than `make test` has."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("support")
    tiny_model(folder / "model", tied=False)
    write_rows(folder / "rows.jsonl")
    run = run_of(folder, "zero3", "adamw")
    prepare(run.data, run.model.path, run.store)
    return folder


def run_of(folder: Path, preset: str, name: str, output: str = "run", **changes: object) -> Run:
    settings = {
        "deepspeed": preset, "optim__name": name, "optim__learning_rate": RATES.get(name, 3e-3), "train__steps": 4,
        "optim__schedule": "constant", "checkpoint__every_steps": 2, "data__store": str(folder / "store"),
        "output": str(folder / preset / name / output),
    }  # fmt: skip
    return tiny_run(folder, **{**settings, **changes})


def test_the_table_has_every_preset_and_every_optimizer() -> None:
    assert set(PRESETS) == {path.stem for path in preset_folder().glob("*.json")}
    assert set(TRAIN) == set(get_args(Optim.model_fields["name"].annotation))
    assert {name for _, name in SUPPORTED} == set(OPTIMIZERS)
    assert all(len(row) == len(PRESETS) for row in TRAIN.values())
    assert all(preset_of(read_preset(preset)) == preset for preset in PRESETS)


@pytest.mark.parametrize(
    ("preset", "name"),
    [cell if cell in QUICK else pytest.param(*cell, marks=pytest.mark.slow) for cell in SUPPORTED],
)
def test_what_is_supported_trains_resumes_and_merges(folder: Path, preset: str, name: str) -> None:
    """On 2 ranks: it learns; from a checkpoint in its middle it goes on to the same bits, and on 3 ranks to nearly the
    same; merged it is what the masters are."""
    run = run_of(folder, preset, name)
    train(run)
    lines = metrics(run)
    assert lines[-1]["loss"] < lines[0]["loss"]
    shutil.copytree(run.output, (resumed := run_of(folder, preset, name, "resumed")).output)
    train(resumed, resume="step-2")
    assert metrics(resumed) == lines
    assert differing(step(resumed, 4), step(run, 4)) == []
    assert differing(step(run, 2), step(run, 4)) != []
    assert_merged(step(run, 4), merge(run.output, run.output / "merged"))
    shutil.copytree(run.output, (elsewhere := run_of(folder, preset, name, "elsewhere")).output)
    train(elsewhere, ranks=3, resume="step-2")
    for line, other in zip(metrics(elsewhere), lines, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-3 if name.endswith("_8bit") else 1e-5)


def assert_merged(checkpoint: Path, merged: Path) -> None:
    """Every parameter equals the masters, put together here from the layout's numbers element by element."""
    layout = Layout.read(checkpoint)
    found = load_file(merged / "model.safetensors")
    ranks = [load_file(path) for path in sorted(checkpoint.glob("rank-*.safetensors"))]
    assert {parameter.name for _, parameter in layout.parameters()} == set(found)
    for group, parameter in layout.parameters():
        windows = [
            content[f"{group.index}.{MASTER}"][parameter.offset : parameter.offset + parameter.length]
            for content in ranks
        ]
        values = torch.cat(windows)[parameter.first : parameter.first + parameter.numel]
        assert torch.equal(found[parameter.name], values.view(parameter.shape)), parameter.name


@pytest.mark.parametrize(("preset", "name"), REFUSED)
def test_what_is_refused_is_told_in_one_line_with_what_to_take(folder: Path, preset: str, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^optim\.name: {name} is refused with {preset}: .*take adamw") as caught:
        check(run_of(folder, preset, name), read_preset(preset))
    assert "\n" not in str(caught.value)
