"""How fast and how tight is a plan? `python benchmarks/plan/run.py --result benchmarks/plan/result.json`

Packs log-normal lengths by best fit, one document at a time, as bigtune did at first, and by patterns, as it
does now; each in a process of its own. With `--data DIR --tokenizer tokenizer.json` it also packs GSM8K and
ShareGPT, whose files lie under DIR. Last, it deals the rows of global batches to ranks.
"""

import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import psutil

from bigtune.data.deal import deal, imbalance
from bigtune.data.plan import Plan, plan_rows

Lengths = npt.NDArray[np.integer]
SEQUENCE_LENGTHS = (2048, 4096)


def plan_by_best_fit(lengths: Lengths, sequence_length: int, seed: int, epoch: int) -> Plan:
    """bigtune's planner before this benchmark: a Python step for each document."""
    random = np.random.default_rng(np.random.SeedSequence([seed, epoch]))
    shuffled = random.permutation(len(lengths))
    order = shuffled[np.argsort(-lengths[shuffled].astype(np.int64), kind="stable")]
    row_of, rows = _best_fit(lengths[order].tolist(), sequence_length)
    row = random.permutation(rows)[np.array(row_of, dtype=np.int64)]
    by_row = np.lexsort((random.permutation(len(lengths)), row))
    offsets = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=rows))]).astype(np.int64)
    return Plan(order[by_row].astype(np.int64), offsets)


def _best_fit(lengths: list[int], room: int) -> tuple[list[int], int]:
    row_of: list[int] = []
    rows = 0
    open_rooms = 0
    rows_with: list[list[int]] = [[] for _ in range(room + 1)]
    for length in lengths:
        fitting = open_rooms >> length
        if fitting:
            left = (fitting & -fitting).bit_length() - 1
            stack = rows_with[length + left]
            row = stack.pop()
            if not stack:
                open_rooms ^= 1 << (length + left)
        else:
            row, left = rows, room - length
            rows += 1
        if left:
            rows_with[left].append(row)
            open_rooms |= 1 << left
        row_of.append(row)
    return row_of, rows


PLANNERS: dict[str, Callable[[Lengths, int, int, int], Plan]] = {"best_fit": plan_by_best_fit, "patterns": plan_rows}


def measure(planner: str, path: str, sequence_length: int) -> dict[str, Any]:
    """Seconds, rows and memory of one plan; runs in a process of its own."""
    lengths = np.load(path)
    PLANNERS[planner](lengths[:1000], sequence_length, 0, 0)
    before = psutil.Process().memory_info().rss
    start = time.perf_counter()
    plan = PLANNERS[planner](lengths, sequence_length, 0, 0)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return {
        "planner": planner,
        "documents": len(lengths),
        "sequence_length": sequence_length,
        "seconds": round(seconds, 3),
        "rows": plan.rows,
        "fewest_rows": fewest_rows(lengths, sequence_length),
        "efficiency": round(plan.efficiency(lengths, sequence_length), 6),
        "peak_bytes_per_document": round(peak / len(lengths), 1),
    }


def fewest_rows(lengths: Lengths, sequence_length: int) -> int:
    """No packing can do with fewer."""
    return -(-int(lengths.sum(dtype=np.int64)) // sequence_length)


def synthetic(sizes: list[int]) -> Iterator[dict[str, Any]]:
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            path = str(Path(folder) / "lengths.npy")
            for sequence_length in SEQUENCE_LENGTHS:
                drawn = np.random.default_rng(0).lognormal(5.5, 1.0, size)
                np.save(path, drawn.clip(8, sequence_length).astype(np.int32))
                for planner in PLANNERS:
                    with context.Pool(1) as pool:
                        yield pool.apply(measure, (planner, path, sequence_length))


def real(data: Path, tokenizer: Path) -> Iterator[dict[str, Any]]:
    """GSM8K at 2,048 tokens and ShareGPT's conversations at 4,096, as plain text in bigtune's own template."""
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(str(tokenizer))
    rows = [json.loads(line) for line in (data / "gsm8k/train.jsonl").read_text(encoding="utf-8").splitlines()]
    chats = json.loads((data / "sharegpt/conversations.json").read_text(encoding="utf-8"))
    texts = {
        ("gsm8k", 2048): [_text([("human", row["question"]), ("gpt", row["answer"])]) for row in rows],
        ("sharegpt", 4096): [_text([(m["from"], m["value"]) for m in chat["conversations"]]) for chat in chats],
    }
    for (name, sequence_length), documents in texts.items():
        lengths = np.array([len(one.ids) for one in encoder.encode_batch(documents)])
        for planner, plan_by in PLANNERS.items():
            plan = plan_by(lengths, sequence_length, 0, 0)
            yield {
                "data": name,
                "planner": planner,
                "documents": len(lengths),
                "tokens": int(lengths.sum()),
                "longest": int(lengths.max()),
                "sequence_length": sequence_length,
                "rows": plan.rows,
                "fewest_rows": fewest_rows(lengths, sequence_length),
                "efficiency": round(plan.efficiency(lengths, sequence_length), 6),
                "highest_possible": round(
                    float(lengths.sum() / fewest_rows(lengths, sequence_length) / sequence_length), 6
                ),
            }


def _text(turns: list[tuple[str, str]]) -> str:
    marks = {"human": "### Instruction:\n{}\n\n", "gpt": "### Response:\n{}<|endoftext|>"}
    return "".join(marks[role].format(text) for role, text in turns)


def dealing() -> Iterator[dict[str, Any]]:
    """Rows of global batches dealt in their own order, and balanced."""
    random = np.random.default_rng(0)
    lengths = random.lognormal(5.5, 1.0, 1_000_000).clip(8, 4096).astype(np.int64)
    supervised = (lengths * random.uniform(0.1, 0.9, len(lengths))).astype(np.int64)
    plan = plan_rows(lengths, 4096, 0, 0)
    loads = [np.add.reduceat(values[plan.documents], plan.offsets[:-1]) for values in (lengths**2, supervised)]
    for rows, ranks in ((8, 2), (64, 8), (256, 32), (4096, 64)):
        found: dict[str, list[Any]] = {"plain": [], "dealt": [], "seconds": []}
        for start in range(0, min(20 * rows, plan.rows - rows), rows):
            work, tokens = (load[start : start + rows] for load in loads)
            began = time.perf_counter()
            slots = deal(work, tokens, ranks, 1, rows)
            found["seconds"].append(time.perf_counter() - began)
            found["dealt"].append(imbalance(slots, work, tokens))
            found["plain"].append(imbalance(np.arange(rows).reshape(-1, ranks).T[:, :, None], work, tokens))
        yield {
            "rows": rows,
            "ranks": ranks,
            "global_batches": len(found["dealt"]),
            **{
                f"{how}_{load}_{name}": round(float(reduce([getattr(one, load) for one in found[how]])), 4)
                for how in ("plain", "dealt")
                for load in ("work", "supervised")
                for name, reduce in (("mean", np.mean), ("worst", np.max))
            },
            "milliseconds": round(float(np.median(found["seconds"])) * 1e3, 3),
        }


@click.command()
@click.option("--size", "sizes", type=int, multiple=True, default=[100_000, 1_000_000, 10_000_000], show_default=True)
@click.option("--data", type=click.Path(path_type=Path, exists=True), help="Folder with gsm8k/ and sharegpt/.")
@click.option("--tokenizer", type=click.Path(path_type=Path, exists=True), help="A tokenizer.json.")
@click.option("--result", type=click.Path(path_type=Path), help="Write the figures here as well.")
def main(sizes: tuple[int, ...], data: Path | None, tokenizer: Path | None, result: Path | None) -> None:
    """Print the figures as JSON."""
    report = {
        "synthetic": list(synthetic(list(sizes))),
        "real": list(real(data, tokenizer)) if data and tokenizer else [],
        "dealing": list(dealing()),
    }
    text = json.dumps(report, indent=1) + "\n"
    click.echo(text, nl=False)
    if result:
        result.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
