"""Safetensors files by byte ranges: headers, reading into memory that is there, writing in pieces with checksums.

The format (https://huggingface.co/docs/safetensors): 8 bytes of header length, a JSON header that gives each tensor's
dtype, shape and byte range, then the bytes. Ranges are read with `preadv`; a memory map's pages would count as memory
held. Checksums are XXH3, 128 bits (https://xxhash.com): against damage, not against malice. Needs no torch.
"""

import errno
import json
import mmap
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol, TypeVar

import xxhash

BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
         "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}  # fmt: skip
"""Of one element, by the format's names of dtypes."""
PIECE_BYTES = 2**24
PAGE = 4096
"""What writing past the cache asks of addresses, offsets and lengths; a file's tensors begin with one."""
MOST_HEADER_BYTES = 100_000_000
"""The format's own limit."""


class BrokenFileError(ValueError):
    """A file that is no whole safetensors file; the message says why, without the path."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where one tensor's elements lie. `offset` is in bytes from the start of the file."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * BYTES[self.dtype]


class _HasDtype(Protocol):
    @property
    def dtype(self) -> str: ...


Typed = TypeVar("Typed", bound=_HasDtype)


@dataclass(frozen=True, slots=True)
class Content:
    """A tensor to be written: its bytes in the order of its elements, in pieces of any length."""

    dtype: str
    shape: tuple[int, ...]
    pieces: Iterable[memoryview]


@dataclass(frozen=True, slots=True)
class Sums:
    """Size in bytes and checksums of a file: of its header and of each tensor, or, of any other file, of the whole."""

    size: int
    checksum: str
    tensors: Mapping[str, str]


def read_header(path: Path) -> tuple[dict[str, Place], dict[str, str], int]:
    """The tensors of a file by name, its metadata, and the bytes before the first tensor; no tensor is read.

    Raises:
        BrokenFileError: it is no safetensors file, or not as long as its header says.
        OSError: it is missing or cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MOST_HEADER_BYTES):
            raise BrokenFileError("the header is longer than the file" if size else "it is empty")
        header = file.read(length)
    try:
        entries = json.loads(header)
        metadata = dict(entries.pop("__metadata__", {}))
        places = {name: _place(path, 8 + length, entry) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise BrokenFileError("its header is no table of tensors") from None
    end = 8 + length
    for name, (place, count) in sorted(places.items(), key=lambda item: (item[1][0].offset, item[1][1])):
        if place.offset + count > size:
            raise BrokenFileError(f"it ends before tensor {name} does")
        if place.dtype in BYTES and place.nbytes != count:
            raise BrokenFileError(f"tensor {name} has {count} bytes, not what its shape and dtype need")
        if place.offset != end:
            raise BrokenFileError(f"tensor {name} does not begin where the one before it ends")
        end += count
    if end != size:
        raise BrokenFileError(f"{size - end} bytes come after its last tensor")
    return {name: place for name, (place, _) in places.items()}, metadata, 8 + length


def _place(path: Path, start: int, entry: dict[str, Any]) -> tuple[Place, int]:
    """Where the header says that a tensor lies, and of how many bytes."""
    first, last = map(int, entry["data_offsets"])
    return Place(path, start + first, tuple(map(int, entry["shape"])), str(entry["dtype"])), last - first


def read_into(path: Path, offset: int, target: memoryview) -> None:
    """Fill memory with the bytes from `offset` of a file.

    Raises:
        BrokenFileError: the file ends before.
        OSError: it cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        done = 0
        while done < len(target):
            read = os.preadv(descriptor, [target[done:]], offset + done)
            if read == 0:
                raise BrokenFileError("the file ends in the middle of a tensor")
            done += read
    finally:
        os.close(descriptor)


def write(path: Path, tensors: Mapping[str, Content], metadata: Mapping[str, str]) -> Sums:
    """Write a file, tensor by tensor, and flush it to the disk.

    Raises:
        OSError: it cannot be written, as on a full disk.
    """
    head, end = _head(tensors, metadata)
    with path.open("wb", buffering=0) as file:
        _write_all(file.fileno(), memoryview(head))
        sums = {}
        for name, content in in_order(tensors).items():
            hasher, written = xxhash.xxh3_128(), 0
            for piece in content.pieces:
                for start in range(0, len(piece), PIECE_BYTES):
                    part = piece[start : start + PIECE_BYTES]
                    _write_all(file.fileno(), part)
                    _begin_flush(file.fileno(), len(part))
                    hasher.update(part)
                written += len(piece)
            if written != prod(content.shape) * BYTES[content.dtype]:
                raise AssertionError(f"{name}: {written} bytes were given for {content.shape} {content.dtype}")
            sums[name] = hasher.hexdigest()
        os.fsync(file.fileno())
    return Sums(len(head) + end, xxhash.xxh3_128_hexdigest(head), sums)


def write_image(path: Path, tensors: Mapping[str, Content], image: memoryview, metadata: Mapping[str, str]) -> Sums:
    """The same, of tensors that lie end to end in memory, `in_order`. It goes past the system's cache where the file
    system lets it: that spares the cores a copy of all of it, 0.05 s of their time a GB against 0.3 to 0.8.

    Args:
        image: begins with a page (`PAGE`), and has room to the end of the page in which the last tensor ends.

    Raises:
        OSError: it cannot be written, as on a full disk.
    """
    head, end = _head(tensors, metadata)
    sums, start = {}, 0
    for name, content in in_order(tensors).items():
        count = prod(content.shape) * BYTES[content.dtype]
        sums[name] = _checksum_of_memory(image[start : start + count])
        start += count
    parts = [_page_aligned(head), image[: end + -end % PAGE]]
    try:
        _write_pages(path, parts, len(head) + end, getattr(os, "O_DIRECT", 0))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        _write_pages(path, parts, len(head) + end, 0)  # a file system that wants none of it
    return Sums(len(head) + end, xxhash.xxh3_128_hexdigest(head), sums)


def _head(tensors: Mapping[str, Content], metadata: Mapping[str, str]) -> tuple[bytes, int]:
    """What stands before the tensors, whole pages of it, and the bytes of these."""
    header, end = dict[str, object](__metadata__=dict(metadata)), 0
    for name, content in in_order(tensors).items():
        start, end = end, end + prod(content.shape) * BYTES[content.dtype]
        header[name] = {"dtype": content.dtype, "shape": content.shape, "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-(8 + len(encoded)) % PAGE)
    return len(encoded).to_bytes(8, "little") + encoded, end


def _write_pages(path: Path, parts: Iterable[memoryview], size: int, flags: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | flags, 0o644)
    try:
        for part in parts:
            for start in range(0, len(part), PIECE_BYTES):
                _write_all(descriptor, part[start : start + PIECE_BYTES])
        os.ftruncate(descriptor, size)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _page_aligned(content: bytes) -> memoryview:
    memory = mmap.mmap(-1, len(content))
    memory.write(content)
    return memoryview(memory)


def _checksum_of_memory(content: memoryview) -> str:
    hasher = xxhash.xxh3_128()
    for start in range(0, len(content), PIECE_BYTES):
        hasher.update(content[start : start + PIECE_BYTES])
    return hasher.hexdigest()


def in_order(tensors: Mapping[str, Typed]) -> dict[str, Typed]:
    """As `write` lays tensors out: those of wide elements first, so that all are aligned."""
    return dict(sorted(tensors.items(), key=lambda item: -BYTES[item[1].dtype]))


def _begin_flush(descriptor: int, count: int) -> None:
    """Send the bytes that were just written on their way to the disk, so that less is left to wait for at the end.

    What is dirty is not dropped by this advice, only written out; one file of 2 GiB was on the disk in 5 s, not in 8.
    """
    if hasattr(os, "posix_fadvise"):
        end = os.lseek(descriptor, 0, os.SEEK_CUR)
        os.posix_fadvise(descriptor, end - count, count, os.POSIX_FADV_DONTNEED)


def _write_all(descriptor: int, content: memoryview) -> None:
    while content:
        content = content[os.write(descriptor, content) :]


def sums_of(path: Path) -> Sums:
    """Read a file and compute what `write` would have said of it; of a file of another kind, of its bytes as a whole.

    Raises:
        BrokenFileError: a .safetensors file that is none.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    if path.suffix != ".safetensors":
        return Sums(size, _checksum(path, 0, size), {})
    places, _, start = read_header(path)
    tensors = {name: checksum_of(place) for name, place in places.items()}
    return Sums(size, _checksum(path, 0, start), tensors)


def checksum_of(place: Place) -> str:
    """The checksum of a tensor's bytes, read piece by piece."""
    return _checksum(place.path, place.offset, place.nbytes)


def _checksum(path: Path, offset: int, count: int) -> str:
    hasher, buffer = xxhash.xxh3_128(), memoryview(bytearray(min(count, PIECE_BYTES)))
    for start in range(0, count, PIECE_BYTES):
        piece = buffer[: min(PIECE_BYTES, count - start)]
        read_into(path, offset + start, piece)
        hasher.update(piece)
    return hasher.hexdigest()
