"""A LoRA run's checkpoints hold what is trained alone; it goes on to the last bit, and merges as peft itself would."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from bigtune.checkpoint.layout import Layout
from bigtune.checkpoint.merge import merge
from bigtune.config import Run
from bigtune.data.prepare import prepare
from bigtune.errors import CheckpointError
from bigtune.evaluate.load import load
from bigtune.model.vocabulary import vocabulary_of
from bigtune.runfile import to_yaml
from bigtune.train.start import find_start
from tests.tiny import tiny_llama, tiny_run, tiny_tokenizer, write_rows
from tests.train.test_lora import small_model
from tests.training import Trained, differing, metrics, reseal, step, train

STEPS, STOP_AFTER = 4, 2
TOKENS = ["<tool>", "</tool>"]
TOKENIZER = 287
"""Tokens of the tiny tokenizer."""


def make_trained(folder: Path, model_type: str, shape: dict[str, Any] | None = None, **changes: Any) -> Trained:
    if model_type == "llama":
        tiny_llama(folder / "model", **(shape or {}))
    else:
        small_model(folder / "model", model_type)
    tiny_tokenizer(folder / "model")
    write_rows(folder / "rows.jsonl")
    settings = {
        "optim__name": "adamw_8bit", "optim__learning_rate": 0.03, "train__steps": STEPS, "train__global_batch": 3,
        "checkpoint__every_steps": STOP_AFTER, "data__store": str(folder / "store"), "data__sequence_length": 60,
        "data__on_long_document": "truncate",
        "adapter": {"rank": 3, "alpha": 5.0, "dropout": 0.1, **changes.pop("adapter", {})}, **changes,
    }  # fmt: skip
    run = tiny_run(folder, **settings)
    prepare(run.data, vocabulary_of(run.model, run.output).folder, run.store)
    train(run)
    return Trained(folder, settings, run)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return make_trained(tmp_path_factory.mktemp("llama"), "llama")


VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {},
    "gpt_neox": {"adapter": {"target_modules": ["query_key_value", "dense"], "use_rslora": True}},
    "gemma2": {"adapter": {"modules_to_save": ["norm", "post_attention_layernorm"]}},
}


@pytest.fixture(scope="module", params=VARIANTS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    if request.param == "llama":
        return request.getfixturevalue("llama")  # type: ignore[no-any-return]
    return make_trained(tmp_path_factory.mktemp("trained"), request.param, **VARIANTS[request.param])


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def grown(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """With new tokens, and so with embeddings that are trained."""
    return make_trained(
        tmp_path_factory.mktemp("grown"),
        "llama",
        {"tied": request.param, "vocab_size": TOKENIZER},
        model__add_tokens=TOKENS,
    )


def logits(model: Any) -> torch.Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        return model.eval()(torch.randint(2, TOKENIZER, (2, 17))).logits  # type: ignore[no-any-return]


def base_of(run: Run) -> Any:
    return AutoModelForCausalLM.from_pretrained(run.model.path, dtype=torch.float32)


def test_a_run_that_stopped_and_went_on_equals_one_that_did_not(llama: Trained, tmp_path: Path) -> None:
    run = llama.another(tmp_path / "stopped", checkpoint__every_steps=None)
    train(run, stop_after=STOP_AFTER)
    assert differing(step(run, STOP_AFTER), step(llama.run, STOP_AFTER)) == []
    train(run)
    assert metrics(run) == metrics(llama.run)
    assert differing(step(run, STEPS), step(llama.run, STEPS)) == []
    assert differing(step(run, STEPS), step(run, STOP_AFTER)) != []  # the comparison sees training
    assert (step(run, STEPS) / "adapter.json").read_text() == (step(llama.run, STEPS) / "adapter.json").read_text()


def test_a_checkpoint_holds_what_is_trained_alone(llama: Trained) -> None:
    layout = Layout.read(step(llama.run, STEPS))
    names = [parameter.name for _, parameter in layout.parameters()]
    assert len(names) == 2 * 2 * 7
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in names)
    assert {group.group for group in layout.sub_groups} == {"matrices"}
    assert {state.dtype for group in layout.sub_groups for state in group.states.values()} >= {"uint8"}


def test_the_merged_model_is_the_base_with_what_was_learnt(trained: Trained, tmp_path: Path) -> None:
    """As peft merges and computes it, in float32; and what is frozen is the base's to the last bit."""
    run = trained.run
    merged = AutoModelForCausalLM.from_pretrained(merge(run.output, tmp_path / "merged", "float32", 30_000))
    adapter = merge(run.output, tmp_path / "adapter", adapter=True)
    assert not (adapter / "config.json").exists()
    wrapped = PeftModel.from_pretrained(base_of(run), adapter)
    assert wrapped.active_peft_config.base_model_name_or_path == str(run.model.path)
    unmerged = logits(wrapped)
    wanted = dict(wrapped.merge_and_unload().named_parameters())
    base = dict(base_of(run).named_parameters())
    found = dict(merged.named_parameters())
    assert found.keys() == wanted.keys() == base.keys()
    folds = json.loads((step(run, STEPS) / "adapter.json").read_text())["folds"]
    changed = {name for name in found if not torch.equal(found[name], base[name])}
    whole = {name for name in found if "norm" in name} if "modules_to_save" in trained.settings["adapter"] else set()
    assert folds.keys() <= changed <= folds.keys() | whole
    for name, value in wanted.items():
        assert torch.allclose(found[name], value, atol=1e-7, rtol=0), name
    error = float((logits(merged) - unmerged).norm() / unmerged.norm())
    assert error < 1e-6
    assert float((logits(base_of(run)) - unmerged).norm() / unmerged.norm()) > 1e-2  # it learnt something


def test_a_fold_that_is_transposed_or_not_scaled_would_fail(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The mutations; layers are square, so that no shape gives them away."""
    trained = make_trained(tmp_path_factory.mktemp("mutated"), "gpt2")
    path = step(trained.run, STEPS) / "adapter.json"
    wanted = logits(AutoModelForCausalLM.from_pretrained(merge(trained.run.output, path.parent / "right")))
    original = json.loads(path.read_text())
    name = "transformer.h.0.mlp.c_fc.weight"
    for change in ({"transposed": False}, {"scale": 1.0}):
        tree = json.loads(json.dumps(original))
        tree["folds"][name] |= change
        path.write_text(json.dumps(tree))
        reseal(path.parent)
        wrong = merge(trained.run.output, path.parent / f"wrong {next(iter(change))}")
        assert float((logits(AutoModelForCausalLM.from_pretrained(wrong)) - wanted).norm() / wanted.norm()) > 1e-4


def test_the_default_dtype_is_the_bases_and_an_adapters_float32(llama: Trained, tmp_path: Path) -> None:
    merged = load_file(merge(llama.run.output, tmp_path / "merged", "bfloat16") / "model.safetensors")
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    adapter = load_file(merge(llama.run.output, tmp_path / "adapter", adapter=True) / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}


def test_new_tokens_come_with_the_model_and_with_the_adapter(grown: Trained, tmp_path: Path) -> None:
    run, rows = grown.run, TOKENIZER + 2
    layout = Layout.read(step(run, STEPS))
    embeddings = [p.name for group, p in layout.parameters() if group.group == "embeddings"]
    untied = not base_of(run).config.tie_word_embeddings
    assert embeddings == ["model.embed_tokens.weight"] + ["lm_head.weight"] * untied
    path = merge(run.output, tmp_path / "merged", "float32")
    merged, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    assert merged.config.vocab_size == rows == len(merged.get_input_embeddings().weight)
    assert len(merged.get_output_embeddings().weight) == rows
    assert [tokenizer.convert_tokens_to_ids(token) for token in TOKENS] == [TOKENIZER, TOKENIZER + 1]
    assert tokenizer("<tool>").input_ids == [TOKENIZER]
    adapter = merge(run.output, tmp_path / "adapter", adapter=True)
    base = base_of(run)
    base.resize_token_embeddings(len(AutoTokenizer.from_pretrained(adapter)))
    found, wanted = logits(merged), logits(PeftModel.from_pretrained(base, adapter))
    assert float((found - wanted).norm() / wanted.norm()) < 1e-6
    resumed = grown.another(tmp_path / "resumed")
    train(resumed, stop_after=STOP_AFTER)
    train(resumed)
    assert differing(step(resumed, STEPS), step(run, STEPS)) == []


# ---------------------------------------------------------------------------------------------- bad input


def test_another_base_or_none_is_one_line(llama: Trained, tmp_path: Path) -> None:
    folder = tmp_path / "moved"
    shutil.copytree(llama.run.output, folder / "run")
    shutil.copytree(llama.run.model.path, folder / "model")
    path = folder / "run" / "checkpoints" / f"step-{STEPS}" / "adapter.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"path": str(folder / "model")}))
    run = tiny_run(folder, **llama.settings)
    (path.parent / "run.yaml").write_text(to_yaml(run))
    reseal(path.parent)
    some = next(path for path in sorted((folder / "model").glob("*.safetensors")))
    content = load_file(some)
    save_file({name: tensor + 1e-3 for name, tensor in content.items()}, some, metadata={"format": "pt"})
    for message in (refused(path.parent, tmp_path / "out"), refused_start(run, path.parent)):
        assert f"its adapters were trained on another base model than {folder / 'model'} holds now" in message
    shutil.rmtree(folder / "model")
    message = refused(path.parent, tmp_path / "out")
    assert "holds adapters alone, and their base model cannot be read" in message
    merge(path.parent, tmp_path / "out", base=llama.run.model.path)


def test_adapters_without_what_tells_of_their_base_are_no_model(llama: Trained, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(step(llama.run, STEPS), tmp_path / "step-4")
    (checkpoint / "adapter.json").unlink()
    assert "adapter.json is missing" in refused(checkpoint, tmp_path / "merged")
    (checkpoint / "adapter.json").write_text("{}")
    reseal(checkpoint)
    assert "adapter.json: broken" in refused(checkpoint, tmp_path / "merged")


def refused(checkpoint: Path, output: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        merge(checkpoint, output, **options)
    assert "\n" not in str(caught.value)
    assert not output.exists()
    return str(caught.value)


def refused_start(run: Run, checkpoint: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        find_start(run, str(checkpoint))
    return str(caught.value)


def test_an_adapter_is_evaluated_as_the_merged_model_is(llama: Trained, tmp_path: Path) -> None:
    adapter = load(merge(llama.run.output, tmp_path / "adapter", adapter=True))
    merged = load(merge(llama.run.output, tmp_path / "merged"))
    ids = torch.arange(12)[None] + 5
    torch.testing.assert_close(adapter.model(ids).logits, merged.model(ids).logits)


def test_a_run_without_adapter_has_none_to_write(tmp_path: Path) -> None:
    tiny_tokenizer(tiny_llama(tmp_path / "model"))
    write_rows(tmp_path / "rows.jsonl")
    run = tiny_run(tmp_path, train__steps=1)
    prepare(run.data, run.model.path, run.store)
    train(run)
    assert "trained the whole model" in refused(run.output, tmp_path / "adapter", adapter=True)
    assert find_start(run, None) == step(run, 1)
