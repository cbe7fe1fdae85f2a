"""Document stores made by hand: of known lengths and tokens, without a tokenizer."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from bigtune.config import Data, TrainingSource
from bigtune.data.document import Document
from bigtune.data.manifest import Manifest, PartCounts, SourceCounts
from bigtune.data.store import PARTS, SCHEMA, Store, write_part, write_store


def document(tokens: Sequence[int], *spans: tuple[int, int], weights: Sequence[float] = ()) -> Document:
    """A document of given tokens and supervised ranges."""
    return Document(
        np.array(tokens, dtype=np.int32),
        np.array(spans, dtype=np.int32).reshape(-1, 2),
        np.array(weights or [1.0] * len(spans), dtype=np.float32),
    )


def batch_of(documents: Sequence[Document], first_row: int = 1, content: int = 1) -> Any:
    """The Arrow batch of a part."""
    n = len(documents)
    columns = [
        pa.array([d.input_ids.tolist() for d in documents], pa.list_(pa.int32())),
        pa.array([d.spans.reshape(-1).tolist() for d in documents], pa.list_(pa.int32())),
        pa.array([d.weights.tolist() for d in documents], pa.list_(pa.float32())),
        pa.array([d.supervised for d in documents], pa.int32()),
        pa.array(range(first_row, first_row + n), pa.int64()),
        pa.array([0] * n, pa.int32()),
        pa.array(range(content, content + n), pa.uint64()),
        pa.array([0] * n, pa.uint64()),
    ]
    return pa.record_batch(columns, schema=SCHEMA)


def make_store(path: Path, *sources: Sequence[Document], parts: int = 1, chosen: Sequence[int] | None = None) -> Store:
    """A store of one file a source, each in some parts."""
    (path / PARTS).mkdir(parents=True, exist_ok=True)
    files = []
    content = 1
    for s, documents in enumerate(sources):
        names = {}
        edges = np.linspace(0, len(documents), parts + 1).astype(int)
        for part, (start, end) in enumerate(itertools.pairwise(edges)):
            name, batch = f"{s}-{part:05d}", batch_of(documents[start:end], int(start) + 1, content)
            names[name] = write_part(path / PARTS / name, batch, PartCounts()).bytes
            content += int(end - start)
        files.append({"source": s, "path": f"{s}.jsonl", "hash": str(s), "stat": None, "parts": names})
    every = [d for documents in sources for d in documents]
    kept = np.array(range(len(every)) if chosen is None else chosen, dtype=np.int64)
    lengths = [len(every[i]) for i in kept]
    manifest = Manifest(
        fingerprint="f" * 64,
        files=files,
        sources=[SourceCounts(f"{s}.jsonl", len(d), len(d), 0, 0) for s, d in enumerate(sources)],
        rows=len(every),
        documents=len(kept),
        conversations=len(kept),
        tokens=sum(lengths),
        supervised_tokens=sum(lengths),
        longest_tokens=max(lengths, default=0),
        highest_token=100,
        template="model",
        template_text="",
    )
    write_store(path, manifest, kept, [])
    return Store.open(path)


def data_of(sources: int = 1, sequence_length: int = 64, **settings: Any) -> Data:
    """A data section over such a store; `weights` and `caps` go to the sources."""
    weights, caps = settings.pop("weights", [None] * sources), settings.pop("caps", [None] * sources)
    named = tuple(
        TrainingSource(path=Path(f"{i}.jsonl"), weight=weight, max_documents=cap)
        for i, (weight, cap) in enumerate(zip(weights, caps, strict=True))
    )
    return Data(sources=named, sequence_length=sequence_length, **settings)
