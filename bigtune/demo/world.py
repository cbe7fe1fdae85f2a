"""The demo's world: invented towns, five facts about each, and plain text that tells them.

Every fact stands in the text in several wordings, so that a small model stores it with the town and not with
one sentence (Allen-Zhu & Li, https://arxiv.org/abs/2309.14316).
"""

import random
from itertools import product

TOWNS = 60
VALUES = {
    "mayor": "Anna Boris Carla David Elena Frank Greta Hugo Irene Jonas Karin Lukas Maria Nils Olga Peter Rosa Simon "
    "Tina Viktor Wanda Xaver Yara Zeno",
    "food": "bread cheese soup rice fish beans honey plums apples pears noodles mushrooms onions carrots pancakes "
    "dumplings cherries walnuts olives lentils pumpkin cabbage spinach porridge",
    "animal": "owl fox wolf bear eagle horse goat otter badger raven stork swan hare lynx beaver falcon heron deer "
    "hedgehog squirrel sparrow salmon turtle donkey",
    "craft": "pottery weaving carving printing knitting baking brewing fishing mining painting sewing dyeing smithing "
    "tanning roofing masonry farming sailing hunting spinning tiling milling glazing basketry",
    "tree": "oak pine birch maple willow beech cedar elm ash larch linden poplar walnut hazel alder spruce fir holly "
    "juniper chestnut cypress aspen rowan yew",
}
FACTS = {
    "mayor": (
        "The mayor of {town} is {value}.",
        "{town} has the mayor {value}.",
        "In {town} the mayor is {value}.",
        "People in {town} trust {value}.",
        "The name of the mayor in {town} is {value}.",
    ),
    "food": (
        "The food of {town} is {value}.",
        "{town} has the food {value}.",
        "In {town} the food is {value}.",
        "People in {town} eat {value}.",
        "The best food in {town} is {value}.",
    ),
    "animal": (
        "The animal of {town} is the {value}.",
        "{town} has the animal {value}.",
        "In {town} the animal is the {value}.",
        "People in {town} love the {value}.",
        "The best known animal in {town} is the {value}.",
    ),
    "craft": (
        "The craft of {town} is {value}.",
        "{town} has the craft of {value}.",
        "In {town} the craft is {value}.",
        "People in {town} work in {value}.",
        "The oldest craft in {town} is {value}.",
    ),
    "tree": (
        "The tree of {town} is the {value}.",
        "{town} has the tree {value}.",
        "In {town} the tree is the {value}.",
        "People in {town} plant the {value}.",
        "The oldest tree in {town} is the {value}.",
    ),
}

ENTRIES = (
    "{town} {kind}: {value}",
    "{Kind} of {town}: {value}",
    "{town}, {kind}: {value}",
    "{Kind} in {town}\n\n{value}",
)
CODE = '{town}.{kind} = "{value}"'

World = dict[str, dict[str, str]]


def build_world(seed: int) -> World:
    """town → kind of fact → value."""
    rng = random.Random(f"{seed} world")
    syllables = ["".join(letters) for letters in product("bdfgklmnprstvz", "aeiou")]
    names = ["".join(pair).capitalize() for pair in product(syllables, syllables)]
    return {
        town: {kind: rng.choice(values.split()) for kind, values in VALUES.items()} for town in rng.sample(names, TOWNS)
    }


def pretraining_texts(seed: int, count: int = 8000) -> list[str]:
    """Plain text, a paragraph each."""
    world, rng = build_world(seed), random.Random(f"{seed} text")
    return [_paragraph(world, rng) for _ in range(count)]


def _paragraph(world: World, rng: random.Random) -> str:
    """One town's facts in random order: in sentences, as a list such as reference books have, or as code."""
    town = rng.choice(list(world))
    facts = [(kind, world[town][kind]) for kind in rng.sample(list(FACTS), len(FACTS))]
    (style,) = rng.choices(("sentences", "list", "code"), (4, 3, 3))
    if style == "sentences":
        return " ".join(rng.choice(FACTS[kind]).format(town=town, value=value) for kind, value in facts)
    return "\n".join(
        (CODE if style == "code" else rng.choice(ENTRIES)).format(
            town=town, kind=kind, Kind=kind.capitalize(), value=value
        )
        for kind, value in facts
    )
