"""Long documents are dropped, cut or split, each counted; a mixture has the shares that were asked for."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bigtune.data.document import Document
from bigtune.data.pieces import Mixture, Pieces, cut
from bigtune.data.store import Store
from bigtune.errors import DataError
from tests.stores import data_of, document, make_store


def text(length: int, supervised_from: int = 1) -> Document:
    return document(range(length), (supervised_from, length))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Lengths 5, 12 (all supervised), 8, 20 (only the last 3 supervised)."""
    return make_store(tmp_path / "s", [text(5), text(12), text(8), text(20, 17)])


def lengths(pieces: Pieces) -> list[tuple[int, int, int]]:
    return list(zip(pieces.document.tolist(), pieces.start.tolist(), pieces.length.tolist(), strict=True))


def test_documents_that_fit_are_one_piece_each(store: Store) -> None:
    pieces = cut(store, data_of(sequence_length=20))
    assert lengths(pieces) == [(0, 0, 5), (1, 0, 12), (2, 0, 8), (3, 0, 20)]
    assert pieces.supervised.tolist() == [4, 11, 7, 3] and pieces.notes(20) == []


def test_long_documents_are_dropped_and_counted(store: Store) -> None:
    pieces = cut(store, data_of(sequence_length=8))
    assert lengths(pieces) == [(0, 0, 5), (2, 0, 8)]
    assert pieces.dropped == {"documents longer than 8 tokens": 2}


def test_truncated_documents_lose_their_end_and_those_left_without_an_answer_go(store: Store) -> None:
    pieces = cut(store, data_of(sequence_length=8, on_long_document="truncate"))
    assert lengths(pieces) == [(0, 0, 5), (1, 0, 8), (2, 0, 8)]
    assert pieces.truncated == 1 and pieces.dropped == {"ends with nothing supervised": 1}
    assert pieces.notes(8) == ["dropped 1 (ends with nothing supervised)", "truncated 1 documents to 8 tokens"]


@pytest.mark.parametrize("room", [2, 3, 5, 8, 11, 12, 19])
def test_split_documents_learn_every_supervised_token_exactly_once(store: Store, room: int) -> None:
    pieces = cut(store, data_of(sequence_length=max(8, room), on_long_document="split")) if room >= 8 else None
    if pieces is None:  # shorter rows than the run file allows, for the arithmetic
        data = data_of(on_long_document="split").model_copy(update={"sequence_length": room})
        pieces = cut(store, data)
    assert pieces.length.max() <= room
    learnt: dict[int, list[int]] = {}
    for i, (of, start, length) in enumerate(lengths(pieces)):
        piece = store.document(of).piece(start, length)
        tokens = [t for a, b in piece.spans.tolist() for t in piece.input_ids[a:b].tolist()]
        assert len(tokens) == pieces.supervised[i]
        learnt.setdefault(of, []).extend(tokens)
    assert learnt == {0: [*range(1, 5)], 1: [*range(1, 12)], 2: [*range(1, 8)], 3: [17, 18, 19]}


def test_supervised_tokens_of_pieces_are_those_that_the_pieces_have(tmp_path: Path) -> None:
    random = np.random.default_rng(5)
    texts = []
    for _ in range(60):
        length = int(random.integers(2, 90))
        borders = np.unique(random.integers(1, length + 1, size=int(random.integers(0, 5)) * 2))
        spans = [(int(a), int(b)) for a, b in zip(borders[::2], borders[1::2], strict=False)]
        texts.append(document(range(length), *spans))
    store = make_store(tmp_path / "s", texts)
    for room in (8, 9, 17, 40):
        for how in ("split", "truncate"):
            pieces = cut(store, data_of(sequence_length=room, on_long_document=how))
            expected = [store.document(of).piece(start, length).supervised for of, start, length in lengths(pieces)]
            assert pieces.supervised.tolist() == expected
            all_of_them = sum(text.supervised for text in texts)
            assert how == "truncate" or sum(expected) == all_of_them


def test_a_long_document_may_be_an_error(store: Store) -> None:
    with pytest.raises(DataError, match=r"^0.jsonl, row 2: 12 tokens, more than data.sequence_length 8; raise it"):
        cut(store, data_of(sequence_length=8, on_long_document="error"))


@pytest.fixture
def mixed(tmp_path: Path) -> Store:
    """Three sources of 100, 300 and 50 documents of 10 tokens."""
    return make_store(tmp_path / "m", *([text(10)] * count for count in (100, 300, 50)), parts=3)


def drawn(store: Store, epoch: int = 0, seed: int = 1, **settings: Any) -> tuple[Mixture, list[int]]:
    data = data_of(3, **settings)
    mixture = Mixture(store, cut(store, data), data, seed)
    return mixture, mixture.draw(epoch).tolist()


def test_without_weights_an_epoch_has_everything(mixed: Store) -> None:
    mixture, documents = drawn(mixed)
    assert documents == list(range(450)) and not mixture.varies


def test_an_epoch_has_the_shares_that_the_weights_ask_for(mixed: Store) -> None:
    mixture, documents = drawn(mixed, weights=[2, 1, 1])
    assert len(set(documents)) == len(documents) == 200  # the first to be used up gives all: 100, 50, 50
    assert [share for *_, share in mixture.proportions(np.array(documents))] == [0.5, 0.25, 0.25]


def test_a_source_that_is_not_used_up_goes_on_in_the_next_epoch(mixed: Store) -> None:
    seen: list[int] = []
    for epoch in range(6):
        seen += [i for i in drawn(mixed, epoch, weights=[2, 1, 1])[1] if 100 <= i < 400]
    assert sorted(seen) == list(range(100, 400))  # 6 × 50 of 300: each once


def test_all_exhausted_repeats_small_sources(mixed: Store) -> None:
    mixture, documents = drawn(mixed, weights=[2, 1, 1], mixture="all_exhausted")
    assert [count for _, count, *_ in mixture.proportions(np.array(documents))] == [600, 300, 300]
    assert set(np.bincount(documents)[100:400]) == {1} and set(np.bincount(documents)[400:]) == {6}


def test_the_seed_decides_what_is_drawn_and_caps_hold_over_epochs(mixed: Store) -> None:
    caps: dict[str, Any] = {"caps": [None, 40, None]}
    first = drawn(mixed, **caps)[1]
    assert len(first) == 190 and first == drawn(mixed, epoch=3, **caps)[1]
    assert drawn(mixed, seed=2, **caps)[1] != first
    assert drawn(mixed, weights=[2, 1, 1])[1] == drawn(mixed, weights=[2, 1, 1])[1]
    assert drawn(mixed, weights=[2, 1, 1], seed=2)[1] != drawn(mixed, weights=[2, 1, 1])[1]


def test_shares_are_of_tokens_not_of_documents(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", [text(40)] * 50, [text(10)] * 400)
    data = data_of(2, weights=[1, 1])
    mixture = Mixture(store, cut(store, data), data, 0)
    assert [share for *_, share in mixture.proportions(mixture.draw(0))] == [0.5, 0.5]


def test_a_weighted_source_without_documents_is_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", [text(10)] * 5, [text(99)] * 5)
    data = data_of(2, weights=[1, 1])
    with pytest.raises(DataError, match=r"^1.jsonl: gives no document, but has a weight"):
        Mixture(store, cut(store, data), data, 0)
