"""A model for inference, from whatever a user has: a model's folder, a peft adapter, or a checkpoint of a run."""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bigtune.checkpoint.folder import read_json
from bigtune.checkpoint.merge import find_source
from bigtune.data.chat import load_tokenizer
from bigtune.errors import CheckpointError, ModelError
from bigtune.progress import without_library_bars

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ADAPTER = "adapter_config.json"
TOKENIZER = "tokenizer.json"


@dataclass(frozen=True, slots=True)
class Loaded:
    """A causal language model in evaluation mode, its tokenizer, and what the user calls it."""

    name: str
    model: Any
    tokenizer: Any


@contextmanager
def whole(path: Path, merge: Callable[[Path, Path], Path]) -> Iterator[Path]:
    """The folder of the model, or of the adapter, that a path means; a checkpoint, or a run's latest, is merged into a
    folder beside it for as long as it is needed.

    Args:
        merge: a checkpoint into a folder.

    Raises:
        ModelError: there is neither at this path.
        CheckpointError: the checkpoint is not whole, or there is no room to merge it.
    """
    if not path.is_dir():
        raise ModelError(f"{path}: no such model folder")
    if (path / "config.json").is_file() or (path / ADAPTER).is_file():
        yield path
        return
    try:
        folder = find_source(path).folder
    except CheckpointError as error:
        raise ModelError(f"{path}: no model is here (it has no config.json), and no checkpoint ({error})") from None
    with tempfile.TemporaryDirectory(prefix=".merged-", dir=folder.parent) as aside:
        yield merge(folder, Path(aside) / "model")


def load(path: Path, dtype: str | None = None, trusted: bool = False, name: str = "") -> Loaded:
    """Load a model's folder or a peft adapter, which is folded into its base, on CUDA where available. Nothing is
    downloaded.

    Args:
        dtype: float32 or bfloat16; by default bfloat16 on CUDA and float32 elsewhere.
        trusted: whether code of the model's folder may run.
        name: what the user calls it, if not by its path.

    Raises:
        ModelError: the folder is missing, is no Hugging Face model, or cannot be read as one.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = dtype or ("bfloat16" if device == "cuda" else "float32")
    if dtype not in DTYPES:
        raise ModelError(f"dtype is '{dtype}'; allowed: {', '.join(DTYPES)}")
    adapter = (path / ADAPTER).is_file()
    base = _base_of(path) if adapter else path
    if not (base / "config.json").is_file():
        raise ModelError(f"{base}: no Hugging Face model folder (it has no config.json)")
    tokenizer = load_tokenizer(path if not adapter or (path / TOKENIZER).is_file() else base)
    try:
        with without_library_bars():
            model = _model(base, DTYPES[dtype], trusted)
            if adapter:
                from peft import PeftModel

                model = PeftModel.from_pretrained(model, path).merge_and_unload()
    except Exception as error:
        # transformers raises nearly every kind of error for a folder that is damaged or of an unknown model
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ModelError(f"{path}: the model cannot be loaded: {reason}") from error
    return Loaded(name or str(path), model.to(device).eval(), tokenizer)


def context_of(model: Any) -> int | None:
    """The most tokens that a model takes at once; None where it does not say."""
    found: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found


def stop_ids(loaded: Loaded, answers: Iterable[Sequence[int]]) -> set[int]:
    """Tokens that end an answer: the model's and its tokenizer's, and the template's end of a turn, with which the
    answers of known ones end."""
    own = getattr(loaded.model.generation_config, "eos_token_id", None)
    ends: set[int] = {loaded.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    special = {id for id, token in loaded.tokenizer.added_tokens_decoder.items() if token.special}
    for ids in answers:
        # Backwards, since templates put a line end behind the token that ends a turn.
        ends.update([token for token in reversed(ids) if token in special][:1])
    return ends


def _model(path: Path, dtype: torch.dtype, trusted: bool) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True, trust_remote_code=trusted)


def _base_of(adapter: Path) -> Path:
    base = read_json(adapter, ADAPTER).get("base_model_name_or_path")
    found = Path(str(base))
    for folder in (found, adapter / found):  # as peft takes it, or beside the adapter
        if folder.is_dir():
            return folder
    mend = f"correct base_model_name_or_path in {ADAPTER}"
    raise ModelError(f"{adapter}: an adapter of {base}, which is not here; {mend}")
