import tomllib
from pathlib import Path

import pytest
from jinja2 import UndefinedError

import pacatune
from pacatune.reports.pages import inline_svg, render_page
from pacatune.reports.tables import ReportTable

ROOT = Path(__file__).parents[2]


def section(**changes):
    values = {
        "name": "one",
        "title": "A & title",
        "place": "here",
        "about": ["What <it> is, by `code` & **bold**."],
        "summary": [],
        "tables": [],
        "charts": [],
        "lists": [],
        "provenance": "",
    }
    return values | changes


def render(**changes):
    values = {"heading": "A <page>", "introduction": ["Hello."], "overview": None}
    values["sections"] = [section(**changes)]
    return render_page("reproduction.html", **values)


def test_texts_are_escaped_and_set():
    page = render()
    assert "<title>A &lt;page&gt;</title>" in page
    assert "A &amp; title" in page
    assert "What &lt;it&gt; is, by <code>code</code> &amp; <b>bold</b>." in page


def test_tables_keep_their_alignment_and_their_note():
    table = ReportTable(title="T<", header=["a", "b"], rows=[["1<2", "3"]], note="a `note`")
    page = render(tables=[ReportTable(**vars(table) | {"align": "lr"})])
    assert "<h3>T&lt;</h3>" in page
    assert '<td class="l">1&lt;2</td><td class="r">3</td>' in page
    assert '<p class="note">a <code>note</code></p>' in page


def test_names_inside_pictures_do_not_meet():
    svg = '<svg><a id="p"/><use href="#p" style="clip: url(#p)"/></svg>'
    page = render(charts=[{"svg": inline_svg(svg, f"n{n}"), "caption": "c"} for n in (1, 2)])
    for n in (1, 2):
        assert f'<a id="n{n}-p"/><use href="#n{n}-p" style="clip: url(#n{n}-p)"/>' in page


def test_a_value_that_is_missing_is_an_error():
    with pytest.raises(UndefinedError):
        render_page("reproduction.html", heading="", introduction=[])


def test_templates_come_with_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    data = project["tool"]["setuptools"]["package-data"]["pacatune"]
    assert "reports/templates/*" in data
    folder = Path(pacatune.__file__).parent / "reports" / "templates"
    assert {path.name for path in folder.iterdir()} >= {"page.html", "page.css"}
