"""Raw files → document store, once: a store that already holds these documents is left as it is.

Several ranks may call `prepare` at once; the first one works and the others wait for it. To find a store
current takes hashing files only: neither transformers nor the documents are loaded.
"""

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from filelock import FileLock

from bigtune.config import Data, Source
from bigtune.data.chat import DEFAULT_TEMPLATE, ChatFormat, Encoded, load_tokenizer
from bigtune.data.conversation import Conversation
from bigtune.data.formats import ReadCounts, read_conversations, unreadable
from bigtune.data.store import VERSION, Manifest, StoreWriter, read_manifest, writing
from bigtune.errors import DataError, ModelError

BATCH = 1000  # conversations tokenised at once

# Whatever of a model folder decides on the token ids.
TOKENIZER_INPUTS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "tekken.json",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)

Progress = Callable[[int, int | None], None]


def prepare(
    data: Data, model_path: Path, store_path: Path, progress: Progress | None = None, keep: str | None = None
) -> Manifest:
    """Make the store at `store_path` hold the documents of `data`. `progress` gets (rows read, None).

    Args:
        keep: the fingerprint of documents that a checkpoint goes on with; a store of them is not replaced.

    Raises:
        DataError: a source cannot be read, a row cannot be used, nothing is left to train on, or the store
            to keep is of other sources.
        ModelError: the model folder or its tokenizer is missing or broken.
    """
    inputs = _hash_inputs(data, model_path)
    current = _current(data, inputs, store_path)  # before the lock, so that ranks need not queue
    if current is not None:
        return current
    with writing(store_path):
        store_path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(store_path.parent / f"{store_path.name}.lock")
        lock.acquire()
    try:
        current = _current(data, inputs, store_path)
        if current is not None:
            return current
        _refuse_to_replace(store_path, keep)
        return _write(data, inputs, model_path, store_path, progress)
    finally:
        lock.release()


def _write(data: Data, inputs: str, model_path: Path, store_path: Path, progress: Progress | None) -> Manifest:
    chat = ChatFormat.of(load_tokenizer(model_path))
    counts, cutter = ReadCounts(), _Cutter(data)
    tokens = supervised = documents = conversations = highest = 0
    with StoreWriter(store_path) as writer:
        for batch in _batches(read_conversations(data.sources, data.on_bad_row, counts)):
            kept = [
                (whole, conversation)
                for encoded, conversation in _encode(chat, batch, data.on_bad_row, counts)
                if (whole := cutter.fit(encoded, conversation)) is not None
            ]
            if kept:
                writer.add([document for document, _ in kept], [conversation for _, conversation in kept])
            documents += len(kept)
            conversations += sum(bool(conversation.messages) for _, conversation in kept)
            tokens += sum(len(document.input_ids) for document, _ in kept)
            supervised += sum(document.supervised for document, _ in kept)
            highest = max([highest, *(int(document.input_ids.max()) for document, _ in kept)])
            if progress is not None:
                progress(counts.rows, None)
        manifest = Manifest(
            fingerprint=_fingerprint(inputs, data.sequence_length, cutter.longest),
            inputs=inputs,
            sequence_length=data.sequence_length,
            rows=counts.rows,
            documents=documents,
            conversations=conversations,
            tokens=tokens,
            supervised_tokens=supervised,
            longest_tokens=cutter.longest,
            truncated=cutter.truncated,
            dropped=dict(cutter.dropped),
            skipped=counts.skipped,
            highest_token=highest,
            template="default" if chat.is_default else "model",
        )
        _require_documents(manifest, data.sources)
        return writer.finish(manifest)


def _require_documents(manifest: Manifest, sources: Sequence[Source]) -> None:
    if manifest.supervised_tokens:
        return
    losses = {**manifest.skipped, **manifest.dropped}
    why = "; ".join(f"{count:,} × {reason}" for reason, count in losses.items()) or "the files are empty"
    names = ", ".join(str(source.path) for source in sources)
    raise DataError(
        f"{names}: nothing to train on is left of {manifest.rows:,} rows ({why}); "
        "mend the rows, or raise data.sequence_length if they are too long"
    )


def _encode(
    chat: ChatFormat, batch: list[Conversation], on_bad_row: str, counts: ReadCounts
) -> Iterator[tuple[Encoded, Conversation]]:
    """Encoded conversations; those that the template refuses count as bad rows."""
    try:
        yield from zip(chat.encode(batch), batch, strict=True)
    except DataError:
        if on_bad_row == "error":
            raise
        for conversation in batch:
            try:
                encoded = chat.encode([conversation])[0]
            except DataError:
                counts.skip("refused by the chat template")
            else:
                yield encoded, conversation


class _Cutter:
    """Applies on_long_document and counts what it did."""

    def __init__(self, data: Data) -> None:
        self.limit, self.action = data.sequence_length, data.on_long_document
        self.longest = self.truncated = 0
        self.dropped: Counter[str] = Counter()

    def fit(self, document: Encoded, conversation: Conversation) -> Encoded | None:
        """The document as it is stored, or None if it is not."""
        length = len(document.input_ids)
        self.longest = max(self.longest, length)
        if length > self.limit:
            if self.action == "error":
                raise DataError(
                    f"{conversation.where}: {length:,} tokens, more than data.sequence_length {self.limit:,};"
                    " raise it, or set data.on_long_document: drop or truncate"
                )
            if self.action == "drop":
                self.dropped[f"longer than {self.limit:,} tokens"] += 1
                return None
            spans = document.spans.clip(max=self.limit)
            document = Encoded(document.input_ids[: self.limit], spans[spans[:, 0] < spans[:, 1]])
        if not document.supervised:
            self.dropped["no answer left after truncation" if length > self.limit else "no answer"] += 1
            return None
        self.truncated += length > self.limit
        return document


def _batches(conversations: Iterator[Conversation]) -> Iterator[list[Conversation]]:
    while batch := list(itertools.islice(conversations, BATCH)):
        yield batch


def _current(data: Data, inputs: str, store_path: Path) -> Manifest | None:
    """The manifest of the store if it holds these documents already.

    The sequence length matters only where a document is longer than the old one or the new one.
    """
    try:
        manifest = read_manifest(store_path)
    except DataError:
        return None
    none_is_long = manifest.longest_tokens <= min(manifest.sequence_length, data.sequence_length)
    same = manifest.inputs == inputs and (manifest.sequence_length == data.sequence_length or none_is_long)
    return manifest if same else None


def _refuse_to_replace(store_path: Path, keep: str | None) -> None:
    try:
        stored = read_manifest(store_path).fingerprint
    except DataError:
        return
    if keep is not None and stored == keep:
        raise DataError(
            f"{store_path}: a source or the tokenizer changed since this run was started; change it back to go on "
            "with the run, or start a new one with another output"
        )


def _fingerprint(inputs: str, sequence_length: int, longest: int) -> str:
    cut_at = sequence_length if longest > sequence_length else None
    return hashlib.sha256(f"{inputs} {cut_at}".encode()).hexdigest()


def _hash_inputs(data: Data, model_path: Path) -> str:
    """Hash of contents, not of paths or times: a moved or copied file stays the same file."""
    if not model_path.is_dir():
        raise ModelError(f"{model_path.absolute()}: no such model folder; correct model.path")
    total = hashlib.sha256()
    facts = [f"store {VERSION}", DEFAULT_TEMPLATE, data.on_bad_row, data.on_long_document]
    for source in data.sources:
        try:
            facts.append(f"source {_hash_file(source.path)}")
        except OSError as error:
            raise unreadable(source.path, error) from None
    for name in TOKENIZER_INPUTS:
        if (model_path / name).is_file():
            facts.append(f"{name} {_hash_file(model_path / name)}")
    for fact in facts:
        total.update(f"{len(fact)} {fact}\n".encode())
    return total.hexdigest()


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
