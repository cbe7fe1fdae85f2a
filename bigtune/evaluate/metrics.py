"""How good an answer is: a number from 0 to 1 for each metric that the run file names.

A metric takes an output, its reference and the row's own values. A name with a colon, `module:function`, is the user's.
"""

import importlib
import re
import string
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any

from bigtune.config import CodeRuns
from bigtune.errors import ConfigError
from bigtune.evaluate.code import check_sandbox, passes
from bigtune.evaluate.constraints import followed, followed_share

Metric = Callable[[str, str, Mapping[str, Any]], float]
CODE = "code"
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
# A minus is a sign only where nothing stands before it that it could be subtracted from.
_NUMBER = re.compile(r"(?:(?<![\w.)])-)?(?:\d+(?:\.\d+)?|\.\d+)")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(output: str, reference: str, row: Mapping[str, Any]) -> float:
    """Whether both are the same text but for case, white space and a final period."""
    return float(normalise(output) == normalise(reference))


def number(output: str, reference: str, row: Mapping[str, Any]) -> float:
    """Whether both end in the same number, after `####` where there is one (GSM8K).

    Raises:
        ValueError: the reference holds no number.
    """
    expected = last_number(reference)
    if expected is None:
        raise ValueError("the reference answer holds no number")
    return float(last_number(output) == expected)


def token_f1(output: str, reference: str, row: Mapping[str, Any]) -> float:
    """F1 of the words that both have, without case, punctuation and articles, as SQuAD scores answers
    (https://arxiv.org/abs/1606.05250)."""
    found, expected = _words(output), _words(reference)
    common = sum((Counter(found) & Counter(expected)).values())
    if not common:
        return float(found == expected)
    return 2 * common / (len(found) + len(expected))


def chrf(output: str, reference: str, row: Mapping[str, Any]) -> float:
    """F-score of character n-grams (https://aclanthology.org/W15-3049), by sacrebleu; of the answer by itself."""
    return float(_chrf_scorer().sentence_score(output, [reference]).score) / 100


def _rouge(kind: str) -> Metric:
    """F1 of ROUGE (https://aclanthology.org/W04-1013), by rouge-score with its stemmer."""

    def score(output: str, reference: str, row: Mapping[str, Any]) -> float:
        return float(_rouge_scorer(kind).score(reference, output)[kind].fmeasure)

    return score


@cache
def _chrf_scorer() -> Any:
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()


@cache
def _rouge_scorer(kind: str) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([kind], use_stemmer=True)


KNOWN: Mapping[str, Metric] = {
    "exact_match": exact_match,
    "number": number,
    "token_f1": token_f1,
    "rouge1": _rouge("rouge1"),
    "rouge2": _rouge("rouge2"),
    "rougeL": _rouge("rougeL"),
    "chrf": chrf,
    "constraints": followed,
    "constraints_share": followed_share,
}


def find_metrics(names: Sequence[str], code: CodeRuns | None = None) -> dict[str, Metric]:
    """Metrics by their names.

    Args:
        code: leave to run code that models write.

    Raises:
        ConfigError: there is no such metric, the user's cannot be imported, or code may not be run.
    """
    return {name: KNOWN.get(name) or (_tests(code) if name == CODE else _of_user(name)) for name in names}


def _tests(code: CodeRuns | None) -> Metric:
    settings = check_sandbox(code)
    return lambda output, reference, row: passes(output, row, settings)


def _of_user(name: str) -> Metric:
    module, colon, function = name.partition(":")
    if not colon:
        known = ", ".join([*KNOWN, CODE])
        raise ConfigError(f"evaluate.metrics: there is no '{name}'; known: {known}, or module:function")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)  # a file beside the run, as `python -m` would find it
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # what a user's module raises can be anything
        raise ConfigError(f"evaluate.metrics: {name} cannot be imported: {error or type(error).__name__}") from None
    if not callable(found):
        raise ConfigError(f"evaluate.metrics: {name} is no function")
    return found  # type: ignore[no-any-return]


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


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.casefold().translate(_PUNCTUATION)).split()
