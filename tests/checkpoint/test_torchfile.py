"""A .pt file is read as torch reads it, and nothing that is in one runs, hangs, or fills the memory."""

import os
import pickle
import random
import sys
import zipfile
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bigtune.checkpoint import torchfile
from bigtune.checkpoint.torchfile import damaged, read
from bigtune.checkpoint.unpickle import INERT
from bigtune.errors import CheckpointError
from bigtune.tensorfile import BYTES, Place

pytestmark = pytest.mark.timeout(60)


class Calls:
    """Pickled as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._call


def zipped(path: Path, content: bytes, **members: bytes) -> Path:
    """A file as torch.save would write it, with this pickle."""
    with zipfile.ZipFile(path, "w") as file:
        for name, member in {"data.pkl": content, "byteorder": b"little", **members}.items():
            file.writestr(f"archive/{name}", member)
    return path


def refused(path: Path) -> str:
    """The one line that says why a file is not read."""
    with pytest.raises(CheckpointError) as error:
        read(path)
    message = str(error.value)
    assert "\n" not in message and message.isprintable() and message.startswith(f"{path}: ") and len(message) < 500
    return message.removeprefix(f"{path}: ")


def test_tensors_are_where_torch_put_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(6, 7)
    tensors = {
        "float32": matrix, "float64": matrix.double(), "float16": matrix.half(), "bfloat16": matrix.bfloat16(),
        "int64": torch.arange(5), "int32": torch.arange(5).int(), "int16": torch.arange(5).short(),
        "int8": torch.arange(5).char(), "uint8": torch.arange(5).byte(), "bool": torch.tensor([True, False]),
        "uint16": torch.arange(5).to(torch.uint16), "float8": matrix.to(torch.float8_e4m3fn),
        "rows": matrix[2:5], "same": matrix, "scalar": torch.tensor(3.0), "none": torch.empty(0, 4),
        "one": matrix[:1].T, "parameter": torch.nn.Parameter(matrix + 1), "buffer": torch.nn.Buffer(matrix + 2),
    }  # fmt: skip
    tensors["attribute"] = torch.ones(3)
    tensors["attribute"].ds_id = 3  # type: ignore[attr-defined]  # DeepSpeed sets such, and torch saves them
    torch.save(
        {"tensors": tensors, "else": {"matrix": matrix.T, "complex": matrix.to(torch.complex64)}}, tmp_path / "a.pt"
    )
    file = read((tmp_path / "a.pt").rename(tmp_path / "renamed.pt"))
    for name, tensor in tensors.items():
        place = file.tree["tensors"][name]
        assert type(place) is Place and place.shape == tuple(tensor.shape), name
        content = file.path.read_bytes()[place.offset :][: place.numel * BYTES[place.dtype]]
        assert content == tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes(), name
    assert file.tree["else"] == {"matrix": INERT, "complex": INERT}


def test_what_is_no_tensor_is_kept_where_it_is_plain(tmp_path: Path) -> None:
    plain = {"a": [1, -2.5, None, True, "ü", 2**70], "b": (1, 2, 3, 4), 3: OrderedDict(x=torch.Size([2, 3]))}
    inert = {
        "numpy": np.float32(3), "array": np.arange(3), "set": {1}, "counter": Counter("aab"), "bytes": b"x",
        "default": defaultdict(list, a=[1]), "dtype": torch.float32, "device": torch.device("cpu"), "path": Path("/"),
    }  # fmt: skip
    torch.save(plain | inert, tmp_path / "a.pt")
    tree = read(tmp_path / "a.pt").tree
    assert {key: tree[key] for key in plain} == plain
    assert {key for key, value in tree.items() if value is INERT or hasattr(value, "make")} == set(inert)


def nested(value: object) -> object:
    return {"optimizer_state_dict": {"fp32_flat_groups": [OrderedDict(a=[(1, {"b": value})])]}}


HOSTILE: dict[str, tuple[Callable[..., Any], str]] = {
    "system": (os.system, "posix.system"),
    "eval": (eval, "__builtin__.eval"),
    "exec": (exec, "__builtin__.exec"),
    "open": (open, "io.open"),
    "getattr": (getattr, "__builtin__.getattr"),
    "import": (__import__, "__builtin__.__import__"),
    "torch.load": (torch.load, "torch.serialization.load"),
    "torch.hub": (torch.hub.load, "torch.hub.load"),
    "numpy.load": (np.load, "numpy.load"),
    "exit": (sys.exit, "sys.exit"),
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", HOSTILE)
def test_code_is_not_run(name: str, protocol: int, tmp_path: Path) -> None:
    function, called = HOSTILE[name]
    told = called.replace("__builtin__", "builtins") if protocol > 2 else called
    ran = tmp_path / "ran"
    arguments = {"system": (f"touch {ran}",), "eval": (f"open({str(ran)!r}, 'w')",), "open": (str(ran), "w")}
    call = Calls(function, *arguments.get(name, ("os",)))
    torch_like = pickle.dumps(nested(call), protocol)
    assert refused(zipped(tmp_path / "a.pt", torch_like)) == (
        f"asks for {told}, which no checkpoint needs; it was not run; "
        "if you trust whoever wrote the file, DeepSpeed's own zero_to_fp32.py reads it"
    )
    assert not ran.exists()
    if name == "system":  # a mutation: what would have happened
        pickle.loads(torch_like)
        assert ran.exists()


P2 = b"\x80\x02"
PLAIN = b"ccollections\nOrderedDict\n"
CRAFTED: dict[str, tuple[bytes, str]] = {
    "instance": (P2 + b"(S'true'\nios\nsystem\n.", "has pickle's instruction STRING, which no checkpoint needs"),
    "instance of no arguments": (P2 + b"(ios\nsystem\n.", "has pickle's instruction INST, which no checkpoint needs"),
    "object": (P2 + b"(cos\nsystem\no.", "asks for os.system, which no checkpoint needs; it was not run"),
    "object of what is known": (P2 + b"(" + PLAIN + b"o.", "has pickle's instruction OBJ"),
    "extension": (P2 + b"\x82\x01.", "has pickle's instruction EXT1"),
    "no instruction": (P2 + b"\xff.", "has pickle's instruction 255"),
    "attribute of what is known": (
        b"\x80\x04\x8c\x0ctorch._utils\x8c\x1e_rebuild_tensor_v2.__globals__\x93.",
        "asks for torch._utils._rebuild_tensor_v2.__globals__, which",
    ),
    "name with control characters": (P2 + b"c\x1b[2J\nsystem\r\n.", "asks for '\\x1b[2J.system\\r', which no"),
    "name without end": (P2 + b"c" + b"a" * 5000 + b"\nb\n.", f"asks for '{'a' * 100}', which no checkpoint"),
    "storage of another kind": (P2 + b"(X\x01\x00\x00\x00xK\x01K\x01K\x01K\x01tQ.", "cannot be read (names a storage"),
    "call of a string": (P2 + b"X\x01\x00\x00\x00a)R.", "cannot be read (calls what is no function)"),
    "call of a tensor's maker": (
        P2 + b"ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x01K\x01K\x01tR.",
        "cannot be read (m",
    ),
    "maker by a maker": (
        P2 + b"ctorch._tensor\n_rebuild_from_type_v2\n(ctorch._tensor\n_rebuild_from_type_v2\nN))tR.",
        "cannot be read (makes a tensor by what is no function for that)",
    ),
    "shape that is none": (
        P2 + b"ctorch\nSize\nJ\xff\xff\xff\xff\x85\x85R.",
        "cannot be read (it has a shape that is none)",
    ),
    "no dictionary": (P2 + b"].", "cannot be read (its pickle is no dictionary)"),
    "no end": (P2 + b"}", "is damaged (EOFError)"),
    "nothing": (b"", "is damaged (EOFError)"),
    "text of 4 GiB": (P2 + b"X\xff\xff\xff\xff.", "is damaged (EOFError)"),
    "bytes of 4 EiB": (b"\x80\x05\x8e" + b"\xff" * 7 + b"\x3f.", "has pickle's instruction BINBYTES8"),
    "array of 4 EiB": (b"\x80\x05\x96" + b"\xff" * 7 + b"\x3f.", "has pickle's instruction BYTEARRAY8"),
    "key that takes a life to hash": (
        P2 + b"})" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(1, 80)) + b"Ns.",
        "cannot be read (has a key that is no string or number)",
    ),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_crafted_pickles_are_refused(name: str, tmp_path: Path) -> None:
    content, message = CRAFTED[name]
    assert message in refused(zipped(tmp_path / "a.pt", content))


def test_state_is_not_set(tmp_path: Path) -> None:
    """BUILD sets attributes, of a class as well as of what it made."""
    state = b"N}(X\x05\x00\x00\x00itemsX\x01\x00\x00\x00au\x86b"
    content = P2 + b"}(X\x01\x00\x00\x00x" + PLAIN + state + b")R" + state + b"u."
    assert read(zipped(tmp_path / "a.pt", content)).tree == {"x": {}}
    assert read(zipped(tmp_path / "b.pt", P2 + b"}" + state + b".")).tree == {}


def test_numbers_in_a_pickle_take_no_memory(tmp_path: Path) -> None:
    """Python's unpickler in C makes a table as long as the largest of these: 64 GiB."""
    assert read(zipped(tmp_path / "a.pt", P2 + b"}r\xff\xff\xff\xff.")).tree == {}


def test_zips_that_are_none_of_torchs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, good = tmp_path / "a.pt", pickle.dumps({"a": 1}, 2)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", good + bytes(2**24))
    assert "its data.pkl is compressed, which torch.save does not do" in refused(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", good)
        file.writestr("b/data.pkl", good)
    assert "it is a zip without the one data.pkl that torch.save writes" in refused(path)
    assert "its numbers are big-endian" in refused(zipped(path, good, byteorder=b"big"))
    zipped(path, good, **{f"data/{number}": b"" for number in range(400)})
    monkeypatch.setattr(torchfile, "MOST_BYTES", 20_000)
    assert "its zip's directory is too long for a checkpoint" in refused(path)
    assert "its data.pkl has 30,000 bytes, too many for a checkpoint" in refused(zipped(path, bytes(30_000)))


def test_storages_that_are_not_there(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(100.0)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as file:
        content = file.read("a/data.pkl")
    assert "its storage 0 is shorter than its tensors" in refused(
        zipped(tmp_path / "b.pt", content, **{"data/0": bytes(399)})
    )
    assert "is damaged (KeyError)" in refused(zipped(tmp_path / "b.pt", content))
    longer = content.replace(b"Kd\x85", b"Ke\x85")  # the shape, not the storage
    assert "it has a tensor that ends after its storage" in refused(
        zipped(tmp_path / "b.pt", longer, **{"data/0": bytes(400)})
    )
    with zipfile.ZipFile(tmp_path / "b.pt", "w") as file:
        file.writestr("archive/data.pkl", content)
        file.writestr("archive/data/0", bytes(400), zipfile.ZIP_DEFLATED)
    assert "its data/0 is compressed, which torch.save does not do" in refused(tmp_path / "b.pt")


def test_files_that_are_damaged(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    assert refused(path) == "is missing; copy it from where the checkpoint was written"
    path.write_bytes(b"")
    assert refused(path) == "is no file of torch.save; copy it again, or merge another step"
    torch.save({"a": torch.arange(1000.0)}, path, _use_new_zipfile_serialization=False)
    assert refused(path).startswith(
        "is in the format of torch before 1.6, which has to be loaded with DeepSpeed and sav"
    )
    torch.save({"a": torch.arange(1000.0)}, path)
    whole = path.read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, 10):
        path.write_bytes(whole[:size])
        assert refused(path) == "is cut or damaged; copy it again, or merge another step"
    path.write_bytes(whole)
    place = read(path).tree["a"]
    assert list(damaged(path, [place.offset])) == []
    path.write_bytes(whole[: place.offset + 8] + b"\x01" + whole[place.offset + 9 :])
    assert list(damaged(path, [place.offset])) == ["is damaged in a/data/0"]
    assert list(damaged(path, [])) == []
    path.write_bytes(whole[: len(whole) // 2])
    assert list(damaged(path, [place.offset])) == ["cannot be read (File is not a zip file)"]


def test_files_without_crcs_are_read_unchecked(tmp_path: Path) -> None:
    path, before = tmp_path / "a.pt", torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.arange(1000.0)}, path)
    finally:
        torch.serialization.set_crc32_options(before)
    place = read(path).tree["a"]
    content = path.read_bytes()
    assert content[place.offset :][:4000] == torch.arange(1000.0).numpy().tobytes()
    path.write_bytes(content[: place.offset] + b"\x01" + content[place.offset + 1 :])
    assert list(damaged(path, [place.offset])) == []


def test_any_damage_is_one_line_or_harmless(tmp_path: Path) -> None:
    """To a pickle whose CRC was made to be right, and to a zip."""
    tree = nested({"t": torch.arange(6.0).view(2, 3), "s": torch.Size([2, 3]), "n": np.float32(1), "p": [1, "x", 2.5]})
    path = tmp_path / "a.pt"
    torch.save(tree, path)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as file:
        content, storage = file.read("a/data.pkl"), file.read("a/data/0")
    dice, outcomes = random.Random(0), Counter[str]()
    for number in range(1000):
        changed = bytearray(whole if number % 2 else content)
        for _ in range(dice.choice([1, 1, 2, 5])):
            changed[dice.randrange(2, len(changed))] = dice.randrange(256)
        if number % 2:
            path.write_bytes(changed)
        else:
            zipped(path, bytes(changed), **{"data/0": storage})
        try:
            read(path)
            outcomes["read"] += 1
        except CheckpointError as error:
            assert str(error).isprintable()
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 100
