"""The documentation says what the code does."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_key_of_the_run_file_is_documented() -> None:
    spec = importlib.util.spec_from_file_location("document_run_file", ROOT / "tools" / "document_run_file.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = (ROOT / "docs" / "run-file.md").read_text(encoding="utf-8")
    assert written == module.document(), "run `python tools/document_run_file.py`"
