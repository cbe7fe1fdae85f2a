"""What is said is compared by its words, and the columns of a row do not depend on the rows around it."""

import hashlib
import random
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtune.config import Clean
from bigtune.data import features as features_module
from bigtune.data import words as words_module
from bigtune.data.conversation import Conversation, Message
from bigtune.data.features import feature_identity, feature_schema, features
from bigtune.data.overlap import Overlap
from bigtune.data.words import ngrams, word_hashes

EVERYTHING = Clean(
    near_duplicates=0.8, decontaminate=5, same_answer_at_most=1, min_answer_characters=3, max_repetition=0.5
)
LETTERS = "aB1_ .,-\n\t'é" + "e\u0301" + "ＡΣ猫の" + "\u3099\u302a\u3001"


def chat(question: str, answer: str, **extra: Any) -> Conversation:
    return Conversation((Message("user", question), Message("assistant", answer, extra=extra)), "rows.jsonl", 1)


def raw(text: str) -> Conversation:
    return Conversation((), "rows.jsonl", 1, text=text)


def column(name: str, conversations: list[Conversation], **settings: Any) -> list[Any]:
    values: list[Any] = features(conversations, Clean(**settings), None)[name].to_pylist()
    return values


def signatures(*texts: str) -> npt.NDArray[np.uint32]:
    made = column("minhash", [raw(text) for text in texts], near_duplicates=0.8)
    return np.array(made, np.uint32)


def same(a: str, b: str) -> bool:
    return np.array_equal(word_hashes(a), word_hashes(b))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("The cat, the CAT!", "the cat  the\ncat"),
        ("(snake_case)", "snake_case"),
        ("cafe\u0301", "café"),
        ("ＡＢＣ　１", "abc 1"),
        ("🎉 -- cat…", "cat"),
        ("ΟΔΟΣ", "οδος"),
    ],
)
def test_case_spacing_punctuation_and_encoding_do_not_count(one: str, other: str) -> None:
    assert same(one, other)


@pytest.mark.parametrize(("one", "other"), [("the cat", "cat the"), ("a bc", "ab c"), ("cat", "cats"), ("3", "4")])
def test_words_and_their_order_do_count(one: str, other: str) -> None:
    assert not same(one, other)


def test_scripts_without_spaces_have_a_word_a_character() -> None:
    assert len(word_hashes("猫が好き。Python 3も。")) == 7
    assert len(word_hashes("แมว cat")) == 4
    assert same("猫が", "猫、が")


def test_hashes_are_the_same_on_every_machine() -> None:
    """They are stored, and compared with those of another process."""
    expected = [int.from_bytes(hashlib.blake2b(word, digest_size=8).digest(), "little") for word in (b"the", b"cat")]
    assert word_hashes("The cat").tolist() == expected


@settings(deadline=None)
@given(st.text(st.characters(max_codepoint=127)))
def test_the_quick_way_for_ascii_is_the_general_way(text: str) -> None:
    assert np.array_equal(word_hashes(text), word_hashes(text + " é")[:-1])


@settings(deadline=None)
@given(st.text(LETTERS, max_size=60))
def test_a_long_text_is_hashed_as_a_short_one(text: str) -> None:
    whole = word_hashes(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(words_module, "_PIECE", 7)
        assert np.array_equal(word_hashes(text), whole)


def test_forgetting_words_changes_no_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "one two three four five six one " + "long" * 20
    expected = word_hashes(text)
    monkeypatch.setattr(words_module._WordHashes, "MOST", 2)
    assert np.array_equal(word_hashes(text), expected) and len(words_module._hashes) <= 2


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), max_size=30), st.integers(1, 6))
def test_ngrams_are_equal_where_the_words_are(words: list[int], n: int) -> None:
    hashes = word_hashes(" ".join(map(str, words)))
    grams = ngrams(hashes, n).tolist()
    plain = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    assert len(grams) == len(plain)
    assert len(set(grams)) == len(set(plain)) == len(set(zip(grams, plain, strict=True)))


def test_only_the_columns_that_the_settings_need() -> None:
    assert feature_schema(Clean(exact_duplicates=True, min_tokens=3, max_tokens=9)) == []
    assert features([raw("a")], Clean(exact_duplicates=True), None) == {}
    made = features([raw("a b c")], EVERYTHING, None)
    for field in feature_schema(EVERYTHING):
        assert made[field.name].type == field.type
    assert list(made) == [field.name for field in feature_schema(EVERYTHING)] and len(made) == 5
    assert made["minhash"].type == pa.list_(pa.uint32(), 128)


WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "purred", ".", "Yes"]
TEXTS = st.lists(st.sampled_from(WORDS), max_size=40).map(" ".join)


@settings(deadline=None)
@given(st.lists(st.tuples(TEXTS, TEXTS), max_size=8), st.data())
def test_a_batch_of_rows_gives_what_each_row_gives(pairs: list[tuple[str, str]], data: st.DataObject) -> None:
    rows = [chat(question, answer) if data.draw(st.booleans()) else raw(question) for question, answer in pairs]
    overlap = Overlap.of([raw("the cat sat on a mat"), chat("and purred the cat", "")], 5)
    together = features(rows, EVERYTHING, overlap)
    cut = data.draw(st.integers(0, len(rows)))
    for part, start in ((rows[:cut], 0), (rows[cut:], cut), *(([row], i) for i, row in enumerate(rows))):
        for name, values in features(part, EVERYTHING, overlap).items():
            assert values.equals(together[name].slice(start, len(part)))


def test_rows_may_have_no_words_and_batches_no_rows() -> None:
    made = features([raw("…"), chat("", ""), Conversation((Message("system", "x"),), "a", 1)], EVERYTHING, None)
    assert made["repetition"].to_pylist() == [0, 0, 0] and made["answer_characters"].to_pylist() == [1, 0, 0]
    assert {len(values) for values in features([], EVERYTHING, None).values()} == {0}


def test_identity_changes_with_the_columns_and_not_with_thresholds() -> None:
    overlap = Overlap.of([raw("one two three four five")], 5)
    identity = feature_identity(EVERYTHING, overlap)
    for threshold in (
        {"near_duplicates": 0.7},
        {"max_repetition": 0.1},
        {"same_answer_at_most": 9},
        {"min_answer_characters": 1},
        {"min_tokens": 5},
        {"exact_duplicates": True},
    ):
        assert feature_identity(EVERYTHING.model_copy(update=threshold), overlap) == identity
    assert feature_identity(EVERYTHING.model_copy(update={"near_duplicates": None}), overlap) != identity
    assert feature_identity(EVERYTHING.model_copy(update={"decontaminate": 6}), overlap) != identity
    assert feature_identity(EVERYTHING, None) != identity
    assert feature_identity(EVERYTHING, Overlap.of([raw("one two three four six")], 5)) != identity
    assert feature_identity(Clean(decontaminate=5), None) != feature_identity(Clean(decontaminate=6), None)


def pair_of_texts(seed: int, shared: int, different: int) -> tuple[str, str]:
    """Two texts that share a beginning of so many words, and then differ."""
    words = random.Random(seed)
    start = [f"w{words.random()}"[:12] for _ in range(shared)]
    ends = [[f"{name}{words.random()}"[:12] for _ in range(different)] for name in "xy"]
    return " ".join(start + ends[0]), " ".join(start + ends[1])


def jaccard(a: str, b: str) -> float:
    one, other = (set(ngrams(word_hashes(text), 5).tolist()) for text in (a, b))
    return len(one & other) / len(one | other)


def estimate_errors(seed_of_second: int, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Of 40 pairs: (estimated - exact Jaccard similarity), in standard errors."""
    errors = []
    for seed in range(40):
        a, b = pair_of_texts(seed, shared=100 + seed, different=5 + 4 * seed)
        exact = jaccard(a, b)
        first = signatures(a)[0]
        monkeypatch.setattr(features_module, "SEED", seed_of_second)
        second = signatures(b)[0]
        monkeypatch.undo()
        errors.append((float(np.mean(first == second)) - exact) / np.sqrt(exact * (1 - exact) / 128))
    return errors


def test_estimated_similarity_is_right_within_its_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = estimate_errors(features_module.SEED, monkeypatch)
    assert max(map(abs, errors)) < 4 and 0.6 < np.std(errors) < 1.5
    assert abs(np.mean(errors)) < 4 / np.sqrt(len(errors))


def test_permutations_of_another_seed_would_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    assert max(estimate_errors(features_module.SEED + 1, monkeypatch)) < -4


def test_order_of_words_matters_for_long_texts_and_not_for_short_ones() -> None:
    long, turned, short, turned_short = signatures("a b c d e f", "f e d c b a", "a b c d", "d c b a")
    assert not np.array_equal(long, turned) and np.array_equal(short, turned_short)


def test_long_texts_go_through_the_permutations_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(map(str, range(300)))
    whole = signatures(text)
    monkeypatch.setattr(features_module, "_AT_ONCE", 7)
    assert np.array_equal(signatures(text), whole)


def test_the_system_prompt_that_all_rows_share_makes_none_alike() -> None:
    prompt = Message("system", "You are a helpful assistant and answer in one word. " * 5)
    rows = [
        Conversation((prompt, Message("user", f"What is the colour of {thing}?"), Message("assistant", "Blue")), "a", 1)
        for thing in ("the sea in summer when it is calm", "a jay that sits in the old oak")
    ]
    one, other = np.array(column("minhash", rows, near_duplicates=0.8))
    assert np.mean(one == other) < 0.4


def test_repetition_is_the_share_of_repeated_4_grams_of_the_worst_answer() -> None:
    loop, varied = "it is as it " * 10, " ".join(map(str, range(40)))
    turns = [Message("user", loop), Message("assistant", varied), Message("assistant", loop)]
    rows = [chat(loop, varied), Conversation(tuple(turns), "a", 1), raw(loop), chat("?", "no " * 19)]
    once = 1 - 4 / 37  # 40 words have 37 4-grams, of which 4 are new
    assert column("repetition", rows, max_repetition=0.5) == pytest.approx([0, once, once, 0])


def test_characters_of_answers_are_counted_without_the_space_around() -> None:
    two = Conversation((Message("assistant", " Hi\n"), Message("user", "…"), Message("assistant", "you")), "a", 1)
    assert column("answer_characters", [two, raw("text "), chat("long question", "")], min_answer_characters=1) == [
        5,
        4,
        0,
    ]


def test_the_same_answer_is_word_for_word_the_same() -> None:
    answers = ["The sum is 4.", " The sum\n is 4.", "The sum is -4.", "the sum is 4."]
    hashes = column("answer", [chat(str(i), answer) for i, answer in enumerate(answers)], same_answer_at_most=1)
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3
    assert column("answer", [raw(answers[0])], same_answer_at_most=1)[0] == hashes[0]


def test_a_tool_call_is_an_answer_and_its_random_id_is_not() -> None:
    def call(city: str, identity: str) -> Conversation:
        function = {"name": "weather", "arguments": {"city": city}}
        return chat("Weather?", "", tool_calls=[{"id": identity, "type": "function", "function": function}])

    rows = [call("Paris", "1"), call("Paris", "2"), call("Oslo", "1")]
    first, again, other = column("answer", rows, same_answer_at_most=1)
    assert first == again != other
    assert min(column("answer_characters", rows, min_answer_characters=1)) > 10
    thinking = chat("Weather?", "", reasoning_content="Let me see")
    assert column("answer_characters", [thinking], min_answer_characters=1) == [10]
