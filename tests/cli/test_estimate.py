"""`pacatune estimate`: what it answers, as text and as JSON."""

import importlib.util
import json

import pytest

from pacatune.training.arguments import training_class
from pacatune.training.sections import LoraSection, PacaSection
from tests.measure.real_step import LLAMA, write_config


@pytest.fixture
def config(tmp_path):
    return write_config(tmp_path, LLAMA)


@pytest.fixture
def estimate(shown):
    def run(*words):
        line = [word for some in words for word in some.split()]
        return json.loads(shown("estimate", *line, "--json"))

    return run


def test_a_real_model_by_name(estimate):
    """The paper reports 23 GB of this setting; docs/memory.md has its other numbers."""
    words = "--method paca --rank 8 --batch-size 2 --seq-len 512 --lean off"
    result = estimate("llama3-8b", words)
    assert result["peak_bytes"] == pytest.approx(23e9, rel=0.1)
    assert sum(result["by_category"].values()) == result["peak_bytes"]
    assert result["by_category"]["weights"] == pytest.approx(2 * 8_030_261_248, rel=0.001)


def test_methods_side_by_side(config, estimate):
    methods = "paca,lora,dora,full,qpaca"
    result = estimate(config, f"--methods {methods} --dropout 0.1 --gpu 4090")["methods"]
    assert list(result) == methods.split(",")
    assert [result[name]["setting"]["dropout"] for name in ("lora", "paca")] == [0.1, 0.0]
    assert result["qpaca"]["by_category"]["weights"] < result["paca"]["by_category"]["weights"]


def test_largest_that_fits(estimate, config, shown):
    result = estimate(config, "--memory 1GiB --max seq-len --lean off")
    assert (result["setting"]["seq_len"], result["fits"]) == (result["max_seq_len"], "yes")
    assert result["device_bytes"]["high"] <= 2**30 == result["available_bytes"]
    nothing = "--memory 1MiB --max batch"
    expected = {"max_batch_size": 0, "notes": [], "available_bytes": 2**20, "fits": "no"}
    assert estimate(config, nothing) == expected
    assert "no" in shown("estimate", config, *nothing.split())


def test_it_is_about_what_train_does(config, shown, estimate):
    """The sizes that a run has by default, and what the last two lines mean."""
    training = training_class("sft")()
    first, *rest = shown("estimate", config, "--methods", "paca,lora").splitlines()
    assert first.endswith(
        "batch 8 x 1,024 tokens and the rank that `pacatune train` has by default"
    )
    assert (training.per_device_train_batch_size, training.max_length) == (8, 1024)
    assert "a device needs the peak and 0.4 GiB" in " ".join(rest)
    found = estimate(config, "--methods paca,lora,qpaca")["methods"]
    ranks = {name: one["setting"]["rank"] for name, one in found.items()}
    assert ranks == {"paca": PacaSection.r, "lora": LoraSection.r, "qpaca": PacaSection.r}
    assert shown("estimate", config, "--rank", "4").splitlines()[0].endswith("1,024 tokens")


def test_4_bits_without_bitsandbytes(estimate, monkeypatch):
    """They are counted by their size, close to what the real step takes."""
    words = "llama3.2-1b --methods qpaca,qlora --batch-size 2"
    real = estimate(words)["methods"]
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "pacatune.measure.simulate.find_spec",
        lambda name: None if name == "bitsandbytes" else find(name),
    )
    counted = estimate(words)["methods"]
    for name, one in counted.items():
        assert one["peak_bytes"] == pytest.approx(real[name]["peak_bytes"], rel=0.05)
        weights = [each[name]["by_category"]["weights"] for each in (counted, real)]
        assert weights[0] == pytest.approx(weights[1], rel=1e-3)
        assert "bitsandbytes is not installed" in one["notes"][0]
