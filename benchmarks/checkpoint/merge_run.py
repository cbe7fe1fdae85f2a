"""How fast does a checkpoint become a model? `python benchmarks/checkpoint/merge_run.py --work DIR --result FILE`

DeepSpeed's zero_to_fp32 beside `bigtune merge`, of the same ZeRO-3 checkpoints of 2 ranks, and of the same values in a
checkpoint of bigtune's: whole commands, in turn, in one run, on the disk of --work; what is read is in the page cache.
Values are compared tensor by tensor; see merge.md.
"""

import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from bigtune.tensorfile import sums_of

RANKS = 2
MIB = 2**20
IMPORTS = {"zero_to_fp32": "deepspeed.utils.zero_to_fp32, transformers", "merge": "bigtune.checkpoint.merge"}
"""What the interpreters import, whose memory is not the merge's."""


def make(size: str, work: Path) -> int:
    """Write a model's checkpoints; its parameters, in millions."""
    ranks = []
    for rank in range(RANKS):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_SIZE": RANKS, "MASTER_PORT": 29_745}
        environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        environment |= {key: str(value) for key, value in place.items()} | {"OMP_NUM_THREADS": "1"}
        script = Path(__file__).with_name("merge_rank.py")
        command = [sys.executable, script, size, work / "deepspeed", work / "bigtune"]
        ranks.append(subprocess.Popen([*map(str, command)], env=environment, stdout=subprocess.PIPE, text=True))
    said = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise SystemExit("a rank failed")
    return int(re.findall(r"^(\d+)M$", said[0], re.MULTILINE)[-1])


def anonymous(process: int) -> int:
    """Bytes of memory that a process holds, but for the page cache."""
    try:
        found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    except OSError:
        found = None
    return int(found[1]) * 1024 if found else 0


def measure(command: Sequence[str | Path]) -> dict[str, float]:
    """Seconds of a command, the peak of its memory, and seconds until what it wrote was on the disk."""
    os.sync()
    start, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen([*map(str, command)], stdout=said, stderr=said)
        while process.poll() is None:
            peak = max(peak, anonymous(process.pid))
            time.sleep(0.002)
        if process.returncode:
            said.seek(0)
            raise SystemExit(f"{command} failed: {said.read()[-2000:]}")
    seconds = time.perf_counter() - start
    os.sync()
    return {"seconds": seconds, "synced_seconds": time.perf_counter() - start, "peak_mib": peak / MIB}


def idle(imports: str) -> float:
    """MiB of anonymous memory of an interpreter that has imported what a command imports."""
    code = f"import re, pathlib, {imports}; print(pathlib.Path('/proc/self/status').read_text())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    found = re.search(r"RssAnon:\s+(\d+) kB", said)
    return int(found[1]) / 1024 if found else 0.0


def disk_speed(work: Path) -> float:
    """MB/s of a file of 1 GiB written in pieces of 16 MiB and flushed, as dd conv=fsync does."""
    piece, start = os.urandom(16 * MIB), time.perf_counter()
    with (work / "written").open("wb", buffering=0) as file:
        for _ in range(64):
            file.write(piece)
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    (work / "written").unlink()
    return 64 * 16 * MIB / 1e6 / seconds


UNFLUSHED = """
import os
os.fsync = lambda descriptor: None
os.posix_fadvise = lambda *_: None
from bigtune.cli import main
main()
"""
"""`bigtune` as zero_to_fp32 is, which ends when what it wrote is in the page cache."""


def commands(work: Path) -> dict[str, list[str | Path]]:
    """By what is measured; each writes its folder in `work`."""
    python, theirs, ours = sys.executable, work / "deepspeed", work / "bigtune"
    found: dict[str, list[str | Path]] = {
        "zero_to_fp32": [python, theirs / "zero_to_fp32.py", theirs, work / "zero_to_fp32", "--safe_serialization"]
    }
    for name, checkpoint in (("of DeepSpeed's", theirs), ("of bigtune's", ours)):
        for dtype in ("float32", "bfloat16"):
            label = f"merge {name}, {dtype}"
            merge = ["merge", checkpoint, "--dtype", dtype, "--output"]
            found[label] = [Path(python).with_name("bigtune"), *merge, work / label]
            if checkpoint == theirs:
                found[f"{label}, not flushed"] = [python, "-c", UNFLUSHED, *merge, work / f"{label}, not flushed"]
    return found


def values(folder: Path) -> dict[str, str]:
    """Checksums of a model's tensors by name."""
    sums = [sums_of(path).tensors for path in sorted(folder.glob("*.safetensors"))]
    return {name: checksum for tensors in sums for name, checksum in tensors.items()}


def compare(size: str, work: Path, repeats: int) -> dict[str, Any]:
    """All commands on one model, in turn; the first round warms the page cache, is not counted, and is compared."""
    parameters = make(size, work)
    runs: dict[str, list[dict[str, float]]] = {}
    speeds, models = [], {}
    for number in range(repeats + 1):
        speeds.append(disk_speed(work))
        for label, command in commands(work).items():
            shutil.rmtree(work / label, ignore_errors=True)
            found = measure(command)
            click.echo(f"{size} {label}: {found['seconds']:.2f} s, {found['synced_seconds']:.2f} s synced", err=True)
            if number:
                runs.setdefault(label, []).append(found)
            else:
                models[label] = values(work / label)
            shutil.rmtree(work / label)
    theirs = models.pop("zero_to_fp32")
    told = {
        label: {
            "seconds": round(statistics.median(run["seconds"] for run in found), 2),
            "synced_seconds": round(statistics.median(run["synced_seconds"] for run in found), 2),
            "all_seconds": [round(run["seconds"], 2) for run in found],
            "peak_mib": round(max(run["peak_mib"] for run in found)),
        }
        for label, found in runs.items()
    }
    return {
        "size": size,
        "parameters_millions": parameters,
        "disk_mb_per_second": [round(speed) for speed in speeds],
        "commands": told,
        "equal": {label: tensors == theirs for label, tensors in models.items() if "float32" in label},
    }


@click.command()
@click.option("--size", "sizes", multiple=True, type=click.Choice(["tiny", "400M", "1B"]), default=["400M", "1B"])
@click.option(
    "--work", type=click.Path(path_type=Path), help="Where checkpoints and models go. Default: a temporary one."
)
@click.option("--repeats", type=int, default=3)
@click.option("--result", type=click.Path(path_type=Path))
def main(sizes: Sequence[str], work: Path | None, repeats: int, result: Path | None) -> None:
    """Measure, print, and write the result."""
    load = os.getloadavg()[0]
    told = []
    for size in sizes:
        with tempfile.TemporaryDirectory(dir=work) as folder:
            told.append(compare(size, Path(folder), repeats))
    tree = {
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "load_before": round(load, 1),
        "interpreter_mib": {name: round(idle(imports)) for name, imports in IMPORTS.items()},
        "models": told,
    }
    text = json.dumps(tree, indent=1) + "\n"
    click.echo(text)
    if result:
        result.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
