"""What a model cannot compute as it was made to is refused before anything is loaded."""

from pathlib import Path

import psutil
import pytest
from transformers import LlamaConfig, MistralConfig

from bigtune.data.prepare import prepare
from bigtune.data.rows import Rows
from bigtune.errors import DataError, ModelError
from bigtune.train.fit import check_fit, open_rows
from tests.tiny import VOCABULARY, tiny_run, tiny_tokenizer, write_rows


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    folder = tmp_path_factory.mktemp("fit")
    tiny_tokenizer(folder / "model")
    write_rows(folder / "rows.jsonl")
    run = tiny_run(folder)
    prepare(run.data, run.model.path, run.store)
    return open_rows(run)


def test_what_fits_passes(store: Rows) -> None:
    longest, _ = store.longest()
    check_fit(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=longest), store)
    check_fit(MistralConfig(vocab_size=VOCABULARY, sliding_window=4), store)  # attention has the window


def test_tokens_without_an_embedding(store: Rows) -> None:
    highest = store.highest_token
    check_fit(LlamaConfig(vocab_size=highest + 1), store)
    with pytest.raises(ModelError, match=f"{highest} embeddings, but the tokenizer beside them gives token {highest}"):
        check_fit(LlamaConfig(vocab_size=highest), store)


def test_documents_longer_than_the_context(store: Rows) -> None:
    longest, _ = store.longest()
    with pytest.raises(
        DataError, match=rf"rows.jsonl, row \d+: a document of {longest} tokens, where the model's cont"
    ):
        check_fit(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=longest - 1), store)


def test_a_stream_that_is_refused_leaves_no_process(tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl")
    run = tiny_run(tmp_path, data__stream=True, data__workers=1, data__min_supervised=0.99)
    with pytest.raises(DataError, match=r"are supervised, less than data.min_supervised"):
        open_rows(run)
    alive = [" ".join(process.cmdline()) for process in psutil.Process().children(recursive=True)]
    assert not [command for command in alive if "popen_loky" in command]
