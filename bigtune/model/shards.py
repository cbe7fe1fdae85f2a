"""Byte ranges of tensors in a folder of safetensors files.

The format (https://huggingface.co/docs/safetensors): 8 bytes of header length, a JSON header that gives each
tensor's dtype, shape and byte range, then the bytes. Ranges are read with `preadv` straight into the tensor
that is to hold them; a memory map's pages would count as memory held.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from bigtune.errors import ModelError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SAMPLES, SAMPLE_BYTES = 16, 4096
"""Of each file, in its fingerprint."""
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """Where one tensor's elements lie. `offset` is in bytes from the start of the file."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class Shards:
    """The tensors of a model folder, by name."""

    def __init__(self, folder: Path) -> None:
        """Read the headers of all files; no tensor is read.

        Raises:
            ModelError: no safetensors files, a missing or truncated one, or an unreadable header.
        """
        self.folder = folder
        self.places: dict[str, TensorPlace] = {}
        for path in _files(folder):
            self.places.update(_header(path))

    def fingerprint(self) -> str:
        """A hash of the files' sizes and headers, and of samples of what is in them: it tells a model from another of
        the same shape, but not from one that differs in a few values."""
        total = hashlib.sha256()
        for path in sorted({place.path for place in self.places.values()}):
            size = path.stat().st_size
            with path.open("rb") as file:
                header = file.read(int.from_bytes(file.read(8), "little"))
                total.update(f"{size} ".encode() + header)
                for number in range(SAMPLES):
                    file.seek(max(0, size - SAMPLE_BYTES) * number // (SAMPLES - 1))
                    total.update(file.read(SAMPLE_BYTES))
        return total.hexdigest()

    def read(self, name: str, start: int, count: int, out: torch.Tensor) -> None:
        """Fill `out[:count]` with elements start … start + count of a tensor, flattened, cast to its dtype."""
        place = self.places[name]
        exact = out.dtype == place.dtype and out.device.type == "cpu"
        target = out[:count] if exact else torch.empty(count, dtype=place.dtype)
        _read_into(place.path, place.offset + start * place.dtype.itemsize, target)
        if not exact:
            out[:count].copy_(target)


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(map(str, json.loads(index.read_text())["weight_map"].values())))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index}: not a safetensors index ({error}); download the model again") from None
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ModelError(f"{folder}: the index names files that are missing: {', '.join(missing)}")
        return [folder / name for name in names]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    raise ModelError(f"{folder.absolute()}: no {INDEX} and no {SINGLE}; bigtune loads safetensors only")


def _header(path: Path) -> dict[str, TensorPlace]:
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(size, 100_000_000):
                raise ValueError("the header is longer than the file")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        places = {}
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            if 8 + length + end > size:
                raise ValueError(f"it ends before tensor {name} does")
            if entry["dtype"] in DTYPES:
                places[name] = TensorPlace(path, 8 + length + start, tuple(entry["shape"]), DTYPES[entry["dtype"]])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: broken safetensors file ({error}); copy or download it again") from None
    return places


def _read_into(path: Path, offset: int, target: torch.Tensor) -> None:
    view = memoryview(target.view(torch.uint8).numpy().data)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        done = 0
        while done < len(view):
            read = os.preadv(descriptor, [view[done:]], offset + done)
            if read == 0:
                raise ModelError(f"{path}: the file ends in the middle of a tensor; copy or download it again")
            done += read
    finally:
        os.close(descriptor)
