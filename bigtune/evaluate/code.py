"""Whether code that a model wrote passes the tests of its row, run apart and with limits.

What holds, with bubblewrap: no network; no other process is seen or reached; all files are read-only, the home folder
and temporary files are not there, and what is written is gone afterwards. With either sandbox: wall and processor time,
memory of each process, size of each file, an empty environment. What does not hold: it is the same kernel, a hole in
which is one here; many small processes may take more memory together; with `limits` alone code may read and write all
that this user may, and use the network. Tests prove nothing against code that means to deceive them.
"""

import re
import resource
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from os import killpg
from pathlib import Path
from typing import Any

from bigtune.config import CodeRuns
from bigtune.errors import ConfigError
from bigtune.process import end_with_parent

FENCE = re.compile(
    r"^[ \t]*```[ \t]*(?:python3?|py)?[ \t]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE | re.IGNORECASE
)
FILE_BYTES = 2**26


def check_sandbox(settings: CodeRuns | None) -> CodeRuns:
    """The settings, where code may be run here.

    Raises:
        ConfigError: nobody allowed it, or there is no bubblewrap that works.
    """
    if settings is None:
        raise ConfigError(
            "evaluate.metrics: code runs what models write; allow it with evaluate.code: {sandbox: bubblewrap}"
        )
    if settings.sandbox == "limits":
        return settings
    if shutil.which("bwrap") is None:
        raise ConfigError("evaluate.code.sandbox: there is no bubblewrap here (package bubblewrap); install it")
    tried = subprocess.run(
        [*_bubblewrap(Path(tempfile.gettempdir())), "true"], capture_output=True, text=True, check=False
    )
    if tried.returncode:
        raise ConfigError(f"evaluate.code.sandbox: bubblewrap does not work here: {tried.stderr.strip()}")
    return settings


def passes(output: str, row: Mapping[str, Any], settings: CodeRuns) -> float:
    """1 where the code of an answer runs, and the row's tests after it, to the end; 0 where it fails or takes too much.

    Raises:
        ValueError: the row has no tests.
    """
    end = secrets.token_hex(8)  # that the last line was reached, and not sys.exit before it
    program = f"{code_of(output)}\n\n{tests_of(row)}\n\nprint({end!r})\n"
    with tempfile.TemporaryDirectory(prefix="bigtune-code-") as folder:
        (Path(folder) / "answer.py").write_text(program, encoding="utf-8")
        python = [sys.executable, "-I", "-B", "answer.py"]
        words = [*_bubblewrap(Path(folder)), *python] if settings.sandbox == "bubblewrap" else python
        with (Path(folder) / "said").open("w+b") as said:
            code = _run(words, folder, said, settings)
            said.seek(0)
            return float(code == 0 and said.read().rstrip().endswith(end.encode()))


def code_of(output: str) -> str:
    """The first fenced block of an answer, or all of it where there is none."""
    found = FENCE.search(output)
    return found[1] if found else output


def tests_of(row: Mapping[str, Any]) -> str:
    """The tests of a row: `tests`, or as MBPP (`test_list`) and HumanEval (`test`, `entry_point`) have them.

    Raises:
        ValueError: it has none.
    """
    for key in ("tests", "test_list", "test"):
        found = row.get(key)
        lines = found if isinstance(found, list) else [found]
        if found and all(isinstance(line, str) for line in lines):
            called = [f"check({row['entry_point']})"] if key == "test" and "entry_point" in row else []
            return "\n".join([*map(str, lines), *called])
    raise ValueError("the row has no tests (a text or a list of texts under tests, test_list or test)")


def _bubblewrap(folder: Path) -> list[str]:
    homes = {str(path) for path in (Path.home(), Path("/root"), Path("/home")) if path.is_dir()}
    hidden = [word for path in sorted(homes) for word in ("--tmpfs", path)]
    shown: list[str] = []
    for needed in (Path(sys.prefix), Path(sys.base_prefix)):  # the interpreter may lie in a home folder
        shown += ["--ro-bind", str(needed), str(needed)]
    return [
        "bwrap", "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "--tmpfs", "/tmp", "--tmpfs", "/var/tmp",
        *hidden, *shown, "--bind", str(folder), str(folder), "--chdir", str(folder),
        "--unshare-all", "--die-with-parent", "--new-session",
    ]  # fmt: skip


def _run(words: list[str], folder: str, said: Any, settings: CodeRuns) -> int | None:
    """Its exit code; None where its time was up."""
    memory, seconds = int(settings.memory_gib * 2**30), int(settings.timeout_seconds) + 1

    def limit() -> None:
        end_with_parent()
        for what, most in (
            (resource.RLIMIT_AS, memory), (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_FSIZE, FILE_BYTES),
            (resource.RLIMIT_CORE, 0),
        ):  # fmt: skip
            resource.setrlimit(what, (most, most))

    process = subprocess.Popen(
        words, cwd=folder, env={"PATH": "/usr/bin:/bin", "HOME": folder}, stdin=subprocess.DEVNULL, stdout=said,
        stderr=subprocess.DEVNULL, start_new_session=True, preexec_fn=limit,
    )  # fmt: skip
    try:
        return process.wait(settings.timeout_seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError):
            killpg(process.pid, signal.SIGKILL)
        process.wait()
