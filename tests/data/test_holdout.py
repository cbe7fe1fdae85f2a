"""The bound of a run: from the run file where that suffices, else from the store that was prepared with it."""

from pathlib import Path

import pytest

from bigtune.config import Data
from bigtune.data.holdout import bound_of, held_out_rows
from bigtune.data.prepare import prepare
from bigtune.errors import DataError
from tests.data.conftest import WriteRows


def data(path: Path, holdout: float | int | None) -> Data:
    return Data.model_validate({"sources": [{"path": path}], "holdout": holdout})


@pytest.fixture
def rows(write_rows: WriteRows) -> Path:
    return write_rows([{"instruction": f"Say {i}.", "output": f"It is {i}."} for i in range(60)])


def test_a_number_of_rows_is_held_out_by_the_store_that_was_prepared_with_it(
    rows: Path, model_path: Path, tmp_path: Path
) -> None:
    store = tmp_path / "s"
    for holdout in (10, 30):
        prepare(data(rows, holdout), model_path, store)
        assert len(list(held_out_rows(data(rows, holdout), bound_of(data(rows, holdout), store)))) == holdout


@pytest.mark.parametrize("before", [10, 0.5, None])
def test_a_store_of_another_holdout_is_one_clear_error(
    rows: Path, model_path: Path, tmp_path: Path, before: float | int | None
) -> None:
    prepare(data(rows, before), model_path, tmp_path / "s")
    with pytest.raises(DataError, match=rf"holdout \({before}, and now 30\); run `bigtune prepare RUN.yaml`$"):
        bound_of(data(rows, 30), tmp_path / "s")


def test_only_a_number_of_rows_needs_a_store(rows: Path, tmp_path: Path) -> None:
    assert bound_of(data(rows, None), tmp_path / "absent") == 0
    assert bound_of(data(rows, 0.25), tmp_path / "absent") == 2**62
    with pytest.raises(DataError, match=r"no prepared documents here; run `bigtune prepare RUN.yaml`"):
        bound_of(data(rows, 10), tmp_path / "absent")
