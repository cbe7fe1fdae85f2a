from decimal import Decimal

import pytest

from bigtune.evaluate.score import is_right, last_number


@pytest.mark.parametrize(
    ("output", "reference"),
    [("Blue", "blue"), ("  blue\n", "blue"), ("Blue.", "blue"), ("a  red\nhen", "A red hen."), ("", " ")],
)
def test_case_spaces_and_a_final_period_do_not_matter(output: str, reference: str) -> None:
    assert is_right(output, reference, "exact")


@pytest.mark.parametrize("output", ["", "light blue", "blue, I think", "b.lue"])
def test_other_words_are_wrong(output: str) -> None:
    assert not is_right(output, "blue", "exact")


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
    assert is_right("It is 18.00", "... #### 18", "number")
    assert not is_right("It is 18.01", "... #### 18", "number")
    assert not is_right("eighteen", "... #### 18", "number")
    assert last_number("none at all") is None
