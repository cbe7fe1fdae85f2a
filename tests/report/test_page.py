"""The page is one file that needs nothing else, and shows data as text, whatever it spells."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner

from bigtune import api
from bigtune.cli import main
from bigtune.errors import ConfigError
from bigtune.report.inspection import Inspection
from bigtune.report.page import render_page, write_page
from bigtune.runfile import to_yaml
from tests.report.conftest import END, MakeRun, questions, write

VOID = {"meta", "br"}


class Reader(HTMLParser):
    """Checks that tags are closed in their order, and collects the text of supervised tokens, ids and links."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.classes: list[str] = []
        self.supervised = ""
        self.ids: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.ids += [found["id"] or ""] if "id" in found else []
        self.links += [found["href"] or ""] if "href" in found else []
        if tag not in VOID:
            self.open.append(tag)
            self.classes.append(found.get("class") or "")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        return

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.classes.pop()

    def handle_data(self, data: str) -> None:
        if self.classes and " s" in self.classes[-1]:
            self.supervised += data


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


@pytest.fixture
def seen(make_run: MakeRun, tmp_path: Path) -> Inspection:
    return api.inspect(make_run(write(tmp_path / "a.jsonl", questions(40))), rows=2)


def test_the_page_needs_nothing_else(seen: Inspection) -> None:
    page = render_page(seen)
    assert not re.search(r"https?:|<script|<link|<img|src=|@import|url\(", page)
    assert "prefers-color-scheme: dark" in page and page.count("<svg") == 2


def test_tags_are_closed_and_the_contents_lead_somewhere(seen: Inspection) -> None:
    reader = read(render_page(seen))
    assert len(set(reader.ids)) == len(reader.ids)
    assert {link.removeprefix("#") for link in reader.links} <= set(reader.ids)
    assert {"#sources", "#left-out", "#statistics", "#samples", "#row-0", "#row-1"} <= set(reader.links)


def test_supervised_tokens_are_marked(seen: Inspection) -> None:
    supervised = read(render_page(seen)).supervised
    for sample in seen.samples:
        said = "".join(token.text for token in sample.tokens if token.supervised)
        assert said.endswith(END) and said in supervised
    assert "Instruction" not in supervised


def test_data_stays_text(make_run: MakeRun, tmp_path: Path) -> None:
    evil = "</span><script>alert(1)</script>{{ 777 * 1000 }}&amp;"
    page = render_page(api.inspect(make_run(write(tmp_path / "<b>.jsonl", [{"question": evil, "answer": evil}]))))
    assert "<script" not in page and "777000" not in page
    assert "<b>.jsonl" not in page
    assert evil in read(page).supervised


def test_a_refused_run_a_stream_and_no_samples_make_a_page_too(make_run: MakeRun, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", questions(12))
    page = render_page(api.inspect(make_run(path, supervise=["tool"])))
    assert "Training would refuse this run" in page and "nothing supervised" in page
    read(page)
    streamed = api.inspect(make_run(path, stream=True, train={"epochs": None, "steps": 3}))
    assert "the first window of the stream" in render_page(streamed)
    read(render_page(streamed))
    assert "Sample documents" not in render_page(api.inspect(make_run(path), samples=0, rows=0))


def test_the_command_writes_the_page_into_a_folder_that_it_makes(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(write(tmp_path / "a.jsonl", questions(12)))
    (tmp_path / "run.yaml").write_text(to_yaml(run))
    target = tmp_path / "deep" / "er" / "page.html"
    done = CliRunner().invoke(main, ["inspect", str(tmp_path / "run.yaml"), "--html", str(target)])
    assert done.exit_code == 0 and done.stdout == f"{target}\n"
    read(target.read_text(encoding="utf-8"))


def test_a_page_that_cannot_be_written_is_one_line(seen: Inspection, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"^--html .*: cannot be written \(.*\); name another file$"):
        write_page(render_page(seen), tmp_path / "file" / "page.html")
