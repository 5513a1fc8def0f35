"""Adapters of convolutions through everything that is done to finished adapters."""

import json
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

from pacatune.adapters.export import export_lora
from pacatune.adapters.export_factors import convolution_factors, refuse_inexpressible
from pacatune.adapters.fingerprint import fingerprint
from pacatune.adapters.folder import read_adapter
from pacatune.adapters.inspect import compare, inspect_adapter
from pacatune.adapters.loading import attach, check_base
from pacatune.adapters.merge import merge
from pacatune.ops.columns import columns_of_kernel, put_columns_, read_columns
from pacatune.tuner.layout import layout_of
from tests.adapters.fixtures import save_adapter

# What the notes of an export say as well.
pytestmark = pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd:UserWarning")

TARGETS = {
    # Patches, depthwise 7 x 7, linear.
    "convnext": ["patch_embeddings", "dwconv", "pwconv1", "downsampling_layer.1"],
    # Dense and pointwise convolutions with stride and padding; no size of the input.
    "resnet": ["convolution"],
}


@pytest.fixture(scope="module", params=TARGETS)
def base_dir(request, tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bases") / request.param
    labels = {"num_labels": 4}
    if request.param == "convnext":
        sizes = {"hidden_sizes": [6, 8], "depths": [1, 1], "num_stages": 2, "image_size": 32}
        model = ConvNextForImageClassification(ConvNextConfig(**sizes, **labels))
    else:
        sizes = {"embedding_size": 4, "hidden_sizes": [8, 16], "depths": [1, 1]}
        model = ResNetForImageClassification(
            ResNetConfig(**sizes, **labels, layer_type="bottleneck", reduction=2)
        )
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(base_dir, tmp_path):
    options = {"r": 2, "task_type": None, "target_modules": TARGETS[base_dir.name]}
    save_adapter(base_dir, tmp_path / "adapter", **options)
    return tmp_path / "adapter"


def test_merges_and_verifies(base_dir, adapter, tmp_path):
    result = merge(str(base_dir), adapter, tmp_path / "merged")
    assert result.error.max_relative < 1e-5 * result.effect + 1e-5
    merged = AutoModelForImageClassification.from_pretrained(tmp_path / "merged")
    base = AutoModelForImageClassification.from_pretrained(base_dir)
    for name, (delta, indices) in read_adapter(adapter).modules.items():
        new, old = (model.get_submodule(name) for model in (merged, base))
        if delta.ndim > 2:
            columns = [read_columns(one.weight, indices, one.groups) for one in (new, old)]
            torch.testing.assert_close(columns[0], columns[1] + 4 * delta)


@pytest.mark.usefixtures("verified_here")
def test_exports_to_lora_that_plain_peft_runs_alike(base_dir, adapter, tmp_path):
    result = export_lora(str(base_dir), adapter, tmp_path / "lora", verify=True)
    assert result.error.max_relative < 1e-5
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    convolutions = {n for n, u in read_adapter(adapter).modules.items() if u.delta.ndim > 2}
    assert len(config["rank_pattern"]) == len(convolutions) == len(config["alpha_pattern"])
    for name in convolutions:
        rank = config["rank_pattern"]["^" + re.escape(name)]
        assert len(tensors[f"base_model.model.{name}.lora_A.weight"]) == rank
    assert any("convolutions have ranks of their own" in note for note in result.notes)
    has_groups = base_dir.name == "convnext"
    assert any("with groups but cannot merge" in note for note in result.notes) == has_groups


def test_is_described(adapter, base_dir, tmp_path):
    report = inspect_adapter(adapter)
    assert {module.rank for module in report.modules} == {2}
    assert any(note.startswith("needs pacatune") and "Conv2d" in note for note in report.notes)
    export_lora(str(base_dir), adapter, tmp_path / "lora")
    lora = inspect_adapter(tmp_path / "lora")
    assert len(lora.modules) == len(report.modules)
    assert lora.extra == []


def test_compares_with_itself(adapter):
    assert compare(adapter, adapter).cosine == pytest.approx(1.0)


def test_another_base_is_noticed_by_its_convolutions(base_dir, adapter):
    model = AutoModelForImageClassification.from_pretrained(base_dir)
    check_base(adapter, model)
    hashes = fingerprint(model, {n: u.indices for n, u in read_adapter(adapter).modules.items()})
    kernels = [n for n in hashes["modules"] if model.get_submodule(n).weight.dim() > 2]
    # Where every channel is adapted there is nothing to compare.
    compared = next(name for name in kernels if hashes["modules"][name])
    with torch.no_grad():
        model.get_submodule(compared).weight.add_(0.1)
    with pytest.raises(ValueError, match="are not those it was trained on"):
        check_base(adapter, model)


def test_another_kernel_is_refused(base_dir, adapter):
    model = AutoModelForImageClassification.from_pretrained(base_dir)
    name = next(n for n, u in read_adapter(adapter).modules.items() if u.delta.ndim > 2)
    conv = model.get_submodule(name)
    model.set_submodule(name, nn.Conv2d(conv.in_channels, conv.out_channels, 9, groups=conv.groups))
    with pytest.raises(ValueError, match=r"has a delta of .* but the base needs \(\d+, 2, 9, 9\)"):
        attach(model, read_adapter(adapter))


CONVOLUTIONS = {
    "wide": ((5, 7, 6), lambda: nn.Conv2d(5, 40, 3, stride=2, padding=1)),  # taps
    "narrow": ((5, 7, 6), lambda: nn.Conv2d(5, 4, 3, padding="same")),  # outputs
    "1d": ((5, 9), lambda: nn.Conv1d(5, 16, 3, padding=2)),
    "groups, wide": ((6, 7, 6), lambda: nn.Conv2d(6, 60, (1, 3), groups=3)),
    "groups, narrow": ((6, 7, 6), lambda: nn.Conv2d(6, 6, 3, groups=2)),
    "depthwise": ((6, 7, 6), lambda: nn.Conv2d(6, 12, 3, groups=6)),
    "3d": ((4, 5, 6, 4), lambda: nn.Conv3d(4, 6, 2)),
    "pointwise, dilated in name": ((5, 7, 6), lambda: nn.Conv2d(5, 8, 1, dilation=2)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_factors_are_exact_in_pefts_lora(name):
    """PEFT builds the layer, so what it has no place for would not load."""
    torch.manual_seed(0)
    shape, build = CONVOLUTIONS[name]
    base = build().double()
    x = torch.randn(2, *shape[-base.weight.dim() + 1 :], dtype=torch.float64)
    refuse_inexpressible(base, "layer")
    out_per_group, in_channels, *kernel = layout_of(base).file_shape
    delta = torch.randn(out_per_group, 3, *kernel, dtype=torch.float64)
    indices = torch.tensor([0, 1, in_channels - 1])
    factor_a, factor_b = convolution_factors(delta, indices, in_channels, base.groups)
    assert len(factor_a) <= base.out_channels
    config = LoraConfig(r=len(factor_a), lora_alpha=len(factor_a), target_modules=["0"])
    weight = base.weight.detach().clone()
    lora = get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=False)
    keys = {"A": factor_a, "B": factor_b}
    tensors = {f"base_model.model.0.lora_{key}.weight": value for key, value in keys.items()}
    loaded = set_peft_model_state_dict(lora, tensors)
    assert not loaded.unexpected_keys
    update = torch.zeros_like(weight)
    put_columns_(update, indices, delta, base.groups)
    with torch.no_grad():
        want = torch.func.functional_call(base, {"weight": weight + update}, x)
        torch.testing.assert_close(lora(x), want, atol=1e-12, rtol=1e-12)


def test_what_lora_does_not_follow_is_refused():
    class Own(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) + 1

    for layer, problem in (
        (nn.Conv2d(3, 4, 3, dilation=2), r"dilation = \(2, 2\)"),
        (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), "padding_mode = 'reflect'"),
        (Own(3, 4, 3), r"a forward of its own \(Own\)"),
    ):
        with pytest.raises(ValueError, match=rf"here is a convolution with {problem}.*merge the"):
            refuse_inexpressible(layer, "here")
    refuse_inexpressible(nn.Conv2d(3, 4, 3, padding_mode="reflect"), "here")  # pads by nothing


def test_an_adapter_of_dilated_convolutions_is_merged_instead(tmp_path):
    sizes = {"image_size": 32, "depth_multiplier": 0.1, "num_labels": 3}
    config = MobileNetV2Config(**sizes, output_stride=16)
    MobileNetV2ForImageClassification(config).save_pretrained(tmp_path / "base")
    options = {"r": 2, "task_type": None, "target_modules": r".*conv_3x3\.convolution"}
    save_adapter(tmp_path / "base", tmp_path / "adapter", **options)
    with pytest.raises(ValueError, match=r"conv_3x3.*with dilation = \(2, 2\).*`pacatune merge`"):
        export_lora(None, tmp_path / "adapter", tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
    assert merge(None, tmp_path / "adapter", tmp_path / "merged").effect > 0


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_a_kernel_as_a_matrix_has_a_column_for_each_channel(groups):
    weight = torch.randn(12, 6 // groups, 2, 3)
    matrix = columns_of_kernel(weight, groups)
    assert matrix.shape == (12 // groups * 6, 6)
    for channel in range(6):
        column = read_columns(weight, torch.tensor([channel]), groups)
        assert sorted(matrix[:, channel].tolist()) == sorted(column.flatten().tolist())
