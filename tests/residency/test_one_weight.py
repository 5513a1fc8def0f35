"""R7: in 16 bits every path multiplies with the same bits of W', which merging writes, too."""

import contextlib
from collections.abc import Callable

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import pacatune
from pacatune import PacaConfig
from pacatune.ops import experts_linear
from pacatune.ops.columns import adapted_columns
from pacatune.tuner.layout import ConvolutionLayout
from pacatune.tuner.quantized import dequantized
from tests.releases import compiles_whole
from tests.residency.net import layers
from tests.residency.twin import KINDS, Twin, twin_of
from tests.tuner.quantizers import quantise

IN, OUT, RANK = 24, 40, 8


def build(dtype: torch.dtype, **options) -> nn.Module:
    """A layer whose updates are smaller, as large, and larger than its weights."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(IN, OUT, bias=False)).to(dtype)
    config = PacaConfig(r=RANK, paca_alpha=1.7 * RANK, target_modules=["0"])
    model = get_peft_model(base, config, autocast_adapter_dtype=True)
    (layer,) = layers(model)
    with torch.no_grad():
        spread = torch.logspace(-5, 3, RANK)
        layer.delta_of("default").copy_(0.2 * torch.randn(OUT, RANK) * spread)
    return model


def expected(model: nn.Module) -> Tensor:
    (layer,) = layers(model)
    delta, indices = layer.delta_of("default"), layer.paca_indices["default"]
    weight = layer.base_layer.weight.detach().clone()
    columns = adapted_columns(weight[:, indices], delta.detach(), layer.scaling["default"])
    return weight.index_copy(1, indices, columns)


def probed(forward: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Tensor:
    """Return the weight that a layer multiplies with: rows of ones and zeros add nothing to it."""
    return forward(torch.eye(IN, dtype=dtype)).detach().t()


def trained(model: nn.Module, dtype: torch.dtype) -> Tensor:
    found = probed(model, dtype)
    assert layers(model)[0].residency.is_written
    return found


def held(model: nn.Module, dtype: torch.dtype) -> Tensor:
    weights = [layers(model)[0].base_layer.weight.detach()]
    found = probed(model, dtype)
    assert not layers(model)[0].residency.is_written
    weights.clear()
    return found


def evaluated(model: nn.Module, dtype: torch.dtype) -> Tensor:
    with torch.no_grad():
        return probed(model, dtype)


def resident(model: nn.Module, dtype: torch.dtype) -> Tensor:
    with pacatune.resident(model):
        return evaluated(model, dtype)


def mixed(model: nn.Module, dtype: torch.dtype) -> Tensor:
    model.eval()
    names = ["default", "__base__"] * (IN // 2)
    one = probed(lambda x: model(x, adapter_names=names), dtype)
    other = probed(lambda x: model(x, adapter_names=names[::-1]), dtype)
    return torch.where(torch.arange(IN) % 2 == 0, one, other)


def several(model: nn.Module, dtype: torch.dtype) -> Tensor:
    model.add_adapter("zero", PacaConfig(r=2, target_modules=["0"]))
    model.base_model.set_adapter(["default", "zero"])
    return probed(model, dtype)


def compiled(model: nn.Module, dtype: torch.dtype) -> Tensor:
    torch._dynamo.reset()
    return probed(torch.compile(model, backend="aot_eager", fullgraph=True), dtype)


def compiled_evaluation(model: nn.Module, dtype: torch.dtype) -> Tensor:
    with torch.no_grad():
        return compiled(model, dtype)


def merged(model: nn.Module, dtype: torch.dtype) -> Tensor:
    return model.merge_and_unload()[0].weight.detach()


def backward(model: nn.Module, dtype: torch.dtype) -> Tensor:
    """What gradients of the input are multiplied with."""
    x = torch.zeros(OUT, IN, dtype=dtype, requires_grad=True)
    model(x).backward(torch.eye(OUT, dtype=dtype))
    return x.grad


def held_backward(model: nn.Module, dtype: torch.dtype) -> Tensor:
    weights = [layers(model)[0].base_layer.weight.detach()]
    found = backward(model, dtype)
    weights.clear()
    return found


PATHS = [trained, held, evaluated, resident, mixed, several, merged, backward, held_backward]
COMPILED = [compiled, compiled_evaluation]


@pytest.mark.parametrize(
    ("path", "dtype"),
    [
        *((path, torch.bfloat16) for path in PATHS),
        (trained, torch.float16),
        (held, torch.float16),
        *(pytest.param(path, torch.bfloat16, marks=compiles_whole) for path in COMPILED),
    ],
)
def test_every_path_has_the_same_bits(path, dtype):
    model = build(dtype)
    want = expected(model)
    assert torch.equal(path(model, dtype), want)


@pytest.mark.parametrize("path", [trained, held])
def test_autocast_rounds_the_same_columns(path):
    model = build(torch.float32)
    want = expected(model).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = path(model, torch.float32)
    assert torch.equal(found, want)


def probed_layer(twin: Twin, adds: bool) -> Tensor:
    """Return what a layer of any kind does with unit vectors, or else what it is of."""
    layer, kind = twin.layer, twin.kind
    base = layer.get_base_layer()
    with torch.set_grad_enabled(not adds):
        if "proj" in kind.parameter:
            weight = getattr(base, kind.parameter)
            x = torch.eye(layer.in_features, dtype=twin.dtype).repeat(len(weight), 1)
            ends = torch.arange(len(x) // len(weight), len(x) + 1, len(x) // len(weight))
            options = {"is_transposed": layer.layout.is_transposed, "is_grouped": adds}
            names = [] if twin.merged else twin.active
            if names:
                return layer.project(x, weight, ends.int(), names, **options)
            return experts_linear(x, weight, ends.int(), **options)
        if isinstance(base, nn.Embedding):
            return twin.model(torch.arange(base.num_embeddings))
        if isinstance(base, (nn.Linear, Conv1D)):
            return twin.model(torch.eye(layer.in_features, dtype=twin.dtype))
        return twin.model(kind.inputs(70).to(twin.dtype))


@pytest.mark.parametrize("adds", [False, True], ids=["trained", "added"])
@pytest.mark.parametrize("delta_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("quantised")])
def test_every_kind_of_layer_is_merged_as_it_is_trained(kind, delta_dtype, adds):
    """With a hook on the base layer, or a second adapter, what is added has the same bits."""
    twin = twin_of(kind, torch.bfloat16)
    base = twin.layer.get_base_layer()
    for name, parameter in base.named_parameters():
        if "bias" in name:
            parameter.zero_()
    (name,) = twin.active
    layout, delta = twin.layer.layout, twin.layer.delta_of(name)
    twin.layer.scaling[name] = 0.7
    # By less than half of each weight: what is added, in 16 bits, then has no more than these.
    weight = twin.weight_of(twin.plain)
    columns = layout.oriented(layout.read_columns(weight, twin.layer.paca_indices[name]))
    delta.data = ((torch.rand(columns.shape) - 0.5) * columns).to(delta_dtype)
    if adds and isinstance(layout, ConvolutionLayout):
        config = PacaConfig(r=2, init_weights=True, target_modules=["layer"])
        twin.model.add_adapter("zero", config)
        twin.model.base_model.set_adapter([name, "zero"])
    elif adds:
        base.register_forward_hook(lambda *call: None)
    torch.manual_seed(0)
    found = probed_layer(twin, adds)
    twin.model.merge_adapter()
    torch.manual_seed(0)
    assert torch.equal(found, probed_layer(twin, adds))


@pytest.mark.parametrize("delta_dtype", [torch.float32, torch.bfloat16])
def test_a_quantised_layer_trains_what_is_written_in_16_bits(delta_dtype):
    plain = quantise(nn.Linear(64, OUT, bias=False).bfloat16(), "bitsandbytes-nf4")
    model = get_peft_model(nn.Sequential(plain), PacaConfig(r=RANK, target_modules=["0"]))
    layer = model.get_base_model()[0]
    delta, indices = layer.delta_of("default"), layer.paca_indices["default"]
    layer.scaling["default"] = 0.7
    delta.data = 0.1 * torch.randn_like(delta, dtype=delta_dtype)
    weight = dequantized(layer.quantization_backend, plain, torch.bfloat16)
    weight[:, indices] = adapted_columns(weight[:, indices], delta.detach(), 0.7)
    x = torch.eye(64, dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    assert torch.equal(y.detach().t(), weight)
    (gx,) = torch.autograd.grad(y, x, torch.eye(64, OUT, dtype=torch.bfloat16))
    assert torch.equal(gx[:OUT], weight)


@pytest.mark.parametrize("channels", [None, 12])
@pytest.mark.parametrize("low", ["weights", "autocast"])
def test_evaluation_has_the_bits_of_a_merged_model(low, channels):
    """Small updates, too: added to a product in 16 bits, most of each would be rounded away."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if low == "weights" else torch.float32
    layer = nn.Linear(256, 64).to(dtype)
    config = PacaConfig(r=8, channels=channels, target_modules=["0"], init_weights=False)
    model = get_peft_model(nn.Sequential(layer), config).eval()
    with torch.no_grad():
        model.get_base_model()[0].update_of("default").delta.mul_(0.01)
    x, autocast = torch.randn(40, 256, dtype=dtype), torch.autocast("cpu", torch.bfloat16)
    with torch.no_grad(), autocast if low == "autocast" else contextlib.nullcontext():
        found, base = model(x), nn.functional.linear(x, layer.weight, layer.bias)
        assert torch.equal(model.merge_and_unload()(x), found)
        assert not torch.equal(found, base)
