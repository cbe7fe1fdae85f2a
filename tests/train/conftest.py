"""What several of these tests train on."""

from pathlib import Path

import pytest

from bigtune.data.prepare import prepare
from tests.tiny import tiny_model, tiny_run, write_rows


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and prepared documents, for runs with an output of their own."""
    folder = tmp_path_factory.mktemp("made")
    tiny_model(folder / "model")
    write_rows(folder / "rows.jsonl")
    run = tiny_run(folder, data__store=str(folder / "store"))
    prepare(run.data, run.model.path, run.store)
    return folder
