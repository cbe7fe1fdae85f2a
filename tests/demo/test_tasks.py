"""The demo's claim rests on what its held-out rows share with training: nothing that would give answers away."""

from collections.abc import Iterable, Mapping
from typing import Any

import pytest

from bigtune.demo.tasks import NEW, PHRASINGS, SEEN, DemoRows, instruction_rows
from bigtune.demo.world import build_world, pretraining_texts


@pytest.fixture(scope="module", params=[0, 1])
def rows(request: pytest.FixtureRequest) -> DemoRows:
    return instruction_rows(request.param)


def shared(key: str, some: Iterable[Mapping[str, Any]], others: Iterable[Mapping[str, Any]]) -> set[str]:
    return {row[key] for row in some} & {row[key] for row in others}


def part(rows: DemoRows, tag: str) -> list[dict[str, Any]]:
    return [row for row in rows.held_out if row["tags"] == [tag]]


def test_held_out_rows_share_no_item_with_training(rows: DemoRows) -> None:
    assert not shared("input", rows.held_out, rows.train)
    assert shared("input", [*rows.held_out, rows.train[0]], rows.train)  # the check can fail


def test_new_phrasings_stand_nowhere_in_training(rows: DemoRows) -> None:
    assert not shared("instruction", part(rows, NEW), rows.train)
    assert {row["instruction"] for row in part(rows, SEEN)} <= {row["instruction"] for row in rows.train}


def test_every_task_has_both_parts(rows: DemoRows) -> None:
    for tag in (SEEN, NEW):
        assert {row["task"] for row in part(rows, tag)} == set(PHRASINGS)


def test_the_world_is_a_function_of_the_seed() -> None:
    assert instruction_rows(3) == instruction_rows(3)
    assert build_world(3) != build_world(4)
    assert pretraining_texts(3, 5) == pretraining_texts(3, 5)


def test_every_fact_that_is_asked_for_stands_in_the_pretraining_text() -> None:
    texts = pretraining_texts(0)
    for town, facts in build_world(0).items():
        about = [text for text in texts if town in text]
        for value in facts.values():
            assert any(value in text for text in about), (town, value)


def test_pretraining_text_holds_no_instruction() -> None:
    text = "\n".join(pretraining_texts(0))
    assert "###" not in text
    assert "?" not in text
