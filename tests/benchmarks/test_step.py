"""The benchmarks: small runs give complete results, and what they count and compare is right."""

import pytest
import torch
from torch import nn

from benchmarks import step
from benchmarks.methods import RANK, USUAL, make_contender
from benchmarks.models import llama_values, make_batch
from benchmarks.results import read
from benchmarks.swap import SwapLinear
from pacatune import PacaConfig
from pacatune.tuner.linear import Linear
from tests.ops.reference import paca_linear

HIDDEN, INTERMEDIATE, NUM_LAYERS = 32, 48, 2
VALUES = llama_values(HIDDEN, NUM_LAYERS, num_heads=4, intermediate_size=48, vocab_size=64)
METHODS = (*USUAL, "additive", "qlora")
# The out_features of a block's linear layers.
WIDTHS = [HIDDEN] * 5 + [INTERMEDIATE] * 2


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("step")
    options = "--tokens 6 --accumulation 1 3 --seconds 0 --min-rounds 2 --warmup 1 --threads 1"
    options += " --dtypes float32 bfloat16"
    for name, size in VALUES.items():
        if type(size) is int:
            options += f" --{name.replace('_', '-')} {size}"
    step.main(["--output", str(folder), *options.split(), "--methods", *METHODS])
    return read("step", folder)


def numbers(result, what, **wanted):
    """Method -> row of a quantity in one setting."""
    rows = [row for row in result.rows if row.what == what]
    return {row.method: row for row in rows if all(getattr(row, k) == v for k, v in wanted.items())}


def test_a_result_says_where_it_comes_from_and_has_every_method_and_ratio(result):
    made = result.provenance
    assert made["command"].startswith("python -m benchmarks.step --output ")
    assert made["device"].endswith("1 thread")
    assert "seed 0" in made["how"]
    assert {"python", "pacatune", "torch", "transformers", "peft"} <= set(made["versions"])
    assert {"commit", "is_modified", "date", "cpu"} <= set(made)
    assert f"hidden {HIDDEN}" in result.rows[0].model
    for dtype in ("float32", "bfloat16"):
        for setting in (f"6 tokens, {dtype}", f"3 x 6 tokens, {dtype}"):
            times = numbers(result, "step", setting=setting, unit="ms")
            methods = [m for m in METHODS if m != "lora_bf16" or dtype == "bfloat16"]
            assert list(times) == methods
            ratios = numbers(result, "step", setting=setting, unit="ratio")
            assert [*ratios] == [f"paca / {method}" for method in methods if method != "paca"]
            for row in (*times.values(), *ratios.values()):
                assert row.n == 2
                assert 0 < row.low <= row.value <= row.high
            for name, ratio in ratios.items():
                other = times[name.removeprefix("paca / ")]
                assert ratio.value == pytest.approx(times["paca"].value / other.value)


@pytest.mark.parametrize(("dtype", "itemsize"), [("float32", 4), ("bfloat16", 2)])
def test_exact_numbers_are_those_of_the_formulas(result, dtype, itemsize):
    """R4: at most two writes of columns per layer and optimizer step."""
    setting = f"6 tokens, {dtype}"
    rows = numbers(result, "kept for backward", setting=setting)
    beyond = {method: row.value - rows["frozen"].value for method, row in rows.items()}
    assert beyond["paca"] == len(WIDTHS) * NUM_LAYERS * 6 * RANK * itemsize
    # x[..., indices], originals, adapted columns
    swapped = (NUM_LAYERS * (6 + 2 * width) * RANK * itemsize for width in WIDTHS)
    assert beyond["swap"] == sum(swapped)
    trained = numbers(result, "trained parameters", setting=setting)
    assert trained["paca"].value == NUM_LAYERS * RANK * sum(WIDTHS)
    assert trained["frozen"].value == 0
    for times in ("", "3 x "):  # however many micro-batches
        (writes,) = numbers(result, "column writes per layer", setting=times + setting).values()
        assert 0 < writes.value <= 2


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("frozen", "qlora")])
def test_every_untrained_method_is_the_base_model(method):
    batch = make_batch(1, 7, VALUES["vocab_size"], seed=1)
    expected = make_contender("frozen", VALUES, torch.float32, 3).model(input_ids=batch).logits
    contender = make_contender(method, VALUES, torch.float32, 3)
    actual = contender.model.eval()(input_ids=batch).logits
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_swapping_columns_is_the_same_map(dtype, error):
    base = nn.Linear(16, 12).to(dtype).requires_grad_(False)
    before = base.weight.clone()
    ours = Linear(base, "default", "name", PacaConfig(r=4, init_weights=False), r=4, paca_alpha=8)
    swap = SwapLinear(ours)
    delta, indices = swap.paca_delta["default"], swap.paca_indices["default"]
    x = torch.randn(2, 5, 16).to(dtype).requires_grad_()
    gy = torch.randn(2, 5, 12).to(dtype)
    outputs = swap(x), paca_linear(x, before, delta, indices, 2.0, base.bias)
    found = [(y, *torch.autograd.grad(y, (x, delta), gy)) for y in outputs]
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=error, atol=error)
    assert torch.equal(base.weight, before)


def test_tokens_fill_rows_of_equal_length(capsys):
    settings = step.choose_settings(step.parse(["--tokens", "8", "1024", "--dtypes", "float32"]))
    assert settings == [(8, 1, "float32"), (1024, 1, "float32")]
    with pytest.raises(SystemExit):
        step.parse(["--tokens", "16", "700"])
    message = "`--tokens` (700), above 512, must be a multiple of it."
    assert message in capsys.readouterr().err
