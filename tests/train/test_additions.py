"""What a run says of the model before it trains: adapters, new tokens, and tensors that have no place in it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bigtune.model.vocabulary import Vocabulary
from bigtune.train.begin import _additions


@pytest.mark.parametrize(
    ("unexpected", "told"),
    [([], []), (["a"], ["1 … a"]), (["a", "b", "c", "d", "e"], ["5 … a, b, c and 2 more"])],
)
def test_tensors_without_a_place_are_one_line(unexpected: list[str], told: list[str]) -> None:
    engine: Any = SimpleNamespace(adapted=None, unexpected=unexpected)
    said = " of the tensors in its files, which are neither trained nor in the merged model: "
    lines = [f"not in the model: {line.replace(' … ', said)}" for line in told]
    assert list(_additions(engine, Vocabulary(Path()))) == lines
