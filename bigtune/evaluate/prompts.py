"""What is asked: held-out rows with examples before them, as token ids.

    rows ──sample──▶ questions ──┬─ chat:  the model's chat template, examples as earlier turns
    pool ──choose──▶ examples ───┘─ plain: few-shot text, for a base model that knows no template

An item's ids serve the loss and the generation alike, so both see the same prompt to the token.
"""

import hashlib
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from bigtune.config import Data, Evaluate
from bigtune.data.chat import ChatFormat
from bigtune.data.choose import NOTHING_SUPERVISED
from bigtune.data.conversation import Conversation, Message
from bigtune.data.formats import BadRow, ReadCounts, bad_row_error, read_conversations
from bigtune.data.parts import REFUSED
from bigtune.errors import DataError, ModelError, counted

# What ends an answer in plain text. Answers of several lines (GSM8K) rule out a single line end.
PLAIN_END = "\n\n"

Pair = tuple[list[int], list[int]]  # prompt ids, answer ids
Encoder = Callable[[Sequence[Conversation]], list[Pair | BadRow]]


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
    values: Mapping[str, Any] = field(default_factory=dict)

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

    Rows that cannot be asked are an error, or left out and counted by reason, as `data.on_bad_row` says.

    Raises:
        ConfigError: there is no such chat template.
        DataError: a source cannot be read, a row cannot be asked, none is left, or there are fewer examples of a task
            than `shots` asks for.
        ModelError: the tokenizer is a slow one.
    """
    counts = counts if counts is not None else ReadCounts()
    encode = encoder(evaluate.prompt, tokenizer, data.chat_template, data.special_tokens)

    def leave_out(row: Conversation, bad: BadRow) -> None:
        if data.on_bad_row == "error":
            raise bad_row_error(row.path, row.row, bad)
        counts.skip(bad.reason)

    rows = []
    sources = evaluate.sources or data.sources
    read_rows = read_conversations(sources, data.on_bad_row, counts)
    for read in read_rows if evaluate.sources else (row for row in read_rows if row.content_hash < below):
        row = _until_answer(read)
        if row is None:
            leave_out(read, BadRow("an evaluation row needs a question and an assistant's answer to it"))
        else:
            rows.append(row)
    if evaluate.max_rows is not None and evaluate.max_rows < len(rows):
        rows = [rows[at] for at in sorted(random.Random(seed).sample(range(len(rows)), evaluate.max_rows))]
    dialogues = rows
    if evaluate.shots and rows:
        pool = read_conversations(evaluate.shots_from or data.sources, data.on_bad_row)
        known = pool if evaluate.shots_from else (row for row in pool if row.content_hash >= below)
        dialogues = with_examples(rows, known, evaluate.shots, seed, encode if data.on_bad_row == "skip" else None)
    items = []
    for row, pair in zip(rows, encode(dialogues), strict=True):
        if isinstance(pair, BadRow):
            leave_out(row, pair)
        else:
            reference = row.messages[-1].content
            items.append(Item(_said(row), reference, *pair, row.task, row.tags, row.where, row.values))
    if not items:
        names = ", ".join(source.name for source in sources)
        why = counted(counts.skipped)
        raise DataError(f"{names}: no row to evaluate on{f' is left ({why})' if why else ''}")
    return items


def with_examples(
    rows: Sequence[Conversation],
    pool: Iterable[Conversation],
    shots: int,
    seed: int,
    encode: Encoder | None = None,
) -> list[Conversation]:
    """Put `shots` examples of the same task before each question; of any task where a question names none.

    Each row of the pool has a rank, a hash of the seed and its question, and the lowest ranks of a task are
    its examples. So all questions of a task share them, and the pool is read once with nothing held but the
    best: one more than `shots`, because a question is never its own example. Rows of the pool without an
    answer are passed over, and with `encode` those that it has no ids for: one such example would spoil every
    question of its task.

    Raises:
        DataError: fewer than `shots` examples of a task.
    """
    best: dict[str, dict[bytes, Conversation]] = {}
    for row in filter(None, map(_until_answer, pool)):
        rank, example = _rank(row, seed), _bare(row)
        holding = [best.setdefault(task, {}) for task in {row.task, ""}]
        better = [held for held in holding if len(held) <= shots or rank <= max(held)]
        if better and encode and isinstance(encode([example])[0], BadRow):
            continue
        for held in better:
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


def encoder(
    prompt: Literal["chat", "plain"],
    tokenizer: Any,
    chat_template: str | None = None,
    special_tokens: Literal["text", "parse"] = "text",
) -> Encoder:
    """What turns dialogues, whose last message is the reference answer, into token ids.

    Template and special tokens are those of `data`: the model is asked as training saw it.

    Raises:
        ConfigError: there is no such chat template.
        ModelError: the tokenizer is a slow one.
    """
    if prompt == "chat":
        chat = ChatFormat.of(tokenizer, chat_template, "last", special_tokens)
        return lambda dialogues: _encode_chat(dialogues, chat)
    if not tokenizer.is_fast:
        raise ModelError(f"{tokenizer.name_or_path}: bigtune needs a fast tokenizer; convert it to tokenizer.json")
    return lambda dialogues: [_encode_plain(dialogue, tokenizer, special_tokens) for dialogue in dialogues]


def plain_text(messages: Iterable[Message]) -> str:
    """Turns as text: a line end after what is asked, `Answer: ` before and `PLAIN_END` after an answer."""
    return "".join(
        f"Answer: {_closed(turn.content)}{PLAIN_END}" if turn.role == "assistant" else f"{turn.content.strip()}\n"
        for turn in messages
    )


def _encode_chat(dialogues: Sequence[Conversation], chat: ChatFormat) -> list[Pair | BadRow]:
    # What a row says of its part in the loss is meant for training.
    asked = [replace(row, messages=tuple(replace(turn, weight=None) for turn in row.messages)) for row in dialogues]
    pairs: list[Pair | BadRow] = []
    for row, documents in zip(asked, chat.encode(asked), strict=True):
        if isinstance(documents, DataError):
            pairs.append(BadRow(REFUSED, f": {str(documents).removeprefix(f'{row.where}: ')}"))
            continue
        [document] = documents
        if not len(document.spans):
            told = " (the chat template marks nothing of the answer as learnt; mend the template)"
            pairs.append(BadRow(NOTHING_SUPERVISED, told))
            continue
        # The answer is exactly as training would see it; a template may have more than one span of it learnt.
        question = chat.prompt_ids(row.messages[:-1], row.tools)
        ids, end = document.input_ids.tolist(), int(document.spans[-1, 1])
        pairs.append((question, ids[len(question) : end]))
    return pairs


def _encode_plain(dialogue: Conversation, tokenizer: Any, special_tokens: Literal["text", "parse"]) -> Pair:
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


def _bare(example: Conversation) -> Conversation:
    """Without system turns and tools: templates want those of one row, the question, and first."""
    return replace(example, messages=tuple(turn for turn in example.messages if turn.role != "system"), tools=())


def _joined(examples: Iterable[Conversation], row: Conversation) -> Conversation:
    """Examples as earlier turns of the question."""
    system = tuple(turn for turn in row.messages[:1] if turn.role == "system")
    earlier = tuple(turn for example in examples for turn in example.messages)
    return replace(row, messages=system + earlier + row.messages[len(system) :])


def _said(row: Conversation) -> str:
    """What is asked, as a person reads it: all turns before the reference."""
    return "\n".join(turn.content for turn in row.messages[:-1])


def _rank(row: Conversation, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed}\n{_said(row)}".encode(), digest_size=16).digest()
