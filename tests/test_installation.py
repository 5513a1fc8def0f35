"""What messages, cards and pages say of installing it."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from pacatune.cli.entry import main
from pacatune.installation import require_extra

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_nothing_else_says_to_install_it_from_an_index() -> None:
    """None has it: who has no pacatune yet would get what somebody else put under this name."""
    paths = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("src/**/*.py")]
    for path in paths:
        assert not re.search(r"pip install ['\"\-\w ]*pacatune", path.read_text()), path


def test_extras_exist() -> None:
    sources = " ".join(path.read_text() for path in ROOT.glob("src/**/*.py"))
    named = set(re.findall(r"install_command\(['\"]([\w-]+)", sources))
    assert named
    assert named | {"train"} <= set(PROJECT["optional-dependencies"])


def test_floors_are_what_make_compat_runs_with() -> None:
    pins = (ROOT / "tools/compat/floors.txt").read_text()
    for line in PROJECT["dependencies"]:
        name, floor = re.match(r"([\w-]+)(?:\[.*\])?>=([\d.]+),", line).groups()
        assert re.search(rf"^{name}=={re.escape(floor)}(\.\d+)*$", pins, re.MULTILINE), line


@pytest.mark.parametrize("name", ["train", "estimate"])
def test_a_command_without_its_packages_says_one_line(name, monkeypatch, capsys) -> None:
    for package in ("trl", "rich"):
        monkeypatch.setitem(sys.modules, package, None)
    assert main([name, "--help"]) == 2
    assert capsys.readouterr().err == (
        f"pacatune: error: `pacatune {name}` needs packages that are not installed (trl, rich): "
        "pip install -e '.[train]' in a checkout of pacatune's repository\n"
    )


def test_only_the_packages_that_are_asked_for_count(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    require_extra("a plot", "train", ("matplotlib",))
    with pytest.raises(
        ValueError, match=r"a plot needs packages .*\(trl\): pip install -e '.\[train"
    ):
        require_extra("a plot", "train", ("matplotlib", "trl"))


def test_the_description_of_a_wheel_leads_nowhere_outside_of_it(tmp_path) -> None:
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "src").mkdir()
    code = "from setuptools import build_meta; build_meta.prepare_metadata_for_build_wheel('.')"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    (path,) = tmp_path.glob("*.dist-info/METADATA")
    text = path.read_text(encoding="utf-8").partition("\n\n")[2]
    assert text.startswith("# pacatune\n\n**Fine-tune Hugging Face models")
    assert "pacatune is [PaCA](https://arxiv.org/abs/2503.01905) (ICLR 2025)" in text
    assert not re.findall(r"\]\((?!https://)|src=|<!--", text)
    assert "Apache License 2.0" in text
