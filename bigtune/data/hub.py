"""Data sets by name, through the `datasets` library: from the hub, or from its cache where there is no network."""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from bigtune.errors import DataError

BATCH = 1000  # rows taken from the library at once


def split_of(name: str, config: str | None, split: str | None) -> str:
    """The split that is read: the one asked for, or the only one.

    Raises:
        DataError: the data set is not to be had, or has several splits, or not this one.
    """
    loaded = load(name, config, split)
    if split is not None:
        return split
    if len(loaded) != 1:
        raise DataError(f"dataset {name}: has several splits; set the source's split to one of {', '.join(loaded)}")
    return str(next(iter(loaded)))


@lru_cache(maxsize=16)
def load(name: str, config: str | None, split: str | None) -> Any:
    """The `datasets.Dataset`, or the dictionary of splits where none is named. Each process opens it once.

    Raises:
        DataError: it is not to be had.
    """
    import datasets

    try:
        return datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the library and those below it raise what they like
        reason = str(error).strip().split("\n")[0][:300] or type(error).__name__
        raise DataError(
            f"dataset {name}: cannot be loaded ({reason}); correct the name, config or split, or, without a "
            "network, save it with `save_to_disk` and give its path"
        ) from None


def fingerprint(name: str, config: str | None, split: str | None) -> str:
    """The library's own hash of the data set's state."""
    return str(load(name, config, split)._fingerprint)


def batches(dataset: Any) -> Iterator[Any]:
    """The rows as `pyarrow.RecordBatch`, in order, mapped from the cache."""
    for table in dataset.with_format("arrow").iter(batch_size=BATCH):
        yield from table.to_batches()


def row_ranges(dataset: Any, block_bytes: int) -> Iterator[tuple[int, int, int]]:
    """Ranges of rows of about so many bytes each, and the bytes."""
    rows = len(dataset)
    each = dataset.data.nbytes // max(rows, 1)
    step = max(1, block_bytes // max(each, 1))
    for start in range(0, rows, step):
        end = min(start + step, rows)
        yield start, end, (end - start) * each


def rows_in(dataset: Any, start: int, end: int) -> Iterator[Any]:
    """The rows of a range, as `pyarrow.RecordBatch`."""
    yield from dataset.with_format("arrow")[start:end].to_batches()
