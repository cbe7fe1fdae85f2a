"""One training run of a benchmark, as a command of its own, and why it came to nothing.

    bigtune prepare ▶ bigtune train ─▶ launcher ─▶ workers ─▶ OUTPUT/metrics.jsonl

What goes wrong in it, out of memory included, ends that command alone.
"""

import json
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from bigtune.bench.machine import OthersLoad
from bigtune.config import Run
from bigtune.data.prepare import is_prepared
from bigtune.errors import LaunchError
from bigtune.host import free_memory
from bigtune.process import end_with_parent
from bigtune.runfile import to_yaml

LEAST_FREE = 0.02
"""Share of the host's memory that must stay free: with less, a host without swap hangs before its kernel acts."""
LOOK_SECONDS = 0.2
NO_MEMORY = re.compile(r"out of memory|OutOfMemory|can't allocate memory|by signal 9\b|MemoryError", re.IGNORECASE)
"""What is said where memory ran out, by bigtune, torch, Python or the launcher."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What became of a run: its lines of metrics, or the reason why there are none."""

    reason: str = ""
    lines: tuple[Mapping[str, Any], ...] = ()
    first_step_seconds: float = 0.0  # from the command to the end of the first step
    busy_by_others: float | None = None  # share of the cores, 0 to 1
    precision: str = ""

    @property
    def out_of_memory(self) -> bool:
        """Whether it is memory that was missing."""
        return NO_MEMORY.search(self.reason) is not None


def try_run(run: Run, ranks: int) -> Trial:
    """Prepare a run's documents, if it has none, and train it in its output folder, from the beginning.

    Raises:
        LaunchError: the folder cannot be written.
    """
    log, metrics = run.output / "bench.log", run.output / "metrics.jsonl"
    try:
        run.output.mkdir(parents=True, exist_ok=True)
        metrics.unlink(missing_ok=True)
        file = run.output / "run.yaml"
        file.write_text(to_yaml(run), encoding="utf-8")
        log.write_bytes(b"")
    except OSError as error:
        raise LaunchError(f"--output: {run.output.absolute()} cannot be written: {error.strerror}") from None
    reason = "" if is_ready(run) else _call(["prepare", str(file)], log)
    others, began = OthersLoad(), time.time()
    reason = reason or _call(["train", str(file), "--ranks", str(ranks)], log)
    busy = others.share()
    if reason:
        return Trial(reason, busy_by_others=busy)
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    if len(lines) < (run.train.steps or 0):
        return Trial(f"the rows ended after {len(lines)} of {run.train.steps} steps; lower --steps or --warm-up")
    # The last line is written as the last step ends.
    first = metrics.stat().st_mtime - began - (lines[-1]["time"] - lines[0]["time"])
    config = json.loads((run.output / "deepspeed.json").read_text(encoding="utf-8"))
    precision = "bfloat16" if config["bf16"]["enabled"] else "float32"
    return Trial("", tuple(lines), first, busy, precision)


def is_ready(run: Run) -> bool:
    """Whether there is nothing to prepare; with new tokens it is `bigtune prepare` that knows."""
    if run.data.stream or run.model.add_tokens:
        return run.data.stream
    return is_prepared(run.data, run.model.path, run.store, run.held_out)


def _call(arguments: list[str], log: Path) -> str:
    """Run a command of bigtune's, whatever it says going to the log.

    Returns:
        Why it failed, in one line; empty where it did not.
    """
    least = LEAST_FREE * psutil.virtual_memory().total
    command = [sys.executable, "-m", "bigtune.cli", *arguments]
    with log.open("ab") as file, subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
        start_new_session=True, preexec_fn=end_with_parent,
    ) as process:  # fmt: skip
        try:
            while process.poll() is None:
                if free_memory() < least:
                    _end(process)
                    return f"out of memory: ended, as {least / 2**30:.2f} GiB of the host's memory were left"
                with suppress(subprocess.TimeoutExpired):
                    process.wait(LOOK_SECONDS)
        except BaseException:  # Ctrl-C
            _end(process)
            raise
    return _reason(process.returncode, log) if process.returncode else ""


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a command and all that it started, at once: there is nothing to save."""
    with suppress(psutil.NoSuchProcess):
        for each in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            with suppress(psutil.NoSuchProcess):
                each.kill()
    process.wait()


def _reason(code: int, log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    told = [line.removeprefix("Error: ") for line in lines if line.startswith("Error: ")]
    if told:
        return told[-1]
    if code < 0:
        return f"ended by signal {-code}{' (out of memory?)' if code == -9 else ''}; see {log}"
    return f"{lines[-1] if lines else f'ended with code {code}'}; see {log}"
