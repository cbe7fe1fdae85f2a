"""Training rows that share n words in a row with a held-out row are found, and those that only look alike are not."""

import re
from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtune.config import Clean
from bigtune.data.conversation import Conversation, Message
from bigtune.data.features import features
from bigtune.data.overlap import Overlap

TEST = "A train travels 270 miles in 3 hours; at the same rate, how far does it travel in 5?"


def chat(question: str, answer: str = "Yes.", system: str | None = None) -> Conversation:
    before = (Message("system", system),) if system is not None else ()
    return Conversation((*before, Message("user", question), Message("assistant", answer)), "rows.jsonl", 1)


def raw(text: str) -> Conversation:
    return Conversation((), "rows.jsonl", 1, text=text)


def overlaps(training: Iterable[Conversation], held_out: Iterable[Conversation], words: int = 13) -> list[bool]:
    column: pa.Array = features(list(training), Clean(decontaminate=words), Overlap.of(held_out, words))["overlaps"]
    found: list[bool] = column.to_pylist()
    return found


def test_thirteen_words_in_a_row_are_found_and_twelve_are_not() -> None:
    words = TEST.split()
    thirteen, twelve = ("Once more: " + " ".join(words[1 : 1 + n]) + " … to the sea" for n in (13, 12))
    assert overlaps([chat(thirteen), chat(twelve), chat("?", thirteen), raw(thirteen)], [chat(TEST)]) == [
        True,
        False,
        True,
        True,
    ]


def test_case_and_punctuation_hide_nothing_and_a_changed_word_does() -> None:
    hidden = TEST.upper().replace(" ", " -- ").replace(";", "")
    assert overlaps([raw(hidden), raw(TEST.replace("same", "equal"))], [raw(TEST)]) == [True, False]


def test_words_that_run_on_over_two_turns_are_no_overlap() -> None:
    words = TEST.split()
    assert overlaps([chat(" ".join(words[:12]), " ".join(words[12:]))], [raw(TEST)]) == [False]


def test_a_short_question_counts_where_a_row_opens_with_it_whole() -> None:
    held_out = [chat("Who wrote the Faust?", "Goethe wrote the Faust.")]
    found = overlaps(
        [
            chat("who wrote the faust"),
            chat("Who wrote the Faust, part two?"),
            raw("Who wrote the Faust?"),
            chat("Name a work", "Who wrote the Faust?"),
            chat("Tell me of Weimar", "Goethe wrote the Faust."),
            chat("Who wrote the Faust?", system="You are a poet."),
        ],
        held_out,
    )
    assert found == [True, False, True, False, False, True]


def test_a_question_of_fewer_than_four_words_removes_nothing() -> None:
    assert overlaps([chat("Who wrote Faust?")], [chat("Who wrote Faust?")]) == [False]


def test_a_system_prompt_that_everyone_uses_is_no_overlap() -> None:
    assert overlaps([chat("Name a colour", system=TEST)], [chat("Name a bird", system=TEST)]) == [False]


def test_boilerplate_of_many_held_out_rows_does_not_count() -> None:
    def task(i: int) -> str:
        return f"{TEST} Write {' '.join(f'w{i}x{j}' for j in range(13))}"

    training = [chat(TEST), chat(task(3))]
    assert overlaps(training, map(chat, map(task, range(10)))) == [True, True]
    assert overlaps(training, map(chat, map(task, range(11)))) == [False, True]
    # A passage of 11 questions among 2,000 is none: it is under 1% of the rows.
    others = [chat(f"q{i} " * 14) for i in range(2000)]
    assert overlaps(training, [*map(chat, map(task, range(11))), *others]) == [True, True]
    # Nor is what one row says many times over.
    assert overlaps(training, [raw(f"{TEST} Stop. " * 12)]) == [True, True]


@pytest.mark.parametrize("held_out", [[], [raw("…")], [chat("")]])
def test_nothing_held_out_removes_nothing(held_out: list[Conversation]) -> None:
    assert overlaps([raw(TEST), raw(""), chat("", "")], held_out) == [False, False, False]
    column: Any = features([raw(TEST)], Clean(decontaminate=13), None)["overlaps"]
    assert column.to_pylist() == [False]


def test_the_identity_is_that_of_the_words_and_not_of_the_rows() -> None:
    rows = [raw(TEST), chat("Who wrote the Faust?")]
    identity = Overlap.of(rows, 13).identity
    assert Overlap.of([chat("who wrote the FAUST", "No"), raw(TEST)], 13).identity == identity
    assert Overlap.of(rows, 12).identity != identity
    assert Overlap.of(rows[:1], 13).identity != identity


TEXTS = st.lists(st.sampled_from("abc"), max_size=14).map(" ".join)


@settings(deadline=None)
@given(st.lists(TEXTS, max_size=6), st.lists(TEXTS, max_size=6))
def test_it_finds_what_comparing_every_word_with_every_word_finds(training: list[str], held_out: list[str]) -> None:
    def grams(text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"\w+", text)
        return {tuple(words[i : i + 5]) for i in range(len(words) - 4)} | ({tuple(words)} if len(words) == 4 else set())

    tested = set().union(*map(grams, held_out))
    expected = [bool(grams(text) & tested) for text in training]
    assert overlaps(map(raw, training), map(raw, held_out), words=5) == expected
