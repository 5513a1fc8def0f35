import importlib.util
import sys

import pytest

from pacatune.integrations.options import join_options, refuse_options

NAMES = {"lora_r": "r", "lora_alpha": "paca_alpha", "lora_modules_to_save": "modules_to_save"}


def join(theirs, ours):
    return join_options(theirs, NAMES, ours, "paca")


def test_both_sides_are_joined():
    theirs = {"lora_r": 4, "lora_alpha": None, "lora_modules_to_save": [], "other": 1}
    assert join(theirs, {"random_seed": 2, "bias": None}) == {"r": 4, "random_seed": 2}


def test_values_that_agree_are_no_conflict():
    assert join({"lora_r": 4}, {"r": 4}) == {"r": 4}
    # 0 is a value: it must not be passed over.
    with pytest.raises(ValueError, match=r"`r` \(0\) must be an integer of at least 1"):
        join({"lora_r": 0}, {})


@pytest.mark.parametrize(
    ("theirs", "ours", "message"),
    [
        ({"lora_r": 4}, {"r": 8}, r"`lora_r` \(4\) and `paca.r` \(8\) differ; give one"),
        ({}, {"nd": 2}, "`paca.nd` does not exist"),
        ({}, "r=8", r"`paca` \('r=8'\) must be a table of PacaConfig's options"),
        ({}, {"peft_type": "LORA"}, "`paca.peft_type` does not exist"),
        ({}, {"bias": "some"}, "`bias` .'some'. must be"),
    ],
)
def test_refusals(theirs, ours, message):
    with pytest.raises(ValueError, match=message):
        join(theirs, ours)


def test_options_that_paca_would_not_keep():
    reasons = {"lora_dropout": "there is nothing to drop"}
    refuse_options({"lora_dropout": 0.0, "lora_r": 4}, reasons, "adapter: paca")
    with pytest.raises(
        ValueError, match=r"`lora_dropout` \(0.1\) is not for `adapter: paca`: there is nothing"
    ):
        refuse_options({"lora_dropout": 0.1}, reasons, "adapter: paca")


TOOLS = {"axolotl": "register", "llamafactory": "main", "ms_swift": "register"}


@pytest.mark.parametrize(("plugin", "function"), TOOLS.items())
def test_a_missing_tool_is_named(plugin, function, monkeypatch):
    package = plugin.replace("_", "-")
    if importlib.util.find_spec(package.removeprefix("ms-")) is not None:
        pytest.skip(f"{package} is installed")
    monkeypatch.setattr(sys, "argv", ["llamafactory", "train", "config.yaml"])
    with pytest.raises(ImportError, match=f"needs .* pip install {package}"):
        getattr(importlib.import_module(f"pacatune.integrations.{plugin}"), function)()
