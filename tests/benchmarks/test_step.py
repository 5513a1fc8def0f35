"""The benchmarks: small runs give complete results, and what they count and compare is right."""

import pytest
import torch
from torch import nn

from benchmarks import step
from benchmarks.methods import USUAL, make_batch, make_contender
from benchmarks.results import read
from benchmarks.swap import SwapLinear
from pacatune import PacaConfig
from pacatune.measure.models import llama_values
from pacatune.ops.reference import paca_linear
from pacatune.tuner.linear import Linear

HIDDEN, INTERMEDIATE, NUM_LAYERS, RANK = 32, 48, 2, 8
VALUES = llama_values(HIDDEN, NUM_LAYERS, num_heads=4, intermediate_size=48, vocab_size=64)
METHODS = (*USUAL, "paca_g8", "additive", "qlora")
# Kind of layer -> out_features.
KINDS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "down_proj"), HIDDEN),
    **dict.fromkeys(("gate_proj", "up_proj"), INTERMEDIATE),
}
QUICK = ["--seconds", "0", "--min-rounds", "2", "--warmup", "1", "--threads", "1"]
BOTH = ["--dtypes", "float32", "bfloat16"]
BYTES = "kept for backward"


@pytest.fixture(scope="module")
def step_result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("step")
    options = ["--output", str(folder), "--tokens", "6", "--accumulation", "1", "3", *QUICK]
    options += ["--methods", *METHODS, *BOTH]
    for name, size in VALUES.items():
        if type(size) is int:
            options += ["--" + name.replace("_", "-"), str(size)]
    step.main(options)
    return folder, read("step", folder)


def numbers(result, what, **wanted):
    """Method -> row of a quantity in one setting."""
    rows = [row for row in result.rows if row.what == what]
    return {row.method: row for row in rows if all(getattr(row, k) == v for k, v in wanted.items())}


def test_step_says_where_it_comes_from(step_result):
    _, result = step_result
    made = result.provenance
    assert made["command"].startswith("python -m benchmarks.step --output ")
    assert made["device"].endswith("1 thread")
    assert "seed 0" in made["how"]
    assert {"python", "pacatune", "torch", "transformers", "peft"} <= set(made["versions"])
    assert {"commit", "is_modified", "date", "cpu"} <= set(made)
    assert f"hidden {HIDDEN}" in result.rows[0].model


def test_step_measures_every_method_in_every_setting(step_result):
    _, result = step_result
    for dtype in ("float32", "bfloat16"):
        for times in ("", "3 x "):
            rows = numbers(result, "step", setting=f"{times}6 tokens, {dtype}", unit="ms")
            assert list(rows) == list(METHODS)
            assert all(row.n == 2 and 0 < row.low <= row.value <= row.high for row in rows.values())


def test_step_compares_with_every_other_method(step_result):
    _, result = step_result
    setting = "3 x 6 tokens, float32"
    times = numbers(result, "step", setting=setting, unit="ms")
    ratios = numbers(result, "step", setting=setting, unit="ratio")
    assert [*ratios] == [f"paca / {method}" for method in METHODS if method != "paca"]
    for name, ratio in ratios.items():
        other = times[name.removeprefix("paca / ")]
        assert ratio.value == pytest.approx(times["paca"].value / other.value)
        assert ratio.low <= ratio.value <= ratio.high


@pytest.mark.parametrize(("dtype", "itemsize"), [("float32", 4), ("bfloat16", 2)])
def test_step_bytes_are_the_formula(step_result, dtype, itemsize):
    _, result = step_result
    rows = numbers(result, BYTES, setting=f"6 tokens, {dtype}")
    per_layer = 6 * RANK * itemsize
    beyond = {method: row.value - rows["frozen"].value for method, row in rows.items()}
    assert beyond["paca"] == len(KINDS) * NUM_LAYERS * per_layer
    # x[..., indices], originals, adapted columns
    swapped = (NUM_LAYERS * (6 + 2 * width) * RANK * itemsize for width in KINDS.values())
    assert beyond["swap"] == sum(swapped)


def test_step_counts_parameters_and_writes(step_result):
    _, result = step_result
    for row in result.rows:
        if row.what == "trained parameters" and row.method in ("paca", "frozen"):
            trained = NUM_LAYERS * RANK * sum(KINDS.values())
            assert row.value == (trained if row.method == "paca" else 0)
        if row.what == "column writes per layer":
            assert row.value <= 2  # however many micro-batches


def test_ratios_are_printed(tmp_path, capsys):
    options = ["--output", str(tmp_path), "--tokens", "4", "--num-hidden-layers", "1", *QUICK]
    options += ["--hidden-size", "32", "--intermediate-size", "48", "--num-attention-heads", "2"]
    options += ["--num-key-value-heads", "2"]
    step.main([*options, "--methods", "frozen", "paca", "--dtypes", "float32"])
    printed = capsys.readouterr().out
    assert "step, paca / frozen" in printed
    assert "4 tokens, float32" in printed
    assert "step.json" in printed


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("frozen", "qlora")])
def test_every_untrained_method_is_the_base_model(method):
    batch = make_batch(7, VALUES["vocab_size"], seed=1)
    expected = make_contender("frozen", VALUES, torch.float32, 3).model(input_ids=batch).logits
    contender = make_contender(method, VALUES, torch.float32, 3)
    actual = contender.model.eval()(input_ids=batch).logits
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swapping_columns_is_the_same_map(dtype):
    base = nn.Linear(16, 12).to(dtype).requires_grad_(False)
    before = base.weight.clone()
    ours = Linear(base, "default", "name", PacaConfig(r=4, init_weights=False), r=4, paca_alpha=8)
    swap = SwapLinear(ours)
    delta, indices = swap.paca_delta["default"], swap.paca_indices["default"]
    x = torch.randn(2, 5, 16).to(dtype).requires_grad_()
    gy = torch.randn(2, 5, 12).to(dtype)
    expected = paca_linear(x, before, delta, indices, 2.0, base.bias)
    expected_gradients = torch.autograd.grad(expected, (x, delta), gy)
    actual = swap(x)
    gradients = torch.autograd.grad(actual, (x, delta), gy)
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    )
    torch.testing.assert_close(actual, expected, **tolerance)
    for ours_, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours_, theirs, **tolerance)
    assert torch.equal(base.weight, before)


def test_rows_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match=r"`tokens` \(700\) must be at least 1, and above"):
        make_batch(700, 10, seed=0)
    assert make_batch(1024, 10, seed=0).shape == (2, 512)
    assert make_batch(16, 10, seed=0).shape == (1, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens", "0"], "must be an integer of at least 1, got 0"),
        (["--methods", "vera"], "invalid choice: 'vera'"),
    ],
)
def test_wrong_options_are_explained(options, message, capsys):
    with pytest.raises(SystemExit):
        step.parse(options)
    assert message in capsys.readouterr().err


def test_given_settings_are_combined():
    options = ["--tokens", "8", "512", "--accumulation", "1", "2", "--dtypes", "float32"]
    settings = step.choose_settings(step.parse(options))
    assert settings == [(n, k, "float32") for n in (8, 512) for k in (1, 2)]
    assert len(step.choose_settings(step.parse(BOTH))) == 2 * len(step.SETTINGS)


def test_usual_methods():
    assert step.parse(["--compiled"]).methods == ["paca", "lora"]
    assert step.parse([]).methods == list(USUAL)


def test_tokens_are_checked_before_anything_is_measured(capsys):
    with pytest.raises(SystemExit):
        step.parse(["--tokens", "16", "700"])
    assert "`tokens` (700) must be at least 1, and above `seq_len` (512)" in capsys.readouterr().err
