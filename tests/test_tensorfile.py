"""Safetensors files as bigtune writes and reads them: those of the safetensors library, with checksums."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file

from bigtune.checkpoint.save import content_of
from bigtune.tensorfile import PAGE, BrokenFileError, Sums, read_header, read_into, sums_of, write, write_image
from bigtune.train.staging import Staging
from tests.disk import small_disk

METADATA = {"save": "an id", "step": "3"}


def some(sizes: tuple[int, ...] = (5000, 3, 0)) -> dict[str, torch.Tensor]:
    """Of several dtypes, the narrow ones first; one is larger than a page, one has nothing."""
    torch.manual_seed(0)
    return {
        "codes": torch.randint(256, (sizes[0],), dtype=torch.uint8),
        "halves": torch.randn(7, sizes[1]).to(torch.bfloat16),
        "values": torch.randn(sizes[0], 2),
        "nothing": torch.randn(sizes[2]),
    }


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> Sums:
    return write(path, {name: content_of(tensor) for name, tensor in tensors.items()}, METADATA)


def write_copy(path: Path, tensors: dict[str, torch.Tensor]) -> Sums:
    copy = Staging().copy(tensors)
    return write_image(path, {name: content_of(tensor) for name, tensor in tensors.items()}, copy.image, METADATA)


@pytest.mark.parametrize("written", [write_tensors, write_copy])
@pytest.mark.parametrize("sizes", [(5000, 3, 0), (1, 1, 1), (PAGE, 512, 0), (2**23 + 1, 5, 2)])
def test_what_is_written_is_what_the_library_reads(tmp_path: Path, written: Any, sizes: tuple[int, ...]) -> None:
    tensors, path = some(sizes), tmp_path / "file.safetensors"
    sums = written(path, tensors)
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
        assert sums.tensors[name] == xxhash.xxh3_128_hexdigest(tensor.view(torch.uint8).numpy().tobytes())
    places, metadata, start = read_header(path)
    assert metadata == METADATA
    assert start % PAGE == 0
    assert sums.size == path.stat().st_size == start + sum(tensor.nbytes for tensor in tensors.values())
    assert sums_of(path) == sums
    assert all(place.nbytes == tensors[name].nbytes for name, place in places.items())


def test_both_ways_write_the_same_bytes(tmp_path: Path) -> None:
    tensors = some()
    assert write_tensors(tmp_path / "one", tensors) == write_copy(tmp_path / "two", tensors)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_file_system_that_wants_the_cache_gets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def refusing(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return opened(path, flags, *arguments, **options)

    wanted = write_copy(tmp_path / "wanted", some())
    monkeypatch.setattr(os, "open", refusing)
    assert write_copy(tmp_path / "file", some()) == wanted
    monkeypatch.undo()
    assert (tmp_path / "file").read_bytes() == (tmp_path / "wanted").read_bytes()


@pytest.mark.parametrize("written", [write_tensors, write_copy])
def test_a_full_disk_is_told(tmp_path: Path, written: Any) -> None:
    with small_disk(tmp_path / "disk", "40k") as disk, pytest.raises(OSError, match="No space left"):
        written(disk / "file.safetensors", some())


def test_one_changed_byte_changes_the_sum_of_its_tensor_alone(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    sums, place = write_tensors(path, some()), read_header(path)[0]["halves"]
    content = bytearray(path.read_bytes())
    content[place.offset + 3] ^= 1
    path.write_bytes(content)
    assert [name for name, sum_ in sums_of(path).tensors.items() if sum_ != sums.tensors[name]] == ["halves"]


def test_files_of_others_are_read(tmp_path: Path) -> None:
    save_file(some(), tmp_path / "theirs.safetensors")
    assert sums_of(tmp_path / "theirs.safetensors").tensors == write_tensors(tmp_path / "ours", some()).tensors
    (tmp_path / "text.json").write_text("{}")
    assert sums_of(tmp_path / "text.json") == Sums(2, xxhash.xxh3_128_hexdigest(b"{}"), {})


def header(tree: object, behind: bytes = b"") -> bytes:
    encoded = json.dumps(tree).encode()
    return len(encoded).to_bytes(8, "little") + encoded + behind


ENTRY = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "content",
    [
        b"", b"1234567", b"\xff" * 8, b"\xff" * 100, header([]), header({"a": 3}), header({"a": ENTRY}, b"123"),
        header({"a": {**ENTRY, "shape": [5]}}, b"1234"), header({"a": {**ENTRY, "data_offsets": [4, 0]}}, b"1234"),
        header({"a": {**ENTRY, "data_offsets": [-1, 3]}}, b"1234"), header({"a": {"shape": [4]}}, b"1234"),
        header({"a": {**ENTRY, "shape": "x"}}, b"1234"), header({"a": ENTRY}, b"12345"),
    ],
)  # fmt: skip
def test_what_is_no_whole_file_is_broken(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file.safetensors"
    path.write_bytes(content)
    for read in (read_header, sums_of):
        with pytest.raises(BrokenFileError) as caught:
            read(path)
        assert "\n" not in str(caught.value)


def test_a_file_that_ends_early_is_broken(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    target = bytearray(4)
    read_into(tmp_path / "file", 1, memoryview(target))
    assert target == b"2345"
    with pytest.raises(BrokenFileError, match="ends in the middle"):
        read_into(tmp_path / "file", 2, memoryview(target))
