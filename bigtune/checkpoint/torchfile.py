"""torch's .pt files without torch: what is in one, and where the bytes of its tensors lie. No code of a file runs.

A .pt file (https://docs.pytorch.org/docs/stable/notes/serialization.html) is a zip whose members are not compressed:

    name/data.pkl          a pickle; in the place of a tensor's bytes it has the name of a storage
    name/byteorder         little
    name/data/0 …          the bytes of the storages
"""

import io
import zipfile
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import xxhash

from bigtune.checkpoint.unpickle import INERT, Named, RefusedError, inert, load, shown
from bigtune.errors import CheckpointError
from bigtune.tensorfile import BYTES, PIECE_BYTES, Place

MOST_BYTES = 2**26
"""Of a pickle, or of a zip's directory; a model of 100,000 tensors has a quarter of it."""
MOST_DIMENSIONS, MOST_ELEMENTS = 64, 2**48
OLD_FORMAT = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
"""How torch.save's files began before torch 1.6, and still do where DeepSpeed's checkpoint_serialization is false."""
LOCAL_HEADER = 30
"""Bytes of a zip member's own header before its name and its extra field."""
DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
          "int16": "I16", "int8": "I8", "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8",
          "bool": "BOOL", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}  # fmt: skip
"""safetensors' names of torch's dtypes."""
STORAGES = {"Double": "F64", "Float": "F32", "Half": "F16", "BFloat16": "BF16", "Long": "I64", "Int": "I32",
            "Short": "I16", "Char": "I8", "Byte": "U8", "Bool": "BOOL"}  # fmt: skip
UNTYPED = "torch.storage.UntypedStorage"
NEEDLESS = {
    "torch": "Tensor device ComplexFloatStorage ComplexDoubleStorage",
    "torch.nn.parameter": "Parameter",
    "torch.serialization": "_get_layout",
    "torch._utils": "_rebuild_sparse_tensor",
    "collections": "defaultdict Counter deque",
    "__builtin__": "set list dict int float",  # as protocol 2 has builtins
    "_codecs": "encode",
    "argparse": "Namespace",
    "pathlib": "PosixPath",
    "numpy": "dtype ndarray",
    "numpy.core.multiarray": "scalar _reconstruct",
    "numpy._core.multiarray": "scalar _reconstruct",
}
"""What the state of schedulers, samplers and callers names beside tensors: nothing of it is made."""


@dataclass(frozen=True, slots=True)
class TorchFile:
    """What torch.save was given: of a tensor a `Place`, or INERT where it is not contiguous or of a dtype that
    safetensors does not have. `sums` is a hash of the file's time and of its members' names, sizes and CRCs."""

    path: Path
    tree: Mapping[Any, Any]
    sums: str


def read(path: Path, others: Mapping[str, Callable[..., object]] = MappingProxyType({})) -> TorchFile:
    """Read the pickle of a file that holds a dictionary; no tensor is read.

    Args:
        others: functions and classes beside torch's that its pickle may name; see `unpickle.load`.

    Raises:
        CheckpointError: the file is missing, cut, damaged or of torch's old format, or asks for code.
    """
    head = b""
    try:
        with _Bounded(path) as file:
            head = file.read(len(OLD_FORMAT))
            archive = _Archive(path, file)
            tree = load(archive.content("data.pkl"), {**MAKERS, **others}, archive.storage)
            if not isinstance(tree, dict):
                raise ValueError("its pickle is no dictionary")
            return TorchFile(path, tree, archive.sums())
    except RefusedError as error:
        raise CheckpointError(
            f"{path}: {error}, which no checkpoint needs; it was not run; "
            "if you trust whoever wrote the file, DeepSpeed's own zero_to_fp32.py reads it"
        ) from None
    except FileNotFoundError:
        raise CheckpointError(f"{path}: is missing; copy it from where the checkpoint was written") from None
    except Exception as error:  # a file that is damaged, or made to be, fails in any way that Python has
        raise CheckpointError(f"{path}: {_why(head, error)}; copy it again, or merge another step") from None


def damaged(path: Path, offsets: Iterable[int]) -> Iterator[str]:
    """Read the storages that have one of these bytes of the file, and tell which have another CRC than the zip says."""
    try:
        with _Bounded(path) as file:
            for name in _Archive(path, file).damaged(sorted(offsets)):
                yield f"is damaged in {shown(name)}"
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        yield f"cannot be read ({shown(str(error))})"


def _why(head: bytes, error: Exception) -> str:
    if head == OLD_FORMAT:
        return "is in the format of torch before 1.6, which has to be loaded with DeepSpeed and saved anew"
    if isinstance(error, zipfile.BadZipFile):
        return "is cut or damaged" if head.startswith(b"PK") else "is no file of torch.save"
    if type(error) in (ValueError, TypeError, OSError, PermissionError):
        return f"cannot be read ({shown(str(error))})"
    return f"is damaged ({type(error).__name__})"


class _Bounded(io.FileIO):
    """A file of which zipfile cannot be made to read more at once than memory has."""

    def read(self, size: int | None = -1, /) -> bytes:
        """As of any file. Raises ValueError when too much is asked for."""
        if size is not None and size > MOST_BYTES:
            raise ValueError("its zip's directory is too long for a checkpoint")
        return super().read(MOST_BYTES if size is None or size < 0 else size) or b""


@dataclass(frozen=True, slots=True)
class _Storage:
    """`numel` elements of a dtype, from a byte of the file on."""

    path: Path
    offset: int
    dtype: str
    numel: int


class _Archive:
    """The zip. Every method raises ValueError, KeyError or zipfile.BadZipFile where it is damaged."""

    def __init__(self, path: Path, file: _Bounded) -> None:
        self._path, self._file, self._zip = path, file, zipfile.ZipFile(file)
        self._size = file.seek(0, io.SEEK_END)
        if not any(member.CRC for member in self._zip.infolist()):
            for member in self._zip.infolist():  # set_crc32_options(False) leaves none to be compared
                del member.CRC
        pickles = [name for name in self._zip.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("it is a zip without the one data.pkl that torch.save writes")
        self._prefix = pickles[0].removesuffix("data.pkl")
        if f"{self._prefix}byteorder" in self._zip.namelist() and self.content("byteorder") != b"little":
            raise ValueError("its numbers are big-endian")

    def content(self, name: str) -> bytes:
        """A member; the zip's CRC of it is checked."""
        member = self._member(name)
        if member.file_size > MOST_BYTES:
            raise ValueError(f"its {name} has {member.file_size:,} bytes, too many for a checkpoint")
        return self._zip.read(member)

    def storage(self, pid: Any) -> object:
        """A storage as a pickle tells of it: `("storage", its class, its name, a device, how many elements)`."""
        kind, of, key, _, numel = pid
        if kind != "storage" or type(of) is not Named or type(key) is not str or not are_counts((numel,)):
            raise TypeError("names a storage that is none")
        dtype = "U8" if of.name == UNTYPED else STORAGES.get(of.name.removeprefix("torch.").removesuffix("Storage"))
        if dtype is None:
            return INERT
        member = self._member(f"data/{key}")
        if member.file_size < numel * BYTES[dtype]:
            raise ValueError(f"its storage {shown(key)} is shorter than its tensors")
        return _Storage(self._path, self._begin(member), dtype, numel)

    def damaged(self, offsets: Sequence[int]) -> Iterator[str]:
        """The names of members that have one of these bytes in them, in order, and another CRC than the zip says."""
        for member in self._zip.infolist():
            begin = self._begin(member)
            first = bisect_left(offsets, begin)
            if first == len(offsets) or offsets[first] >= begin + member.file_size:
                continue
            try:
                with self._zip.open(member) as stream:
                    while stream.read(PIECE_BYTES):
                        pass
            except zipfile.BadZipFile:
                yield member.filename

    def _begin(self, member: zipfile.ZipInfo) -> int:
        """The byte of the file where a member's content begins."""
        self._file.seek(member.header_offset)
        header = self._file.read(LOCAL_HEADER)
        name, extra = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
        begin = member.header_offset + LOCAL_HEADER + name + extra
        if not header.startswith(b"PK\x03\x04") or begin + member.file_size > self._size:
            raise zipfile.BadZipFile
        return begin

    def sums(self) -> str:
        """A hash that another save does not have."""
        told = "".join(
            f"{member.filename}\0{member.file_size}\0{getattr(member, 'CRC', 0)}\n" for member in self._zip.infolist()
        )
        told += str(self._path.stat().st_mtime_ns)  # CRCs can be switched off
        return xxhash.xxh3_128_hexdigest(told.encode("utf-8", "surrogatepass"))

    def _member(self, name: str) -> zipfile.ZipInfo:
        member = self._zip.getinfo(self._prefix + name)
        if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
            raise ValueError(f"its {shown(name)} is compressed, which torch.save does not do")
        return member


def are_counts(value: Any) -> bool:
    """Whether a value is a tuple of numbers as shapes, strides and offsets are."""
    known = type(value) is tuple and len(value) <= MOST_DIMENSIONS
    return known and all(type(number) is int and 0 <= number <= MOST_ELEMENTS for number in value)


def is_shape(value: Any) -> bool:
    """Whether a value is a tuple of numbers that a tensor's shape can be."""
    return are_counts(value) and prod(value) <= MOST_ELEMENTS


def _size(numbers: Any = ()) -> tuple[int, ...]:
    """torch.Size."""
    if not is_shape(numbers):
        raise ValueError("it has a shape that is none")
    return tuple(numbers)


def _tensor(storage: Any, start: Any, shape: Any, strides: Any, *_: object) -> object:
    """torch._utils._rebuild_tensor_v2: `start` and `strides` are in elements."""
    if storage is INERT:
        return INERT
    if type(storage) is not _Storage or not (are_counts((start,)) and is_shape(shape) and are_counts(strides)):
        raise TypeError("makes a tensor of what is no storage")
    dense = [prod(shape[axis + 1 :]) for axis in range(len(shape))]
    numel = prod(shape)
    if numel and any(size > 1 and has != is_ for size, has, is_ in zip(shape, strides, dense, strict=True)):
        return INERT
    if start + numel > storage.numel:
        raise ValueError("it has a tensor that ends after its storage")
    return Place(storage.path, storage.offset + start * BYTES[storage.dtype], shape, storage.dtype)


def _tensor_of_bytes(storage: Any, start: Any, shape: Any, strides: Any, _: object, __: object, dtype: Any) -> object:
    """torch._utils._rebuild_tensor_v3, for dtypes that have no storage of their own."""
    known = DTYPES.get(dtype.name.removeprefix("torch.")) if type(dtype) is Named else None
    if type(storage) is not _Storage or known is None:
        return INERT
    typed = _Storage(storage.path, storage.offset, known, storage.numel // BYTES[known])
    return _tensor(typed, start, shape, strides)


def _parameter(data: object, *_: object) -> object:
    """torch._utils._rebuild_parameter: its tensor."""
    return data


def _of_type(function: Any, _: object, arguments: Any, *__: object) -> object:
    """torch._tensor._rebuild_from_type_v2: a tensor with attributes, without them."""
    if type(function) is not Named or function.make not in (_tensor, _tensor_of_bytes, _parameter):
        raise TypeError("makes a tensor by what is no function for that")
    return function.make(*arguments)


def _dictionary() -> dict[Any, Any]:
    """collections.OrderedDict; its items come after."""
    return {}


MAKERS: dict[str, Callable[..., object]] = {
    **{f"{module}.{name}": inert for module, names in NEEDLESS.items() for name in names.split()},
    **{f"torch.{name}": inert for name in DTYPES},
    **{f"torch.{name}Storage": inert for name in STORAGES},
    UNTYPED: inert,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_bytes,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _of_type,
    "torch.Size": _size,
    "collections.OrderedDict": _dictionary,
}
