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
    "accumulated": {"method": "full", "gradient_accumulation": 3},
}
CHECKPOINTED = {
    f"{name}_checkpointing": METHODS[name] | {"gradient_checkpointing": True}
    for name in ("paca", "lora_dropout", "full")
}
FAMILIES = {"qwen3": {"values": QWEN}, "gemma3": {"values": GEMMA}}
ALL = METHODS | CHECKPOINTED | FAMILIES
WIDE = LLAMA | {"vocab_size": 65536}
MIXTRAL = LLAMA | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}


def simulate(setting):
    return FakeTraining(setting).step(setting.batch_size, setting.seq_len)


@pytest.fixture
def simulated(tmp_path):
    """Simulate the step of a tiny model."""
    return lambda values=LLAMA, **options: simulate(tiny(tmp_path, values, **options))


def peak_with_allocations_of_gpu(model, setting):
    with gpu_kernels.allocations_of_gpu():
        return real_peak(model, setting)


@pytest.mark.parametrize("options", ALL.values(), ids=ALL)
def test_saved_bytes_and_the_peak_and_its_moment_are_those_of_a_real_step(options, tmp_path):
    setting = tiny(tmp_path, **options)
    measured, model = simulate(setting), real_model(setting)
    # Real attention of the CPU, counted by hooks: nothing of the simulation is involved.
    with patch.object(F, "dropout", gpu_kernels.dropout):
        saved = really_saved(model, setting)
    # Held by the closures of checkpointing, past the hooks: positions and rotations.
    aside = ("LlamaRotaryEmbedding", "LlamaModel")
    inside = sum(n for kind, n in measured.saved_by_module.items() if kind not in aside)
    assert inside == pytest.approx(saved, rel=0.01)
    assert measured.saved_bytes - inside == (2304 if setting.gradient_checkpointing else 0)
    real, kept = peak_with_allocations_of_gpu(model, setting)
    assert measured.peak_bytes == pytest.approx(real.peak_bytes, rel=0.002)
    assert measured.peak_phase == real.peak_phase
    assert measured.saved_by_module == pytest.approx(kept, rel=0.01)


@pytest.mark.parametrize("method", ["paca", "lora"])
def test_quantised_base(method, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM

    from pacatune.pretrained import bitsandbytes_config

    setting = tiny(tmp_path, method=method, quantization="nf4")
    plain = real_model(setting.but(quantization=None, method="full"))
    plain.save_pretrained(tmp_path / "model")
    config = bitsandbytes_config("nf4", torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.bfloat16, quantization_config=config
    )
    model, measured = with_adapter(model, setting), simulate(setting)
    assert measured.saved_bytes == pytest.approx(really_saved(model, setting), rel=0.01)
    # Weights, scales, codes and buffers, shared ones once.
    weights = [p for p in model.parameters() if not p.requires_grad]
    states = [p.quant_state for p in weights if hasattr(p, "quant_state")]
    assert len(states) == 14
    scales = [t for s in states for t in (s.absmax, s.state2.absmax, s.offset)]
    codes = [t for s in states for t in (s.code, s.state2.code)]
    held = {t.data_ptr(): t.nbytes for t in (*weights, *scales, *codes, *model.buffers())}
    assert measured.by_category["weights"] == pytest.approx(sum(held.values()), rel=0.01)


@pytest.mark.parametrize(
    ("options", "masks"),
    [
        (METHODS["paca"], 0),
        (METHODS["lora_dropout"], 0),
        (METHODS["full"], 0),
        # Of one layer, two bytes each: beyond its window, on GPUs as well.
        (FAMILIES["gemma3"], 2 * (512**2 - 3 * 256**2 + 2 * 128**2)),
    ],
)
def test_nothing_but_sliding_windows_masks_grows_with_the_square_of_the_length(
    options, masks, tmp_path
):
    """transformers builds a causal mask where it cannot look at values; no layer may keep one."""
    training = FakeTraining(tiny(tmp_path, **options))
    short, middle, long = (training.step(1, length).saved_bytes for length in (128, 256, 512))
    # A constant beside: what does not depend on the length.
    squares = (long - middle) - 2 * (middle - short)
    assert squares == pytest.approx(masks, rel=0.05, abs=0.001 * (long - middle))


def test_steps_do_not_influence_each_other_and_their_model_is_freed(tmp_path):
    """A search makes many; none may stay behind in a hook or a cache."""
    training = FakeTraining(tiny(tmp_path))
    first = training.step(2, 32)
    training.step(1, 64)
    assert training.step(2, 32) == first
    model = weakref.ref(training.base)
    del training
    gc.collect()
    assert model() is None


def test_what_paca_keeps_aside_counts(simulated):
    """Delta and original columns: of shards (R6) there are none, gone with the gathered weights."""
    deltas, columns = 2 * (3 * 64 + 2 * 32 + 2 * 176) * 4, 2 * 7 * 4
    assert simulated().by_category["adapter"] == deltas * (4 + 2) + columns * 8
    shared = simulated(sharding="fsdp2", num_gpus=2).by_category["adapter"]
    assert shared == deltas * 4 / 2


def test_chunked_loss_keeps_no_logits_and_trains_the_head_in_full_training(simulated):
    logits, frozen = simulated(WIDE, loss="logits"), simulated(WIDE, loss="chunked")
    kept = logits.saved_bytes - frozen.saved_bytes
    assert kept == pytest.approx(4 * 2 * 32 * 65536, rel=0.01)  # logarithms, in float32
    assert "LlamaForCausalLM" not in frozen.saved_by_module
    trained = simulated(WIDE, method="full", loss="chunked")
    # The head's gradient, gathered in float32, then cast.
    more = trained.peak_bytes - trained.by_category["optimizer"] - frozen.peak_bytes
    assert more == pytest.approx((4 + 2) * 65536 * 64, rel=0.1)


def step_of_eager_experts(setting):
    """Eager experts loop over those that are hit; the others sort tokens, and need no values."""
    training = FakeTraining(setting)
    training.base.set_experts_implementation("eager")
    training.step(1, 8)


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        (LLAMA, {"loss": "chunked"}, r"`loss` \('chunked'\) needs a newer TRL"),
        (LLAMA, {"quantization": "nf4"}, r"`quantization` \('nf4'\) needs bitsandbytes"),
        (MIXTRAL, {"lean": "require"}, "this model cannot be all lean"),
        (MIXTRAL, {}, "MixtralForCausalLM decides by values what it computes"),
    ],
)
def test_what_cannot_be_simulated_says_so(values, options, message, tmp_path):
    with (
        patch.dict("sys.modules", {"trl.kernels.chunked_logprob": None}),
        patch("pacatune.pretrained.find_spec", return_value=None),
        pytest.raises(ValueError, match=message),
    ):
        step_of_eager_experts(tiny(tmp_path, values, **options))


@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize("values", [LLAMA, GEMMA], ids=["llama", "gemma3"])
def test_lean_layers_keep_what_they_keep_for_real(values, level, tmp_path):
    """All but the loss, which is TRL's in an estimate."""
    setting = tiny(tmp_path, values, lean="auto", lean_level=level)
    measured, model = simulate(setting), real_model(setting)
    lean.enable(model, level=level)
    _, kept = peak_with_allocations_of_gpu(model, setting)
    saved = dict(measured.saved_by_module)
    assert saved.pop("loss") > 0
    kept.pop(type(model.get_base_model()).__name__)
    assert saved == pytest.approx(kept, rel=0.01)
    required = simulate(setting.but(lean="require"))
    assert replace(measured, setting=required.setting) == required
    assert required.saved_bytes < simulate(tiny(tmp_path, values, loss="chunked")).saved_bytes


def test_what_is_offloaded_is_not_on_the_device(simulated):
    """It comes back layer by layer, so that the peak is that of one layer's backward pass."""
    sizes = {"lean": "auto", "seq_len": 512, "lean_level": 2}
    here, away = simulated(**sizes), simulated(**sizes, activation_offloading=True)
    assert away.saved_bytes < 0.1 * here.saved_bytes
    assert away.peak_bytes < here.peak_bytes
    for name in ("weights", "adapter", "optimizer"):
        assert away.by_category[name] == here.by_category[name]


def test_sharded_training_shares_what_it_says(simulated):
    one = simulated(method="full").by_category
    kinds = ("zero1", "zero2", "zero3", "fsdp2")
    four = {kind: simulated(method="full", sharding=kind, num_gpus=4) for kind in kinds}
    for measured in four.values():
        assert measured.by_category["optimizer"] == pytest.approx(one["optimizer"] / 4, rel=0.01)
    assert four["zero1"].by_category["weights"] == one["weights"]
    assert four["fsdp2"].by_category["weights"] == pytest.approx(one["weights"] / 4, rel=0.01)
    assert replace(four["zero3"], setting=four["fsdp2"].setting) == four["fsdp2"]
    assert four["zero2"].peak_bytes < four["zero1"].peak_bytes
    block = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 176 + 2 * 64)
    outside = 2 * (2 * 128 * 64 + 64)
    assert four["fsdp2"].by_category["gathered"] == 2 * block + outside


def test_operations_are_those_of_the_formulas(tmp_path):
    """PaCA's forward pass has the products of the model alone; LoRA's two thin ones per layer."""
    counts = {
        method: FakeTraining(tiny(tmp_path, method=method)).count_operations(2, 32)
        for method in ("full", "paca", "lora")
    }
    assert counts["paca"]["forward"] == counts["full"]["forward"]
    sides = 2 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 176))
    beyond = counts["lora"]["forward"] - counts["paca"]["forward"]
    assert beyond == 2 * 64 * 4 * sides
