"""What README and docs say of themselves: blocks, links, tables and the site."""

import re
import sys

import pytest

from benchmarks import tables
from tests.docs.blocks import DOCUMENTS, ROOT, SHOWN, read_blocks, run
from tools import cli_reference, doc_block, llms_txt

NOT_RUN = {
    "docs/bench.md": 3,
    "docs/distributed.md": 3,
    "docs/evaluate.md": 5,
    "docs/images.md": 2,
    "docs/integrations.md": 6,
    "docs/memory.md": 1,
    "docs/mt_bench.md": 2,
    "docs/quality_study.md": 1,
    "docs/quickstart.md": 1,
    "docs/recipes.md": 2,
    "docs/reproduce.md": 1,
    "docs/selection_study.md": 1,
    "docs/serving.md": 2,
    "docs/vllm.md": 4,
}


def test_blocks_have_a_known_language():
    for document in DOCUMENTS:
        for block in read_blocks(document):
            assert block.language in ("python", "bash", "yaml", *SHOWN), f"{document}:{block.line}"


def test_number_of_blocks_that_are_not_run():
    counted = {
        document: number
        for document in DOCUMENTS
        if (number := sum(not block.is_run for block in read_blocks(document)))
    }
    assert counted == NOT_RUN


def test_local_links_lead_somewhere():
    for document in DOCUMENTS:
        text = (ROOT / document).read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
            assert (ROOT / document).parent.joinpath(target).exists(), f"{document}: {target}"


def test_the_site_is_built_and_its_links_lead_somewhere(tmp_path):
    """mkdocs warns of links and anchors that lead nowhere, and of pages that no menu has."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    result = run([*command, "--config-file", str(ROOT / "mkdocs.yml"), "-d", str(tmp_path)], ROOT)
    assert result.returncode == 0, result.stderr
    text = (tmp_path / "api" / "peft.html").read_text(encoding="utf-8")
    assert "Number of trained input columns of each weight." in text
    listed = re.findall(
        r"\]\(([\w/]+\.html)\)", (tmp_path / "llms.txt").read_text(encoding="utf-8")
    )
    built = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.html")}
    assert sorted(listed) == sorted(built - {"index.html", "404.html", "search.html"})


def test_the_list_for_language_models_is_that_of_the_pages():
    text = llms_txt.DOCUMENT.read_text(encoding="utf-8")
    assert text == llms_txt.render(), "run `make docs`"
    *_, about = zip(*re.findall(r"^- \[(.+?)\]\((.+?)\): (.*)$", text, re.MULTILINE), strict=True)
    assert all(len(line) > 10 and not line.endswith(":") for line in about)


def test_readme_shows_the_two_commands_on_the_first_screen():
    first_screen = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:20]
    assert any(line.startswith("make demo") for line in first_screen)
    assert any(line.startswith("make test") for line in first_screen)


def test_tables_of_options_are_those_of_the_commands():
    path = cli_reference.DOCUMENT
    expected = doc_block.render(path, "options", cli_reference.options_table)
    assert path.read_text(encoding="utf-8") == expected, "run `make docs`"


def test_every_command_has_a_section():
    from pacatune.cli.entry import COMMANDS

    text = cli_reference.DOCUMENT.read_text(encoding="utf-8")
    assert re.findall(r"^## pacatune ([\w-]+)$", text, re.MULTILINE) == list(COMMANDS)


def test_tables_of_measurements_are_those_of_the_committed_results():
    for path in tables.DOCUMENTS:
        expected = doc_block.render(path, "table", tables.block)
        assert path.read_text(encoding="utf-8") == expected, f"{path}: run `make docs`"


def test_block_without_end_is_refused(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("<!-- table: a -->\n<!-- table: b -->\n<!-- end -->\n")
    with pytest.raises(ValueError, match="2 blocks of kind 'table', 1 closed; add the end"):
        doc_block.render(path, "table", str.upper)
