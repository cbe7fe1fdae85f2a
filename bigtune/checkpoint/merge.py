"""A checkpoint's partitions become a Hugging Face model: sharded safetensors, config and tokenizer. Needs no torch.

    headers ─▶ plan of the files ─▶ each file, by byte ranges ──▶ config, manifest ─▶ rename
                              └───▶ are the checksums right? ──┘

Checkpoints of bigtune and of DeepSpeed's ZeRO-3 are merged alike. Adapters are folded into the base model's tensors on
the way, or written alone, as one file. No tensor is in memory whole, and no code of a checkpoint ever runs.
"""

import json
import re
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigtune.checkpoint import deepspeed, outputs
from bigtune.checkpoint.base import Base
from bigtune.checkpoint.check import MIB, Progress, cores, find_problems
from bigtune.checkpoint.folder import latest
from bigtune.checkpoint.layout import BUFFERS
from bigtune.checkpoint.layout import FILE as LAYOUT
from bigtune.checkpoint.outputs import DTYPES, Files
from bigtune.checkpoint.partial import Partial
from bigtune.checkpoint.source import Source, of_checkpoint
from bigtune.checkpoint.stream import AHEAD, write_outputs
from bigtune.checkpoint.verify import INDEX
from bigtune.errors import CheckpointError, ModelError
from bigtune.model.companions import companion_files
from bigtune.tensorfile import BrokenFileError

SHARD_BYTES = 5 * 10**9
MOST_FILES = 8
"""That are written at once: each has buffers of up to 24 MiB, and few disks are faster for more."""
CONFIGS = ("config.json", "generation_config.json")


def merge(
    checkpoint: Path,
    output: Path,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
    adapter: bool = False,
    base: Path | None = None,
    workers: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Write the model of a checkpoint into a folder: aside first, then renamed. What a merge that was killed has
    finished there is kept by the next one of the same.

    Args:
        checkpoint: a step-N folder, a `checkpoints` folder, or a run's output folder (then the latest); or the same of
            DeepSpeed's.
        dtype: bfloat16, float16 or float32; None for the precision that the base model's config names, and float32
            for an adapter.
        adapter: of a LoRA run, write the adapter alone, as peft loads it, instead of the model with it folded in.
        base: the base model's folder, if it moved since a LoRA run; of DeepSpeed's checkpoints the folder of config
            and tokenizer, if they are not there.
        workers: threads that read and cast, and files that are written at once; None for one a core.
        say: is told in a line what a user should know.

    Returns:
        The output folder.

    Raises:
        CheckpointError: no checkpoint there, a file of it is missing or damaged, the output is in use or cannot be
            written, or the base model of a LoRA run is gone or another.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"{output}: exists and is not empty; give another --output or remove it")
    try:
        source = find_source(checkpoint)
        plan = _plan(source, dtype, shard_bytes, adapter, base, say)
        with Partial(output.absolute(), plan.made_of) as partial:
            partial.keep_finished(workers, progress)
            if partial.finished:
                say(f"{partial.folder}: goes on from {len(partial.finished)} of {len(plan.files)} files")
            try:
                _write(partial, plan.files, source, workers or cores(), progress)
                partial.complete(plan.texts, plan.files)
            except CheckpointError:  # nothing that was made of a damaged checkpoint stays
                partial.finished.clear()
                raise
            except (OSError, BrokenFileError) as error:
                kept = f"{len(partial.finished)} of {len(plan.files)} files are finished and stay in {partial.folder}"
                mend = f"; {kept}; the same command goes on from them" if partial.finished else ""
                raise CheckpointError(f"{source.folder}: could not be merged into {output}: {error}{mend}") from None
    except (OSError, ModelError) as error:
        raise CheckpointError(f"{checkpoint}: could not be merged into {output}: {error}") from None
    return output


def find_source(path: Path) -> Source:
    """The checkpoint that a path means, of bigtune's or of DeepSpeed's.

    Raises:
        CheckpointError: there is none, or it is not whole.
    """
    for folder in (path, path / "checkpoints"):
        found = folder if (folder / LAYOUT).is_file() else _latest_of_bigtune(folder)
        if found is not None:
            return of_checkpoint(found)
    theirs = deepspeed.find(path)
    if theirs is not None:
        return deepspeed.of_deepspeed(theirs)
    raise CheckpointError(f"{path.absolute()}: no checkpoint here; give a step-N folder or a run's output folder")


def _latest_of_bigtune(folder: Path) -> Path | None:
    """The step that `latest` names, unless that is of DeepSpeed's."""
    return None if deepspeed.find(folder) is not None else latest(folder)


@dataclass(frozen=True, slots=True)
class _Plan:
    """The files of a model to be, what they are made of, and the small ones' content by their paths."""

    files: Files
    made_of: str
    texts: dict[str, bytes]


def _plan(
    source: Source,
    dtype: str | None,
    shard_bytes: int,
    adapter: bool,
    base: Path | None,
    say: Callable[[str], None],
) -> _Plan:
    lora = Base.read(source.folder) if source.manifest else None
    if adapter and lora is None:
        raise CheckpointError(f"--adapter: {source.folder} is of a run without adapter, which trained the whole model")
    texts, config = _companions(source, base)
    name = dtype or ("float32" if adapter else config.get("dtype") or config.get("torch_dtype") or source.dtype)
    if name not in DTYPES:
        raise CheckpointError(f"--dtype {name}: give {', '.join(DTYPES)}")
    if lora and adapter:
        files: Files = {outputs.ADAPTER: outputs.adapter_alone(source, DTYPES[name])}
        texts = {path: content for path, content in texts.items() if path not in CONFIGS}
        told = {**lora.adapted.config, "base_model_name_or_path": str(lora.path)}
        texts["adapter_config.json"] = _json(told)
        return _Plan(files, outputs.fingerprint(source, lora, files), texts)
    if lora:
        tensors = outputs.folded_model(source, lora, lora.shards(source.folder, base), DTYPES[name])
    else:
        tensors = outputs.whole_model(source, DTYPES[name])
    files = outputs.split(tensors, shard_bytes, source.carried.values())
    if config:
        keys = ["dtype", *(["torch_dtype"] if "torch_dtype" in config else [])]
        texts["config.json"] = _json(config | dict.fromkeys(keys, name))
    else:
        say(f"{source.folder}: has no config.json: the weights are merged alone; --base FOLDER gives one")
    if len(files) > 1:
        texts[INDEX] = outputs.index_of(files).encode()
    return _Plan(files, outputs.fingerprint(source, lora, files), texts)


def _companions(source: Source, base: Path | None) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The small files of a model by name, and its config; both empty where there are none."""
    if source.manifest and source.model:
        within = f"{source.model.name}/"
        names = [name.removeprefix(within) for name in source.manifest.files if name.startswith(within)]
        paths = {name: source.model / name for name in names if name != BUFFERS}
    else:
        folder = source.model or base
        paths = companion_files(folder) if folder else {}
        if folder and not paths:
            raise CheckpointError(f"{folder}: has no config.json; give the model's folder as --base")
    texts = {name: path.read_bytes() for name, path in paths.items()}
    if not texts:
        return {}, {}
    try:
        return texts, dict(json.loads(texts["config.json"]))
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{source.model or base}: no config.json that can be read ({error!r}); copy it from the base model"
        ) from None


def _json(tree: object) -> bytes:
    return (json.dumps(tree, indent=2) + "\n").encode()


def _write(partial: Partial, files: Files, source: Source, workers: int, progress: Progress | None) -> None:
    """Write what is not finished yet, several files at once, while the checksums of all that is merged are compared:
    what either reads from the disk is in memory for the other."""
    missing = {name: tensors for name, tensors in files.items() if name not in partial.finished}
    total = sum(output.nbytes for tensors in missing.values() for output in tensors)
    free = shutil.disk_usage(partial.folder).free
    if total > free:
        raise OSError(f"{total / 2**30:.2f} GiB are to be written, {free / 2**30:.2f} GiB are free; make room")
    stop, lock, done = threading.Event(), threading.Lock(), 0

    def unless_stopped(*_: object) -> None:
        if stop.is_set():
            raise InterruptedError("another thread has failed")

    def written(count: int) -> None:
        nonlocal done
        unless_stopped()
        with lock:
            done += count
            if progress:
                progress(done // MIB, total // MIB, "MiB written")

    def write(name: str) -> None:
        partial.add(name, write_outputs(partial.folder / name, missing[name], readers, written))

    writing = min(workers, MOST_FILES)
    with ThreadPoolExecutor(min(workers, writing * AHEAD)) as readers, ThreadPoolExecutor(writing + 1) as threads:
        tasks = [threads.submit(_refuse_damaged, source, workers, unless_stopped)]
        tasks += [threads.submit(write, name) for name in missing]
        try:
            for task in as_completed(tasks):
                task.result()
        finally:  # the first that fails ends all
            stop.set()
            for task in tasks:
                task.cancel()


def _refuse_damaged(source: Source, workers: int, progress: Progress) -> None:
    """Read all that is merged, against its checksums or the CRCs that DeepSpeed's files have."""
    if source.manifest:
        problems = find_problems(source.folder, source.manifest, source.used, workers, progress)
    else:
        problems = deepspeed.find_problems(source.folder, progress)
    if problems:
        more = f" ({len(problems)} problems, `bigtune verify` lists them)" if len(problems) > 1 else ""
        raise CheckpointError(
            f"{source.folder}: {problems[0].file} {problems[0].what}{more}; nothing is merged; take another step"
        )


def parse_size(text: str) -> int:
    """Bytes of a size such as 5GB or 500MB (powers of ten) or 2GiB (powers of two).

    Raises:
        CheckpointError: it is no size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B", text.strip(), re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise CheckpointError(f"--max-shard-size {text}: write a size such as 5GB or 500MB")
    power = " KMGT".index(match[2].upper() or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)
