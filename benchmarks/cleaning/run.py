"""What does cleaning cost, and what does it find? `python benchmarks/cleaning/run.py --data DIR --tokenizer FILE`

Times the features of each step on GSM8K and on code instructions, on one core, beside the tokenizer on the same
rows; then the selection among made-up documents, with its memory. DIR holds gsm8k/ and gpteacher/.
"""

import json
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import psutil
import pyarrow as pa
from tokenizers import Tokenizer

from bigtune.config import Clean, Source
from bigtune.data.clean import select
from bigtune.data.conversation import Conversation
from bigtune.data.duplicates import Signatures
from bigtune.data.features import features
from bigtune.data.formats import read_conversations
from bigtune.data.overlap import Overlap
from bigtune.data.words import Words, spoken

STEPS = {
    "min_answer_characters": Clean(min_answer_characters=1),
    "same_answer_at_most": Clean(same_answer_at_most=1),
    "max_repetition": Clean(max_repetition=0.3),
    "decontaminate": Clean(decontaminate=13),
    "near_duplicates": Clean(near_duplicates=0.8),
    "all but near_duplicates": Clean(
        min_answer_characters=1, same_answer_at_most=1, max_repetition=0.3, decontaminate=13
    ),
    "all": Clean(
        min_answer_characters=1, same_answer_at_most=1, max_repetition=0.3, decontaminate=13, near_duplicates=0.8
    ),
}
BATCH = 1000  # conversations, as a worker sees them


def read(path: Path) -> list[Conversation]:
    return list(read_conversations([Source(path=path)], "error"))


def seconds(work: Callable[[], object]) -> float:
    """The best of five."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def of_batches(rows: list[Conversation], clean: Clean, overlap: Overlap) -> dict[str, Any]:
    parts = [features(rows[i : i + BATCH], clean, overlap) for i in range(0, len(rows), BATCH)]
    return {name: pa.chunked_array([part[name] for part in parts]) for name in parts[0]}


def features_cost(rows: list[Conversation], overlap: Overlap, tokenizer: Tokenizer) -> dict[str, Any]:
    words = len(Words.of([spoken(row) for row in rows]).hashes)
    texts = ["\n".join(part.text for part in spoken(row)) for row in rows]
    costs = {name: seconds(lambda clean=clean: of_batches(rows, clean, overlap)) for name, clean in STEPS.items()}  # type: ignore[misc]
    costs["tokenizer, for comparison"] = seconds(lambda: tokenizer.encode_batch_fast(texts))
    return {
        "rows": len(rows),
        "words": words,
        "microseconds_a_row": {name: round(cost / len(rows) * 1e6, 1) for name, cost in costs.items()},
    }


def found(rows: list[Conversation], overlap: Overlap) -> dict[str, int]:
    clean = Clean(exact_duplicates=True, near_duplicates=0.8, decontaminate=13, max_repetition=0.3)
    columns = of_batches(rows, clean, overlap)
    columns["minhash"] = Signatures(columns["minhash"])
    content = np.array([row.content_hash for row in rows], np.uint64)
    return select(columns, content, np.ones(len(rows), np.int32), clean).counts()


def made_up(path: Path, rows: int) -> npt.NDArray[np.uint32]:
    """Random signatures in a mapped file, of which 5% agree with an earlier one in 92% of the values."""
    random = np.random.default_rng(0)
    file = np.memmap(path, np.uint32, "w+", shape=(rows, 128))
    for start in range(0, rows, 50_000):
        part = random.integers(0, 2**32 - 1, (min(50_000, rows - start), 128), dtype=np.uint32)
        copies = np.flatnonzero(random.random(len(part)) < 0.05)[1:]
        originals = (random.random(len(copies)) * copies).astype(np.int64)
        part[copies] = np.where(random.random((len(copies), 128)) < 0.92, part[originals], part[copies])
        file[start : start + len(part)] = part
    file.flush()
    return np.memmap(path, np.uint32, "r", shape=(rows, 128))


def selection_cost(rows: int) -> dict[str, Any]:
    """5% exact duplicates, 5% near ones, and one answer that a fifth of the rows give. Memory without mapped files."""
    random = np.random.default_rng(1)
    content, answer = (random.integers(0, 2**63, rows).astype(np.uint64) for _ in range(2))
    content[::20], answer[random.random(rows) < 0.2] = content[0], 7
    with tempfile.TemporaryDirectory() as folder:
        columns = {"minhash": made_up(Path(folder) / "signatures", rows), "answer": answer}
        clean = Clean(exact_duplicates=True, near_duplicates=0.8, same_answer_at_most=3)
        peak, done = [0], threading.Event()
        before = anonymous_bytes()

        def watch() -> None:
            while not done.wait(0.02):
                peak[0] = max(peak[0], anonymous_bytes())

        watcher = threading.Thread(target=watch)
        watcher.start()
        start = time.perf_counter()
        removals = select(columns, content, np.full(rows, 100, np.int32), clean)
        taken = time.perf_counter() - start
        done.set()
        watcher.join()
    return {
        "rows": rows,
        "seconds": round(taken, 1),
        "added_mib": round((peak[0] - before) / 2**20),
        "removed": removals.counts(),
    }


def anonymous_bytes() -> int:
    memory = psutil.Process().memory_info()
    return int(memory.rss - memory.shared)


@click.command()
@click.option("--data", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--tokenizer", type=click.Path(exists=True, path_type=Path), required=True, help="A tokenizer.json.")
@click.option("--rows", default=1_000_000, show_default=True, help="Made-up documents to select from.")
@click.option("--result", type=click.Path(path_type=Path), help="Write the result here as well.")
def main(data: Path, tokenizer: Path, rows: int, result: Path | None) -> None:
    """Measure and print the result as JSON."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    held_out = Overlap.of(read(data / "gsm8k" / "test.jsonl"), 13)
    sources = {"gsm8k": read(data / "gsm8k" / "train.jsonl"), "codegen": read(data / "gpteacher" / "codegen.json")}
    encoder = Tokenizer.from_file(str(tokenizer))
    measured = {
        "features": {name: features_cost(read_rows, held_out, encoder) for name, read_rows in sources.items()},
        "found": {name: found(read_rows, held_out) for name, read_rows in sources.items()},
        "selection": selection_cost(rows),
    }
    text = json.dumps(measured, indent=1) + "\n"
    click.echo(text, nl=False)
    if result:
        result.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
