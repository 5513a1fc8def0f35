"""What README and docs say of themselves: blocks, links, tables and the site."""

import ast
import importlib
import json
import re
import sys
import tomllib
from itertools import pairwise

import pytest

from benchmarks import tables
from pacatune.cli import main
from pacatune.cli.entry import COMMANDS
from pacatune.methods import METHODS
from pacatune.training import PacaSection
from tests.docs.blocks import DOCUMENTS, ROOT, SHOWN, read_blocks, run
from tools import doc_block, picture

PARTS = "lean ops patch selection sync training tuner"
PUBLIC = ("pacatune", *(f"pacatune.{part}" for part in PARTS.split()))


def test_local_links_lead_somewhere_and_blocks_have_a_known_language():
    for document in DOCUMENTS:
        for block in read_blocks(document):
            assert block.language in ("python", "bash", "yaml", *SHOWN), f"{document}:{block.line}"
        text = (ROOT / document).read_text(encoding="utf-8")
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
            path = (ROOT / document).parent / target if target else ROOT / document
            assert path.exists(), f"{document}: {target}"
            assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), anchor


def anchors(text):
    """Return what the headings of a page are called in links, by GitHub and by the site."""
    titles = re.findall(r"^#+ (.*)", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\s-]", "", title).lower().replace(" ", "-") for title in titles}


def unlisted(api):
    """Return the public names that the page of the API does not have."""
    listed = "\n".join(re.findall(r'id="(pacatune[\w.]*)"', api))
    missing = set()
    for module in map(importlib.import_module, PUBLIC):
        for name in set(module.__all__) - {"__version__"}:
            home = getattr(getattr(module, name), "__module__", None)
            path = rf"^({module.__name__}(\.[a-z_]+)*|{home})\.{name}$"  # never a class's method
            if not re.search(path, listed, re.MULTILINE):
                missing.add(f"{module.__name__}.{name}")
    return missing


def literal(node):
    """Return a string of the sources, of a value in it `{}`."""
    if isinstance(node, ast.JoinedStr):
        return "".join(map(literal, node.values))
    return str(node.value) if isinstance(node, ast.Constant) else "{}"


def test_troubleshooting_quotes_messages_that_there_are():
    """Quotes of more than a word, with `...` for values; those of others name their package."""
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    cells = [row.split("|")[1] for row in re.findall(r"^\| .*", page, re.MULTILINE)]
    ours = [cell for cell in cells if not re.search("vLLM|PEFT|torch", cell)]
    quotes = [quote for cell in ours for quote in re.findall(r"`([^`]* [^`]*)`", cell)]
    trees = [ast.parse(path.read_text()) for path in (ROOT / "src").rglob("*.py")]
    kinds = (ast.Constant, ast.JoinedStr)
    messages = [literal(n) for tree in trees for n in ast.walk(tree) if isinstance(n, kinds)]
    assert len(quotes) > 8
    for quote in quotes:
        pattern = ".*".join(map(re.escape, quote.split("...")))
        assert any(re.search(pattern, message) for message in messages), quote


@pytest.mark.docs
def test_what_gpus_are_for_is_what_estimate_says(capsys):
    page = (ROOT / "docs/memory.md").read_text(encoding="utf-8")
    section = page.partition("## Which GPU?")[2].partition("\n## ")[0]
    commands = re.findall(r"^pacatune (.+)$", section, re.MULTILINE)
    lines = re.findall(r"^\| \d+ GB \| (.*) \|$", section, re.MULTILINE)
    assert len(commands) == len(lines) > 4
    for command, line in zip(commands, lines, strict=True):
        words = command.split()
        given = dict(pairwise(words))
        assert main([*words, "--json"]) == 0
        methods = json.loads(capsys.readouterr().out)["methods"].values()
        sizes = [[size / 2**30 for size in one["device_bytes"].values()] for one in methods]
        needs = [f"{low:.1f} to {high:.1f} GiB" for low, high in sizes]
        cells = [n + ": no" * (one["fits"] == "no") for n, one in zip(needs, methods, strict=True)]
        tokens = f"{given.get('--batch_size', '8')} x {int(given['--seq_len']):,}"
        model = words[1] + ", 4 bits" * ("qpaca" in command)
        assert line == " | ".join([model, tokens, *cells])


def test_every_extra_is_listed():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    page = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    table = page.partition("| extra |")[2].partition("\n\n")[0]
    listed = re.findall(r"`([\w-]+)`", "".join(re.findall(r"^\| (.*?) \|", table, re.MULTILINE)))
    assert sorted(listed) == sorted(extras["optional-dependencies"])


def test_the_site_is_built_and_its_links_lead_somewhere(tmp_path):
    """mkdocs warns of links and anchors that lead nowhere, and of pages that no menu has."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    result = run([*command, "--config-file", str(ROOT / "mkdocs.yml"), "-d", str(tmp_path)], ROOT)
    assert result.returncode == 0, result.stderr
    api = (tmp_path / "api.html").read_text(encoding="utf-8")
    assert "Number of trained input columns of each weight." in api
    assert unlisted(api) == {"pacatune.training.TrainingConfig"}  # made of TRL's class, when asked
    commands = (tmp_path / "cli.html").read_text(encoding="utf-8")
    assert all(f'id="pacatune-{name}"' in commands for name in COMMANDS)
    assert "--training.output_dir" in commands
    text = (tmp_path / "llms.txt").read_text(encoding="utf-8")
    built = {path.name for path in tmp_path.glob("*.html")} - {"404.html", "search.html"}
    assert set(re.findall(r"\]\((\w+\.html)\)", text)) == built - {"index.html"}
    *_, about = zip(*re.findall(r"^- \[(.+?)\]\((.+?)\): (.*)$", text, re.MULTILINE), strict=True)
    assert all(len(line) > 10 and not line.endswith(":") for line in about)


def test_the_readme_is_read_in_minutes_and_its_numbers_are_those_of_results():
    """`test_tables_of_measurements...` holds the tables; the first screen has no other number."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.findall("<!-- table: ([a-z-]+) -->", text) == ["first", "demo"]
    assert text.count("<picture>") == 1
    shown = re.sub(r"<!--.*?-->\n|<picture>.*?</picture>\n", "", text)
    assert len(shown.splitlines()) <= 120
    prose = re.sub(r"\]\(.*?\)", "]", shown)
    assert len([word for word in prose.split() if re.search(r"\w", word)]) <= 900
    rows = [line for line in prose.splitlines() if line.startswith("|")]
    cells = [cell.split() for row in rows for cell in row.strip("|").split("|")]
    assert len(rows) > 8
    assert max(len([w for w in cell if re.search(r"\w", w)]) for cell in cells) <= 8
    screen = re.sub("<!-- table.*?<!-- end -->", "", text.partition("## Train")[0], flags=re.S)
    screen = re.sub(r"```.*?```|\]\(.*?\)|<picture>.*?</picture>", "", screen, flags=re.S)
    assert set(re.findall(r"(?<!\w)\d+", screen)) == {"2025", "135", "1"}


def test_the_first_screen_trains_by_the_defaults_of_train():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    ours = PacaSection()
    numbers = set(re.findall(r"PacaConfig\(r=(\d+), paca_alpha=(\d+)", text))
    assert numbers == {(str(ours.r), str(ours.paca_alpha))}
    rates = re.findall(r"learning_rate=([\d.e-]+)", text)
    assert set(map(float, rates)) == {METHODS["paca"].text_rate}


def test_the_agreement_with_the_paper_is_that_of_its_tables():
    text = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
    tables = "".join(re.findall(r"<!-- table: reproduce-.*?<!-- end -->", text, re.DOTALL))
    verdicts = ("agrees", "same order", "other order", "no significant difference", "one run")
    agree, same, other, apart, single = (tables.count(f"| {word} |") for word in verdicts)
    number = agree + same + other + apart + single
    said = " ".join(text.split())
    assert f"Of {number} shares and differences, {agree} agree with the paper" in said
    assert f"{same} have its order; none has the other order.** {apart} show no" in said
    assert other == 0
    assert f"The other {single} come from one run" in said


def test_the_pictures_show_the_committed_numbers():
    step = [row.value for rows in picture.shares().values() for row in rows.values()]
    step += [value for level in picture.kept().values() for value in level.values()]
    sync, first = (
        [value for panel in panels.values() for value in panel.values()]
        for panels in (picture.synced(), picture.first())
    )
    for name, values in (("step", step), ("sync", sync), ("first", first)):
        paths = list(picture.FOLDER.glob(f"{name}-*.svg"))
        assert len(paths) == 2
        for path in paths:
            drawn = set(re.findall(r">\s*([\d.e-]+)</text>", path.read_text(encoding="utf-8")))
            assert {f"{value:.3g}" for value in values} <= drawn, "run `make docs`"
    panels = [panel for task in picture.frontier().values() for panel in task.values()]
    assert panels
    paths = list(picture.FOLDER.glob("frontier-*.svg"))
    assert len(paths) == 2
    for path in paths:
        drawn = re.findall(r">\s*([^<>]+)</text>", path.read_text(encoding="utf-8"))
        for arm in {arm for panel in panels for arm in panel}:
            assert drawn.count(arm) == sum(arm in panel for panel in panels), "run `make docs`"


def test_tables_of_measurements_are_those_of_the_committed_results(tmp_path):
    for path in tables.DOCUMENTS:
        expected = doc_block.render(path, "table", tables.block)
        assert path.read_text(encoding="utf-8") == expected, f"{path}: run `make docs`"
    (tmp_path / "page.md").write_text("<!-- table: a -->\n<!-- table: b -->\n<!-- end -->\n")
    with pytest.raises(ValueError, match="2 blocks of kind 'table', 1 closed; add the end"):
        doc_block.render(tmp_path / "page.md", "table", str.upper)
