"""The demo's instruction data: eight kinds of questions, each worded in many ways.

No item (a country, a story, a list, a price list) stands both in training and in held-out rows: a model
that answers a held-out row about a country knows the fact from its pretraining alone. Half of the held-out
rows are worded as in training ("seen phrasing"), half as nowhere else ("new phrasing").
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from bigtune.demo import phrasings
from bigtune.demo.phrasings import Phrasings
from bigtune.demo.world import NOUNS, World, build_world, make_prices, make_story, show_prices

SEEN, NEW = "seen phrasing", "new phrasing"
TRAIN_ROWS, HELD_OUT_ROWS = 400, 60  # a task

Row = dict[str, Any]


@dataclass(frozen=True)
class DemoRows:
    """Rows in the alpaca shape, with a `task` and `tags`, by which scores are grouped."""

    train: list[Row]
    held_out: list[Row]


@dataclass(frozen=True)
class Question:
    """What is asked about one item, before it is put into words."""

    item: str
    phrasings: Phrasings
    values: dict[str, str]
    answer: str
    input: str = ""


def instruction_rows(seed: int) -> DemoRows:
    """Training and held-out rows, in a random order."""
    world, rng = build_world(seed), random.Random(f"{seed} rows")
    makers: dict[str, Callable[[], Question]] = {
        "story": lambda: _about_story(rng),
        "list ends": lambda: _about_ends(rng),
        "list next": lambda: _about_next(rng),
        "list reverse": lambda: _about_reverse(rng),
        "price": lambda: _about_price(rng),
    }
    train, held_out = [], []
    known, asked = world.countries[HELD_OUT_ROWS:], world.countries[:HELD_OUT_ROWS]
    for task, questions in (("capital", _about_capital), ("ruler", _about_ruler)):
        train += [_word(task, questions(world, rng.choice(known)), SEEN, rng) for _ in range(TRAIN_ROWS)]
        held_out += [_word(task, questions(world, asked[at]), _part(at), rng) for at in range(HELD_OUT_ROWS)]
    for task, maker in makers.items():
        fresh = _distinct(maker)
        train += [_word(task, next(fresh), SEEN, rng) for _ in range(TRAIN_ROWS)]
        held_out += [_word(task, next(fresh), _part(at), rng) for at in range(HELD_OUT_ROWS)]
    rng.shuffle(train)
    rng.shuffle(held_out)
    return DemoRows(train, held_out)


def _part(at: int) -> str:
    return (SEEN, NEW)[at % 2]


def _word(task: str, question: Question, part: str, rng: random.Random) -> Row:
    wordings = question.phrasings.seen if part == SEEN else question.phrasings.new
    return {
        "instruction": rng.choice(wordings).format(**question.values),
        "input": question.input,
        "output": question.answer,
        "task": task,
        "tags": [part],
    }


def _distinct(maker: Callable[[], Question]) -> Iterator[Question]:
    """Questions about new items only."""
    items: set[str] = set()
    while True:
        question = maker()
        if question.item not in items:
            items.add(question.item)
            yield question


def _about_capital(world: World, country: str) -> Question:
    return Question(country, phrasings.CAPITAL, {"country": country}, world.capitals[country])


def _about_ruler(world: World, country: str) -> Question:
    return Question(country, phrasings.RULER, {"country": country}, world.rulers[country])


def _about_story(rng: random.Random) -> Question:
    story = make_story(rng)
    part = rng.choice(list(phrasings.STORY))
    return Question(story.text, phrasings.STORY[part], story.parts, story.parts[part], story.text)


def _words(rng: random.Random, shortest: int, longest: int) -> list[str]:
    return rng.sample(NOUNS, rng.randint(shortest, longest))


def _about_ends(rng: random.Random) -> Question:
    words, end = _words(rng, 3, 6), rng.choice(list(phrasings.ENDS))
    text = ", ".join(words)
    return Question(text, phrasings.ENDS[end], {}, words[0] if end == "first" else words[-1], text)


def _about_next(rng: random.Random) -> Question:
    words = _words(rng, 3, 6)
    text, at = ", ".join(words), rng.randrange(len(words) - 1)
    return Question(text, phrasings.NEXT, {"word": words[at]}, words[at + 1], text)


def _about_reverse(rng: random.Random) -> Question:
    words = _words(rng, 3, 4)
    text = ", ".join(words)
    return Question(text, phrasings.REVERSE, {}, ", ".join(reversed(words)), text)


def _about_price(rng: random.Random) -> Question:
    prices = make_prices(rng, rng.randint(3, 6))
    text, thing = show_prices(prices), rng.choice(list(prices))
    return Question(text, phrasings.PRICE, {"thing": thing}, prices[thing], text)
