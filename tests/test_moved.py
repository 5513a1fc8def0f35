"""Tests of `pacatune._moved`: imports by old names."""

import importlib
import subprocess
import sys

import pytest

from pacatune._moved import MOVED


@pytest.mark.parametrize("old", MOVED)
def test_gives_the_module_at_its_new_place(old, monkeypatch):
    monkeypatch.delitem(sys.modules, old, raising=False)
    new = importlib.import_module(MOVED[old])
    spec = new.__spec__

    with pytest.warns(DeprecationWarning, match=rf"^{old} is now {MOVED[old]}\.$"):
        module = importlib.import_module(old)

    assert module is new
    assert module.__spec__ is spec
    assert module.__name__ == MOVED[old]


def test_modules_below_are_found_by_old_names_too():
    code = (
        "import sys, warnings; warnings.simplefilter('ignore')\n"
        "from pacatune.functional.linear import paca_linear as old\n"
        "from pacatune.ops.linear import paca_linear as new\n"
        "from pacatune.reference import paca_linear as twin\n"
        "from pacatune.baselines import MosLoraConfig\n"
        "import pacatune\n"
        "assert old is new and twin.__module__ == 'pacatune.ops.reference'\n"
        "assert MosLoraConfig is pacatune.MosLoraConfig\n"
        "assert sys.modules['pacatune.functional.linear'] is sys.modules['pacatune.ops.linear']\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_module_that_never_was_is_not_found():
    with pytest.raises(ModuleNotFoundError, match=r"pacatune\.functionals"):
        importlib.import_module("pacatune.functionals")
    with (
        pytest.warns(DeprecationWarning, match="is now pacatune"),
        pytest.raises(ModuleNotFoundError, match=r"pacatune\.ops\.nothing"),
    ):
        importlib.import_module("pacatune.functional.nothing")
