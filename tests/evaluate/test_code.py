"""Code of an answer is run with its row's tests, and can neither harm nor hang nor pass without them."""

import time
from pathlib import Path
from typing import Any

import pytest

from bigtune.config import CodeRuns
from bigtune.errors import ConfigError
from bigtune.evaluate import code
from bigtune.evaluate.code import check_sandbox, code_of, passes
from bigtune.evaluate.metrics import find_metrics

TESTS = {"tests": ["assert double(2) == 4", "assert double(-1) == -2"]}
RIGHT = "def double(x):\n    return 2 * x\n"


@pytest.fixture(params=["limits", "bubblewrap"])
def settings(request: pytest.FixtureRequest) -> CodeRuns:
    found = CodeRuns(sandbox=request.param, timeout_seconds=5.0)
    try:
        return check_sandbox(found)
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("answer", [RIGHT, f"Here it is:\n```python\n{RIGHT}```\nIt doubles.", f"```\n{RIGHT}"])
def test_code_that_passes(settings: CodeRuns, answer: str) -> None:
    assert passes(answer, TESTS, settings) == 1


@pytest.mark.parametrize(
    "answer",
    [
        "def double(x):\n    return x + 2",
        "def double(x) return 2 * x",
        f"{RIGHT}\nimport sys; sys.exit(0)",
        f"{RIGHT}\nimport os; os._exit(0)",
        f"{RIGHT}\nwhile True: pass",
        f"{RIGHT}\nimport time; time.sleep(600)",
        f"{RIGHT}\nx = bytearray(2**31)",
        f"{RIGHT}\nopen('big', 'wb').write(bytes(2**27))",
        "",
    ],
)
def test_code_that_fails_hangs_or_takes_too_much(settings: CodeRuns, answer: str) -> None:
    settings = settings.model_copy(update={"timeout_seconds": 1.5})
    assert passes(answer, TESTS, settings) == 0


def test_what_it_starts_ends_with_it(settings: CodeRuns, tmp_path: Path) -> None:
    answer = f"{RIGHT}\nimport subprocess, sys\n"
    answer += "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(61.5)'])"
    assert passes(answer, TESTS, settings) == 1
    time.sleep(0.2)
    lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not any(b"time.sleep(61.5)" in line for line in lines)


def test_bubblewrap_holds_files_and_the_network(settings: CodeRuns, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("before")
    answers = [
        f"open({str(kept)!r}, 'w').write('after')",
        "import pathlib\npathlib.Path('/usr/written').touch()\npathlib.Path('/usr/written').unlink()",
        "import socket\nassert [name for _, name in socket.if_nameindex()] != ['lo']",
        "import os\nos.kill(os.getppid(), 0)\nassert len([n for n in os.listdir('/proc') if n.isdigit()]) > 5",
    ]
    reached = [passes(answer, {"tests": "done = 1"}, settings) for answer in answers]
    if settings.sandbox == "bubblewrap":
        assert reached == [0, 0, 0, 0] and kept.read_text() == "before"
    else:
        assert reached[0] == 1 and kept.read_text() == "after"  # as its name says


def test_tests_as_known_sets_have_them() -> None:
    assert code.tests_of({"test_list": ["a", "b"]}) == "a\nb"
    assert code.tests_of({"test": "def check(f): ...", "entry_point": "double"}) == "def check(f): ...\ncheck(double)"
    with pytest.raises(ValueError, match="no tests"):
        code.tests_of({"tests": 3})
    assert code_of("no fence") == "no fence"


def test_it_is_off_unless_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"allow it with evaluate\.code: \{sandbox: bubblewrap\}"):
        find_metrics(["code"])
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="there is no bubblewrap here"):
        find_metrics(["code"], CodeRuns(sandbox="bubblewrap"))


def test_a_metric_of_code(settings: CodeRuns) -> None:
    row: dict[str, Any] = TESTS
    assert find_metrics(["code"], settings)["code"](RIGHT, "", row) == 1
