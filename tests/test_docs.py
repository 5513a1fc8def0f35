"""Every block of code in README and docs runs, in a folder with a tiny model and some data.

The blocks of a document run in order in one folder, as a reader would paste them. A YAML block is
written to the file that its first line names. A block that cannot run here (hub, GPU, another
program) has a visible line above it that says so; their number is fixed.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from benchmarks import tables
from pacatune.cli import main
from tests.forks import server
from tests.image_models import save_vit, write_images
from tools import cli_reference, doc_block, llms_txt

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    str(path.relative_to(ROOT))
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "src").rglob("*.md")]
)
NOT_RUN_MARK = "*Not run in the tests:"
NOT_RUN = {
    "docs/bench.md": 3,
    "docs/cli.md": 4,
    "docs/distributed.md": 2,
    "docs/evaluate.md": 4,
    "docs/images.md": 2,
    "docs/integrations.md": 4,
    "docs/memory.md": 1,
    "docs/mt_bench.md": 2,
    "docs/quality_study.md": 1,
    "docs/quickstart.md": 1,
    "docs/reproduce.md": 1,
    "docs/selection_study.md": 1,
    "docs/serving.md": 2,
    "docs/vllm.md": 5,
}
# Languages that are shown only.
SHOWN = ("text", "math")


@dataclass(frozen=True)
class Block:
    language: str
    code: str
    line: int
    is_run: bool


def read_blocks(document):
    """Fenced blocks of a document, in order."""
    blocks, language, lines, start, above = [], None, [], 0, ""
    for number, line in enumerate((ROOT / document).read_text(encoding="utf-8").splitlines(), 1):
        if not line.startswith("```"):
            if language is not None:
                lines.append(line)
            elif line.strip():
                above = line
        elif language is None:
            language, lines, start = line[3:].strip(), [], number
        else:
            is_run = not above.startswith(NOT_RUN_MARK)
            blocks.append(Block(language, "\n".join(lines) + "\n", start, is_run))
            language, above = None, ""
    assert language is None, f"{document}:{start}: the block is not closed"
    return blocks


def is_make(block):
    return block.language == "bash" and all(
        line.startswith("make ") for line in block.code.splitlines()
    )


@pytest.fixture
def workplace(tmp_path, tiny_model_dir):
    """Folder of a reader: my-model, my-data.jsonl, my-image-model and my-images."""
    server()
    shutil.copytree(tiny_model_dir, tmp_path / "my-model")
    save_vit(tmp_path / "my-image-model")
    write_images(tmp_path / "my-images", 12)
    config = tmp_path / "my-model" / "config.json"
    longer = json.loads(config.read_text()) | {"max_position_embeddings": 2048}
    config.write_text(json.dumps(longer))
    with (tmp_path / "my-data.jsonl").open("w") as file:
        for i in range(20):
            user = {"role": "user", "content": f"What is {i} and {i}?"}
            assistant = {"role": "assistant", "content": f"It is {2 * i}."}
            file.write(json.dumps({"messages": [user, assistant]}) + "\n")
    return tmp_path


def run(command, folder):
    env = dict(os.environ, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", COLUMNS="100")
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]])
    env.pop("PYTHONPATH", None)
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600)


def is_plain_command(line):
    """Whether a line is one command of ours without anything for a shell to do."""
    return line.startswith("pacatune ") and not re.search(r"[|&;<>$`*\\]", line)


def run_commands(block, folder, monkeypatch):
    """Run each line in this process where that is the same, which spares loading torch anew."""
    lines = [line.partition("  #")[0] for line in block.code.splitlines()]
    if not any(is_plain_command(line) for line in lines) or "<<" in block.code:
        return run(["bash", "-euo", "pipefail", "-c", block.code], folder)
    for line in lines:
        if not is_plain_command(line):
            done = run(["bash", "-euo", "pipefail", "-c", line], folder)
        else:
            with monkeypatch.context() as patch:
                patch.chdir(folder)
                done = subprocess.CompletedProcess(line, main(shlex.split(line)[1:]), "", "")
        if done.returncode != 0:
            break
    return done


def run_python(block, folder, monkeypatch):
    """Run a block in this process, as a new program as far as it can see."""
    code = compile(block.code, f"block at line {block.line}", "exec")
    with monkeypatch.context() as patch, warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("default")
        patch.chdir(folder)
        exec(code, {"__name__": "__main__"})


def run_block(block, folder, monkeypatch):
    if is_make(block):
        for line in block.code.splitlines():
            result = run(["bash", "-c", line.replace("make ", "make -n ", 1)], ROOT)
            assert result.returncode == 0, result.stderr
        return
    if block.language == "yaml":
        name = re.match(r"# ([\w.-]+\.ya?ml)\n", block.code)
        assert name, "the first line of a YAML block names its file: # run.yaml"
        (folder / name[1]).write_text(block.code)
        return
    if block.language == "bash":
        result = run_commands(block, folder, monkeypatch)
    else:
        run_python(block, folder, monkeypatch)
        return
    assert result.returncode == 0, f"{block.code}\n{result.stdout}\n{result.stderr}"


@pytest.mark.slow
@pytest.mark.parametrize("document", [name for name in DOCUMENTS if read_blocks(name)])
def test_blocks_run(document, workplace, monkeypatch):
    for block in read_blocks(document):
        if block.is_run and block.language not in SHOWN:
            print(f"{document}:{block.line}")
            run_block(block, workplace, monkeypatch)


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
    assert "Number of trained input columns per weight." in text
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
        for kind, body in tables.BLOCKS.items():
            expected = doc_block.render(path, kind, body)
            assert path.read_text(encoding="utf-8") == expected, f"{path}: run `make docs`"


def test_block_without_end_is_refused(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("<!-- table: a -->\n<!-- table: b -->\n<!-- end -->\n")
    with pytest.raises(ValueError, match="2 blocks of kind 'table', 1 closed; add the end"):
        doc_block.render(path, "table", str.upper)
