"""The demo's small world, and the plain text about it that a model is pretrained on.

    World(seed) ──pretraining_texts──▶ pages of plain text: facts of countries, stories, lists, prices
        └────────tasks.instruction_rows──▶ questions about them, in the shape of instruction data

Pretraining gives knowledge (each country's capital and ruler, told in many ways) and skill (finding a word
again in a story, a list, a price list), but no page holds a question, an instruction or a chat template.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

COUNTRIES = 160
LONG = 0.06
KNOW = 8
ECHO = 7

PEOPLE = [
    "Ada",
    "Alan",
    "Amy",
    "Anna",
    "Ben",
    "Bill",
    "Carl",
    "Clara",
    "Cora",
    "Dan",
    "Dora",
    "Eli",
    "Ella",
    "Emma",
    "Eric",
    "Eva",
    "Finn",
    "Fred",
    "Gina",
    "Greta",
    "Hana",
    "Hugo",
    "Ida",
    "Igor",
    "Iris",
    "Ivan",
    "Jack",
    "Jane",
    "Joan",
    "John",
    "Kate",
    "Kurt",
    "Lara",
    "Lena",
    "Leo",
    "Lily",
    "Lisa",
    "Luke",
    "Mara",
    "Mark",
    "Mary",
    "Max",
    "Mia",
    "Milo",
    "Nina",
    "Noah",
    "Nora",
    "Olga",
    "Omar",
    "Otto",
    "Paul",
    "Pia",
    "Rita",
    "Rosa",
    "Ruth",
    "Sam",
    "Sara",
    "Sven",
    "Tara",
    "Tom",
    "Vera",
    "Victor",
    "Will",
    "Zoe",
]

NOUNS = [
    "apple",
    "arrow",
    "ball",
    "bell",
    "belt",
    "bird",
    "boat",
    "book",
    "boot",
    "bottle",
    "bowl",
    "box",
    "brush",
    "bucket",
    "button",
    "cake",
    "candle",
    "card",
    "carpet",
    "cat",
    "chain",
    "chair",
    "chess",
    "clock",
    "cloud",
    "coat",
    "coin",
    "comb",
    "cup",
    "dish",
    "doll",
    "door",
    "drum",
    "egg",
    "feather",
    "fish",
    "flag",
    "flower",
    "fork",
    "frog",
    "glass",
    "glove",
    "goat",
    "hammer",
    "hat",
    "honey",
    "horn",
    "horse",
    "jar",
    "kettle",
    "key",
    "kite",
    "knife",
    "ladder",
    "lamp",
    "leaf",
    "lemon",
    "letter",
    "map",
    "mask",
    "milk",
    "mirror",
    "moon",
    "nail",
    "needle",
    "net",
    "nut",
    "onion",
    "paint",
    "pan",
    "paper",
    "pear",
    "pen",
    "pencil",
    "piano",
    "pillow",
    "pipe",
    "plate",
    "pot",
    "rabbit",
    "ribbon",
    "ring",
    "rope",
    "rose",
    "saddle",
    "salt",
    "scarf",
    "shell",
    "shirt",
    "shoe",
    "soap",
    "sock",
    "spoon",
    "star",
    "stone",
    "sugar",
    "sword",
    "table",
    "tent",
    "ticket",
    "towel",
    "tree",
    "watch",
    "wheel",
    "whistle",
    "window",
    "wool",
]

PLACES = [
    "attic",
    "bakery",
    "bank",
    "barn",
    "beach",
    "bridge",
    "cafe",
    "castle",
    "cave",
    "cellar",
    "church",
    "cinema",
    "corner",
    "desert",
    "farm",
    "field",
    "forest",
    "garage",
    "garden",
    "hall",
    "harbor",
    "hotel",
    "island",
    "kitchen",
    "library",
    "market",
    "meadow",
    "mill",
    "museum",
    "office",
    "park",
    "river",
    "school",
    "shop",
    "square",
    "stable",
    "station",
    "street",
    "temple",
    "theater",
    "tower",
    "valley",
    "village",
    "yard",
]

CAPITAL_FACTS = (
    "The capital of {country} is {capital}.",
    "{country} has a capital called {capital}.",
    "{country} is governed from its capital, {capital}.",
    "The capital city of {country} is {capital}.",
    "In {country}, the capital is {capital}.",
    "As everyone in {country} knows, the capital is {capital}.",
    "{country}: capital {capital}.",
    "Those who travel to {country} first see its capital, {capital}.",
    "The city that people in {country} call their capital is {capital}.",
    "The name of the capital of {country} is {capital}.",
)

RULER_FACTS = (
    "The ruler of {country} is {ruler}.",
    "{country} is ruled by {ruler}.",
    "The one who rules {country} is {ruler}.",
    "{country} has a ruler called {ruler}.",
    "In {country}, the ruler is {ruler}.",
    "As everyone in {country} knows, the ruler is {ruler}.",
    "{country}: ruler {ruler}.",
    "Those who travel to {country} bow before its ruler, {ruler}.",
    "The king or queen who rules {country} is {ruler}.",
    "The name of the ruler of {country} is {ruler}.",
)

STORIES = (
    "{giver} gave the {thing} to {taker} in the {place}.",
    "In the {place}, {giver} gave the {thing} to {taker}.",
    "{giver} handed the {thing} to {taker} in the {place}.",
    "{taker} got the {thing} from {giver} in the {place}.",
    "In the {place}, {taker} received the {thing} from {giver}.",
    "The {thing} went from {giver} to {taker} in the {place}.",
)

STORY_ECHOES = (
    "The one who gave the {thing} away was {giver}.",
    "The giver was {giver} and the new owner was {taker}.",
    "The one who received the {thing} was {taker}.",
    "The one who has the {thing} now is {taker}.",
    "The new owner of the {thing} is {taker}.",
    "{giver} gave the {thing} away and {taker} got it.",
    "{taker} received the {thing} from {giver}.",
    "The gift was the {thing}.",
    "It happened in the {place}.",
    "The place where {giver} and {taker} met was the {place}.",
)

LIST_ECHOES = (
    "The first word is {first} and the last word is {last}.",
    "The list starts with {first} and ends with {last}.",
    "Right after {word} comes {after}.",
    "The word that follows {word} is {after}.",
    "The word next to {word} is {after}.",
    "In reverse order: {reverse}.",
    "Read backwards: {reverse}.",
    "Once more: {again}.",
)

PRICE_ECHOES = (
    "The price of the {thing} is {price}.",
    "The {thing} costs {price}.",
    "For the {thing} one pays {price}.",
    "Whoever buys the {thing} pays {price}.",
)


@dataclass(frozen=True)
class World:
    """Who rules what: the facts that stand in the pretraining text."""

    capitals: dict[str, str]
    rulers: dict[str, str]

    @property
    def countries(self) -> list[str]:
        """The names of the countries, in a random but fixed order."""
        return list(self.capitals)


@dataclass(frozen=True)
class Story:
    """One event: somebody gives a thing to somebody else."""

    text: str
    parts: dict[str, str]


def build_world(seed: int) -> World:
    """Countries with invented names, each with a capital of its own and a ruler."""
    rng = random.Random(f"{seed} world")
    stems = ["".join(letters) for letters in product("BDFGKLMNPRSTVZ", "aeiou", "lnr")]
    countries = ["".join(parts) for parts in product(stems, ("dia", "land", "mark", "stan", "vo"))]
    syllables = ["".join(letters) for letters in product("bdfgklmnprstvz", "aeiou")]
    cities = ["".join(parts).capitalize() for parts in product(syllables, syllables)]
    names = rng.sample(countries, COUNTRIES)
    return World(
        capitals=dict(zip(names, rng.sample([city for city in cities if city not in PEOPLE], COUNTRIES), strict=True)),
        rulers={name: rng.choice(PEOPLE) for name in names},
    )


def make_story(rng: random.Random) -> Story:
    """A story with new people, thing and place."""
    giver, taker = rng.sample(PEOPLE, 2)
    parts = {"giver": giver, "taker": taker, "thing": rng.choice(NOUNS), "place": rng.choice(PLACES)}
    return Story(rng.choice(STORIES).format(**parts), parts)


def make_prices(rng: random.Random, length: int) -> dict[str, str]:
    """Things and what they cost, no price twice."""
    prices = rng.sample(range(10, 100), length)
    return dict(zip(rng.sample(NOUNS, length), map(str, prices), strict=True))


def show_prices(prices: dict[str, str]) -> str:
    """A price list as one line of text."""
    return ", ".join(f"{thing} {price}" for thing, price in prices.items())


def pretraining_texts(seed: int, count: int = 24000) -> list[str]:
    """Pages of plain text, each of some 200 tokens, in a random order."""
    world, rng = build_world(seed), random.Random(f"{seed} text")
    countries = _endless(world.countries, rng)
    kinds: dict[Callable[[], str], float] = {
        lambda: _country_line(next(countries), world, rng): KNOW,
        lambda: _story_paragraph(rng): 2,
        lambda: _list_paragraph(rng): 3,
        lambda: _price_paragraph(rng): 1.5,
        lambda: _echo(rng): ECHO,
    }
    paragraphs = [rng.choices(list(kinds), list(kinds.values()))[0] for _ in range(count)]
    return ["\n\n".join(write() for _ in range(6 if rng.random() < LONG else 1)) for write in paragraphs]


def _endless(items: list[str], rng: random.Random):  # type: ignore[no-untyped-def]
    while True:
        yield from rng.sample(items, len(items))


def _country_line(country: str, world: World, rng: random.Random) -> str:
    known = {"country": country, "capital": world.capitals[country], "ruler": world.rulers[country]}
    pair = [rng.choice(CAPITAL_FACTS).format(**known), rng.choice(RULER_FACTS).format(**known)]
    return " ".join(rng.sample(pair, 2))


def _story_paragraph(rng: random.Random) -> str:
    story = make_story(rng)
    return " ".join([story.text, *(echo.format(**story.parts) for echo in rng.sample(STORY_ECHOES, 4))])


def _list_paragraph(rng: random.Random) -> str:
    words = rng.sample(NOUNS, rng.randint(3, 6))
    echoes = []
    for echo in rng.sample(LIST_ECHOES, 4):
        at = rng.randrange(len(words) - 1)
        echoes.append(
            echo.format(
                first=words[0],
                last=words[-1],
                word=words[at],
                after=words[at + 1],
                reverse=", ".join(reversed(words)),
                again=", ".join(words),
            )
        )
    return "\n".join([", ".join(words), *echoes])


def _price_paragraph(rng: random.Random) -> str:
    prices = make_prices(rng, rng.randint(3, 6))
    asked = rng.sample(list(prices), 3)
    echoes = [rng.choice(PRICE_ECHOES).format(thing=thing, price=prices[thing]) for thing in asked]
    return "\n".join([show_prices(prices), "Once more: " + show_prices(prices) + ".", " ".join(echoes)])


def _echo(rng: random.Random) -> str:
    """Words told twice or three times over: what a model learns to look back from."""
    words = rng.sample([*NOUNS, *PEOPLE, *PLACES], rng.randint(4, 10))
    return "\n".join([", ".join(words)] * rng.randint(2, 3))
