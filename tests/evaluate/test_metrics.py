"""Each metric by cases that a person can check, and against the library or paper it follows."""

from decimal import Decimal
from pathlib import Path

import pytest

from bigtune.errors import ConfigError
from bigtune.evaluate.metrics import find_metrics, last_number


def score(name: str, output: str, reference: str) -> float:
    return find_metrics([name])[name](output, reference, {})


@pytest.mark.parametrize(
    ("output", "reference"),
    [("Blue", "blue"), ("  blue\n", "blue"), ("Blue.", "blue"), ("a  red\nhen", "A red hen."), ("", " ")],
)
def test_case_spaces_and_a_final_period_do_not_matter(output: str, reference: str) -> None:
    assert score("exact_match", output, reference) == 1


@pytest.mark.parametrize("output", ["", "light blue", "blue, I think", "b.lue"])
def test_other_words_are_wrong(output: str) -> None:
    assert score("exact_match", output, "blue") == 0


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("9 * 2 = $<<9*2=18>>18 every day.\n#### 18", "18"),
        ("#### 1,234", "1234"),
        ("The total is $1,000,000.50.", "1000000.50"),
        ("so 3, 4 and 5,6", "6"),
        ("from 10-3", "3"),
        ("it fell to -3", "-3"),
        ("it fell to -$3", "-3"),
        ("it fell to \u22123", "-3"),
        ("a half is .5", "0.5"),
        ("#### 7 apples\n\nQuestion: what is 2 + 2?", "7"),
        ("####\n42", "42"),
        ("#### 5 #### 6", "6"),
        ("16 eggs ####", "16"),
        ("18.", "18"),
        ("50%", "50"),
    ],
)
def test_the_last_number_is_found(text: str, number: str) -> None:
    assert last_number(text) == Decimal(number)


def test_numbers_compare_by_value_and_no_number_is_wrong() -> None:
    assert score("number", "It is 18.00", "... #### 18") == 1
    assert score("number", "It is 18.01", "... #### 18") == 0
    assert score("number", "eighteen", "... #### 18") == 0
    assert last_number("none at all") is None
    with pytest.raises(ValueError, match="holds no number"):
        score("number", "18", "eighteen")


@pytest.mark.parametrize(
    ("output", "reference", "expected"),
    [
        ("The red hen.", "a red hen", 1.0),
        ("red", "a red hen", 2 / 3),  # precision 1, recall 1/2
        ("red red red", "red hen", 2 / 5),  # a word counts as often as both have it
        ("blue", "red hen", 0.0),
        ("", "", 1.0),
        ("", "red", 0.0),
    ],
)
def test_words_in_common(output: str, reference: str, expected: float) -> None:
    assert score("token_f1", output, reference) == pytest.approx(expected)


def test_rouge_is_by_words_and_their_stems() -> None:
    assert score("rouge1", "the cats sat", "the cat sat") == 1
    assert score("rouge2", "the cat sat", "the cat lay") == pytest.approx(0.5)
    assert score("rougeL", "the cat on a mat sat", "the cat sat") == pytest.approx(2 * 0.5 * 1 / 1.5)


def test_chrf_is_by_characters() -> None:
    assert score("chrf", "a red hen", "a red hen") == pytest.approx(1)
    assert 0.5 < score("chrf", "a red hens", "a red hen") < 1
    assert score("chrf", "xyz", "a red hen") == pytest.approx(0)


def test_a_metric_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_of_a_test.py").write_text("def length(output, reference, row): return len(output) <= row['most']")
    monkeypatch.chdir(tmp_path)
    metric = find_metrics(["mine_of_a_test:length"])["mine_of_a_test:length"]
    assert [metric(text, "", {"most": 3}) for text in ("one", "three")] == [True, False]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("rouge3", "there is no 'rouge3'; known: exact_match, number, token_f1"),
        ("no_such_module:f", "No module named 'no_such_module'"),
        ("math:no_such", "has no attribute 'no_such'"),
        ("math:pi", "is no function"),
    ],
)
def test_one_that_is_not_there_is_told(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        find_metrics([name])
