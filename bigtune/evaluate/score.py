"""Whether an answer is right: the whole text, or its last number."""

import re
from decimal import Decimal
from typing import Literal

_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
# A minus is a sign only where nothing stands before it that it could be subtracted from.
_NUMBER = re.compile(r"(?:(?<![\w.)])-)?(?:\d+(?:\.\d+)?|\.\d+)")


def is_right(output: str, reference: str, answer: Literal["exact", "number"]) -> bool:
    """Compare as `evaluate.answer` says; an output without a number is wrong where one is asked for."""
    if answer == "exact":
        return normalise(output) == normalise(reference)
    number = last_number(output)
    return number is not None and number == last_number(reference)


def normalise(text: str) -> str:
    """Fold case, collapse white space and drop a final period."""
    return " ".join(text.split()).casefold().removesuffix(".").rstrip()


def last_number(text: str) -> Decimal | None:
    """The number an answer ends in: of the line after the last `####` (GSM8K's mark), else of the whole text.

    Commas between thousands and dollar signs are dropped, so `$1,234.50` is 1234.5.
    """
    _, mark, after = text.rpartition("####")
    if mark and after.strip():
        # A model that does not stop writes a new question below its answer; that one is not the answer.
        text = after.strip().splitlines()[0]
    text = _THOUSANDS.sub("", text.replace("$", "").replace("\u2212", "-"))
    numbers = _NUMBER.findall(text)
    return Decimal(numbers[-1]) if numbers else None
