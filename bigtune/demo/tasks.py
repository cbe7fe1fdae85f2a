"""The demo's instruction data: questions about the towns of eight kinds, each worded in many ways.

Five ask for one fact; the others for two, as a list, in a sentence and in code.

A third of the towns are never asked about in training, so a model that answers about them knows the fact
from its pretraining alone. Every held-out question is asked once in a wording of the training rows ("seen
phrasing") and once in one that stands nowhere else ("new phrasing").
"""

import random
from dataclasses import dataclass
from typing import Any

from bigtune.demo.world import World, build_world

SEEN, NEW = "seen phrasing", "new phrasing"
HELD_OUT_TOWNS = 20
ROWS_A_QUESTION = 8
"""Wordings in which each training question is asked."""

PHRASINGS = {
    "mayor": (
        "The mayor of this town, please.",
        "This town has which mayor?",
        "In this town, the mayor is called what?",
        "Say who leads this town as mayor.",
        "Who is the mayor of this town?",
        "Name the mayor of this town.",
        "Tell me who the mayor of this town is.",
        "What is the name of the mayor in this town?",
        "Which person is mayor of this town?",
        "Give the mayor of this town.",
        "I want to know the mayor of this town.",
        "This town: who is the mayor?",
        "Please name the mayor that this town has.",
        "The mayor of this town is who?",
        "As mayor, this town has whom?",
        "Write the name of the mayor of this town.",
    ),
    "food": (
        "The food of this town, please.",
        "This town eats which food?",
        "In this town, the food is which?",
        "Say which food this town likes.",
        "What is the favourite food of this town?",
        "Name the food that people like in this town.",
        "What do people eat in this town?",
        "Which food is this town known for?",
        "Tell me the food of this town.",
        "Give the favourite food in this town.",
        "I want to know what people in this town like to eat.",
        "This town: what is the food there?",
        "Please name the food that this town serves.",
        "The favourite food of this town is what?",
        "As for food, what does this town eat?",
        "Write down the food of this town.",
    ),
    "animal": (
        "The animal of this town, please.",
        "This town has which animal?",
        "In this town, the animal is which?",
        "Say which animal this town has.",
        "Which animal stands for this town?",
        "Name the animal of this town.",
        "What is the animal of this town?",
        "Tell me the animal of this town.",
        "Which animal does this town have on its coat of arms?",
        "Give the animal that this town loves.",
        "I want to know the animal of this town.",
        "This town: which animal is it?",
        "Please name the animal that this town protects.",
        "The animal of this town is what?",
        "As its animal, what does this town have?",
        "Write down the animal of this town.",
    ),
    "craft": (
        "The craft of this town, please.",
        "This town has which craft?",
        "In this town, the craft is which?",
        "Say which craft this town has.",
        "Which craft is this town known for?",
        "Name the craft of this town.",
        "What is the craft of this town?",
        "Tell me the craft of this town.",
        "What do most people in this town work in?",
        "Give the craft that this town lives from.",
        "I want to know the craft of this town.",
        "This town: which craft is it?",
        "Please name the craft that this town teaches.",
        "The craft of this town is what?",
        "As a craft, what does this town have?",
        "Write down the craft of this town.",
    ),
    "tree": (
        "The tree of this town, please.",
        "This town has which tree?",
        "In this town, the tree is which?",
        "Say which tree this town has.",
        "Which tree stands in the square of this town?",
        "Name the tree of this town.",
        "What is the tree of this town?",
        "Tell me the tree of this town.",
        "What is the most common tree in this town?",
        "Give the tree that this town planted.",
        "I want to know the tree of this town.",
        "This town: which tree is it?",
        "Please name the tree that this town has.",
        "The tree of this town is what?",
        "As its tree, what does this town have?",
        "Write down the tree of this town.",
    ),
    "two facts": (
        "The mayor and the animal of this town, please.",
        "This town has which mayor and which animal?",
        "In this town, who is mayor, and what is the animal?",
        "First tell me the mayor of this town, then its animal.",
        "Name the mayor and the animal of this town.",
        "What are the mayor and the animal of this town?",
        "Tell me the mayor and the animal of this town.",
        "Give both the mayor and the animal of this town.",
        "I want to know two things of this town: mayor and animal.",
        "This town: mayor and animal?",
        "Please name mayor and animal of this town.",
        "Write down mayor and animal of this town.",
        "Which mayor and which animal does this town have?",
        "List the mayor, then the animal, of this town.",
        "First the mayor, then the animal of this town, please.",
        "For this town, what are mayor and animal?",
    ),
    "sentence": (
        "A sentence on tree and food of this town, please.",
        "This town has which tree and food? Answer in a sentence.",
        "In one sentence, what are the tree and the food of this town?",
        "Say in a whole sentence which tree and food this town has.",
        "Say in a sentence what people grow and eat in this town.",
        "Write a sentence about the tree and the food of this town.",
        "Use a whole sentence: the tree and the food of this town.",
        "Tell me in one sentence about tree and food in this town.",
        "Describe tree and food of this town in a sentence.",
        "In a full sentence, please: the tree and food of this town.",
        "Give me a sentence on the tree and the food of this town.",
        "I want a sentence with the tree and the food of this town.",
        "Form a sentence that tells the tree and food of this town.",
        "Put the tree and the food of this town into a sentence.",
        "One sentence: which tree and which food has this town?",
        "Answer in a sentence what tree and food this town has.",
    ),
    "code": (
        "A dict with the mayor and craft of this town, please.",
        "This town has which mayor and craft? Answer with a dict.",
        "In Python, what are mayor and craft of this town as a dict?",
        "Say in Python who is mayor of this town, and its craft.",
        "Write a Python dict with the mayor and the craft of this town.",
        "Give the mayor and craft of this town as a Python dict.",
        "As a Python dict, please: mayor and craft of this town.",
        "Put the mayor and the craft of this town into a dict.",
        "Make a dict of mayor and craft for this town.",
        "Code a dict that holds mayor and craft of this town.",
        "I want a Python dict of the mayor and the craft in this town.",
        "Show mayor and craft of this town as a dict.",
        "Return the mayor and the craft of this town as a dict.",
        "Define a dict for this town, with mayor and craft.",
        "A Python dict, please, with this town's mayor and craft.",
        "What dict has the mayor and the craft of this town?",
    ),
}
ANSWERS = {
    "two facts": "{mayor}, {animal}",
    "sentence": "The tree is the {tree} and the food is {food}.",
    "code": '{{"mayor": "{mayor}", "craft": "{craft}"}}',
}
"""How a task is answered, where it is not by the fact of its name."""
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
    answer = ANSWERS.get(task, f"{{{task}}}").format(**facts)
    return {"instruction": wording, "input": town, "output": answer, "task": task, "tags": [part]}
