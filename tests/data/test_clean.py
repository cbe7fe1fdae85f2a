"""What is left out, why, and which kept row it repeats."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtune.config import Clean
from bigtune.data import duplicates
from bigtune.data import features as features_module
from bigtune.data.clean import Removal, Removals, select
from bigtune.data.conversation import Conversation, Message
from bigtune.data.duplicates import Signatures, bands
from bigtune.data.features import features
from bigtune.data.overlap import Overlap

STORY = (
    "The lighthouse keeper of the northern island rowed to the harbour every Friday to fetch bread, oil and letters, "
    "and on the way back he sang to the seals, who followed his boat as far as the reef and no further. "
    "In winter, when the sea was too rough to row, he wrote down what he would have sung, on the backs of old charts."
)
OTHER = (
    "To fold a paper crane, begin with a square sheet, coloured side up, and crease both diagonals before you turn it "
    "over; the second pair of folds goes from edge to edge, so that the sheet collapses into a smaller square."
)


def chat(question: str, answer: str = "Yes.") -> Conversation:
    return Conversation((Message("user", question), Message("assistant", answer)), "rows.jsonl", 1)


def cleaned(
    rows: list[Conversation], tokens: list[int] | None = None, held_out: list[Conversation] | None = None, **steps: Any
) -> Removals:
    clean = Clean(**steps)
    overlap = Overlap.of(held_out, clean.decontaminate) if held_out is not None and clean.decontaminate else None
    columns = {name: as_numpy(values) for name, values in features(rows, clean, overlap).items()}
    content = np.array([row.content_hash for row in rows], np.uint64)
    return select(columns, content, np.array(tokens or [10] * len(rows)), clean)


def as_numpy(column: pa.Array) -> npt.NDArray[Any]:
    if pa.types.is_fixed_size_list(column.type):
        return np.asarray(column.flatten()).reshape(len(column), column.type.list_size)
    return column.to_numpy(zero_copy_only=False)  # type: ignore[no-any-return]


def kept(removals: Removals) -> list[int]:
    return np.flatnonzero(removals.kept).tolist()


def changed(text: str, *places: int) -> str:
    words = text.split()
    for place in places:
        words[place] = "else"
    return " ".join(words)


def test_nothing_is_removed_unless_asked_for() -> None:
    removals = cleaned([chat(STORY), chat(STORY)])
    assert kept(removals) == [0, 1] and removals.counts() == {} and removals[1] is None


def test_of_exact_duplicates_the_first_stays() -> None:
    removals = cleaned([chat("a"), chat("b"), chat("a"), chat("A"), chat("a")], exact_duplicates=True)
    assert kept(removals) == [0, 1, 3]
    assert removals[2] == removals[4] == Removal("exact duplicate", like=0)
    assert removals.like.tolist() == [-1, -1, 0, -1, 0]


def test_a_text_with_a_few_other_words_is_a_near_duplicate_and_another_text_is_not() -> None:
    rows = [chat(STORY), chat(OTHER), chat(changed(STORY, 0, 40)), chat(STORY.upper()), chat(changed(OTHER, -1))]
    removals = cleaned(rows, near_duplicates=0.8)
    assert kept(removals) == [0, 1]
    assert [removals.like[i] for i in (2, 3, 4)] == [0, 0, 1]
    assert removals[2] == Removal("near duplicate", like=0)


def test_signatures_of_another_seed_would_find_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    clean = Clean(near_duplicates=0.8)
    rows = [chat(STORY), chat(changed(STORY, 0))]
    honest = as_numpy(features(rows, clean, None)["minhash"])
    monkeypatch.setattr(features_module, "SEED", 2)
    shuffled = as_numpy(features(rows, clean, None)["minhash"])
    content, tokens = np.arange(2, dtype=np.uint64), np.ones(2, np.int32)
    assert kept(select({"minhash": honest}, content, tokens, clean)) == [0]
    mixed = np.stack([honest[0], shuffled[1]])
    assert kept(select({"minhash": mixed}, content, tokens, clean)) == [0, 1]


@pytest.mark.parametrize("threshold", [0.9, 0.7, 0.5, 0.3])
def test_texts_are_removed_down_to_the_threshold(threshold: float) -> None:
    words = [f"word{i}" for i in range(100)]
    removed, expected = 0, 0
    for n in range(1, 80, 3):
        other = " ".join([*words[:-n], *(f"new{i}" for i in range(n))])
        removed += not cleaned([chat(" ".join(words)), chat(other)], near_duplicates=threshold).kept[1]
        # With the answer these are 97 shingles each, of which 96 - n are the same.
        expected += (96 - n) / (98 + n) >= threshold
    assert expected - 2 <= removed <= expected + 2 and removed > 0


def test_texts_without_words_repeat_nothing() -> None:
    removals = cleaned([chat("…", "!"), chat("🎉", "?"), chat("---", "!!")], near_duplicates=0.5)
    assert kept(removals) == [0, 1, 2]


def test_short_texts_are_compared_by_their_words() -> None:
    assert kept(cleaned([chat("Hi", "Hello"), chat("hi!", "hello."), chat("Hi", "Bye")], near_duplicates=0.8)) == [0, 2]


def test_lengths_are_limited_on_both_sides() -> None:
    removals = cleaned([chat(str(i)) for i in range(4)], tokens=[4, 5, 1000, 1001], min_tokens=5, max_tokens=1000)
    assert kept(removals) == [1, 2]
    assert removals[0] == Removal("fewer than 5 tokens", None) and removals[3] == Removal(
        "more than 1,000 tokens", None
    )


def test_short_and_repetitive_answers_are_removed() -> None:
    rows = [chat("a", "Yes"), chat("b", "Yes."), chat("c", "again and " * 20), chat("again and " * 20, STORY)]
    removals = cleaned(rows, min_answer_characters=4, max_repetition=0.3)
    assert kept(removals) == [1, 3]
    assert removals.counts() == {"answers of fewer than 4 characters": 1, "over 30% of an answer's 4-grams repeated": 1}


def test_an_answer_is_kept_so_many_times() -> None:
    rows = [chat(str(i), "I cannot help." if i % 2 else f"Answer {i}.") for i in range(10)]
    removals = cleaned(rows, same_answer_at_most=2)
    assert kept(removals) == [0, 1, 2, 3, 4, 6, 8]
    assert removals[9] == Removal("same answer as 2 earlier", like=1)


def test_raw_text_is_its_own_answer() -> None:
    rows = [Conversation((), "a.txt", i, text=text) for i, text in enumerate([STORY, changed(STORY, 3), "ab", STORY])]
    removals = cleaned(rows, near_duplicates=0.8, min_answer_characters=3, exact_duplicates=True)
    assert [removal and removal.reason for removal in map(removals.__getitem__, range(4))] == [
        None,
        "near duplicate",
        "answers of fewer than 3 characters",
        "exact duplicate",
    ]


def test_the_first_reason_wins_and_counts_are_in_the_order_of_the_steps() -> None:
    rows = [chat(STORY, "x"), chat(STORY, "x"), chat(OTHER), chat(OTHER), chat(changed(OTHER, 0)), chat(STORY)]
    removals = cleaned(
        rows,
        tokens=[1, 9, 9, 9, 9, 9],
        held_out=[chat(STORY)],
        min_tokens=2,
        min_answer_characters=2,
        decontaminate=13,
        exact_duplicates=True,
        near_duplicates=0.8,
        same_answer_at_most=1,
    )
    assert list(removals.counts().items()) == [
        ("fewer than 2 tokens", 1),
        ("answers of fewer than 2 characters", 1),
        ("overlaps held-out rows", 1),
        ("exact duplicate", 1),
        ("near duplicate", 1),
        ("same answer as 1 earlier", 0),
    ]
    assert removals.reason.tolist() == [0, 1, -1, 3, 4, 2]
    assert removals.reason.dtype == np.int8 and removals.like.dtype == np.int64


def test_a_removed_row_takes_no_other_with_it() -> None:
    near = changed(STORY, 20)
    rows = [chat(STORY, "x"), chat(near, "xyz")]
    assert kept(cleaned(rows, near_duplicates=0.8)) == [0]
    assert kept(cleaned(rows, tokens=[1, 9], near_duplicates=0.8, min_tokens=2)) == [1]
    assert kept(cleaned(rows, near_duplicates=0.8, min_answer_characters=2)) == [1]
    leak = changed(STORY, *range(0, 40, 12))  # shares fewer than 13 words in a row with the story's beginning
    removals = cleaned([chat(STORY), chat(leak)], held_out=[chat(STORY[:150])], decontaminate=13, near_duplicates=0.3)
    assert kept(removals) == [1]


def test_a_row_that_is_too_much_of_an_answer_hides_no_near_duplicate() -> None:
    rows = [chat("first", STORY), chat(OTHER, STORY), chat(OTHER, changed(STORY, 0, 10, 20, 30))]
    removals = cleaned(rows, near_duplicates=0.6, same_answer_at_most=1)
    alone = cleaned(rows[1:], near_duplicates=0.6)
    assert kept(alone) == [0]  # the last two are alike
    assert kept(removals) == [0, 2]  # but the second goes for its answer, so the third stays


def test_an_exact_duplicate_of_a_near_duplicate_is_like_the_row_that_was_kept() -> None:
    rows = [chat(STORY), chat(changed(STORY, 0)), chat(changed(STORY, 0))]
    removals = cleaned(rows, exact_duplicates=True, near_duplicates=0.8)
    assert removals.like.tolist() == [-1, 0, 0] and removals.counts() == {"exact duplicate": 0, "near duplicate": 2}


def test_a_chain_of_likes_is_cut_at_what_was_kept() -> None:
    """b is like a and c like b, but c is not like a: c stays, since b is gone."""
    base = [f"w{i}" for i in range(60)]
    a, b, c = (" ".join([*base[n:], *(f"x{i}" for i in range(n))]) for n in (0, 6, 12))
    removals = cleaned([chat(a), chat(b), chat(c)], near_duplicates=0.7)
    assert kept(cleaned([chat(b), chat(c)], near_duplicates=0.7)) == [0]
    assert kept(removals) == [0, 2] and removals.like.tolist() == [-1, 0, -1]


def families(seed: int, rows: int, agreeing: float) -> npt.NDArray[np.uint32]:
    """Signatures of a few families, whose members agree with their first in such a share of values."""
    random = np.random.default_rng(seed)
    firsts = random.integers(0, 2**31, (3, 128), dtype=np.uint32)
    mine = random.integers(0, 2**31, (rows, 128), dtype=np.uint32)
    return np.where(random.random((rows, 128)) < agreeing, firsts[random.integers(0, 3, rows)], mine)


def compared_with_all(signatures: npt.NDArray[np.uint32], threshold: float) -> list[int]:
    left: list[int] = []
    for row, signature in enumerate(signatures):
        if not left or (np.mean(signatures[left] == signature, axis=1) < threshold).all():
            left.append(row)
    return left


def select_near(signatures: Any, threshold: float) -> Removals:
    content = np.arange(len(signatures), dtype=np.uint64)
    return select({"minhash": signatures}, content, np.ones(len(content), np.int32), Clean(near_duplicates=threshold))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.97, 1.0]))
def test_banding_finds_what_comparing_every_row_finds(seed: int, agreeing: float) -> None:
    signatures = families(seed, rows=30, agreeing=agreeing)
    removals = select_near(signatures, threshold=0.7)
    assert kept(removals) == compared_with_all(signatures, 0.7)
    gone = np.flatnonzero(~removals.kept)
    assert removals.kept[removals.like[gone]].all() and (removals.like[gone] < gone).all()


@pytest.mark.parametrize("threshold", [0.05, 0.5, 0.8, 0.95, 0.99])
def test_bands_use_no_more_than_the_signature(threshold: float) -> None:
    count, width = bands(threshold, 128)
    assert count * width <= 128
    # At little over the threshold nearly all pairs meet in some band.
    similarity = threshold + 0.6 * (1 - threshold)
    assert 1 - (1 - similarity**width) ** count > 0.9


def test_a_bucket_that_all_rows_share_is_searched_from_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the work stays bounded where thousands of different rows have a passage in common."""
    signatures = families(0, rows=40, agreeing=0.0)
    signatures[:, :20] = 7  # some bands are the same in all
    signatures[39] = signatures[38]
    monkeypatch.setattr(duplicates, "_COMPARED", 4)
    assert kept(select_near(signatures, 0.8)) == list(range(39))


def test_the_column_of_a_store_is_read_like_an_array(monkeypatch: pytest.MonkeyPatch) -> None:
    signatures = families(5, rows=30, agreeing=0.95)
    kind = pa.list_(pa.uint32(), 128)
    whole = pa.FixedSizeListArray.from_arrays(pa.array(signatures.reshape(-1)), type=kind)
    chunks = [whole[:7], whole[7:7], whole[7:8], whole[8:]]
    stored = Signatures(pa.chunked_array(chunks, kind))
    assert len(stored) == 30
    for rows in (slice(5, 12), slice(0, 0), np.array([29, 0, 7, 7]), 8, np.int64(29)):
        assert np.array_equal(stored[rows], signatures[rows])
    monkeypatch.setattr(duplicates, "_ROWS_AT_ONCE", 4)
    monkeypatch.setattr(duplicates, "_KEYS_AT_ONCE", 3)
    of_store, of_array = select_near(stored, 0.7), select_near(signatures, 0.7)
    assert np.array_equal(of_store.like, of_array.like) and 0 < of_array.kept.sum() < 30
    assert np.array_equal(of_array.like, select_near(signatures, 0.7).like)


def test_no_rows_at_all() -> None:
    steps = Clean(exact_duplicates=True, near_duplicates=0.8, same_answer_at_most=1, decontaminate=13, min_tokens=1)
    columns = {name: as_numpy(values) for name, values in features([], steps, None).items()}
    removals = select(columns, np.empty(0, np.uint64), np.empty(0, np.int32), steps)
    assert len(removals.kept) == 0 and set(removals.counts().values()) == {0}
