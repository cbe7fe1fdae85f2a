"""New tokens: the tokenizer, the embeddings and what prepares documents agree on them, on any number of ranks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PhiConfig, PhiForCausalLM

from bigtune.api import inspect
from bigtune.config import Model
from bigtune.data.prepare import prepare
from bigtune.data.recipe import Recipe
from bigtune.data.store import Store
from bigtune.dist import World
from bigtune.errors import ConfigError, ModelError
from bigtune.model.initial import Initial, vocabulary_parameters
from bigtune.model.load import skeleton
from bigtune.model.vocabulary import vocabulary_of
from bigtune.model.weights import Weights
from bigtune.train.ds_config import complete, read_preset
from bigtune.train.engine import Engine
from tests.distributed import run_distributed
from tests.tiny import tiny_llama, tiny_model, tiny_run, tiny_tokenizer, write_rows

TOKENS = ["<tool>", "</tool>"]
TOKENIZER = 287
"""Tokens of the tiny tokenizer."""


def made(folder: Path, rows: int, *tokens: str) -> tuple[Any, int, range]:
    """The tokenizer with the tokens, the rows of the config beside it, and which of them are new."""
    tiny_model(folder / "model", vocab_size=rows)
    vocabulary = vocabulary_of(Model(path=folder / "model", add_tokens=tokens), folder / "run")
    config = json.loads((vocabulary.folder / "config.json").read_text())
    return AutoTokenizer.from_pretrained(vocabulary.folder), config["vocab_size"], vocabulary.new_rows


def test_embeddings_grow_by_the_tokens_that_do_not_fit(tmp_path: Path) -> None:
    tokenizer, size, new_rows = made(tmp_path, TOKENIZER, *TOKENS)
    assert (size, new_rows) == (TOKENIZER + 2, range(TOKENIZER, TOKENIZER + 2))
    assert tokenizer("a<tool>b").input_ids == [*tokenizer("a").input_ids, TOKENIZER, *tokenizer("b").input_ids]
    assert tokenizer.decode([TOKENIZER + 1]) == "</tool>"


def test_rows_that_pad_the_embeddings_are_used_first(tmp_path: Path) -> None:
    _, size, new_rows = made(tmp_path, TOKENIZER + 1, *TOKENS)
    assert (size, new_rows) == (TOKENIZER + 2, range(TOKENIZER, TOKENIZER + 2))
    _, size, new_rows = made(tmp_path / "padded", TOKENIZER + 33, *TOKENS)
    assert (size, new_rows) == (TOKENIZER + 33, range(TOKENIZER, TOKENIZER + 2))


def test_a_token_that_is_there_needs_no_row(tmp_path: Path) -> None:
    tokenizer, size, new_rows = made(tmp_path, TOKENIZER, "<|end|>")
    assert (len(tokenizer), size, new_rows) == (TOKENIZER, TOKENIZER, range(0))
    tokenizer, size, new_rows = made(tmp_path / "mixed", TOKENIZER, "<|end|>", "<tool>")
    assert (len(tokenizer), size, new_rows) == (TOKENIZER + 1, TOKENIZER + 1, range(TOKENIZER, TOKENIZER + 1))


def test_a_token_that_the_tokenizer_has_and_the_model_not_gets_its_row(tmp_path: Path) -> None:
    """As where someone added it to the tokenizer, and did not resize the model."""
    folder = tiny_model(tmp_path / "model", vocab_size=TOKENIZER)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<other>", "<tool>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    vocabulary = vocabulary_of(Model(path=folder, add_tokens=("<tool>",)), tmp_path / "run")
    assert vocabulary.new_rows == range(TOKENIZER, TOKENIZER + 2)


def test_the_folder_is_made_once_and_again_for_other_tokens_or_files(tmp_path: Path) -> None:
    made(tmp_path, TOKENIZER, *TOKENS)
    folder = tmp_path / "run" / "tokenizer"
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}

    def again(*tokens: str) -> dict[str, tuple[int, bytes]]:
        vocabulary_of(Model(path=tmp_path / "model", add_tokens=tokens), tmp_path / "run")
        return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}

    assert again(*TOKENS) == before
    assert again("<tool>") != before
    after = again(*TOKENS)
    assert {name: content for name, (_, content) in after.items()} == {
        name: content for name, (_, content) in before.items()
    }
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages }}")
    assert again(*TOKENS)["chat_template.jinja"][1] == b"{{ messages }}"


# ------------------------------------------------------------------------------------------------ documents


def test_a_template_that_writes_a_token_yields_it_and_text_that_spells_it_where_asked(tmp_path: Path) -> None:
    tiny_model(tmp_path / "model")
    (tmp_path / "template.jinja").write_text(
        "{% for m in messages %}{{ '<tool>' if m.role == 'user' else '' }}{{ m.content }}{{ eos_token }}{% endfor %}"
    )
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "ask <tool> me", "completion": "</tool>"}) + "\n")
    found = {}
    for rule in ("text", "parse"):
        run = tiny_run(
            tmp_path, model__add_tokens=TOKENS, data__chat_template=str(tmp_path / "template.jinja"),
            data__special_tokens=rule, output=str(tmp_path / rule),
        )  # fmt: skip
        prepare(run.data, vocabulary_of(run.model, run.output).folder, run.store)
        found[rule] = Store.open(run.store).document(0).input_ids.tolist()
    assert [found["text"].count(id) for id in (TOKENIZER, TOKENIZER + 1)] == [1, 0]
    assert [found["parse"].count(id) for id in (TOKENIZER, TOKENIZER + 1)] == [2, 1]


def test_other_tokens_are_other_documents_and_inspect_reads_them(tmp_path: Path) -> None:
    tiny_model(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl", count=3)
    prints = []
    for tokens in ([], ["word"], ["word", "number"]):
        run = tiny_run(tmp_path, model__add_tokens=tokens, data__special_tokens="parse")
        prints.append(prepare(run.data, vocabulary_of(run.model, run.output).folder, run.store).fingerprint)
    assert len(set(prints)) == 3
    shown = inspect(run, samples=1)
    assert {token.text for sample in shown.samples for token in sample.tokens if token.special} >= {"word", "number"}


# ---------------------------------------------------------------------------------------------- embeddings


def grown_values(folder: Path, output: Path) -> dict[str, np.ndarray[Any, Any]]:
    from deepspeed.utils import safe_get_full_fp32_param

    world, run = World.from_environment(), tiny_run(folder)
    vocabulary = vocabulary_of(Model(path=folder, add_tokens=(*TOKENS,)), output)
    config = complete(read_preset("zero3"), run, "float32", 36)
    engine = Engine(folder, run.optim, config, "float32", world, vocabulary=vocabulary, seed=5)
    return {name: safe_get_full_fp32_param(p).numpy().copy() for name, p in engine.parameters.items()}


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_are_near_the_mean_and_the_same_on_any_number_of_ranks(tied: bool, tmp_path: Path) -> None:
    folder = tiny_tokenizer(tiny_llama(tmp_path / "model", tied=tied, vocab_size=TOKENIZER + 1))
    one, two, three = (run_distributed(grown_values, ranks, folder, tmp_path / "run")[0] for ranks in (1, 2, 3))
    base = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    assert one.keys() == base.keys()
    for name, value in one.items():
        assert np.array_equal(value, two[name])
        assert np.array_equal(value, three[name])
        old = base[name].detach().numpy()
        if name not in ("model.embed_tokens.weight", "lm_head.weight"):
            assert np.array_equal(value, old)
            continue
        assert value.shape == (TOKENIZER + 2, 36)
        assert np.array_equal(value[:TOKENIZER], old[:TOKENIZER])  # and its padding row is none any more
        near = (value[TOKENIZER:] - old[:TOKENIZER].mean(0)) / old[:TOKENIZER].std(0)
        assert 0 < np.abs(near).max() < 0.05
        assert not np.array_equal(value[-1], value[-2])


def test_the_bias_of_an_output_layer_grows_too(tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path / "model")
    config = PhiConfig(vocab_size=TOKENIZER, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                       num_attention_heads=2, partial_rotary_factor=1.0)  # fmt: skip
    model = PhiForCausalLM(config)
    torch.nn.init.normal_(model.lm_head.bias)
    model.save_pretrained(tmp_path / "model")
    vocabulary = vocabulary_of(Model(path=tmp_path / "model", add_tokens=(*TOKENS,)), tmp_path / "run")
    grown = skeleton(vocabulary.folder, torch.float32)
    weights = Weights.of(grown, tmp_path / "model", vocabulary_parameters(grown))
    initial = Initial(grown, weights, 0, vocabulary.new_rows)
    whole = torch.empty(TOKENIZER + 2)
    initial.read("lm_head.bias", 0, len(whole), whole)
    assert torch.equal(whole[:TOKENIZER], model.lm_head.bias)
    assert float((whole[TOKENIZER:] - model.lm_head.bias.detach().mean()).abs().max()) < 0.05


# ----------------------------------------------------------------------------------------------- bad input


def test_a_config_that_promises_more_rows_than_the_files_have_is_told_of(tmp_path: Path) -> None:
    """There would be rows that are neither in the files nor new."""
    folder = tiny_model(tmp_path / "model", vocab_size=TOKENIZER - 7)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": TOKENIZER}))
    vocabulary = vocabulary_of(Model(path=folder, add_tokens=("<tool>",)), tmp_path / "run")
    grown = skeleton(vocabulary.folder, torch.float32)
    weights = Weights.of(grown, folder, vocabulary_parameters(grown))
    with pytest.raises(
        ModelError, match=r"embed_tokens.weight has 280 rows, fewer than vocab_size of its config\.json"
    ):
        Initial(grown, weights, 0, vocabulary.new_rows)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [("<tool>", "give a list of tokens"), (["<a>", "<a>"], "a token is given twice"), ([" "], "give a list of tokens")],
)
def test_what_is_no_list_of_tokens_is_one_line(tokens: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_run(tmp_path, model__add_tokens=tokens)


@pytest.mark.parametrize("tokens", [[], TOKENS])
def test_a_tokenizer_that_is_larger_than_the_model_is_told_with_both_numbers(tokens: list[str], tmp_path: Path) -> None:
    """Before a document is made; and new tokens are no way round it."""
    tiny_model(tmp_path / "model", vocab_size=200)
    run = tiny_run(tmp_path, model__add_tokens=tokens)
    with pytest.raises(ModelError, match=f"its tokenizer has {TOKENIZER} tokens, but the model 200 embeddings"):
        Recipe.of(run.data, vocabulary_of(run.model, run.output).folder, ())


def test_added_tokens_beyond_the_embeddings_are_no_mistake_unless_documents_have_them(tmp_path: Path) -> None:
    """Gemma 3's text models come so."""
    folder = tiny_model(tmp_path / "model", vocab_size=TOKENIZER)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    Recipe.of(tiny_run(tmp_path).data, folder, ())


def test_a_model_without_config_is_one_line(tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path / "model")
    with pytest.raises(ModelError, match=r"has no config.json; it must be a Hugging Face model"):
        vocabulary_of(Model(path=tmp_path / "model", add_tokens=("<tool>",)), tmp_path / "run")
