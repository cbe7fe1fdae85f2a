"""What a terminal shows: supervised text is marked, with and without colours, and nothing is wider than the screen."""

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from bigtune import api
from bigtune.report.inspection import Inspection
from bigtune.report.terminal import render
from tests.report.conftest import END, MakeRun, questions, write


def shown(seen: Inspection, width: int = 80, colour: bool = False) -> str:
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=colour, color_system="standard" if colour else None)
    console.print(render(seen, width))
    return file.getvalue()


@pytest.fixture
def seen(make_run: MakeRun, tmp_path: Path) -> Inspection:
    return api.inspect(make_run(write(tmp_path / "a.jsonl", questions(40))), samples=2)


def flat(text: str) -> str:
    """Token text as it was before it was marked and wrapped."""
    return re.sub(r"\s+", "", text.replace("·", "").replace("↵", ""))


def test_without_colours_brackets_stand_around_what_is_supervised(seen: Inspection) -> None:
    text = shown(seen, width=400)
    assert "\x1b" not in text
    bracketed = re.findall(r"⟦(.*?)⟧", text.split("line break")[1].split("Packed row")[0], re.DOTALL)
    for sample, said in zip(seen.samples, bracketed, strict=True):
        path, _, row = sample.where.rpartition(", row ")
        answer = json.loads(Path(path).read_text().splitlines()[int(row) - 1])["answer"]
        assert flat(said) == flat(answer) + END


def test_with_colours_what_is_supervised_is_bold_and_green_and_nothing_else_is(seen: Inspection) -> None:
    text = shown(seen, colour=True).split("line break")[1].split("Packed row")[0]
    green = "".join(re.findall(r"\x1b\[(?:1;(?:4;)?(?:7;)?32)m(.*?)\x1b\[0m", text))
    assert "Instruction" not in green and green.count(END) == len(seen.samples)
    assert "⟦" not in text


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_line_is_wider_than_the_screen(seen: Inspection, width: int) -> None:
    from rich.cells import cell_len

    assert max(cell_len(line) for line in shown(seen, width).splitlines()) <= width


def test_documents_of_a_packed_row_are_told_apart(seen: Inspection) -> None:
    text = shown(seen).split("Packed row 0")[1]
    row = seen.rows[0]
    assert f"{row.tokens} of 128 tokens: {row.fill:.1%} full" in text
    begin = 0
    for number, document in enumerate(row.documents, 1):
        assert f"{number} · tokens {begin} to {begin + document.length - 1} ─" in text
        assert document.where.rpartition("/")[2] in text
        begin += document.length


def test_data_cannot_upset_the_terminal(make_run: MakeRun, tmp_path: Path) -> None:
    rows = [{"question": "\x1b[31mred[/]?", "answer": "\x1b]0;title\x07 [bold]x[/bold] \u202e"}]
    text = shown(api.inspect(make_run(write(tmp_path / "a.jsonl", rows))), width=200)
    assert "\x1b" not in text and "\u202e" not in text and "\x07" not in text
    assert "␛" in text and "[bold]" in text.replace("·", "")


def test_a_run_that_would_be_refused_says_so_first_and_in_red(make_run: MakeRun, tmp_path: Path) -> None:
    refused = api.inspect(make_run(write(tmp_path / "a.jsonl", questions(5)), supervise=["tool"]))
    assert shown(refused).lstrip().startswith("Training would refuse this run")
    assert "\x1b[1;37;41m Training would refuse this run" in shown(refused, colour=True)
    assert "nothing supervised" in shown(refused)


def test_what_is_left_out_is_listed_with_its_rows(make_run: MakeRun, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [*questions(5), *questions(2), {"other": 1}])
    run = make_run(path, on_bad_row="skip", clean={"exact_duplicates": True})
    text = re.sub(r"\s+", " ", shown(api.inspect(run), width=200))
    assert "2 rows exact duplicate" in text and "row 6 repeats" in text
    assert "What is left out" in text and "row 8" in text


def test_a_sequence_length_below_all_lengths_is_marked_and_everything_beyond_is_red(
    make_run: MakeRun, tmp_path: Path
) -> None:
    text = shown(api.inspect(make_run(write(tmp_path / "a.jsonl", questions(5)), sequence_length=16)), colour=True)
    plot = text.split("before long ones are cut")[1].split("data.sequence_length 16")[0]
    assert "▲" in text and re.search("\x1b\\[31m[▁-█]", plot) and not re.search("\x1b\\[36m[▁-█]", plot)
