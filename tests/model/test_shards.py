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


def test_float64_is_read_and_integers_are_no_weights(folder: Path) -> None:
    shards, out = Shards(folder), torch.empty(4)
    shards.read("wide", 0, 4, out)
    assert torch.equal(out, truth(folder)["wide"].float())
    assert "ids" not in shards.places
    assert shards.places["t.2"].shape == (3, 7)


def test_tensors_of_several_files_are_found_through_the_index(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(3)}, tmp_path / "two.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    places = Shards(tmp_path).places
    assert {name: place.path.name for name, place in places.items()} == {"a": "one.safetensors", "b": "two.safetensors"}


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
    ],
    ids=["empty", "one byte", "git lfs pointer", "no json", "a list", "cut", "no entry", "no offsets", "no utf-8"],
)
def test_a_broken_header_is_refused(folder: Path, content: bytes) -> None:
    (folder / SINGLE).write_bytes(content)
    assert f"{folder / SINGLE}: broken safetensors file (" in refused(folder)


def test_an_index_that_names_a_missing_file_names_it_too(folder: Path) -> None:
    weight_map = {"a": SINGLE, "b": "model-2.safetensors", "c": "model-3.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert "the index names files that are missing: model-2.safetensors, model-3.safetensors" in refused(folder)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"weight_map": ["a"]}'])
def test_a_broken_index_is_refused(folder: Path, text: str) -> None:
    (folder / INDEX).write_text(text)
    assert f"{folder / INDEX}: not a safetensors index" in refused(folder)


def test_a_folder_without_safetensors_is_refused_by_its_full_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    message = refused(Path())
    assert str(tmp_path) in message
    assert "bigtune loads safetensors only" in message
