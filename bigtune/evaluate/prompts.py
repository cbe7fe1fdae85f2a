"""What is asked: held-out rows with examples before them, as token ids.

    rows ──sample──▶ questions ──┬─ chat:  the model's chat template, examples as earlier turns
    pool ──choose──▶ examples ───┘─ plain: few-shot text, for a base model that knows no template

An item's ids serve the loss and the generation alike, so both see the same prompt to the token.
"""

import hashlib
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from bigtune.config import Data, Evaluate
from bigtune.data.chat import ChatFormat
from bigtune.data.conversation import Conversation, Message
from bigtune.data.formats import ReadCounts, read_conversations
from bigtune.errors import DataError, ModelError

# What ends an answer in plain text. Answers of several lines (GSM8K) rule out a single line end.
PLAIN_END = "\n\n"


@dataclass(frozen=True, slots=True)
class Item:
    """One question. `answer_ids` holds the reference and its end: the end of the turn, or `PLAIN_END`."""

    question: str
    reference: str
    prompt_ids: Sequence[int]
    answer_ids: Sequence[int]
    task: str = ""
    tags: tuple[str, ...] = ()
    where: str = ""

    @property
    def length(self) -> int:
        """Tokens of the prompt and its reference answer."""
        return len(self.prompt_ids) + len(self.answer_ids)


def build_items(
    evaluate: Evaluate, data: Data, tokenizer: Any, seed: int, counts: ReadCounts | None = None, below: int = 0
) -> list[Item]:
    """The questions of `evaluate.sources`, in their order; the same for every model with this tokenizer.

    Where the run names no sources, the questions are the rows of `data.sources` that are held out from training:
    those whose content hash is lower than `below`. Examples are never drawn from them.

    A row's last assistant turn is the reference, and what comes before it is the question. With `max_rows`,
    the rows are a random sample by seed, since files are often sorted by task.

    Raises:
        DataError: a source cannot be read, holds no row, a row has no question or no answer, or there are
            fewer examples of a task than `shots` asks for.
    """
    rows = []
    sources = evaluate.sources or data.sources
    read_rows = read_conversations(sources, data.on_bad_row, counts)
    for read in read_rows if evaluate.sources else (row for row in read_rows if row.content_hash < below):
        row = _until_answer(read)
        if row is None:
            raise DataError(f"{read.where}: an evaluation row needs a question and an assistant's answer to it")
        rows.append(row)
    if not rows:
        names = ", ".join(source.name for source in sources)
        raise DataError(f"{names}: no row to evaluate on")
    if evaluate.max_rows is not None and evaluate.max_rows < len(rows):
        rows = [rows[at] for at in sorted(random.Random(seed).sample(range(len(rows)), evaluate.max_rows))]
    dialogues = rows
    if evaluate.shots:
        pool = read_conversations(evaluate.shots_from or data.sources, data.on_bad_row)
        known = pool if evaluate.shots_from else (row for row in pool if row.content_hash >= below)
        dialogues = with_examples(rows, known, evaluate.shots, seed)
    encoded = encode(dialogues, evaluate.prompt, tokenizer, data.chat_template, data.special_tokens)
    return [
        Item(_said(row), row.messages[-1].content, prompt, answer, row.task, row.tags, row.where)
        for row, (prompt, answer) in zip(rows, encoded, strict=True)
    ]


def with_examples(
    rows: Sequence[Conversation], pool: Iterable[Conversation], shots: int, seed: int
) -> list[Conversation]:
    """Put `shots` examples of the same task before each question; of any task where a question names none.

    Each row of the pool has a rank, a hash of the seed and its question, and the lowest ranks of a task are
    its examples. So all questions of a task share them, and the pool is read once with nothing held but the
    best: one more than `shots`, because a question is never its own example. Rows of the pool without an
    answer are passed over.

    Raises:
        DataError: fewer than `shots` examples of a task.
    """
    best: dict[str, dict[bytes, Conversation]] = {}
    for example in filter(None, map(_until_answer, pool)):
        rank = _rank(example, seed)
        for task in {example.task, ""}:
            held = best.setdefault(task, {})
            held[rank] = example
            if len(held) > shots + 1:
                del held[max(held)]
    dialogues = []
    for row in rows:
        held = best.get(row.task, {})
        examples = [held[rank] for rank in sorted(held) if rank != _rank(row, seed)][:shots]
        if len(examples) < shots:
            of_task = f" of task '{row.task}'" if row.task else ""
            raise DataError(
                f"{row.where}: evaluate.shots is {shots}, but there are {len(examples)} other rows{of_task} "
                "to draw examples from; lower it, or name more in evaluate.shots_from"
            )
        dialogues.append(_joined(examples, row))
    return dialogues


def encode(
    dialogues: Sequence[Conversation],
    prompt: Literal["chat", "plain"],
    tokenizer: Any,
    chat_template: str | None = None,
    special_tokens: Literal["text", "parse"] = "text",
) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, answer ids) of each dialogue, whose last message is the reference answer.

    Template and special tokens are those of `data`: the model is asked as training saw it.

    Raises:
        ConfigError: there is no such chat template.
        DataError: the chat template refuses a dialogue.
        ModelError: the tokenizer is a slow one.
    """
    if prompt == "plain":
        if not tokenizer.is_fast:
            raise ModelError(f"{tokenizer.name_or_path}: bigtune needs a fast tokenizer; convert it to tokenizer.json")
        return [_encode_plain(dialogue, tokenizer, special_tokens) for dialogue in dialogues]
    chat = ChatFormat.of(tokenizer, chat_template, "last", special_tokens)
    # What a row says of its part in the loss is meant for training.
    asked = [replace(row, messages=tuple(replace(turn, weight=None) for turn in row.messages)) for row in dialogues]
    pairs = []
    for row, documents in zip(asked, chat.encode(asked), strict=True):
        if isinstance(documents, DataError):
            raise documents
        [document] = documents
        if not len(document.spans):
            raise DataError(f"{row.where}: the chat template marks nothing of the answer as learnt; mend the template")
        # The answer is exactly as training would see it; a template may have more than one span of it learnt.
        question = chat.prompt_ids(row.messages[:-1], row.tools)
        ids, end = document.input_ids.tolist(), int(document.spans[-1, 1])
        pairs.append((question, ids[len(question) : end]))
    return pairs


def plain_text(messages: Iterable[Message]) -> str:
    """Turns as text: a line end after what is asked, `Answer: ` before and `PLAIN_END` after an answer."""
    return "".join(
        f"Answer: {_closed(turn.content)}{PLAIN_END}" if turn.role == "assistant" else f"{turn.content.strip()}\n"
        for turn in messages
    )


def _encode_plain(
    dialogue: Conversation, tokenizer: Any, special_tokens: Literal["text", "parse"]
) -> tuple[list[int], list[int]]:
    text = plain_text(dialogue.messages)
    start = len(plain_text(dialogue.messages[:-1])) + len("Answer:")
    # Encoded as one text with something after it, so that the answer's borders are cut into tokens as
    # those of the examples are: many tokenizers take line ends at the end of a text together.
    coded = tokenizer(
        text + dialogue.messages[0].content.strip(),
        return_offsets_mapping=True,
        add_special_tokens=False,
        split_special_tokens=special_tokens == "text",
    )
    ids, ends = coded["input_ids"], [end for _, end in coded["offset_mapping"]]
    first = next(at for at, end in enumerate(ends) if end > start)
    last = next((at for at, end in enumerate(ends) if end > len(text)), len(ids))
    begin = tokenizer("x")["input_ids"][:1]
    begin = begin if begin == [tokenizer.bos_token_id] else []
    return begin + ids[:first], ids[first:last]


def _closed(answer: str) -> str:
    """An answer without blank lines, one of which would end it."""
    return re.sub(r"\n\s*\n", "\n", answer.strip())


def _until_answer(row: Conversation) -> Conversation | None:
    """The row up to its last assistant turn; None where there is none, or nothing before it."""
    last = max((at for at, turn in enumerate(row.messages) if turn.role == "assistant"), default=0)
    return replace(row, messages=row.messages[: last + 1]) if last else None


def _joined(examples: Iterable[Conversation], row: Conversation) -> Conversation:
    """Examples as earlier turns. Only the question's own system turn and tools stay: templates want one, and first."""
    system = tuple(turn for turn in row.messages[:1] if turn.role == "system")
    earlier = tuple(turn for example in examples for turn in example.messages if turn.role != "system")
    return replace(row, messages=system + earlier + row.messages[len(system) :])


def _said(row: Conversation) -> str:
    """What is asked, as a person reads it: all turns before the reference."""
    return "\n".join(turn.content for turn in row.messages[:-1])


def _rank(row: Conversation, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed}\n{_said(row)}".encode(), digest_size=16).digest()
