"""A merge that is killed goes on where it was, to the same bytes, and never holds much memory."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bigtune.checkpoint import partial as partial_module
from bigtune.checkpoint.manifest import Manifest
from bigtune.checkpoint.merge import merge
from bigtune.errors import CheckpointError
from bigtune.tensorfile import read_header
from tests.checkpoint.made import content_of, damage_tensor, make_checkpoint, some_tensors, values
from tests.disk import resize, small_disk

SHARD_BYTES = 2_000_000
FILES = 15
MIB = 2**20


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model that is merged into many files."""
    tensors = {f"layer.{number}.weight": values((450, 1000 + number), number) for number in range(FILES)}
    return make_checkpoint(tmp_path_factory.mktemp("killed") / "step-1", tensors)


@pytest.fixture(scope="module")
def wanted(checkpoint: Path) -> dict[str, bytes]:
    """What a merge that nothing interrupts writes."""
    return content_of(merge(checkpoint, checkpoint.parent / "wanted", shard_bytes=SHARD_BYTES))


def start(checkpoint: Path, output: Path, *options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "bigtune.cli", "merge", checkpoint, "--output", output, "--workers", "2", *options]
    return subprocess.Popen([*map(str, command), "--max-shard-size", "2MB"], stderr=subprocess.DEVNULL)


def finished(output: Path) -> dict[str, tuple[int, int]]:
    """The files that are recorded as finished, with what tells a file from another of its name."""
    try:
        manifest = Manifest.read(output.with_name(f"{output.name}.partial"))
    except CheckpointError:
        return {}
    stats = {name: output.with_name(f"{output.name}.partial") / name for name in manifest.files}
    return {name: identity(path) for name, path in stats.items() if name.startswith("model-")}


def identity(path: Path) -> tuple[int, int]:
    return path.stat().st_ino, path.stat().st_mtime_ns


def kill_at(process: subprocess.Popen[bytes], output: Path, files: int, after: float) -> None:
    """When so many files are finished, and some time later."""
    while process.poll() is None and len(finished(output)) < files:
        time.sleep(0.001)
    time.sleep(after)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_a_merge_that_is_killed_again_and_again_comes_to_the_same(
    checkpoint: Path, wanted: dict[str, bytes], tmp_path: Path
) -> None:
    output, chance = tmp_path / "merged", random.Random(0)
    kept: dict[str, tuple[int, int]] = {}
    for count in (0, 1, 3, 6, 10):
        process = start(checkpoint, output)
        kill_at(process, output, count, chance.uniform(0, 0.03))
        assert process.returncode == -signal.SIGKILL
        if output.exists():  # its last moments are short: it had come to its end
            assert count
            break
        now = finished(output)
        assert kept.items() <= now.items()  # nothing that was finished is written again
        assert len(now) >= count
        kept = now
    assert output.exists() or start(checkpoint, output).wait() == 0
    assert kept.items() <= {path.name: identity(path) for path in output.iterdir()}.items()
    assert content_of(output) == wanted
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


KILLED = """
import os, signal, sys
from pathlib import Path
from bigtune.checkpoint.merge import merge

left, flush = int(sys.argv[3]), os.fsync
def fsync(descriptor):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    flush(descriptor)
os.fsync = fsync
merge(Path(sys.argv[1]), Path(sys.argv[2]), shard_bytes=3000, workers=1)
"""


def test_a_merge_that_is_killed_before_any_flush_comes_to_the_same(tmp_path: Path) -> None:
    """Of its two files, of what is recorded of them, of the small files and of the folders."""
    checkpoint = make_checkpoint(tmp_path / "step-1", some_tensors(), small={"config.json": "{}"})
    wanted = content_of(merge(checkpoint, tmp_path / "wanted", shard_bytes=3000))
    for number in range(1, 100):
        output = tmp_path / f"merged {number}"
        command = [sys.executable, "-c", KILLED, str(checkpoint), str(output), str(number)]
        if subprocess.run(command, check=False).returncode == 0:
            break
        if not output.exists():  # the last flush is of the folder that it lies in
            merge(checkpoint, output, shard_bytes=3000)
        assert content_of(output) == wanted
    assert number == 3 * 2 + 2 + 2 + 1 + 1 + 1


def killed(checkpoint: Path, output: Path, files: int = 4) -> Path:
    """What a merge leaves that was killed in the middle."""
    kill_at(start(checkpoint, output), output, files, 0)
    return output.with_name(f"{output.name}.partial")


@pytest.mark.parametrize("read_again", [True, False], ids=["read again", "trusted: the mutation"])
def test_only_what_is_recorded_and_whole_is_kept(
    checkpoint: Path, wanted: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_again: bool
) -> None:
    output, said = tmp_path / "merged", list[str]()
    partial = killed(checkpoint, output)
    first, second, third, *_ = names = sorted(finished(output))
    before = {name: identity(partial / name) for name in names}
    damage_tensor(partial / first, next(iter(read_header(partial / first)[0])))
    (partial / second).write_bytes((partial / second).read_bytes()[:-10])
    (partial / third).unlink()
    last = f"model-{FILES:05d}-of-{FILES:05d}.safetensors"
    (partial / last).write_bytes(b"of a file that was not finished")
    (partial / "strange").mkdir()
    (partial / "strange" / "file").write_text("")
    if not read_again:
        monkeypatch.setattr(partial_module, "find_problems", lambda *_: [])
        (partial / third).write_bytes(b"")
        merge(checkpoint, output, shard_bytes=SHARD_BYTES)
        assert content_of(output).keys() == wanted.keys()
        assert content_of(output) != wanted
        return
    merge(checkpoint, output, shard_bytes=SHARD_BYTES, say=said.append)
    assert said == [f"{partial}: goes on from {len(names) - 3} of {FILES} files"]
    assert content_of(output) == wanted
    redone = {name for name in names if identity(output / name) != before[name]}
    assert redone == {first, second, third}


@pytest.mark.parametrize("change", [{"dtype": "bfloat16"}, {"shard_bytes": 4 * 10**6}, "another save", "no record"])
def test_files_of_another_merge_are_not_taken(
    checkpoint: Path, wanted: dict[str, bytes], tmp_path: Path, change: Any
) -> None:
    """Of another dtype, size or checkpoint, though they have the same names."""
    partial = killed(checkpoint, tmp_path / "merged")
    options: dict[str, Any] = {"shard_bytes": SHARD_BYTES} | (change if isinstance(change, dict) else {})
    if change == "another save":
        tensors = {f"layer.{number}.weight": values((450, 1000 + number), 100 + number) for number in range(FILES)}
        checkpoint = make_checkpoint(tmp_path / "step-2", tensors, saved_as="4567")
    elif change == "no record":
        (partial / "manifest.json").unlink()
        for path in partial.glob("*.safetensors"):
            path.write_bytes(path.read_bytes()[:-1] + b"!")
    merge(checkpoint, tmp_path / "merged", **options)
    assert content_of(tmp_path / "merged") == content_of(merge(checkpoint, tmp_path / "fresh", **options))
    assert (content_of(tmp_path / "merged") == wanted) is (change == "no record")


def test_one_merge_at_a_time_writes_into_a_folder(checkpoint: Path, wanted: dict[str, bytes], tmp_path: Path) -> None:
    process = start(checkpoint, tmp_path / "merged")
    while not finished(tmp_path / "merged"):
        time.sleep(0.001)
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(CheckpointError, match=r"merged.partial: another merge writes there; wait for it"):
        merge(checkpoint, tmp_path / "merged", shard_bytes=SHARD_BYTES)
    process.send_signal(signal.SIGCONT)
    assert process.wait() == 0
    assert content_of(tmp_path / "merged") == wanted


def test_a_disk_that_fills_up_keeps_what_is_finished(
    checkpoint: Path, wanted: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with small_disk(tmp_path / "disk", "16m") as disk:
        monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**9))
        with pytest.raises(CheckpointError) as caught:
            merge(checkpoint, disk / "merged", shard_bytes=SHARD_BYTES, workers=1)
        message = str(caught.value)
        assert message.startswith(f"{checkpoint}: could not be merged into {disk / 'merged'}: [Errno 28] No space left")
        match = re.search(
            r"; (\d+) of 15 files are finished and stay in \S+merged.partial; the same command goes", message
        )
        assert match and 4 <= int(match[1]) < FILES
        kept = finished(disk / "merged")
        assert len(kept) == int(match[1])
        assert sorted(path.name for path in (disk / "merged.partial").iterdir()) == sorted([*kept, "manifest.json"])
        monkeypatch.undo()
        resize(disk, "64m")
        merge(checkpoint, disk / "merged", shard_bytes=SHARD_BYTES)
        assert kept.items() <= {path.name: identity(path) for path in (disk / "merged").iterdir()}.items()
        assert content_of(disk / "merged") == wanted


def test_nothing_that_was_made_of_a_damaged_checkpoint_is_kept(checkpoint: Path, tmp_path: Path) -> None:
    """Though most of it is not damaged, and was finished before."""
    copy = shutil.copytree(checkpoint, tmp_path / "step-1")
    partial = killed(copy, tmp_path / "merged")
    assert list(partial.glob("model-*"))
    damage_tensor(copy / "rank-00002-of-00003.safetensors", "1.master")
    for folder in ("merged", "fresh"):
        with pytest.raises(CheckpointError, match=r"rank-00002-of-00003.safetensors is damaged in tensor 1\.master"):
            merge(copy, tmp_path / folder, shard_bytes=SHARD_BYTES)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


# ----------------------------------------------------------------------------------------------------- memory

MEASURED = """
import json, re, sys, threading, time
from pathlib import Path
from bigtune.checkpoint.merge import merge

def held():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

before, most, done = held(), 0, threading.Event()
def watch():
    global most
    while not done.is_set():
        most = max(most, held())
        time.sleep(0.001)
watcher = threading.Thread(target=watch)
watcher.start()
merge(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], 2 * 10**7, workers=4)
done.set()
watcher.join()
print(json.dumps({"over": most - before, "modules": sorted(sys.modules)}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_is_bounded_whatever_the_size_of_a_tensor(tmp_path: Path) -> None:
    """Anonymous memory over that of the interpreter, by a model of 336 MB with a tensor of 256; page cache is none."""
    tensors = {"large": np.resize(values((1000, 1000), 0), (64_000, 1000))}
    tensors |= {f"layer.{number}": values((5_000, 1000), number) for number in range(4)}
    checkpoint = make_checkpoint(tmp_path / "step-1", tensors, ranks=2)
    command = [sys.executable, "-c", MEASURED, str(checkpoint), str(tmp_path / "merged"), "bfloat16"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": "."})
    facts = json.loads(said.stdout)
    assert facts["over"] < 160 * MIB  # 4 files at once: 72 of buffers, and 64 where checksums are read
    assert not {"torch", "transformers", "deepspeed"} & set(facts["modules"])
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())["weight_map"]
    large = load_file(tmp_path / "merged" / index["large"])["large"]
    assert torch.equal(large, torch.from_numpy(tensors["large"]).bfloat16())
