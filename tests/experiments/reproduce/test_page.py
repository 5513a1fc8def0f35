"""The report: complete in itself, and readable by somebody who knows nothing of us."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from importlib.resources import files

import pytest

from benchmarks.pages import read_sections
from pacatune.experiments.reproduce.comparison import fill_section
from pacatune.experiments.reproduce.experiment import Measured, Section
from pacatune.experiments.reproduce.page import (
    make_html,
    make_markdown,
    make_result,
    outcomes_table,
)


def exact(value, note=""):
    return Measured.exact(value, "simulated", note)


@pytest.fixture
def section(table, same, shares, scores):
    part = Section(
        name="table9",
        title="A & table",
        place="nowhere",
        about=["What <it> is."],
        notes=["One `limit`."],
        missing=["DoRA"],
        provenance="made by a command",
    )
    tuned = {
        "small-none": exact(20.0),
        "small-lora-r8": Measured(value=30, low=28, high=32, origin="measured", rate=3e-3),
        "small-paca-r8": Measured(
            value=31, low=29, high=33, origin="measured", rate=1e-2, at_edge=True
        ),
    }
    megabytes = {"lora": 1000.0, "dora": 1500.0, "paca": 850.0}
    columns = [
        (same, {"small-lora-r8": exact(18.0), "small-paca-r8": exact(19.0, "a note")}),
        (shares, {f"small-{method}-r8": exact(size) for method, size in megabytes.items()}),
        (scores, tuned),
    ]
    fill_section(part, table, columns)
    return part


def test_markdown_has_the_papers_numbers_ours_and_differences(section):
    page = make_markdown([section], "A report")
    for line in (
        "| small | LoRA | 8 | 20 | 50.0 |",
        "| small | No tuning | - | - | 40.0 |",
        "### Our memory",
        "| small | PaCA | 8 | 16 | 19 | +18.8% |",
        "How it is got. small, PaCA (rank 8): a note.",
        # 30 / 20, 1500 / 1000, and 16 / 20, 850 / 1000; ours are Tiny's, at rank 4
        "| Tiny | DoRA | 4 | 1,500 | small | 8 | 30 | 1.50 | 1.50 | +0.00 |",
        "| Tiny | PaCA | 4 | 850 | small | 8 | 16 | 0.80 | 0.85 | +0.05 |",
        "| Tiny | PaCA | 8 | 31 (29 to 33) | 0.01 (edge) | small | 8 | 53.0 | +3.00 | +1 |",
        "| Tiny | No tuning | - | 20 | - | small | - | 40.0 | -10.00 | -10 |",
        "### Contradicts the paper",
        "Not computed yet: DoRA.",
        "- One `limit`.",
        "made by a command",
        "![our memory: the paper and here](table9-1.svg)",
        "![measured memory: the paper and here: Tiny](table9-2.svg)",
        "**Comparisons of simulated numbers: 3 agree, 0 cannot tell, 0 open, 1 contradict.**",
        "**Comparisons of measured numbers: 0 agree, 1 cannot tell, 0 open, 0 contradict.**",
        "The best learning rate of 1 of 2 lines lies at the edge of its grid",
        "### Cannot be told: our intervals are wider than the paper's difference",
    ):
        assert line in page, line
    counts = section.outcomes()
    assert counts == {"agrees": 3, "cannot_tell": 1, "open": 0, "contradicts": 1}


def test_no_line_of_ours_is_named_after_the_papers_model(section):
    """Numbers of a small model once stood in rows called llama3-8b."""
    for one in section.tables[2:]:
        assert {row[0] for row in one.rows} == {"Tiny"}


def test_several_sections_begin_with_how_the_comparisons_end(section):
    table = outcomes_table([section, section])
    measured = ["", "measured", "0", "1", "0", "0", "1 of 2"]
    assert table.rows == [["table9", "simulated", "3", "0", "0", "1", ""], measured] * 2
    text = make_markdown([section, section], "A report")
    assert text.index(table.title) < text.index("A & table")
    assert table.title in make_html([section, section], "A report")
    assert table.title not in make_markdown([section], "A report")


class _Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.links, self.ids, self.open = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href"):
                self.links.append(value)
            if name == "id":
                self.ids.append(value)
        if tag not in ("meta", "br", "hr"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_terminal_gets_tables_and_what_contradicts(section):
    shown = make_result(section)
    assert "| small | PaCA | 8 | 16 | 19 | +18.8% |" in shown
    assert "Not computed yet: DoRA." in shown
    contradicting = [v.text for v in section.verdicts if v.outcome == "contradicts"]
    assert contradicting
    assert all(f"- {text}." in shown for text in contradicting)
    assert "What <it> is" not in shown  # the page explains


def test_html_is_one_page_that_loads_nothing(section):
    text = make_html([section, section], "A report")
    page = _Page()
    page.feed(text)
    assert page.open == []
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert page.tags.count("svg") == 6
    assert all(link.startswith("#") for link in page.links)
    # Everything that a picture refers to inside is there.
    referred = set(re.findall(r"url\(#([^)]+)\)", text)) | {
        link[1:] for link in page.links if link.startswith("#")
    }
    assert referred <= set(page.ids)
    for words in (
        "A &amp; table",
        "What &lt;it&gt; is.",
        "<code>limit</code>",
        "Fine-tuning adapts",
    ):
        assert words in text


def test_pictures_are_the_same_every_time(section, table, same):
    again = Section(name="table9", title="", place="", about=[])
    ours = {"small-lora-r8": exact(18.0), "small-paca-r8": exact(19.0)}
    fill_section(again, table, [(same, ours)])
    assert again.charts[0].svg == section.charts[0].svg


_QUIET = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync --dump-dom"
)
_MEASURE = """<script>addEventListener("load", () => {
  const found = [...document.querySelectorAll("table")].map(t => ({
    width: t.parentElement.scrollWidth, room: t.parentElement.clientWidth,
    lines: Math.max(...[...t.querySelectorAll("td")].map(c => c.getClientRects()[0].height)),
    line: t.querySelector("td:last-child").getClientRects()[0].height}));
  document.body.innerText = "measured " + JSON.stringify(found) + " end"; })</script>"""


def test_tables_have_the_width_of_the_window_and_cells_one_line():
    style = (files("pacatune.reports") / "templates" / "page.css").read_text()
    rules = dict(re.findall(r"([^{}]+?) \{([^}]*)\}", " ".join(style.split("*/")[1].split())))
    rules = {name.strip(): text for name, text in rules.items()}
    assert "white-space: nowrap" in rules["td"]
    assert "max-width: 60rem" in rules["p, ul, figure"]
    assert int(re.search(r"max-width: (\d+)rem", rules["body"]).group(1)) * 16 > 1233


@pytest.mark.parametrize("mode", ["small", "simulate"])
def test_no_table_is_cut_at_1280_pixels(mode, tmp_path):
    """Looked at in a browser: the pages of the committed results."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium on PATH to measure tables with; apt-get install chromium")
    text = make_html(read_sections(mode), "The paper and here")
    page = tmp_path / "page.html"
    page.write_text(text.replace("</body>", f"{_MEASURE}</body>"))
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = [chromium, *_QUIET.split(), profile, "--window-size=1280,900", page.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    tables = json.loads(re.search(r"measured (\[.*\]) end", shown).group(1))
    assert len(tables) == text.count("<table>")
    assert [table for table in tables if table["width"] > table["room"]] == []
    assert [table for table in tables if table["lines"] > table["line"]] == []
