"""The run file, read and written: what is said of an unknown key, a wrong value, broken YAML or a bad override."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from bigtune.config import Run
from bigtune.errors import ConfigError
from bigtune.runfile import dotted_keys, load_run, parse, to_line, to_yaml
from bigtune.train.ds_config import preset_folder, read_preset

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
PRESETS = sorted(preset_folder().glob("*.json"))
MINIMAL = """\
model: {path: models/base}
data:
  sources:
    - path: data/train.jsonl
train: {epochs: 2}
output: runs/first
"""


@pytest.fixture
def write(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL, encoding="utf-8")
    return path


def load(folder: Path, text: str, *overrides: str) -> Run:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return load_run(path, overrides)


def refused(folder: Path, text: str, *overrides: str) -> str:
    """The message, which is one line."""
    with pytest.raises(ConfigError) as caught:
        load(folder, text, *overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_run_file_is_read_without_torch_or_a_stage() -> None:
    code = (
        "import sys, bigtune.runfile\n"
        "print(sorted(name for name in sys.modules if name.startswith(('torch', 'bigtune'))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == str(["bigtune", "bigtune.config", "bigtune.errors", "bigtune.runfile"])


def test_every_run_file_that_the_readme_shows_parses(tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    for block in (block for block in blocks if re.search(r"^model:", block, re.MULTILINE)):
        load(tmp_path, block)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINIMAL + "optim: {lerning_rate: 1.0}\n", "unknown key 'optim.lerning_rate'; did you mean 'learning_rate'?"),
        (MINIMAL + "optim: {lerning_rate: 1.0}\n", "(valid: name, learning_rate, schedule, warmup_steps,"),
        (MINIMAL + "chekpoint: {}\n", "unknown key 'chekpoint'; did you mean 'checkpoint'? (valid: model, data,"),
        (MINIMAL + "learning_rate: 1.0\n", "did you mean 'optim.learning_rate'?"),
        (
            MINIMAL.replace("data/train.jsonl", "x\n      pth: y"),
            "unknown key 'data.sources.0.pth'; did you mean 'path'?",
        ),
    ],
)
def test_an_unknown_key_names_the_nearest_and_the_valid_ones(tmp_path: Path, text: str, message: str) -> None:
    assert message in refused(tmp_path, text)


@pytest.mark.parametrize(
    ("section", "complaint"),
    [
        ("optim: {learning_rate: fast}", "'optim.learning_rate' is 'fast'; input should be a valid number"),
        ("optim: {learning_rate: -1.0}", "'optim.learning_rate' is -1.0; input should be greater than 0"),
        ("optim: {learning_rate: 0}", "'optim.learning_rate' is 0; input should be greater than 0"),
        ("optim: {learning_rate: .inf}", "'optim.learning_rate' is inf; input should be a finite number"),
        ("optim: {learning_rate: .nan}", "'optim.learning_rate' is nan; input should be a finite number"),
        ("optim: {warmup_steps: 1.5}", "'optim.warmup_steps' is 1.5"),
        ("optim: {warmup_steps: '3'}", "'optim.warmup_steps' is '3'; input should be a valid integer"),
        ("optim: {betas: [0.9, 1.0]}", "'optim.betas.1' is 1.0; input should be less than 1"),
        ("optim: {betas: [0.9]}", "'optim.betas.1' is missing"),
        (
            "optim: {name: adamax}",
            "'optim.name' is 'adamax'; allowed: 'adamw', 'adamw_8bit', 'lion_8bit', 'sgd', 'adam'",
        ),
        ("optim: {name: [sgd]}", "'optim.name' is ['sgd']; allowed: 'adamw', "),
        (
            "optim: {final_learning_rate: 2}",
            "'optim.final_learning_rate' is 2; input should be less than or equal to 1",
        ),
        ("optim: {decay_steps: 0}", "'optim.decay_steps' is 0; input should be greater than or equal to 1"),
        ("optim: 3", "'optim' is 3"),
        ("checkpoint: {every_steps: 0}", "'checkpoint.every_steps' is 0; input should be greater than or equal to 1"),
        ("evaluate: {sources: []}", "'evaluate.sources' is []"),
        ("deepspeed: [zero3]", "'deepspeed' is ['zero3']; input should be a valid string"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(tmp_path: Path, section: str, complaint: str) -> None:
    assert complaint in refused(tmp_path, f"{MINIMAL}{section}\n")


def test_every_wrong_key_is_told_at_once(tmp_path: Path) -> None:
    message = refused(tmp_path, "model: {path: m}\ntrain: {steps: 0, micro_batch: 0}\n")
    for part in ("'data' is missing", "'output' is missing", "'train.steps' is 0", "'train.micro_batch' is 0"):
        assert part in message


@pytest.mark.parametrize("train", ["{}", "{steps: 3, epochs: 1}"])
def test_the_length_is_given_once(tmp_path: Path, train: str) -> None:
    text = MINIMAL.replace("{epochs: 2}", train)
    assert "'train': give either steps or epochs" in refused(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "key", "line"), [(MINIMAL + "train: {steps: 3}\n", "train", 7), ("a:\n  b: 1\n  b: 2\n", "b", 3)]
)
def test_a_key_given_twice_is_refused_by_line(tmp_path: Path, text: str, key: str, line: int) -> None:
    message = refused(tmp_path, text)
    assert f"the key '{key}' is given twice" in message
    assert f"line {line}:" in message


@pytest.mark.parametrize("number", ["1e-3", "1E-3", "1.0e-3", "+1e-3", "0.1e-2", ".1e-2", "0.001"])
def test_a_learning_rate_is_a_number_however_it_is_written(tmp_path: Path, number: str) -> None:
    """YAML 1.1, which PyYAML reads, takes 1e-3 for text."""
    assert load(tmp_path, f"{MINIMAL}optim: {{learning_rate: {number}}}\n").optim.learning_rate == 1e-3
    assert load(tmp_path, MINIMAL, f"optim.learning_rate={number}").optim.learning_rate == 1e-3


def test_overrides_reach_any_depth_and_sections_that_the_file_leaves_out(tmp_path: Path) -> None:
    run = load(
        tmp_path,
        MINIMAL,
        "optim.betas=[0.5, 0.6]",
        "data.sources.0.path=other.jsonl",
        "checkpoint.every_steps=5",
        "evaluate.sources=[{path: held.jsonl}]",
        "output=runs/second",
        "train.epochs=null",
        "train.steps=7",
    )
    assert run.optim.betas == (0.5, 0.6)
    assert run.data.sources[0].path == Path("other.jsonl")
    assert run.checkpoint.every_steps == 5
    assert run.evaluate is not None and run.evaluate.sources is not None
    assert run.evaluate.sources[0].path == Path("held.jsonl")
    assert run.output == Path("runs/second")
    assert (run.train.steps, run.train.epochs) == (7, None)


def test_the_last_of_two_overrides_wins(tmp_path: Path) -> None:
    assert load(tmp_path, MINIMAL, "train.seed=1", "train.seed=2").train.seed == 2


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("train.seed", "write section.key=value"),
        ("=3", "write section.key=value"),
        ("train..seed=3", "write section.key=value"),
        ("train.sed=3", "unknown key 'train.sed'; did you mean 'seed'?"),
        ("output.path=x", "output is a value, not a section"),
        ("data.sources.1.path=x", "'1' is no position in a list of 1"),
        ("data.sources.first=x", "'first' is no position in a list of 1"),
        ("train.seed=[1", "--set train.seed, line 1: not valid YAML"),
        ("train.seed=soon", "'train.seed' is 'soon'"),
        ("output=2024-13-01", "--set output: not valid YAML: month must be in 1..12"),
        ("data.supervise=[[user]]", "'data.supervise': [['user']]; allowed: all, last, or a list of system, user,"),
        ("evaluate={}", "run.yaml: evaluate.sources is missing; name held-out rows there"),
    ],
)
def test_a_bad_override_is_refused(tmp_path: Path, override: str, complaint: str) -> None:
    assert complaint in refused(tmp_path, MINIMAL, override)


def test_the_resolved_run_file_reads_back_the_same(tmp_path: Path) -> None:
    run = load(
        tmp_path,
        MINIMAL,
        "evaluate.sources=[{path: größe.jsonl}]",
        "optim.learning_rate=1e-05",
        "data.store=a/b",
        "output='1e-4'",  # a folder that looks like a number
    )
    assert load(tmp_path, to_yaml(run)) == run
    assert "größe" in to_yaml(run)


@pytest.mark.parametrize(
    "value", ["zero3", "1e-4", "null", "a: b", "größe", 1e-05, True, None, [1, "x"], {"a": [None]}]
)
def test_a_value_on_one_line_reads_back_the_same(value: object) -> None:
    assert "\n" not in to_line(value)
    assert parse(to_line(value), "value") == value


def test_keys_of_a_list_are_named_as_overrides_take_them() -> None:
    keys = list(dotted_keys(Run))
    assert {"data.sources", "data.sources.0.path", "evaluate.shots_from.0.split", "optim.betas", "train"} <= set(keys)
    assert "data.sources.path" not in keys


def test_a_missing_or_unreadable_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: no such run file \(looked in /"):
        load_run(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_run(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(MINIMAL.encode() + b"# \xe9\n")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_run(tmp_path / "latin.yaml")
    (tmp_path / "deep.yaml").write_text("a: " + "[" * 5000)
    with pytest.raises(ConfigError, match=r"deep\.yaml: not valid YAML: nested too deeply"):
        load_run(tmp_path / "deep.yaml")
    assert "a run file is a mapping of sections" in refused(tmp_path, "")
    assert "a run file is a mapping of sections" in refused(tmp_path, "- model\n")
    assert "run.yaml, line 2: not valid YAML" in refused(tmp_path, "model: {path: x}\n data: 3\n")


@pytest.mark.parametrize("recipe", RECIPES, ids=[path.stem for path in RECIPES])
def test_every_recipe_parses_and_names_a_good_preset(recipe: Path) -> None:
    read_preset(load_run(recipe).deepspeed)


@pytest.mark.parametrize("preset", PRESETS, ids=[path.stem for path in PRESETS])
def test_every_preset_holds_only_what_is_deepspeeds(preset: Path) -> None:
    assert read_preset(preset.stem)["zero_optimization"]["stage"] in (2, 3)
