"""Code of a model's folder runs where the run file says so, and nowhere else."""

import json
from pathlib import Path

import pytest

from bigtune.checkpoint.merge import merge
from bigtune.config import Run
from bigtune.data.chat import load_tokenizer
from bigtune.data.prepare import prepare
from bigtune.errors import ModelError
from bigtune.evaluate.load import load
from bigtune.model.load import read_config
from tests.tiny import tiny_model, tiny_run, write_rows
from tests.training import metrics, step, train

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path({ran!r}).touch()

class MineConfig(LlamaConfig):
    model_type = "mine"

class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
"""


def run_of(folder: Path, **changes: object) -> Run:
    run = tiny_run(folder, train__steps=2, **changes)
    prepare(run.data, run.model.path, run.store)
    return run


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A Llama that says that it is code of its own; `ran` appears where that runs."""
    tiny_model(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text()) | {"model_type": "mine", "architectures": ["MineForCausalLM"]}
    config["auto_map"] = {
        "AutoConfig": "modeling_mine.MineConfig",
        "AutoModelForCausalLM": "modeling_mine.MineForCausalLM",
    }
    path.write_text(json.dumps(config))
    (tmp_path / "model" / "modeling_mine.py").write_text(CODE.format(ran=str(tmp_path / "ran")))
    return tmp_path


def test_it_is_not_run_and_nobody_is_asked(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*words: object) -> str:
        raise AssertionError("asked")

    monkeypatch.setattr("builtins.input", asked)
    with pytest.raises(ModelError, match=r"Python code beside it \(auto_map .*; .* set model.trust_remote_code: true"):
        read_config(own / "model")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(own / "model")
    load_tokenizer(own / "model")
    run_of(own)
    assert not (own / "ran").exists()


def test_a_known_type_needs_no_code_beside_it(own: Path) -> None:
    path = own / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "llama"}))
    assert read_config(own / "model").model_type == "llama"
    assert not (own / "ran").exists()


def test_where_the_run_file_trusts_it_it_trains_as_what_it_is(own: Path, tmp_path: Path) -> None:
    run = run_of(own, model__trust_remote_code=True)
    train(run)
    assert (own / "ran").exists()
    merged = merge(step(run, 2), tmp_path / "merged")
    assert (merged / "modeling_mine.py").is_file()
    assert type(load(merged, trusted=True).model).__name__ == "MineForCausalLM"
    tiny_model(tmp_path / "plain" / "model")
    (own / "rows.jsonl").rename(tmp_path / "plain" / "rows.jsonl")
    plain = run_of(tmp_path / "plain")
    train(plain)
    for one, other in zip(metrics(plain), metrics(run), strict=True):  # its layers are gathered whole, in another order
        assert one == {key: pytest.approx(value, rel=1e-6) for key, value in other.items()}
