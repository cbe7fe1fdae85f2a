"""What a terminal and the page show of results."""

import re
from dataclasses import replace

from rich.console import Console

from bigtune.bench.compare import compare
from bigtune.bench.figures import Figures
from bigtune.bench.page import render_page
from bigtune.bench.result import Result
from bigtune.bench.session import scaling_efficiency
from bigtune.bench.sweep import Case
from bigtune.bench.table import render, render_comparison
from tests.bench.lines import HOST, line, result
from tests.report.test_page import read


def results() -> list[Result]:
    one = result(settings={"train.micro_batch": "max"}, micro_batch=4, busy_by_others=0.3, precision="float32")
    two = result(1.5, ranks=2, settings={"train.micro_batch": "max"}, micro_batch=4)
    two = replace(two, scaling_efficiency=scaling_efficiency(two, [one]), tflops={"exact": 2.0, "palm": 3.0},
                  roof_tflops={"measured": 4.0, "datasheet": 8.0},
                  mfu={"exact": {"measured": 0.5, "datasheet": 0.25}, "palm": {"measured": 0.75}})  # fmt: skip
    failed = Result(Case({"deepspeed": "<b>&"}, 9), "this host has 2 cores; give at most --ranks 2", machine=HOST)
    return [one, two, failed]


def shown(renderable: object, width: int = 80) -> str:
    console = Console(width=width, highlight=False)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def test_scaling_is_a_device_s_speed_beside_that_on_the_fewest_ranks() -> None:
    one, two, failed = results()
    assert two.scaling_efficiency is not None and abs(two.scaling_efficiency - 0.75) < 1e-9
    assert scaling_efficiency(one, []) is None
    assert scaling_efficiency(failed, [one, two]) is None
    assert scaling_efficiency(result(ranks=4), [one]) is None  # of other settings


def test_the_table_has_every_case_and_fits_80_columns() -> None:
    text = shown(render(results()))
    assert max(map(len, text.splitlines())) <= 80
    assert re.search(r"1  train.micro_batch=max \(4\) +1  1,000", text)
    assert re.search(r"3  deepspeed=<b>& +9  this host has 2 cores; give at most", text)
    assert re.search(r"^2 +1,500 +750 +60 +0.66\d +0.66\d +0.673 +75%", text, re.MULTILINE)
    assert re.search(r"^2 +4 +2 +50.0% +25.0% +3 +75.0% +\?", text, re.MULTILINE)
    assert "warning: other processes used up to 30% of the cores during 1 of 2 cases" in " ".join(text.split())
    assert "share the host's cores" in " ".join(text.split())
    assert "…" not in text


def test_no_case_measured_is_a_table_too() -> None:
    text = shown(render(results()[2:]))
    assert "Cases" in text and "Throughput" not in text
    assert shown(render([]))


def test_a_comparison_in_a_terminal() -> None:
    before, after = ({each.key: each for each in made} for made in (results(), results()[1:]))
    text = shown(render_comparison(compare(before, after)), 140)
    assert "no difference beyond the noise" in text and "before: train.micro_batch=max, ranks 1" in text
    assert "after: this host has 2 cores" in text


def test_the_page_needs_nothing_else_and_text_stays_text() -> None:
    timed = {"forward": 0.4, "backward": 0.4}
    figures = Figures.of([line(step, float(step), phase_seconds=timed) for step in range(4)], 1, 1)
    page = render_page([*results(), replace(results()[0], figures=figures)])
    assert not re.search(r"https?:|<script|<link|<img|src=|@import|url\(", page)
    assert page.count('<svg class="plot"') == 2 and "<b>&" not in page
    reader = read(page)
    assert set(reader.ids) >= {"cases", "speed", "time", "memory"}
    assert "1,500 tokens/s" in page and "this host has 2 cores" in page
    assert re.search(r'<rect class="phase forward"[^>]*><title>forward: 40.0%</title>', page)
    assert "Not timed." not in page and "Not timed." in render_page(results()[2:])
    read(render_page(results()[2:]))
