"""What messages, cards and pages say of installing it."""

import re
import tomllib
from pathlib import Path

from pacatune.installation import install_command

ROOT = Path(__file__).parents[1]


def test_command_names_the_repository() -> None:
    assert install_command() == "pip install -e . in a checkout of pacatune's repository"
    assert install_command("quant").startswith("pip install -e '.[quant]' in a checkout")


def test_nothing_says_to_install_it_from_an_index() -> None:
    """None has it: what an index has under this name would be somebody else's."""
    paths = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("src/**/*.py")]
    for path in paths:
        assert not re.search(r"pip install ['\"\-\w ]*pacatune", path.read_text()), path


def test_extras_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    sources = " ".join(path.read_text() for path in ROOT.glob("src/**/*.py"))
    named = set(re.findall(r"install_command\(['\"]([\w-]+)", sources))
    assert named
    assert named <= set(project["optional-dependencies"])
