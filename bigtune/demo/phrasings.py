"""How the demo's questions are worded: by kind of question, the wordings to train on and the held-out ones."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Phrasings:
    """Wordings of one question. The `new` ones appear in held-out rows only."""

    seen: tuple[str, ...]
    new: tuple[str, ...]


CAPITAL = Phrasings(
    seen=(
        "What is the capital of {country}?",
        "Name the capital of {country}.",
        "Which city is the capital of {country}?",
        "Tell me the capital of {country}.",
        "{country} has which capital?",
        "I am going to {country}. What is its capital?",
        "Give the name of the capital of {country}.",
        "What is the capital city of {country} called?",
        "From which capital is {country} governed?",
        "Please name the capital city of {country}.",
        "Do you know the capital of {country}?",
        "Write down the capital of {country}.",
        "In {country}, which city is the capital?",
        "What do people in {country} call their capital?",
    ),
    new=(
        "Which capital does {country} have?",
        "Please tell me the name of the capital of {country}.",
        "What is the name of the capital city in {country}?",
        "I want to know the capital of {country}.",
        "State which city is the capital of {country}.",
    ),
)

RULER = Phrasings(
    seen=(
        "Who rules {country}?",
        "Name the ruler of {country}.",
        "Who is the ruler of {country}?",
        "Tell me the ruler of {country}.",
        "{country} has which ruler?",
        "I am going to {country}. Who is its ruler?",
        "Give the name of the ruler of {country}.",
        "What is the ruler of {country} called?",
        "By whom is {country} ruled?",
        "Please name the person who rules {country}.",
        "Do you know the ruler of {country}?",
        "Write down the ruler of {country}.",
        "In {country}, who is the ruler?",
        "Who is the king or queen of {country}?",
    ),
    new=(
        "Which ruler does {country} have?",
        "Please tell me the name of the ruler of {country}.",
        "What is the name of the person who rules {country}?",
        "I want to know who rules {country}.",
        "State who is the ruler of {country}.",
    ),
)

STORY = {
    "giver": Phrasings(
        seen=(
            "Who gave the {thing} away?",
            "Who was the giver?",
            "Name the giver.",
            "Tell me who gave the {thing}.",
            "From whom did the {thing} come?",
            "Which person gave something away?",
            "Find the person who gave the {thing} away.",
            "Who no longer has the {thing}?",
        ),
        new=("Who gave something away?", "Please name the person who gave the {thing}.", "Tell me the giver."),
    ),
    "taker": Phrasings(
        seen=(
            "Who received the {thing}?",
            "Who has the {thing} now?",
            "Name the new owner.",
            "Tell me who received the {thing}.",
            "To whom did the {thing} go?",
            "Which person received something?",
            "Find the person who has the {thing} now.",
            "Who is the new owner of the {thing}?",
        ),
        new=(
            "Who received something?",
            "Please name the new owner of the {thing}.",
            "Tell me who has the {thing} now.",
        ),
    ),
    "thing": Phrasings(
        seen=(
            "What did {giver} give away?",
            "What was the gift?",
            "Name the thing that changed hands.",
            "Tell me what {taker} received.",
            "Which thing did {giver} give to {taker}?",
            "What did {taker} get?",
            "Find the thing that was given away.",
            "What does {taker} have now?",
        ),
        new=("Name the gift.", "What thing changed hands?", "Tell me what {giver} gave away."),
    ),
    "place": Phrasings(
        seen=(
            "Where did it happen?",
            "Where were {giver} and {taker}?",
            "Name the place.",
            "Tell me where they met.",
            "In which place did {taker} get the {thing}?",
            "Which place is this about?",
            "Find the place where it happened.",
            "Where did {giver} give the {thing} away?",
        ),
        new=("Where did they meet?", "Name the place where it happened.", "In which place were {giver} and {taker}?"),
    ),
}

ENDS = {
    "first": Phrasings(
        seen=(
            "What is the first word?",
            "Give the first word of the list.",
            "Name the first word.",
            "Which word does the list start with?",
            "With which word does the list start?",
            "Tell me the first word in the list.",
            "Write down the first word.",
            "Find the word that comes first.",
        ),
        new=("Which word is the first?", "Please give me the first word.", "Tell me which word the list starts with."),
    ),
    "last": Phrasings(
        seen=(
            "What is the last word?",
            "Give the last word of the list.",
            "Name the last word.",
            "Which word does the list end with?",
            "With which word does the list end?",
            "Tell me the last word in the list.",
            "Write down the last word.",
            "Find the word that comes last.",
        ),
        new=("Which word is the last?", "Please give me the last word.", "Tell me which word the list ends with."),
    ),
}

NEXT = Phrasings(
    seen=(
        "What comes after {word}?",
        "Which word follows {word}?",
        "Name the word after {word}.",
        "Tell me the word that follows {word}.",
        "What is right after {word} in the list?",
        "Find {word} and give the next word.",
        "Give the word next to {word}, to its right.",
        "Which word comes right after {word}?",
        "After {word}, which word is next?",
        "Write down the word that comes after {word}.",
        "In this list, what follows {word}?",
        "Please give the word following {word}.",
    ),
    new=(
        "What follows {word}?",
        "Please name the word right after {word}.",
        "Tell me which word comes after {word}.",
        "In the list, which word is next after {word}?",
    ),
)

REVERSE = Phrasings(
    seen=(
        "Reverse the list.",
        "Write the list backwards.",
        "Give the words in reverse order.",
        "Turn the list around.",
        "Read the list backwards.",
        "Put the words in reverse order.",
        "Say the words from the last to the first.",
        "List these words in reverse.",
        "Please reverse the order of the words.",
        "What is the list in reverse order?",
        "Start at the end and write all the words.",
        "Repeat the list backwards.",
    ),
    new=(
        "Please write the words backwards.",
        "Give the list in reverse.",
        "Reverse the order of this list.",
        "Write the words from the last to the first.",
    ),
)

PRICE = Phrasings(
    seen=(
        "What is the price of the {thing}?",
        "What does the {thing} cost?",
        "How much is the {thing}?",
        "Name the price of the {thing}.",
        "Tell me what the {thing} costs.",
        "I want to buy the {thing}. What do I pay?",
        "Find the price of the {thing}.",
        "How much does one pay for the {thing}?",
        "Give the price for the {thing}.",
        "What must I pay for the {thing}?",
        "For how much is the {thing} sold?",
        "Write down the price of the {thing}.",
    ),
    new=(
        "How much does the {thing} cost?",
        "Please tell me the price of the {thing}.",
        "What does one pay for the {thing}?",
        "I want to know what the {thing} costs.",
    ),
)
