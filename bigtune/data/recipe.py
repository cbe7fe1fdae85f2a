"""All that decides what a row becomes: made once, and sent to the processes that tokenise."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bigtune.config import Clean, Data, Source
from bigtune.data.chat import ChatFormat, load_tokenizer
from bigtune.data.formats import read_conversations
from bigtune.data.holdout import bound, held_out_rows
from bigtune.data.overlap import Overlap


@dataclass(frozen=True)
class Recipe:
    """A chat format, the sources' fields and roles, and what cleaning compares rows with."""

    chat: ChatFormat
    sources: tuple[Source, ...]
    clean: Clean
    overlap: Overlap | None

    @classmethod
    def of(cls, data: Data, model_path: Path, held_out: Sequence[Source]) -> "Recipe":
        """The recipe of a run.

        Raises:
            ModelError: the tokenizer is missing or broken.
            DataError: a held-out source cannot be read.
        """
        chat = ChatFormat.of(load_tokenizer(model_path), data.chat_template, data.supervise, data.special_tokens)
        return cls(chat, data.sources, data.clean, _overlap(data, held_out))


def _overlap(data: Data, held_out: Sequence[Source]) -> Overlap | None:
    """The words in a row that no training row may share: those of held-out sources, and of rows held out here."""
    if not data.clean.decontaminate:
        return None
    content = np.empty(0, np.uint64)
    if isinstance(data.holdout, int):
        hashes = (row.content_hash for row in read_conversations(data.sources, data.on_bad_row))
        content = np.fromiter(hashes, np.uint64)
    below = bound(data.holdout, content)
    rows = [read_conversations(held_out, data.on_bad_row), held_out_rows(data, below) if below else ()]
    return Overlap.of(itertools.chain(*rows), data.clean.decontaminate)
