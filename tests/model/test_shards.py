"""Byte ranges of safetensors files: the right elements, the right dtype, and clear words about broken files."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bigtune.errors import ModelError
from bigtune.model.shards import INDEX, SINGLE, Shards

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One file of three dtypes; odd sizes, so that nothing is aligned by chance."""
    torch.manual_seed(0)
    tensors = {f"t.{i}": torch.randn(3, 7).to(dtype) for i, dtype in enumerate(FLOATS)}
    save_file(tensors | {"ids": torch.arange(5), "wide": torch.randn(4, dtype=torch.float64)}, tmp_path / SINGLE)
    return tmp_path


def truth(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = load_file(folder / SINGLE)
    return tensors


@pytest.mark.parametrize(("start", "count"), [(0, 21), (0, 1), (20, 1), (5, 9), (3, 0)])
@pytest.mark.parametrize("stored", range(3))
@pytest.mark.parametrize("wanted", FLOATS)
def test_a_range_is_read_and_cast(folder: Path, start: int, count: int, stored: int, wanted: torch.dtype) -> None:
    name, out = f"t.{stored}", torch.full((count + 2,), 7.0, dtype=wanted)
    Shards(folder).read(name, start, count, out)
    assert torch.equal(out[:count], truth(folder)[name].flatten()[start : start + count].to(wanted))
    assert out[count:].tolist() == [7.0, 7.0]  # the padding is left alone


def test_float64_is_read_and_what_is_not_read_is_known_all_the_same(folder: Path) -> None:
    shards, out = Shards(folder), torch.empty(4)
    shards.read("wide", 0, 4, out)
    assert torch.equal(out, truth(folder)["wide"].float())
    assert (shards.places["ids"].dtype, shards.places["ids"].shape) == ("I64", (5,))
    assert shards.places["t.2"].shape == (3, 7)


def test_tensors_of_several_files_are_found_through_the_index(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(3)}, tmp_path / "two.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    places = Shards(tmp_path).places
    assert {name: place.path.name for name, place in places.items()} == {"a": "one.safetensors", "b": "two.safetensors"}


def indexed(folder: Path, weight_map: dict[str, str]) -> Path:
    """A folder of two files, `one` with tensors a and c, `two` with b and c, and an index."""
    save_file({"a": torch.ones(2), "c": torch.full((1,), 1.0)}, folder / "one.safetensors")
    save_file({"b": torch.zeros(3), "c": torch.full((1,), 2.0)}, folder / "two.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize(("name", "value"), [("one", 1.0), ("two", 2.0)])
def test_a_tensor_in_two_files_is_taken_from_where_the_index_says(tmp_path: Path, name: str, value: float) -> None:
    where = {"a": "one.safetensors", "b": "two.safetensors", "c": f"{name}.safetensors"}
    out = torch.empty(1)
    Shards(indexed(tmp_path, where)).read("c", 0, 1, out)
    assert float(out) == value


def test_a_tensor_that_the_index_leaves_out_is_found(tmp_path: Path) -> None:
    assert Shards(indexed(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})).places.keys() == {"a", "b", "c"}


def test_an_index_may_name_files_in_folders(tmp_path: Path) -> None:
    indexed(tmp_path, {"a": "part/one.safetensors"})
    (tmp_path / "part").mkdir()
    (tmp_path / "one.safetensors").rename(tmp_path / "part" / "one.safetensors")
    assert Shards(tmp_path).places.keys() == {"a", "c"}


def test_a_single_file_beside_an_index_is_the_model_as_for_transformers(tmp_path: Path) -> None:
    indexed(tmp_path, {"a": "one.safetensors"})
    save_file({"a": torch.full((2,), 3.0)}, tmp_path / SINGLE)
    assert {name: place.path.name for name, place in Shards(tmp_path).places.items()} == {"a": SINGLE}


def refused(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        Shards(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("cut", [1, 30, 100])
def test_a_truncated_file_is_refused_before_anything_is_read(folder: Path, cut: int) -> None:
    data = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(data[:-cut])
    message = refused(folder)
    assert f"{folder / SINGLE}: broken safetensors file (it ends before tensor" in message
    assert "copy or download it again" in message


def test_a_file_that_is_longer_than_its_header_says_is_refused(folder: Path) -> None:
    with (folder / SINGLE).open("ab") as file:
        file.write(b"12345")
    assert "(5 bytes come after its last tensor); copy or download it again" in refused(folder)


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        ({"a": ("F32", [2], 0, 8), "b": ("F32", [2], 4, 12)}, "b does not begin where the one before it ends"),
        ({"a": ("F32", [2], 0, 8), "b": ("F32", [1], 12, 16)}, "b does not begin where the one before it ends"),
        ({"a": ("F32", [3], 0, 8)}, "tensor a has 8 bytes, not what its shape and dtype need"),
        ({"a": ("BF16", [-2], 0, 8)}, "tensor a has 8 bytes, not what its shape and dtype need"),
        ({"a": ("F32", [2], 8, 0)}, "tensor a has -8 bytes"),
        ({"a": ("F32", [2], -8, 0), "b": ("F32", [2], 0, 8)}, "a does not begin where the one before it ends"),
    ],
    ids=["overlap", "gap", "shape", "negative shape", "backwards", "before the start"],
)
def test_a_header_that_lies_about_its_tensors_is_refused(
    folder: Path, entries: dict[str, tuple[str, list[int], int, int]], problem: str
) -> None:
    header = json.dumps(
        {
            name: {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
            for name, (dtype, shape, start, end) in entries.items()
        }
    ).encode()
    (folder / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    assert problem in refused(folder)


def test_a_file_that_shrinks_after_it_was_opened_is_told_of(folder: Path) -> None:
    shards = Shards(folder)
    place = shards.places["t.0"]
    (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[: place.offset + 10])
    with pytest.raises(ModelError, match=r"model\.safetensors: the file ends in the middle of a tensor"):
        shards.read("t.0", 0, 21, torch.empty(21))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x10",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        (5).to_bytes(8, "little") + b"{]]]}",
        (2).to_bytes(8, "little") + b"[]",
        (2).to_bytes(8, "little") + b"{}"[:1],
        (10).to_bytes(8, "little") + b'{"a": 3}  ',
        (10).to_bytes(8, "little") + b'{"a": {}} ',
        (6).to_bytes(8, "little") + b'"\xff\xfe\xfd" ',
        (99_999).to_bytes(8, "little") + b"[" * 99_999,
        (2**63).to_bytes(8, "little") + b"{}",
    ],
    ids=[
        "empty",
        "one byte",
        "git lfs pointer",
        "no json",
        "a list",
        "cut",
        "no entry",
        "no offsets",
        "no utf-8",
        "deep",
        "huge",
    ],
)
def test_a_broken_header_is_refused(folder: Path, content: bytes) -> None:
    (folder / SINGLE).write_bytes(content)
    assert f"{folder / SINGLE}: broken safetensors file (" in refused(folder)


def test_an_index_that_names_a_missing_file_names_it_too(tmp_path: Path) -> None:
    indexed(tmp_path, {"a": "one.safetensors", "b": "model-2.safetensors", "c": "model-3.safetensors"})
    message = refused(tmp_path)
    assert message == (
        f"{tmp_path}: the index names files that are missing: model-2.safetensors, model-3.safetensors; download them"
    )


def test_an_index_that_lies_is_refused(tmp_path: Path) -> None:
    message = refused(indexed(tmp_path, {"a": "two.safetensors", "b": "two.safetensors", "c": "one.safetensors"}))
    assert message.startswith(f"{tmp_path / INDEX}: places a in two.safetensors, which holds no such tensor; ")


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"weight_map": ["a"]}'])
def test_a_broken_index_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX).write_text(text)
    assert f"{tmp_path / INDEX}: not a safetensors index" in refused(tmp_path)


def test_a_folder_without_safetensors_is_refused_by_its_full_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    message = refused(Path())
    assert str(tmp_path) in message
    assert "bigtune loads safetensors only" in message
