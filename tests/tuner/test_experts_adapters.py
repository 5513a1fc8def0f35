"""Adapters on experts: merged, saved, several of them, copied."""

import copy
import io
import pickle

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict

from pacatune import PacaConfig
from tests.releases import needs
from tests.tuner.moe import (
    BOTH,
    Reference,
    adapt,
    build,
    deltas,
    fill,
    ids,
    layers,
)
from tests.tuner.test_experts import frozen


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "llama4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_and_unmerge(kind: str, dtype: torch.dtype) -> None:
    base = build(kind, dtype=dtype)
    model = adapt(base)
    before = {name: p.clone() for name, p in frozen(model.get_base_model()).items()}
    unmerged = model(input_ids=ids()).logits
    for _ in range(3):
        model.merge_adapter(safe_merge=True)
        merged = model(input_ids=ids()).logits
        if dtype == torch.float32:  # in 16 bits a router may decide differently
            torch.testing.assert_close(merged, unmerged, atol=1e-4, rtol=1e-4)
        model.unmerge_adapter()
        for name, parameter in frozen(model.get_base_model()).items():
            assert torch.equal(parameter, before[name]), name
    for name, layer in layers(model).items():
        want = base.get_parameter(name) + layer.get_delta_weight("default").to(dtype)
        model.merge_adapter()
        merged = frozen(model.get_base_model())[name]
        tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
        torch.testing.assert_close(merged, want, atol=tolerance, rtol=tolerance)
        with model.disable_adapter():
            assert torch.equal(model(input_ids=ids()).logits, base(input_ids=ids()).logits)
        for parameter, original in before.items():
            assert torch.equal(frozen(model.get_base_model())[parameter], original)


def test_merge_and_unload_leaves_nothing_of_ours() -> None:
    base = build("qwen2")
    model = adapt(base)
    unmerged = model(input_ids=ids()).logits
    merged = model.merge_and_unload()
    assert [type(m) for m in merged.modules()] == [type(m) for m in base.modules()]
    torch.testing.assert_close(merged(input_ids=ids()).logits, unmerged, atol=1e-6, rtol=1e-6)
    plain = adapt(base).unload()
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, base.get_parameter(name))


def test_safe_merge_refuses_what_is_not_finite() -> None:
    model = adapt(build("mixtral"))
    with torch.no_grad():
        deltas(model)[0][0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.merge_adapter(safe_merge=True)


def test_weights_shared_by_two_experts_modules() -> None:
    """Merging into one must not change the other."""
    base = build("mixtral")
    first, second = (layer.mlp.experts for layer in base.model.layers)
    second.gate_up_proj, second.down_proj = first.gate_up_proj, first.down_proj
    model = adapt(base, target_parameters=["layers.0.mlp.experts.down_proj"])
    unmerged = model(input_ids=ids()).logits
    shared = model.get_base_model().model.layers[1].mlp.experts.down_proj
    before = shared.clone()
    model.merge_adapter()
    assert torch.equal(shared, before)
    torch.testing.assert_close(model(input_ids=ids()).logits, unmerged, atol=1e-6, rtol=1e-6)
    model.unmerge_adapter()
    experts = model.get_base_model().model.layers[0].mlp.experts
    assert experts.base_layer.down_proj is shared


def test_names_do_not_depend_on_what_else_is_adapted() -> None:
    names = set(get_peft_model_state_dict(adapt(build("mixtral"))))
    one = set(get_peft_model_state_dict(adapt(build("mixtral"), target_parameters=BOTH[1:])))
    stem = "base_model.model.model.layers.0.mlp.experts"
    assert f"{stem}.down_proj.paca_delta" in one < names
    assert f"{stem}.gate_up_proj.paca_indices" in names - one


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("kind", ["qwen2", "gpt_oss"])
def test_save_and_load(tmp_path, kind: str, low_cpu_mem_usage: bool) -> None:
    base = build(kind)
    patterns = {"rank_pattern": {"gate_up_proj": 3}, "alpha_pattern": {r"experts\.down_proj": 2}}
    model = adapt(base, random_seed=7, **patterns)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        copy.deepcopy(base),
        tmp_path,
        autocast_adapter_dtype=False,
        low_cpu_mem_usage=low_cpu_mem_usage,
    )
    for name, layer in layers(model).items():
        other = layers(loaded)[name]
        assert torch.equal(layer.delta_of("default"), other.delta_of("default"))
        assert torch.equal(layer.paca_indices["default"], other.paca_indices["default"])
        assert layer.r == other.r == {"default": 3 if "gate_up" in name else 4}
    assert torch.equal(model(input_ids=ids()).logits, loaded(input_ids=ids()).logits)


@needs("peft", "0.20")  # 0.19 cannot beside transformers 5.14, nor LoRA for experts
def test_transformers_loads_it(tmp_path) -> None:
    base = build("qwen3", dtype=torch.float32)
    model = adapt(base)
    model.save_pretrained(tmp_path)
    plain = copy.deepcopy(base)
    plain.load_adapter(str(tmp_path))
    torch.testing.assert_close(plain(input_ids=ids()).logits, model(input_ids=ids()).logits)


def test_a_file_for_other_parameters_is_refused() -> None:
    from peft import set_peft_model_state_dict

    tensors = get_peft_model_state_dict(adapt(build("mixtral"), target_parameters=BOTH[:1]))
    model = adapt(build("mixtral"), target_parameters=BOTH[1:])
    with pytest.raises(ValueError, match=r"gate_up_proj.paca_delta', but this model has no such"):
        set_peft_model_state_dict(model, tensors)


def test_several_adapters() -> None:
    base = build("gpt_oss")
    model = adapt(base, target_parameters=BOTH[1:])
    untouched = model(input_ids=ids()).logits
    config = PacaConfig(r=3, target_modules=[], target_parameters=BOTH, random_seed=5)
    model.add_adapter("other", config)
    fill(model, "other")
    assert torch.equal(model(input_ids=ids()).logits, untouched)
    assert all(p.requires_grad is False for p in deltas(model, "other"))
    model.set_adapter("other")
    assert all(p.requires_grad for p in deltas(model, "other"))
    reference = Reference(base, model, "other")
    torch.testing.assert_close(model(input_ids=ids()).logits, reference(input_ids=ids()).logits)
    model.base_model.set_adapter(["default", "other"])
    reference = Reference(base, model, "default", "other")
    torch.testing.assert_close(
        model(input_ids=ids()).logits, reference(input_ids=ids()).logits, atol=1e-6, rtol=1e-6
    )
    with model.disable_adapter():
        assert torch.equal(model(input_ids=ids()).logits, base(input_ids=ids()).logits)
    model.base_model.set_adapter("default")
    assert torch.equal(model(input_ids=ids()).logits, untouched)
    model.delete_adapter("other")
    assert all(set(layer.r) <= {"default"} for layer in layers(model).values())
    assert torch.equal(model(input_ids=ids()).logits, untouched)


def test_weighted_sum_of_adapters() -> None:
    base = build("mixtral")
    model = adapt(base, target_parameters=BOTH[1:], target_modules=["q_proj"])
    config = PacaConfig(r=3, target_modules=[], target_parameters=BOTH, random_seed=5)
    model.add_adapter("other", config)
    fill(model, "other")
    model.add_weighted_adapter(["default", "other"], [0.5, -2.0], "sum")
    assert set(model.peft_config["sum"].target_parameters) == {
        f"model.layers.{number}.mlp.{name}" for number in (0, 1) for name in BOTH
    }
    for layer in layers(model).values():
        want = sum(
            factor * layer.get_delta_weight(name)
            for name, factor in (("default", 0.5), ("other", -2.0))
            if name in layer.r
        )
        torch.testing.assert_close(layer.get_delta_weight("sum"), want)


def test_copies_are_independent() -> None:
    model = adapt(build("mixtral"))
    expected = model(input_ids=ids()).logits
    stream = io.BytesIO(pickle.dumps(model))
    for twin in (copy.deepcopy(model), pickle.load(stream)):
        assert torch.equal(twin(input_ids=ids()).logits, expected)
        for layer in layers(twin).values():
            experts = twin.get_base_model().model.layers[0].mlp.experts
            assert layer.base_layer is experts.base_layer or layer.base_layer.num_experts == 4
            layer.delta_of("default").data.zero_()
        assert not torch.equal(twin(input_ids=ids()).logits, expected)
    assert torch.equal(model(input_ids=ids()).logits, expected)
