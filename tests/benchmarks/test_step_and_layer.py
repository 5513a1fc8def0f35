"""The benchmarks: small runs give complete results, and what they count and compare is right."""

import itertools
import json

import pytest
import torch
from torch import nn

from benchmarks import distance, layer, step, tables
from benchmarks.counts import check_bytes
from benchmarks.llama import Shape, linear_layers, make_batch, make_model
from benchmarks.methods import METHODS, adapt, all_methods
from benchmarks.swap import SwapLinear
from pacatune import PacaConfig
from pacatune.ops.reference import paca_linear
from pacatune.tuner.linear import Linear

HIDDEN, INTERMEDIATE, NUM_LAYERS, RANK = 32, 48, 2, 8
SHAPE = Shape(
    hidden_size=HIDDEN,
    intermediate_size=INTERMEDIATE,
    num_hidden_layers=NUM_LAYERS,
    num_attention_heads=4,
    vocab_size=64,
)
# Kind of layer -> out_features.
KINDS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "down_proj"), HIDDEN),
    **dict.fromkeys(("gate_proj", "up_proj"), INTERMEDIATE),
}
QUICK = ["--seconds", "0", "--min-rounds", "2", "--warmup", "1", "--threads", "1"]
BOTH = ["--dtypes", "float32", "bfloat16"]
SUMMARY = {"step_ms", "step_ms_quartile_1", "step_ms_quartile_3", "step_ms_min"}
NOISE = {"load_average", "num_cores_of_others"}


@pytest.fixture(scope="module")
def step_result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("step")
    options = ["--output", str(folder), "--tokens", "6", "--accumulation", "1", "3", *QUICK]
    options += ["--methods", *all_methods(), *BOTH]
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        options += ["--" + name.replace("_", "-"), str(getattr(SHAPE, name))]
    step.main(options)
    return folder, json.loads((folder / "step.json").read_text())


@pytest.fixture(scope="module")
def layer_result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layer")
    options = ["--output", str(folder), "--tokens", "6", "--shapes", "32x16", "--num-layers", "3"]
    layer.main([*options, *QUICK, *BOTH])
    return folder, json.loads((folder / "layer.json").read_text())


def by_method(result, **wanted):
    rows = [r for r in result["rows"] if all(r[key] == value for key, value in wanted.items())]
    return {row["method"]: row for row in rows}


def test_step_says_where_it_comes_from(step_result):
    _, result = step_result
    assert result["command"].startswith("python -m benchmarks.step --output ")
    assert result["device"].endswith("1 thread")
    assert result["seed"] == 0
    assert result["shape"]["hidden_size"] == HIDDEN
    assert {"python", "pacatune", "torch", "transformers", "peft"} == set(result["versions"])
    assert {"commit", "is_modified", "date", "cpu", "num_threads", "settings"} <= set(result)
    assert result["peak_process_bytes"] > 0


def test_step_measures_every_method_in_every_setting(step_result):
    _, result = step_result
    for dtype in ("float32", "bfloat16"):
        for accumulation in (1, 3):
            rows = by_method(result, dtype=dtype, accumulation=accumulation)
            assert list(rows) == list(all_methods())
            for row in rows.values():
                assert row["num_rounds"] == 2
                assert row.keys() >= SUMMARY | NOISE
                assert 0 < row["step_ms_min"] <= row["step_ms"]


def test_step_compares_with_every_other_method(step_result):
    _, result = step_result
    times = by_method(result, dtype="float32", accumulation=3)
    ratios = [r for r in result["ratios"] if r["setting"] == "3 x 6 tokens, float32"]
    assert [ratio["reference"] for ratio in ratios] == [m for m in all_methods() if m != "paca"]
    for ratio in ratios:
        expected = times["paca"]["step_ms"] / times[ratio["reference"]]["step_ms"]
        assert ratio["ratio"] == pytest.approx(expected)
        assert ratio["low"] <= ratio["ratio"] <= ratio["high"]
        assert ratio["target"] is None  # there are targets for the standard settings only


def test_step_says_where_the_distance_to_frozen_goes(step_result):
    folder, result = step_result
    assert [row["setting"] for row in result["distance"]] == [
        f"{times}6 tokens, {dtype}" for times in ("", "3 x ") for dtype in ("float32", "bfloat16")
    ]
    for row in result["distance"]:
        steps = by_method(result, setting=row["setting"])
        assert "timed" not in steps
        assert row["frozen_ms"] == steps["frozen"]["step_ms"]
        assert row["distance_ms"] == steps["paca"]["step_ms"] - row["frozen_ms"]
        parts = [row[f"{part}_ms"] for part in distance.PARTS]
        assert sum(parts) + row["rest_ms"] == pytest.approx(row["distance_ms"])
        # Few tokens in float32 are not worth a write.
        idle = "write" if row["dtype"] == "float32" else "added_products"
        assert {part for part in distance.PARTS if row[f"{part}_ms"] == 0} == {idle}
    lines = tables.table("distance", folder).splitlines()
    assert lines[0].endswith(
        "| in all | gather | thin product | write | added products | optimizer | rest |"
    )
    assert lines[2].startswith("| 6 tokens, float32 | ")


def test_clocks_count_every_part_once():
    ticks = itertools.count()
    batch = make_batch(7, SHAPE.vocab_size, seed=1)
    model = make_model(SHAPE, torch.float32, seed=3)
    ours = adapt(model, "paca", targets="all-linear", seed=0)
    timed = distance.TimedStep(ours, batch, 2, clock=lambda: float(next(ticks)))
    timed()
    passes = len(KINDS) * NUM_LAYERS * 2
    assert timed.rounds == [
        {
            "gather": passes,
            "thin_product": passes,
            "write": 0,
            "added_products": 2 * passes,
            "optimizer": 2,
        }
    ]


def test_distance_of_an_older_result_is_missing(tmp_path):
    (tmp_path / "step.json").write_text("{}")
    assert tables.table("distance", tmp_path).startswith("Not measured yet")


@pytest.mark.parametrize(("dtype", "itemsize"), [("float32", 4), ("bfloat16", 2)])
def test_step_bytes_are_the_formula(step_result, dtype, itemsize):
    _, result = step_result
    rows = by_method(result, dtype=dtype, accumulation=1)
    per_layer = 6 * RANK * itemsize
    assert rows["paca"]["saved_bytes_by_layer"] == dict.fromkeys(KINDS, NUM_LAYERS * per_layer)
    assert rows["paca"]["saved_bytes_beyond_frozen"] == len(KINDS) * NUM_LAYERS * per_layer
    assert rows["frozen"]["saved_bytes_by_layer"] == dict.fromkeys(KINDS, 0)
    for kind, out_features in KINDS.items():  # x[..., indices], originals, adapted columns
        expected = NUM_LAYERS * (6 + 2 * out_features) * RANK * itemsize
        assert rows["swap"]["saved_bytes_by_layer"][kind] == expected


def test_step_counts_parameters_and_writes(step_result):
    _, result = step_result
    num_trained = NUM_LAYERS * RANK * sum(KINDS.values())
    for row in result["rows"]:
        if row["method"] == "paca":
            assert row["num_trainable_parameters"] == num_trained
            assert row["column_writes_per_layer"] <= 2  # however many micro-batches
        if row["method"] == "frozen":
            assert row["num_trainable_parameters"] == 0


def test_layer_measures_phases_and_bytes(layer_result):
    _, result = layer_result
    for dtype, itemsize in (("float32", 4), ("bfloat16", 2)):
        rows = by_method(result, dtype=dtype)
        assert list(rows) == list(METHODS)
        assert rows["paca"]["saved_bytes"] == 3 * 6 * RANK * itemsize
        assert rows["full"]["saved_bytes"] == 3 * 6 * 16 * itemsize
        for row in rows.values():
            assert row.keys() >= SUMMARY | NOISE
            assert row["forward_us"] > 0
            assert row["backward_us"] > 0
            assert row["optimizer_us"] >= 0


@pytest.mark.parametrize("name", ["step", "layer"])
def test_tables_are_made_of_the_results(request, name):
    folder, result = request.getfixturevalue(f"{name}_result")
    lines = tables.table(name, folder).splitlines()
    assert lines[0].split(" | ")[1:] == [
        *list(result["methods"])[:-1],
        f"{[*result['methods']][-1]} |",
    ]
    assert lines[2].startswith(f"| {result['rows'][0]['setting']} | ")


def test_table_of_ratios_is_printed(tmp_path, capsys):
    options = ["--output", str(tmp_path), "--tokens", "4", "--shapes", "8x8", "--num-layers", "1"]
    layer.main([*options, *QUICK, "--methods", "frozen", "paca", "--dtypes", "float32"])
    printed = capsys.readouterr().out
    assert "| weight 8 x 8, 4 tokens, float32 | frozen" in printed
    assert "layer.json" in printed


def test_paca_that_keeps_more_than_its_formula_is_refused():
    rows = [
        {"setting": "s", "method": "frozen", "saved_bytes": 100},
        {
            "setting": "s",
            "method": "paca",
            "saved_bytes": 164,
            "saved_bytes_by_layer": {"q_proj": 64},
            "formula_bytes_by_layer": {"q_proj": 64},
        },
    ]
    check_bytes(rows)
    assert rows[1]["saved_bytes_beyond_frozen"] == 64
    for change in ({"saved_bytes": 165}, {"saved_bytes_by_layer": {"q_proj": 65}}):
        with pytest.raises(RuntimeError, match=r"s: paca keeps .* N \* R \* itemsize gives"):
            check_bytes([rows[0], rows[1] | change])


@pytest.mark.parametrize("method", [m for m in all_methods() if m != "frozen"])
def test_every_untrained_method_is_the_base_model(method):
    batch = make_batch(7, SHAPE.vocab_size, seed=1)
    expected = make_model(SHAPE, torch.float32, seed=3)(input_ids=batch).logits
    contender = adapt(
        make_model(SHAPE, torch.float32, seed=3), method, targets="all-linear", seed=0
    )
    actual = contender.model.eval()(input_ids=batch).logits
    torch.testing.assert_close(actual, expected)
    assert len(linear_layers(contender.model)) == len(KINDS) * NUM_LAYERS


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


def test_unknown_method_is_refused():
    with pytest.raises(ValueError, match=r"`method` \('vera'\) must be one of \['additive', "):
        adapt(nn.Linear(2, 2), "vera", targets="x", seed=0)


def test_rows_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match=r"`tokens` \(700\) must be a multiple of 512"):
        make_batch(700, 10, seed=0)
    assert make_batch(1024, 10, seed=0).shape == (2, 512)
    assert make_batch(16, 10, seed=0).shape == (1, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens", "0"], "must be an integer of at least 1, got 0"),
        (["--methods", "vera"], "invalid choice: 'vera'"),
        (["--shapes", "512"], "must be OUTxIN, such as 512x1408, got '512'"),
    ],
)
def test_wrong_options_are_explained(options, message, capsys):
    with pytest.raises(SystemExit):
        layer.parse(options)
    assert message in capsys.readouterr().err


def test_quantised_step(tmp_path):
    options = ["--quantization", "nf4", "--tokens", "6", "--output", str(tmp_path), *QUICK]
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        options += ["--" + name.replace("_", "-"), str(getattr(SHAPE, name))]
    step.main([*options, "--dtypes", "float32"])
    result = json.loads((tmp_path / "step-nf4.json").read_text())
    rows = {row["method"]: row for row in result["rows"]}
    assert list(rows) == list(step.QUANTISED_METHODS)
    assert result["model"].endswith("nf4")
    kept = 6 * RANK * 4 * 7 * NUM_LAYERS
    assert rows["paca"]["saved_bytes_beyond_frozen"] == kept
    assert rows["lora"]["saved_bytes_beyond_frozen"] > kept


def test_standard_settings_are_those_with_targets():
    settings = step.choose_settings(step.parse(BOTH))
    assert len(settings) == 2 * len(step.SETTINGS)
    for setting in settings:
        for targets in step.TARGETS.values():
            assert (setting.num_tokens, setting.accumulation) in targets
    assert settings[2].label == "4 x 16 tokens, float32"


def test_given_settings_are_combined():
    options = ["--tokens", "8", "512", "--accumulation", "1", "2", "--dtypes", "float32"]
    settings = step.choose_settings(step.parse(options))
    pairs = [(setting.num_tokens, setting.accumulation) for setting in settings]
    assert pairs == [(8, 1), (8, 2), (512, 1), (512, 2)]


def test_compiled_compares_with_lora_alone():
    assert step.parse(["--compiled"]).methods == ["paca", "lora"]


def test_tokens_are_checked_before_anything_is_measured(capsys):
    with pytest.raises(SystemExit):
        step.parse(["--tokens", "16", "700"])
    assert "`tokens` (700) must be a multiple of 512" in capsys.readouterr().err
