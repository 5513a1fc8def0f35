"""Levels 2 and 3: what level 1 keeps is computed again, and every gradient is its own, bit for bit.

The memory of a layer is in units of one byte per token and hidden channel; LLaMA3-8B's proportions
are those of `SHAPE`, whose hidden size is smaller.
"""

from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch
from torch.autograd.graph import save_on_cpu

from benchmarks import lean as benchmark
from benchmarks.lean import count, formula_units
from benchmarks.models import llama_values
from pacatune import PacaConfig, lean
from pacatune.lean.attention import find_registry
from pacatune.lean.modules import RecomputedAttention, RecomputedGatedMLP
from pacatune.measure.tracker import StorageTracker
from tests.distributed.net import checkpoint
from tests.lean.models import (
    ADAPTED,
    adapt,
    adapted,
    assert_equal_results,
    build,
    gradients,
    make_batch,
    results,
)
from tests.ops import twin
from tests.releases import parameters_keep_hooks

NO_ATTENTION = "Gemma 2", "DINOv2, SwiGLU"  # none that can be cut
SHAPE = llama_values(512, 2, num_heads=4, num_kv_heads=1, intermediate_size=1792, vocab_size=64)

assert_equal = partial(twin.assert_equal, atol=0)


def batch_of(name, dtype=torch.float32):
    batch = make_batch(name, dtype)
    return batch | {"use_cache": False} if "input_ids" in batch else batch


def compare_levels(model, batch, *, within=nullcontext):
    """Hold the results of levels 2 and 3 against those of level 1; return the bytes of each."""
    found = []
    for level in (1, 2, 3):
        lean.enable(model, level=level)
        found.append(gradients(model, batch, within))
        assert_equal(found[-1][0], found[0][0])
    return [num_bytes for _, num_bytes in found]


@pytest.mark.parametrize(
    ("name", "method", "dtype"),
    [
        *((name, "paca", torch.bfloat16) for name in ADAPTED),
        *((name, "lora", torch.float32) for name in ADAPTED),
        *(("Llama", method, torch.bfloat16) for method in ("dora", "full", "channels")),
        ("Phi-3", "dora", torch.float32),
        ("Gemma 3", "full", torch.float32),
    ],
)
def test_gradients_are_those_of_level_1(name, method, dtype):
    model = build(name, dtype)
    if method != "full":
        model = adapt(model, method)
    one, two, three = compare_levels(model, batch_of(name, dtype))
    assert max(two, three) < one
    if method != "dora" and name not in NO_ATTENTION:
        assert three < two


@pytest.mark.parametrize(
    ("method", "bounds"),
    [
        # At 8B the columns are an eighth of what they are here: 23.08, 9.06 and 6.04 units.
        ("paca", (23.5, 9.3, 6.15)),
        # Its inputs are recomputed like what is made of them: at level 3 it keeps what PaCA does.
        ("lora_bf16", (34.5, 11.4, 6.3)),
        # PEFT casts inputs to its factors' dtype, under autocast too: float32 copies are kept.
        ("lora", (52.5, 22.9, 11.5)),
    ],
)
def test_units_at_the_proportions_of_llama3_8b(method, bounds, monkeypatch):
    monkeypatch.setattr(benchmark, "_NUM_COUNTED", 64)
    for level, bound in enumerate(bounds, 1):
        row = count(method, f"level {level}", SHAPE)
        assert row.value <= bound
        if method == "paca":
            assert row.value == pytest.approx(formula_units(SHAPE, level=level), abs=1e-6)
            assert formula_units(benchmark.LAYER, level=level) <= (23.1, 9.1, 6.1)[level - 1]
    # The float32 copy that down_proj's factors read: 4 bytes for each of 3.5 channels.
    one, two = (count("lora", f"level {level}", SHAPE).value for level in (1, 2))
    assert one - two >= 14 + 14


def test_memory_that_lives_is_what_is_counted():
    """Hooks see what autograd keeps; here every storage counts that is there after the pass."""
    model, batch = adapted(dtype=torch.bfloat16), batch_of("Llama")
    gradients(model, batch)
    alive, counted = [], []
    for level in (1, 2, 3):
        lean.enable(model, level=level)
        counted.append(gradients(model, batch)[1])
        with StorageTracker() as tracker:
            loss = model(**batch).loss
            alive.append(tracker.num_bytes)
        loss.backward()
    for level in (1, 2):
        saved, freed = counted[0] - counted[level], alive[0] - alive[level]
        assert saved > 30_000
        assert freed == pytest.approx(saved, rel=0.05)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_blocks(use_reentrant):
    model, batch = adapted(), batch_of("Llama")
    checkpoint(model, use_reentrant=use_reentrant)
    plain, plain_bytes = gradients(model, batch)
    num_bytes = compare_levels(model, batch)
    assert_equal_results(gradients(model, batch)[0], plain)
    assert len(set(num_bytes)) == 1
    assert num_bytes[0] < plain_bytes


def test_other_models():
    """A cache would be filled twice, so it leaves attention at level 1; two adapters do not."""
    model, batch = adapted(), batch_of("Llama")
    _, two, three = compare_levels(model, batch | {"use_cache": True})
    assert three == two
    model.add_adapter("other", PacaConfig(r=2, target_modules="all-linear", init_weights=False))
    model.base_model.set_adapter(["default", "other"])
    compare_levels(model, batch)


@pytest.mark.parametrize("within", [partial(torch.autocast, "cpu", torch.bfloat16), save_on_cpu])
@pytest.mark.parametrize("method", ["paca", "lora"])
def test_autocast_and_what_is_kept_elsewhere(method, within):
    compare_levels(adapt(build("Llama"), method), batch_of("Llama"), within=within)


def train(level):
    """Return ten losses and the weights; with two graphs at once, and looks at the base."""
    model, batch, losses = adapted(), batch_of("Llama"), []
    if level:
        lean.enable(model, level=level)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(10):
        first, second = model(**batch).loss, model(**batch).loss
        with model.disable_adapter(), torch.no_grad():
            model(**batch)
        model.state_dict()
        (first / 2).backward()
        (second / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(second.item())
    return losses, model.state_dict()


def test_ten_steps_are_those_of_level_1_and_of_a_plain_twin():
    (plain, _), one, two, three = map(train, (0, 1, 2, 3))
    assert one[0] == pytest.approx(plain, abs=2e-4)
    assert plain[-1] < plain[0] - 0.05
    for losses, state in (two, three):
        assert losses == one[0]
        assert_equal(state, one[1])


@pytest.mark.parametrize(
    ("kind", "within"),
    [
        ("layer", nullcontext),
        ("base layer", nullcontext),
        # Bytes are counted by saved-tensor hooks.
        pytest.param("parameter", nullcontext, marks=parameters_keep_hooks),
        pytest.param("parameter", save_on_cpu, marks=parameters_keep_hooks),
    ],
)
def test_hooks_are_called_as_often_as_at_level_1(kind, within):
    model, batch, calls = adapted(), batch_of("Llama"), []
    for name, layer in model.named_modules():
        if not name.endswith(("up_proj", "q_proj")):
            continue
        if kind == "parameter":
            delta = layer.paca_delta["default"].weight
            delta.register_hook(lambda grad: [calls.append(1), 2 * grad][1])
        else:
            target = layer if kind == "layer" else layer.base_layer
            target.register_forward_hook(lambda *args: calls.append(1))
    compare_levels(model, batch, within=within)
    assert len(calls) == 3 * 4


def test_dropout_stays_at_level_1_and_is_reported():
    model, batch = adapt(build("Llama"), "lora", lora_dropout=0.1), batch_of("Llama")
    report = lean.enable(model, level=3)
    assert set(report.left) == {
        "LlamaMLP stays at level 1: dropout (0.1) cannot be computed again",
        "LlamaAttention stays at level 1: dropout (0.1) cannot be computed again",
    }
    assert len(report.made["gated_mlp"]) == 2
    assert "not lean: " not in str(lean.enable(model))
    with pytest.raises(ValueError, match="cannot be all lean"):
        lean.enable(model, mode="require", level=2)
    num_bytes = compare_levels(model, batch, within=seeded)
    assert len(set(num_bytes)) == 1


@contextmanager
def seeded():
    torch.manual_seed(1)
    yield


def test_an_adapter_with_dropout_that_came_later():
    model, batch = adapted(), batch_of("Llama")
    lean.enable(model, level=2)
    model = adapt(model.unload(), "lora", lora_dropout=0.1)
    torch.manual_seed(1)
    late, _ = gradients(model, batch)
    lean.enable(model)
    torch.manual_seed(1)
    assert_equal(late, gradients(model, batch)[0])


def step(fused):
    def change(model):
        trained = [p for p in model.parameters() if p.requires_grad]
        torch.optim.AdamW(trained, lr=1e-2, fused=fused).step()

    return change


def scale(model):
    for module in model.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(0.5)


@pytest.mark.parametrize(
    ("method", "change", "words"),
    [
        *(
            (method, change, words)
            for method in ("paca", "lora")
            for change, words in (
                (lambda model: model.base_model.disable_adapter_layers(), "adapters were switched"),
                (scale, "adapters were switched, merged or scaled"),
                (lambda model: model.merge_adapter(), "merged|changed or replaced"),
                (step(fused=False), "a parameter was changed or replaced since"),
            )
        ),
        # LoRA's parameters are changed by torch's fused optimisers without a trace.
        ("paca", step(fused=True), "a parameter was changed or replaced since"),
    ],
)
def test_another_function_by_the_time_of_the_backward_pass_is_refused(method, change, words):
    model, batch = adapt(build("Llama"), method), batch_of("Llama")
    lean.enable(model, level=2)
    gradients(model, batch)
    loss = model(**batch).loss
    change(model)
    with pytest.raises(RuntimeError, match=words):
        loss.backward()


def test_made_plain_between_the_passes(monkeypatch):
    plain = getattr(find_registry()["sdpa"], "plain", find_registry()["sdpa"])
    model, batch = adapted(), batch_of("Llama")
    lean.enable(model)
    expected, _ = gradients(model, batch)
    for level in (2, 3):
        lean.enable(model, level=level)
        model.zero_grad()
        loss = model(**batch).loss
        lean.disable(model)
        if level == 3:
            monkeypatch.setitem(find_registry(), "sdpa", plain)  # as if nothing else were lean
            with pytest.raises(RuntimeError, match="or was made plain since"):
                loss.backward()
            continue
        loss.backward()
        assert_equal(results(model, loss), expected)


def test_levels_replace_one_another():
    model = build("Llama")
    plain = [type(module) for module in model.modules()]
    for level, has_mlps, has_attentions in ((3, 2, 2), (1, 0, 0), (2, 2, 0), (3, 2, 2)):
        report = lean.enable(model, mode="require", level=level)
        assert report.level == level
        modules = list(model.modules())
        assert sum(isinstance(m, RecomputedGatedMLP) for m in modules) == has_mlps
        assert sum(isinstance(m, RecomputedAttention) for m in modules) == has_attentions
    assert str(report).startswith("lean, level 3: 2 x attention, 2 x gated_mlp, 5 x norm, 1 x loss")
    lean.disable(model)
    assert [type(module) for module in model.modules()] == plain


def test_which_attention_is_cut_at_level_3():
    """Of any number of groups; of sdpa, and others are told of."""
    shape = SHAPE | {"num_key_value_heads": 4, "num_hidden_layers": 1}
    model = benchmark.make_contender("frozen", shape, torch.float32).model
    assert "attention" not in lean.enable(model, level=2).made
    assert lean.enable(model, level=3).made["attention"] == ["model.layers.0.self_attn"]
    assert lean.enable(model, level=1).level == 1
    assert not any(isinstance(m, RecomputedAttention) for m in model.modules())
    model = build("Llama")
    model.config._attn_implementation = "flash_attention_2"
    (reason,) = lean.enable(model, level=3).left
    assert reason == "flash_attention_2 keeps query, key and value: level 3 is for sdpa"
    assert lean.enable(model, level=2).left == {}
