"""What makes a model of weights: config, tokenizer and their like; with the tokens that a run adds to them.

    model.path ──▶ OUTPUT/tokenizer: the same files, the tokenizer with `model.add_tokens`, vocab_size with their rows

A run that adds none uses the files of model.path themselves. Every stage takes the tokenizer from here, so that
documents, embeddings, checkpoints and the merged model agree; this module needs no torch.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from bigtune.config import Model
from bigtune.data.chat import check_vocabulary, load_tokenizer
from bigtune.errors import ModelError
from bigtune.model.companions import companion_files as companion_files  # saving takes it from here

FOLDER = "tokenizer"
FACTS = "new_tokens.json"


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A folder of companion files, the rows of the embeddings that belong to tokens new to the model, and whether code
    of the folder may run."""

    folder: Path
    new_rows: range = range(0)
    trusted: bool = False


def vocabulary_of(model: Model, output: Path) -> Vocabulary:
    """The vocabulary of a run; its folder is made where it is not there, or was made of other files.

    Raises:
        ModelError: the model's tokenizer or config is missing or broken, or the tokenizer is of another model.
    """
    if not model.add_tokens:
        return Vocabulary(model.path, trusted=model.trust_remote_code)
    folder = output / FOLDER
    try:
        hashes = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in _files(model.path).items()}
        made_of = {"tokens": list(model.add_tokens), "files": hashes}
        output.mkdir(parents=True, exist_ok=True)
        with FileLock(output / f"{FOLDER}.lock"):
            if (folder / FACTS).is_file():
                facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
                if facts["made_of"] == made_of:
                    return Vocabulary(folder, range(*facts["new_rows"]), model.trust_remote_code)
            return Vocabulary(folder, _make(folder, model, made_of), model.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{folder.absolute()}: the tokenizer with new tokens cannot be made or read ({error})"
        ) from None


def _files(folder: Path) -> dict[str, Path]:
    if not (folder / "config.json").is_file():
        raise ModelError(f"model.path: {folder.absolute()} has no config.json; it must be a Hugging Face model")
    return companion_files(folder)


def _make(folder: Path, model: Model, made_of: dict[str, Any]) -> range:
    tokenizer = load_tokenizer(model.path)
    config = json.loads((model.path / "config.json").read_text(encoding="utf-8"))
    rows: int = config["vocab_size"]
    check_vocabulary(tokenizer, model.path)
    size, new_rows = _add(tokenizer, model.add_tokens, rows)
    aside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    for name, path in companion_files(model.path).items():
        shutil.copyfile(path, aside / name)
    tokenizer.save_pretrained(aside)
    (aside / "config.json").write_text(json.dumps(config | {"vocab_size": size}, indent=2) + "\n", encoding="utf-8")
    facts = {"made_of": made_of, "new_rows": [new_rows.start, new_rows.stop]}
    (aside / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
    return new_rows


def _add(tokenizer: Any, tokens: Sequence[str], rows: int) -> tuple[int, range]:
    """Give the tokenizer new special tokens; of `rows` embeddings then so many are needed, and these are new.

    Rows that pad the embeddings are used first. A token that the tokenizer has keeps its id, and is new to the model
    only where that has no row for it.
    """
    from transformers import AddedToken

    before = max(tokenizer.get_vocab().values()) + 1
    known = {token.content for token in tokenizer.added_tokens_decoder.values()}
    tokenizer.add_tokens(
        [AddedToken(token, special=True, normalized=False) for token in tokens if token not in known],
        special_tokens=True,
    )
    ids = tokenizer.get_vocab()
    size = max(rows, max(ids.values()) + 1)
    new = [ids[token] for token in tokens if ids[token] >= min(before, rows)]
    if not new:
        return rows, range(0)
    return size, range(min(*new, rows), size if size > rows else max(new) + 1)
