"""The tensors of a model folder, read by byte ranges of its safetensors files."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from bigtune.errors import ModelError
from bigtune.tensorfile import BYTES, PIECE_BYTES, BrokenFileError, Place, read_header, read_into

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SAMPLES, SAMPLE_BYTES = 16, 4096
"""Of each file, in its fingerprint."""
SHOWN = 3
"""Names in a message about many."""
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64, "U8": torch.uint8}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
"""The dtypes that bigtune reads and writes, by the format's names of them."""
WEIGHTS = frozenset(name for name, dtype in DTYPES.items() if dtype.is_floating_point)
"""Those that a model's weights may have."""


class Shards:
    """The tensors of a model folder, by name, of whatever dtype."""

    def __init__(self, folder: Path) -> None:
        """Read the headers of all files; no tensor is read.

        Raises:
            ModelError: no safetensors files, a missing or truncated one, an unreadable header, or an index that lies.
        """
        self.folder = folder
        self.places: dict[str, Place] = {}
        paths, index = _files(folder)
        for path in paths:
            try:
                places, _, _ = read_header(path)
            except (OSError, BrokenFileError) as error:
                raise ModelError(f"{path}: broken safetensors file ({error}); copy or download it again") from None
            lacking = [name for name, where in index.items() if where == path and name not in places]
            if lacking:
                raise ModelError(
                    f"{folder / INDEX}: places {named(lacking)} in {path.name}, which holds no such tensor; "
                    "download the model again"
                )
            self.places |= {name: place for name, place in places.items() if index.get(name, path) == path}

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
        """Fill `out[:count]` with elements start … start + count of a tensor, flattened, cast to its dtype.

        Raises:
            ModelError: the file was cut meanwhile.
        """
        place = self.places[name]
        try:
            read_range(place, start, out[:count])
        except (OSError, BrokenFileError) as error:
            raise ModelError(f"{place.path}: {error}; copy or download it again") from None


def read_range(place: Place, start: int, out: torch.Tensor) -> None:
    """Fill a tensor with the elements from `start` of a file's tensor, cast to its dtype, wherever it is.

    Raises:
        BrokenFileError: the file ends before.
        OSError: it cannot be read.
    """
    dtype, size = DTYPES[place.dtype], BYTES[place.dtype]
    if out.dtype == dtype and out.device.type == "cpu":
        read_into(place.path, place.offset + start * size, memory_of(out))
        return
    for part in out.split(PIECE_BYTES // size):
        read = torch.empty(part.numel(), dtype=dtype)
        read_into(place.path, place.offset + start * size, memory_of(read))
        part.copy_(read)
        start += part.numel()


def memory_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a flat tensor in the host's memory."""
    return memoryview(tensor.view(torch.uint8).numpy().data)


def named(names: Sequence[str]) -> str:
    """The first of many names, for a message."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else "")


def _files(folder: Path) -> tuple[list[Path], Mapping[str, Path]]:
    """The files of a folder, and where its index, if there is one, says that each tensor is.

    Where there is a single file as well, that is the model, as for transformers.
    """
    index = folder / INDEX
    if (folder / SINGLE).is_file():
        return [folder / SINGLE], {}
    if not index.is_file():
        raise ModelError(f"{folder.absolute()}: no {INDEX} and no {SINGLE}; bigtune loads safetensors only")
    try:
        names = {str(tensor): str(name) for tensor, name in json.loads(index.read_text())["weight_map"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{index}: not a safetensors index ({error}); download the model again") from None
    files = sorted(set(names.values()))
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise ModelError(f"{folder}: the index names files that are missing: {named(missing)}; download them")
    return [folder / name for name in files], {tensor: folder / name for tensor, name in names.items()}
