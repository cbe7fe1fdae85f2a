"""Every constraint, met and not met, as IFEval's rows name them."""

from typing import Any

import pytest

from bigtune.evaluate.constraints import CHECKS, followed, followed_share

AT_LEAST, LESS = "at least", "less than"
CASES: list[tuple[str, dict[str, Any], str, str]] = [
    ("keywords:existence", {"keywords": ["red", "hen"]}, "A Red hen", "A red cat"),
    ("keywords:frequency", {"keyword": "red", "frequency": 2, "relation": AT_LEAST}, "red RED", "red"),
    ("keywords:frequency", {"keyword": "red", "frequency": 2, "relation": LESS}, "red", "red red"),
    ("keywords:forbidden_words", {"forbidden_words": ["hen"]}, "then what", "a Hen"),
    ("keywords:letter_frequency", {"letter": "E", "let_frequency": 2, "let_relation": AT_LEAST}, "eE", "e"),
    ("length_constraints:number_words", {"num_words": 3, "relation": LESS}, "one two", "one two, three"),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": AT_LEAST},
        "It is 3.5. Is it?",
        "It is 3.5 m",
    ),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "one\n***\ntwo", "one\n\ntwo"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"},
        "One.\n\nThen two.",
        "Then.\n\nOne.",
    ),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Yours\nP.S. more", "Yours"),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name] of [place]", "[name]"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* one\n- two", "* one\n* two\n* three"),
    ("detectable_format:title", {}, "<<Hens>>\nOnce", "<< >>"),
    ("detectable_format:constrained_response", {}, "My answer is no.", "No."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and **b**", "*a* and b"),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Part", "num_sections": 2},
        "Part 1 a Part 2 b",
        "Part 1",
    ),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "{a: 1}"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it."}, "Say it. It.", "It. Say it."),
    ("combination:two_responses", {}, "one\n******\ntwo", "one\n******\none"),
    ("change_case:english_capital", {}, "ALL, 1", "All"),
    ("change_case:english_lowercase", {}, "all, 1", "All"),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": LESS}, "ONE two", "ONE TWO"),
    ("startend:end_checker", {"end_phrase": "Any questions?"}, "So. any questions?", "Any questions? No."),
    ("startend:quotation", {}, '"so"', "so"),
    ("punctuation:no_comma", {}, "a; b", "a, b"),
]


@pytest.mark.parametrize(("name", "settings", "met", "missed"), CASES)
def test_constraints(name: str, settings: dict[str, Any], met: str, missed: str) -> None:
    row = {"instruction_id_list": [name], "kwargs": [{**settings, "of_another": None}]}
    assert followed(met, "", row) == 1
    assert followed(missed, "", row) == 0
    assert followed("", "", row) == 0


def test_every_constraint_has_a_case() -> None:
    assert {name for name, *_ in CASES} == CHECKS.keys()


def test_all_must_be_met_or_each_counts() -> None:
    row = {"instruction_id_list": ["punctuation:no_comma", "startend:quotation"], "kwargs": [{}, {}]}
    assert (followed("so", "", row), followed_share("so", "", row)) == (0, 0.5)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({}, "no instruction_id_list"),
        ({"instruction_id_list": ["x"], "kwargs": [{}]}, "'x' is no constraint"),
        ({"instruction_id_list": ["keywords:existence"], "kwargs": [{}]}, "kwargs of 'keywords:existence': .*keywords"),
    ],
)
def test_rows_without_are_told(row: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        followed("so", "", row)
