"""All that decides what a row becomes: made once, and sent to the processes that tokenise."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bigtune.config import Clean, Data, Source
from bigtune.data.chat import ChatFormat, check_vocabulary, load_tokenizer
from bigtune.data.features import feature_identity
from bigtune.data.formats import read_conversations
from bigtune.data.holdout import bound, held_out_rows
from bigtune.data.overlap import Overlap
from bigtune.errors import DataError


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
            ModelError: the tokenizer is missing, broken, or of a larger model.
            DataError: a held-out source cannot be read.
        """
        tokenizer = load_tokenizer(model_path)
        check_vocabulary(tokenizer, model_path)
        chat = ChatFormat.of(tokenizer, data.chat_template, data.supervise, data.special_tokens)
        return cls(chat, data.sources, data.clean, _overlap(data, held_out, chat))

    @property
    def identity(self) -> str:
        """All that decides what a row becomes, as text."""
        named = [[source.fields, source.roles] for source in self.sources]
        return json.dumps([self.chat.identity, named, feature_identity(self.clean, self.overlap)], sort_keys=True)


def _overlap(data: Data, held_out: Sequence[Source], chat: ChatFormat) -> Overlap | None:
    """The words in a row that no training row may share: those of held-out sources, and of rows held out here."""
    if not data.clean.decontaminate:
        return None
    rows = [read_conversations(held_out, data.on_bad_row)]
    if data.holdout is not None:
        rows.append(held_out_rows(data, held_out_below(data, chat)))
    return Overlap.of(itertools.chain(*rows), data.clean.decontaminate)


def held_out_below(data: Data, chat: ChatFormat) -> int:
    """The content hash below which rows will be held out: of the rows that the chat format takes, as in the store."""
    if not isinstance(data.holdout, int):
        return bound(data.holdout)
    hashes = (row.content_hash for row in read_conversations(data.sources, data.on_bad_row))
    content = np.unique(np.fromiter(hashes, np.uint64))
    reach = data.holdout
    while True:
        # Few rows are refused, so a few more than are held out are asked for.
        reach = 2 * reach + 1
        lowest = int(content[reach]) if reach < len(content) else 2**64
        taken = {
            row.content_hash for row in held_out_rows(data, lowest) if not isinstance(chat.encode([row])[0], DataError)
        }
        if len(taken) > data.holdout or lowest == 2**64:
            return bound(data.holdout, np.array(sorted(taken), dtype=np.uint64))
