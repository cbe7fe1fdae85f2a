"""The demo's instruction data: six kinds of questions about the towns, each worded in many ways.

A quarter of the towns are never asked about in training, so a model that answers about them knows the fact
from its pretraining alone. Every held-out question is asked once in a wording of the training rows ("seen
phrasing") and once in one that stands nowhere else ("new phrasing").
"""

import random
from dataclasses import dataclass
from typing import Any

from bigtune.demo.world import World, build_world

SEEN, NEW = "seen phrasing", "new phrasing"
HELD_OUT_TOWNS = 15
ROWS_A_QUESTION = 6
"""Wordings in which each training question is asked."""

PHRASINGS = {
    "mayor": (
        "Who is the mayor of {town}?",
        "Name the mayor of {town}.",
        "Tell me who the mayor of {town} is.",
        "What is the name of the mayor in {town}?",
        "Which person is mayor of {town}?",
        "Give the mayor of {town}.",
        "I want to know the mayor of {town}.",
        "{town}: who is the mayor?",
        "Please name the mayor that {town} has.",
        "The mayor of {town} is who?",
        "As mayor, {town} has whom?",
        "Write the name of the mayor of {town}.",
    ),
    "food": (
        "What is the favourite food of {town}?",
        "Name the food that people like in {town}.",
        "What do people eat in {town}?",
        "Which food is {town} known for?",
        "Tell me the food of {town}.",
        "Give the favourite food in {town}.",
        "I want to know what people in {town} like to eat.",
        "{town}: what is the food there?",
        "Please name the food that {town} serves.",
        "The favourite food of {town} is what?",
        "As for food, what does {town} eat?",
        "Write down the food of {town}.",
    ),
    "animal": (
        "Which animal stands for {town}?",
        "Name the animal of {town}.",
        "What is the animal of {town}?",
        "Tell me the animal of {town}.",
        "Which animal does {town} have on its coat of arms?",
        "Give the animal that {town} loves.",
        "I want to know the animal of {town}.",
        "{town}: which animal is it?",
        "Please name the animal that {town} protects.",
        "The animal of {town} is what?",
        "As its animal, what does {town} have?",
        "Write down the animal of {town}.",
    ),
    "craft": (
        "Which craft is {town} known for?",
        "Name the craft of {town}.",
        "What is the craft of {town}?",
        "Tell me the craft of {town}.",
        "What do most people in {town} work in?",
        "Give the craft that {town} lives from.",
        "I want to know the craft of {town}.",
        "{town}: which craft is it?",
        "Please name the craft that {town} teaches.",
        "The craft of {town} is what?",
        "As a craft, what does {town} have?",
        "Write down the craft of {town}.",
    ),
    "tree": (
        "Which tree stands in the square of {town}?",
        "Name the tree of {town}.",
        "What is the tree of {town}?",
        "Tell me the tree of {town}.",
        "What is the most common tree in {town}?",
        "Give the tree that {town} planted.",
        "I want to know the tree of {town}.",
        "{town}: which tree is it?",
        "Please name the tree that {town} has.",
        "The tree of {town} is what?",
        "As its tree, what does {town} have?",
        "Write down the tree of {town}.",
    ),
    "two facts": (
        "Name the mayor and the animal of {town}.",
        "What are the mayor and the animal of {town}?",
        "Tell me the mayor and the animal of {town}.",
        "Give both the mayor and the animal of {town}.",
        "I want to know two things of {town}: mayor and animal.",
        "{town}: mayor and animal?",
        "Please name mayor and animal of {town}.",
        "Write down mayor and animal of {town}.",
        "Which mayor and which animal does {town} have?",
        "List the mayor, then the animal, of {town}.",
        "First the mayor, then the animal of {town}, please.",
        "For {town}, what are mayor and animal?",
    ),
}
UNSEEN = 3
"""So many of each kind's wordings, the last ones, are kept for held-out rows."""

Row = dict[str, Any]


@dataclass(frozen=True)
class DemoRows:
    """Rows in the Alpaca shape, with a `task` and `tags` by which scores are grouped."""

    train: list[Row]
    held_out: list[Row]


def instruction_rows(seed: int) -> DemoRows:
    """Training and held-out rows, in a random order."""
    world, rng = build_world(seed), random.Random(f"{seed} rows")
    towns = rng.sample(list(world), len(world))
    asked, known = towns[:HELD_OUT_TOWNS], towns[HELD_OUT_TOWNS:]
    train, held_out = [], []
    for task, wordings in PHRASINGS.items():
        seen, new = wordings[:-UNSEEN], wordings[-UNSEEN:]
        for town in known:
            train += [_row(world, town, task, wording, SEEN) for wording in rng.sample(seen, ROWS_A_QUESTION)]
        for town in asked:
            held_out.append(_row(world, town, task, rng.choice(seen), SEEN))
            held_out.append(_row(world, town, task, rng.choice(new), NEW))
    rng.shuffle(train)
    rng.shuffle(held_out)
    return DemoRows(train, held_out)


def _row(world: World, town: str, task: str, wording: str, part: str) -> Row:
    facts = world[town]
    answer = f"{facts['mayor']}, {facts['animal']}" if task == "two facts" else facts[task]
    return {"instruction": wording.format(town=town), "input": "", "output": answer, "task": task, "tags": [part]}
