"""Adapters of experts, embeddings and torch's attention, through everything done to them."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModel, SiglipVisionConfig, SiglipVisionModel

from pacatune.adapters.export import export_lora
from pacatune.adapters.fingerprint import fingerprint
from pacatune.adapters.folder import read_adapter
from pacatune.adapters.inspect import compare, inspect_adapter
from pacatune.adapters.loading import attach, check_base, hotswap_adapter
from pacatune.adapters.merge import merge
from tests.adapters.fixtures import save_adapter
from tests.conftest import build_model
from tests.releases import has
from tests.tuner import moe, nets

EXPERTS = {"target_modules": ["q_proj"], "target_parameters": moe.BOTH}
KINDS = {
    "mixtral": EXPERTS,
    "qwen2": {**EXPERTS, "target_modules": ["q_proj", "shared_expert.down_proj"]},
    "qwen3": {"target_modules": [], "target_parameters": moe.BOTH[1:]},
    "gpt_oss": {**EXPERTS, "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    "llama4": {**EXPERTS, "rank_pattern": {"down_proj": 2}},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "attention": {"target_modules": ["attention", "fc1"]},
    "projection": {"target_modules": ["attention.out_proj"]},
}
# With the base's embedding, which `make` leaves out of the file again.
pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
WITH_EXPERTS = ["mixtral", "gpt_oss"]
# Older releases of PEFT build LoRA of other shapes on these experts.
LEAST_PEFT = {"mixtral": "0.20", "qwen2": "0.20", "qwen3": "0.20", "llama4": "0.19"}
WITH_ATTENTION = ["attention", "projection"]


def build(kind):
    if kind in WITH_ATTENTION:
        # Its pooling head asks a torch.nn.MultiheadAttention with one learnt query.
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
        config = SiglipVisionConfig(**sizes, num_attention_heads=2, image_size=16, patch_size=8)
        torch.manual_seed(0)
        return SiglipVisionModel(config)
    if kind == "embedding":
        return build_model(64)
    return moe.build(kind, dtype=torch.float32)


@pytest.fixture(scope="module", params=KINDS)
def base_dir(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases") / request.param
    build(request.param).save_pretrained(folder)
    return folder


def make(base_dir, folder, **options):
    kind = base_dir.name
    task = None if kind in WITH_ATTENTION else "CAUSAL_LM"
    options = {"task_type": task, **KINDS[kind], **options}
    model = save_adapter(base_dir, folder, **options)
    model.save_pretrained(folder, save_embedding_layers=False)  # the base's own, that is
    return model


def pooled(model):
    """What the pooling head returns; the probe of `merge` and `export` looks at hidden states."""
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(pixel_values=pixels).pooler_output


@pytest.mark.parametrize("groups", [1, 2])
def test_merges_and_verifies(base_dir, tmp_path, groups):
    model = make(base_dir, tmp_path / "adapter", groups=groups)
    result = merge(str(base_dir), tmp_path / "adapter", tmp_path / "merged")
    assert result.error.max_relative < 1e-5
    if base_dir.name in WITH_ATTENTION:
        merged = AutoModel.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(pooled(merged), pooled(model))
        assert not torch.allclose(pooled(merged), pooled(build(base_dir.name)), atol=1e-3)
    else:
        assert result.effect > 1e-3


@pytest.mark.usefixtures("verified_here")
@pytest.mark.parametrize("groups", [1, 2])
def test_exports_to_lora_that_plain_peft_runs_alike(base_dir, tmp_path, groups):
    model = make(base_dir, tmp_path / "adapter", groups=groups)
    if base_dir.name == "projection":
        with pytest.raises(
            ValueError, match=r"is the out_proj of .* adds twice; merge the adapter"
        ):
            export_lora(str(base_dir), tmp_path / "adapter", tmp_path / "lora")
        return
    if not has("peft", LEAST_PEFT.get(base_dir.name, "0.18")):
        with pytest.raises(ValueError, match=r"LoRA for the experts of .* needs PEFT 0\.(19|20)"):
            export_lora(str(base_dir), tmp_path / "adapter", tmp_path / "lora")
        return
    result = export_lora(str(base_dir), tmp_path / "adapter", tmp_path / "lora", verify=True)
    assert result.error.max_relative < 1e-5
    assert result.rounding < 1e-6
    if base_dir.name in WITH_ATTENTION:
        lora = PeftModel.from_pretrained(build(base_dir.name), tmp_path / "lora")
        torch.testing.assert_close(pooled(lora.eval()), pooled(model))


def test_describes_and_compares(base_dir, tmp_path):
    for name, seed in (("one", 0), ("two", 5)):
        make(base_dir, tmp_path / name, seed=seed, random_seed=seed)
    one = read_adapter(tmp_path / "one")
    report = inspect_adapter(tmp_path / "one")
    assert {module.name for module in report.modules} == set(one.modules)
    for module in report.modules:
        assert module.rank == len(module.columns)
        assert module.num_parameters == one.modules[module.name].delta.numel()
    assert not any("convolution" in note for note in report.notes)
    assert compare(one, one).cosine == pytest.approx(1)
    assert abs(compare(one, tmp_path / "two").cosine) < 0.5


def test_hotswaps(base_dir, tmp_path):
    model = make(base_dir, tmp_path / "one")
    other = make(base_dir, tmp_path / "two", seed=5, random_seed=5)
    hotswap_adapter(model, tmp_path / "two")
    for ours, theirs in zip(nets.layers(model).values(), nets.layers(other).values(), strict=True):
        assert torch.equal(ours.delta_of("default"), theirs.delta_of("default"))
        assert torch.equal(ours.paca_indices["default"], theirs.paca_indices["default"])


def test_knows_its_base(base_dir, tmp_path):
    make(base_dir, tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter")
    base = build(base_dir.name)
    assert check_base(adapter, base) == []
    name = next(reversed(adapter.modules))
    columns = {name: adapter.modules[name].indices}
    before = fingerprint(base, columns)["modules"][name]
    peft_model, _ = attach(base, adapter)
    assert fingerprint(peft_model, columns)["modules"][name] == before != {}
    other = build(base_dir.name)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.5)
    with pytest.raises(ValueError, match=r"weights of .* adapted modules are not those"):
        check_base(adapter, other)


@pytest.mark.parametrize("base_dir", WITH_EXPERTS, indirect=True)
def test_another_number_of_experts_is_refused(base_dir, tmp_path):
    make(base_dir, tmp_path / "adapter")
    base = build(base_dir.name)
    experts = base.model.layers[0].mlp.experts
    for name in ("gate_up_proj", "down_proj"):
        setattr(experts, name, torch.nn.Parameter(getattr(experts, name)[:3]))
    with pytest.raises(ValueError, match=r"has a delta of \(.*, 4\) and .* base needs \(.*, 3\)"):
        check_base(tmp_path / "adapter", base)


@pytest.mark.parametrize("base_dir", ["mixtral"], indirect=True)
def test_a_configuration_without_its_parameters_is_refused(base_dir, tmp_path):
    make(base_dir, tmp_path / "adapter", r=3)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(path.read_text().replace('"experts.gate_up_proj"', '"experts.other"'))
    with pytest.raises(ValueError, match="fits its 3 `paca_indices` only as one of `target_param"):
        read_adapter(tmp_path / "adapter")
