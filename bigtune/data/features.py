"""What cleaning must know of each document, as columns that are stored beside its tokens.

Features look at one conversation alone, so worker processes compute them chunk by chunk; `clean.select` decides from
the columns afterwards. Only the columns that the settings need are there:

| column            | type        | of which setting      |
| ----------------- | ----------- | --------------------- |
| answer_characters | int32       | min_answer_characters |
| repetition        | float32     | max_repetition        |
| overlaps          | bool        | decontaminate         |
| minhash           | uint32 [128]| near_duplicates       |
| answer            | uint64      | same_answer_at_most   |
"""

import hashlib
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from bigtune.config import Clean
from bigtune.data.arrow import arrow_numbers
from bigtune.data.conversation import Conversation, hash64
from bigtune.data.overlap import Overlap
from bigtune.data.words import Spoken, Words, ngrams, spoken

VERSION = 1  # of the methods below and of words.py and overlap.py; part of the identity
PERMUTATIONS = 128
SEED = 1  # of the permutations
SHINGLE_WORDS = 5
REPEATED_WORDS = 4
SHORTEST_REPETITION = 20  # words of an answer below which repetition says nothing

# Shingles that go through all permutations at once: 0.5 MiB of products, which stays in the cache.
_AT_ONCE = 1024


def feature_schema(clean: Clean) -> list[Any]:
    """The columns that `clean` needs, as `pa.field`s in a fixed order."""
    fields = [
        (clean.min_answer_characters, pa.field("answer_characters", pa.int32())),
        (clean.max_repetition, pa.field("repetition", pa.float32())),
        (clean.decontaminate, pa.field("overlaps", pa.bool_())),
        (clean.near_duplicates, pa.field("minhash", pa.list_(pa.uint32(), PERMUTATIONS))),
        (clean.same_answer_at_most, pa.field("answer", pa.uint64())),
    ]
    return [field for setting, field in fields if setting is not None]


def feature_identity(clean: Clean, overlap: Overlap | None) -> str:
    """A hash of all that decides the stored columns; thresholds that only select are not in it."""
    facts = [f"features {VERSION}", *(field.name for field in feature_schema(clean))]
    if clean.decontaminate is not None:
        facts.append(f"{clean.decontaminate} words")
        facts.append(overlap.identity if overlap is not None else "nothing held out")
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()


def features(conversations: Sequence[Conversation], clean: Clean, overlap: Overlap | None) -> dict[str, Any]:
    """The columns of `feature_schema(clean)` as `pa.Array`s [N]; a row's values do not depend on the other rows.

    Args:
        overlap: of the held-out rows; None where there are none, and then no document overlaps.
    """
    said = [spoken(conversation) for conversation in conversations]
    answers = [[turn.text for turn in conversation if turn.answer] for conversation in said]
    columns: dict[str, Any] = {}
    if clean.min_answer_characters is not None:
        lengths = [sum(len(text.strip()) for text in texts) for texts in answers]
        columns["answer_characters"] = arrow_numbers(np.array(lengths, np.int32))
    if clean.same_answer_at_most is not None:
        columns["answer"] = arrow_numbers(np.array([_answer_hash(texts) for texts in answers], np.uint64))
    columns |= _of_words(said, clean, overlap)
    return {field.name: columns[field.name] for field in feature_schema(clean)}


def _of_words(said: Sequence[Sequence[Spoken]], clean: Clean, overlap: Overlap | None) -> dict[str, Any]:
    """The columns for which texts must be cut into words, which is done once for all of them."""
    columns: dict[str, Any] = {}
    if clean.max_repetition is clean.decontaminate is clean.near_duplicates is None:
        return columns
    words = Words.of(said)
    if clean.max_repetition is not None:
        columns["repetition"] = arrow_numbers(_repetition(words, len(said)))
    if clean.decontaminate is not None:
        overlaps = np.zeros(len(said), np.bool_)
        if overlap is not None:
            overlaps[overlap.touched(words)] = True
        columns["overlaps"] = pa.array(overlaps)
    if clean.near_duplicates is not None:
        signatures = _minhash(words, len(said))
        columns["minhash"] = pa.FixedSizeListArray.from_arrays(arrow_numbers(signatures.reshape(-1)), PERMUTATIONS)
    return columns


def _answer_hash(texts: Sequence[str]) -> int:
    """64 bits of the answers, word for word: only spacing does not count."""
    text = "\n".join(" ".join(text.split()) for text in texts)
    return hash64(text)


def _repetition(words: Words, rows: int) -> npt.NDArray[np.float32]:
    """For the worst answer of each row, the share of its 4-grams that stand earlier in it; 0 for short answers.

    One of the quality rules of Gopher (Rae et al. 2021, appendix A.1.1), in words rather than characters.
    """
    worst = np.zeros(rows, np.float32)
    for i in np.flatnonzero(words.answers & (words.lengths >= SHORTEST_REPETITION)).tolist():
        grams = np.sort(ngrams(words.turn(i), REPEATED_WORDS))
        repeated = np.count_nonzero(grams[1:] == grams[:-1]) / len(grams)
        worst[words.rows[i]] = max(worst[words.rows[i]], repeated)
    return worst


def _minhash(words: Words, rows: int) -> npt.NDArray[np.uint32]:
    """MinHash signatures, uint32 [rows, 128] (Broder 1997, On the resemblance and containment of documents).

    The set of a row is that of its shingles, 5 words in a row; of its words where it has fewer. A row without words
    has the signature of the empty set, which is 2^32 - 1 throughout.
    """
    from datasketch import MinHash  # type: ignore[import-untyped]  # here: it takes scipy along, most of a second

    shingles = (ngrams(words.hashes, SHINGLE_WORDS) >> np.uint64(32)).astype(np.uint32)
    single = (words.hashes >> np.uint64(32)).astype(np.uint32)
    lengths = np.bincount(words.rows, weights=words.lengths, minlength=rows).astype(np.int64)
    sketch = MinHash(PERMUTATIONS, seed=SEED, hashfunc=operator.index, scheme="affine32")
    signatures = np.empty((rows, PERMUTATIONS), np.uint32)
    for row, (end, length) in enumerate(zip(np.cumsum(lengths).tolist(), lengths.tolist(), strict=True)):
        start = end - length
        elements = shingles[start : end - SHINGLE_WORDS + 1] if length >= SHINGLE_WORDS else single[start:end]
        sketch.clear()
        for i in range(0, len(elements), _AT_ONCE):
            sketch.update_batch(elements[i : i + _AT_ONCE].tolist())
        signatures[row] = sketch.hashvalues
    return signatures
