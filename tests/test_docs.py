"""The documentation says what the code does."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(("page", "tool"), [("run-file", "document_run_file"), ("optimizers", "document_optimizers")])
def test_pages_made_from_code_are_what_it_says(page: str, tool: str) -> None:
    """Every key of the run file; every cell of the table of presets and optimizers."""
    spec = importlib.util.spec_from_file_location(tool, ROOT / "tools" / f"{tool}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    assert written == module.document(), f"run `python tools/{tool}.py`"
