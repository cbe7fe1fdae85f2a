"""Token text is the document's text, whatever is in it; what is learnt is what the spans say."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtune.data.chat import load_tokenizer
from bigtune.data.document import Document
from bigtune.report.tokens import Gap, Reader, learnt_weights, shorten
from bigtune.visible import visible
from tests.stores import document
from tests.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def reader(model: Path) -> Reader:
    return Reader(model)


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> object:
    return load_tokenizer(model)


def ids_of(tokenizer: object, text: str) -> list[int]:
    return list(tokenizer(text).input_ids)  # type: ignore[operator]


@given(st.text(max_size=60), st.integers(0, 60), st.integers(0, 60))
@settings(max_examples=200, deadline=None)
def test_joined_the_tokens_are_the_text(reader: Reader, tokenizer: object, text: str, start: int, end: int) -> None:
    ids = ids_of(tokenizer, text)
    tokens = reader.read(document(ids, (min(start, len(ids)), min(end, len(ids)))))
    assert "".join(token.text for token in tokens) == text
    assert sum(token.count for token in tokens) == len(ids)


def test_bytes_are_joined_until_they_are_a_character(reader: Reader, tokenizer: object) -> None:
    tokens = reader.read(document(ids_of(tokenizer, "a🙂b"), (0, 0)))
    assert [(token.text, token.count) for token in tokens] == [("a", 1), ("🙂", 4), ("b", 1)]


def test_a_character_that_is_cut_off_loses_no_token_and_takes_no_special_one(reader: Reader, tokenizer: object) -> None:
    ids = [*ids_of(tokenizer, "🙂")[:2], 0, *ids_of(tokenizer, "🙂")[:3]]
    tokens = reader.read(document(ids, (2, 3)))
    assert [token.count for token in tokens] == [2, 1, 3]
    assert [token.special for token in tokens] == [False, True, False]
    assert tokens[1].text == "<|end|>" and [token.supervised for token in tokens] == [False, True, False]


def test_what_is_learnt_is_what_the_spans_say(reader: Reader, tokenizer: object) -> None:
    ids = ids_of(tokenizer, "qQxXzZ")
    made = document(ids, (2, 4), (5, 6), weights=[1.0, 0.25])
    assert learnt_weights(made).tolist() == [0, 0, 1, 1, 0, 0.25, *[0] * (len(ids) - 6)]
    weights = [token.weight for token in reader.read(made) for _ in range(token.count)]
    assert weights == learnt_weights(made).tolist()
    assert weights != learnt_weights(document(ids, (1, 4), (5, 6), weights=[1.0, 0.25])).tolist()


def test_a_first_token_is_never_learnt() -> None:
    assert learnt_weights(document([5, 6, 7], (0, 3))).tolist() == [0, 1, 1]


def test_the_middle_of_a_long_document_is_left_out_and_counted(reader: Reader, tokenizer: object) -> None:
    ids = ids_of(tokenizer, "q" * 30)
    tokens = reader.read(document(ids, (20, 30)))
    head, gap, tail = shorten(tokens, 9)
    assert (len(head), len(tail)) == (6, 3) and gap == Gap(21, 7)
    assert shorten(tokens, 30) == (tokens, None, ())


def test_what_would_upset_a_terminal_is_shown_as_pictures() -> None:
    assert visible("a\x1b[31m\0\x7f\u202eb\x9b") == "a␛[31m␀␡⟨202E⟩b⟨9B⟩"
    assert visible("line\r\nnext\tcolumn") == "line␍↵\nnext⇥\tcolumn"
    assert visible("👩‍🚀 é 漢") == "👩‍🚀 é 漢"


def test_an_empty_document_has_no_tokens(reader: Reader) -> None:
    assert reader.read(Document(np.empty(0, np.int32), np.empty((0, 2), np.int32), np.empty(0, np.float32))) == ()
