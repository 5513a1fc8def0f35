"""The simulated step against the same step of a model with weights."""

import gc
import weakref
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch.nn import functional as F

from pacatune import lean
from pacatune.measure import gpu_kernels
from pacatune.measure.simulate import FakeTraining
from tests.measure.real_step import (
    GEMMA,
    LLAMA,
    QWEN,
    real_model,
    real_peak,
    really_saved,
    tiny,
    with_adapter,
)

METHODS = {
    "paca": {},
    "paca_bf16": {"adapter_dtype": "bfloat16"},
    "lora": {"method": "lora"},
    "lora_dropout": {"method": "lora", "dropout": 0.1},
    "dora": {"method": "dora"},
    "full": {"method": "full"},
    "full_fp32": {"method": "full", "dtype": "float32"},
}
CHECKPOINTED = {
    f"{name}_checkpointing": METHODS[name] | {"gradient_checkpointing": True}
    for name in ("paca", "lora_dropout", "full")
}
ALL = METHODS | CHECKPOINTED


def simulate(setting):
    return FakeTraining(setting).step(setting.batch_size, setting.seq_len)


@pytest.mark.parametrize("name", ALL)
def test_saved_bytes_are_those_of_a_real_step(name, tmp_path):
    """Real attention of the CPU, counted by hooks: nothing of the simulation is involved."""
    setting = tiny(tmp_path, **ALL[name])
    measured, model = simulate(setting), real_model(setting)
    with patch.object(F, "dropout", gpu_kernels.dropout):
        real = really_saved(model, setting)
    # Held by the closures of checkpointing, past the hooks: positions and rotations.
    aside = ("LlamaRotaryEmbedding", "LlamaModel")
    saved = sum(n for kind, n in measured.saved_by_module.items() if kind not in aside)
    assert saved == pytest.approx(real, rel=0.01)
    assert measured.saved_bytes - saved == (2304 if setting.gradient_checkpointing else 0)


@pytest.mark.parametrize("name", ALL)
def test_peak_and_its_moment_are_those_of_a_real_step(name, tmp_path):
    setting = tiny(tmp_path, **ALL[name])
    measured, model = simulate(setting), real_model(setting)
    with gpu_kernels.allocations_of_gpu():
        real, kept = real_peak(model, setting)
    assert measured.peak_bytes == pytest.approx(real.peak_bytes, rel=0.002)
    assert measured.peak_phase == real.peak_phase
    assert measured.saved_by_module == pytest.approx(kept, rel=0.01)


def test_row_groups_keep_the_expected_number_of_columns(tmp_path):
    setting = tiny(tmp_path, groups=8, rank=4)
    measured, model = simulate(setting), real_model(setting)
    with gpu_kernels.allocations_of_gpu():
        real, kept = real_peak(model, setting)
    assert measured.peak_bytes == pytest.approx(real.peak_bytes, rel=0.01)
    # What is drawn is more or less than that.
    assert measured.saved_by_module == pytest.approx(kept, rel=0.05)
    alone = simulate(setting.but(groups=1)).saved_by_module["linear layers"]
    assert 5 * alone < measured.saved_by_module["linear layers"] < 8 * alone
    with pytest.raises(ValueError, match=r"`groups` \(8\) with `method` \('lora'\): only paca"):
        setting.but(method="lora")


@pytest.mark.parametrize("values", [QWEN, GEMMA], ids=["qwen3", "gemma3"])
def test_other_families(values, tmp_path):
    setting = tiny(tmp_path, values)
    measured, model = simulate(setting), real_model(setting)
    with gpu_kernels.allocations_of_gpu():
        real, _ = real_peak(model, setting)
    assert measured.peak_bytes == pytest.approx(real.peak_bytes, rel=0.002)


def test_gradients_are_there_from_the_second_micro_batch_on(tmp_path):
    setting = tiny(tmp_path, method="full", gradient_accumulation=3)
    measured, model = simulate(setting), real_model(setting)
    with gpu_kernels.allocations_of_gpu():
        real, _ = real_peak(model, setting)
    assert measured.peak_bytes == pytest.approx(real.peak_bytes, rel=0.002)
    assert measured.peak_bytes > simulate(setting.but(gradient_accumulation=1)).peak_bytes
    assert measured.peak_bytes == simulate(setting.but(gradient_accumulation=2)).peak_bytes


@pytest.mark.parametrize("method", ["paca", "lora"])
def test_quantised_base(method, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    setting = tiny(tmp_path, method=method, quantization="nf4")
    plain = real_model(setting.but(quantization=None, method="full"))
    plain.save_pretrained(tmp_path / "model")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.bfloat16, quantization_config=config
    )
    model = with_adapter(model, setting)
    measured = simulate(setting)
    assert measured.saved_bytes == pytest.approx(really_saved(model, setting), rel=0.01)
    assert measured.by_category["weights"] == pytest.approx(frozen_bytes(model), rel=0.01)


def frozen_bytes(model):
    """Return the bytes of a 4-bit model: weights, scales, codes and buffers, shared ones once."""
    weights = [p for p in model.parameters() if not p.requires_grad]
    states = [p.quant_state for p in weights if hasattr(p, "quant_state")]
    assert len(states) == 14
    scales = [t for s in states for t in (s.absmax, s.state2.absmax, s.offset)]
    codes = [t for s in states for t in (s.code, s.state2.code)]
    held = [*weights, *scales, *codes, *model.buffers()]
    return sum({t.data_ptr(): t.nbytes for t in held}.values())


@pytest.mark.parametrize("name", ["paca", "lora_dropout", "full"])
def test_nothing_grows_with_the_square_of_the_length(name, tmp_path):
    """transformers builds a causal mask where it cannot look at values; no layer may keep one."""
    training = FakeTraining(tiny(tmp_path, **METHODS[name]))
    lengths = (128, 256, 512)
    short, middle, long = (training.step(1, length).saved_bytes for length in lengths)
    # A constant beside: what does not depend on the length.
    assert long - middle == pytest.approx(2 * (middle - short), rel=0.001)


def test_sliding_windows_do_keep_masks(tmp_path):
    """Beyond its window, transformers gives a layer's attention a mask, on GPUs as well."""
    training = FakeTraining(tiny(tmp_path, GEMMA))
    lengths = (128, 256, 512)
    short, middle, long = (training.step(1, length).saved_bytes for length in lengths)
    squares = (long - middle) - 2 * (middle - short)
    masks = 2 * (512**2 - 3 * 256**2 + 2 * 128**2)  # of one layer, two bytes each
    assert squares == pytest.approx(masks, rel=0.05)


def test_steps_of_one_model_do_not_influence_each_other(tmp_path):
    training = FakeTraining(tiny(tmp_path))
    first = training.step(2, 32)
    training.step(1, 64)
    assert training.step(2, 32) == first


def test_what_paca_keeps_aside_counts(tmp_path):
    """Original columns in the weights' dtype, the columns twice, delta and its optimiser state."""
    setting = tiny(tmp_path)
    measured = simulate(setting)
    shapes = [
        (64, 64),
        (32, 64),
        (32, 64),
        (64, 64),
        (176, 64),
        (176, 64),
        (64, 176),
    ]
    deltas = 2 * sum(out * setting.rank for out, _ in shapes)
    columns = 2 * len(shapes) * setting.rank
    assert measured.by_category["adapter"] == deltas * (4 + 2) + columns * 8
    num_steps = 2 * len(shapes)  # AdamW's counters
    assert measured.by_category["optimizer"] == deltas * 8 + num_steps * 4


def test_chunked_loss_keeps_no_logits(tmp_path):
    wide = LLAMA | {"vocab_size": 65536}
    logits = simulate(tiny(tmp_path, wide, loss="logits"))
    chunked = simulate(tiny(tmp_path, wide, loss="chunked"))
    num_logits = 2 * 32 * 65536
    kept = logits.saved_bytes - chunked.saved_bytes
    assert kept == pytest.approx(4 * num_logits, rel=0.01)  # their logarithms, in float32
    assert "LlamaForCausalLM" not in chunked.saved_by_module


def test_chunked_loss_trains_the_head_in_full_training(tmp_path):
    wide = LLAMA | {"vocab_size": 65536}
    frozen = simulate(tiny(tmp_path, wide, loss="chunked"))
    trained = simulate(tiny(tmp_path, wide, method="full", loss="chunked"))
    head = 65536 * 64
    # Its gradient, gathered in float32, then cast.
    more = trained.peak_bytes - trained.by_category["optimizer"] - frozen.peak_bytes
    assert more == pytest.approx((4 + 2) * head, rel=0.1)


def test_missing_trl_is_named(tmp_path):
    training = FakeTraining(tiny(tmp_path, loss="chunked"))
    with (
        patch.dict("sys.modules", {"trl.kernels.chunked_logprob": None}),
        pytest.raises(ValueError, match="`loss` \\('chunked'\\) needs a newer TRL"),
    ):
        training.step(1, 8)


def test_missing_bitsandbytes_is_named(tmp_path):
    with (
        patch("pacatune.pretrained.find_spec", return_value=None),
        pytest.raises(ValueError, match="`quantization` \\('nf4'\\) needs bitsandbytes"),
    ):
        FakeTraining(tiny(tmp_path, quantization="nf4"))


def test_lean_may_be_required(tmp_path):
    required = simulate(tiny(tmp_path, lean="require"))
    found = simulate(tiny(tmp_path, lean="auto"))
    assert replace(found, setting=required.setting) == required
    assert required.saved_bytes < simulate(tiny(tmp_path, loss="chunked")).saved_bytes
    values = LLAMA | {"model_type": "mixtral", "num_local_experts": 4}
    with pytest.raises(ValueError, match="this model cannot be all lean"):
        FakeTraining(tiny(tmp_path, values, lean="require"))


@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize("values", [LLAMA, GEMMA], ids=["llama", "gemma3"])
def test_lean_layers_keep_what_they_keep_for_real(values, level, tmp_path):
    """All but the loss, which is TRL's in an estimate."""
    setting = tiny(tmp_path, values, lean="auto", lean_level=level)
    measured, model = simulate(setting), real_model(setting)
    lean.enable(model, level=level)
    with gpu_kernels.allocations_of_gpu():
        _, kept = real_peak(model, setting)
    saved = dict(measured.saved_by_module)
    assert saved.pop("loss") > 0
    kept.pop(type(model.get_base_model()).__name__)
    assert saved == pytest.approx(kept, rel=0.01)


@pytest.mark.parametrize("method", ["paca", "lora"])
def test_what_is_offloaded_is_not_on_the_device(method, tmp_path):
    """It comes back layer by layer, so that the peak is that of one layer's backward pass."""
    sizes = {"method": method, "lean": "auto", "seq_len": 512, "lean_level": 2}
    here = simulate(tiny(tmp_path, **sizes))
    away = simulate(tiny(tmp_path, **sizes, activation_offloading=True))
    assert away.saved_bytes < 0.1 * here.saved_bytes
    assert away.peak_bytes < here.peak_bytes
    static = ("weights", "adapter", "optimizer")
    assert [away.by_category[name] for name in static] == [
        here.by_category[name] for name in static
    ]


def test_sharded_training_shares_what_it_says(tmp_path):
    one = simulate(tiny(tmp_path, method="full"))
    four = {
        kind: simulate(tiny(tmp_path, method="full", sharding=kind, num_gpus=4))
        for kind in ("zero1", "zero2", "zero3", "fsdp2")
    }
    state = one.by_category["optimizer"]
    for measured in four.values():
        assert measured.by_category["optimizer"] == pytest.approx(state / 4, rel=0.01)
    assert four["zero1"].by_category["weights"] == one.by_category["weights"]
    weights = one.by_category["weights"]
    assert four["fsdp2"].by_category["weights"] == pytest.approx(weights / 4, rel=0.01)
    assert replace(four["zero3"], setting=four["fsdp2"].setting) == four["fsdp2"]
    assert four["zero2"].peak_bytes < four["zero1"].peak_bytes
    block = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 176 + 2 * 64)
    outside = 2 * (2 * 128 * 64 + 64)
    assert four["fsdp2"].by_category["gathered"] == 2 * block + outside


def test_sharded_paca_keeps_no_originals(tmp_path):
    """Those of gathered weights are gone with them."""
    alone = simulate(tiny(tmp_path))
    shared = simulate(tiny(tmp_path, sharding="fsdp2", num_gpus=2))
    indices = 2 * 7 * 4 * 8
    deltas = (alone.by_category["adapter"] - 2 * indices) * 4 // 6
    assert shared.by_category["adapter"] == pytest.approx((deltas + indices) / 2, rel=0.01)


def test_largest_rank_is_that_of_the_narrowest_layer(tmp_path):
    assert FakeTraining(tiny(tmp_path)).max_rank() == 64


def test_model_is_freed(tmp_path):
    """A search makes many; none may stay behind in a hook or a cache."""
    training = FakeTraining(tiny(tmp_path))
    training.step(1, 8)
    model = weakref.ref(training.base)
    del training
    gc.collect()
    assert model() is None


def test_experts_are_chosen_by_values(tmp_path):
    """Eager experts loop over those that are hit; the others sort tokens, and need no values."""
    values = LLAMA | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    training = FakeTraining(tiny(tmp_path, values))
    training.base.set_experts_implementation("eager")
    with pytest.raises(ValueError, match="MixtralForCausalLM decides by values what it computes"):
        training.step(1, 8)
