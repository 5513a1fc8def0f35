"""QPaCA over every quantiser that runs on a CPU: training, PEFT's features, where columns start."""

import collections
import copy
import gc
import types
import weakref

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pacatune import PacaConfig
from pacatune.ops import reference
from pacatune.tuner.quantized import QuantizedLinear, dequantized
from tests.tuner.quantizers import QUANTIZERS, quantise

IN, OUT, RANK = 64, 96, 4


class Net(nn.Module):
    """Two quantised layers, beside which transformers would hold what torchao asks for."""

    def __init__(self, method, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.first = quantise(nn.Linear(IN, OUT).to(dtype), method)
        self.second = quantise(nn.Linear(OUT, IN, bias=False).to(dtype), method)
        if method.startswith("torchao"):
            from torchao.quantization import Int8WeightOnlyConfig as Config

            options = types.SimpleNamespace(get_apply_tensor_subclass=Config)
            self.hf_quantizer = types.SimpleNamespace(quantization_config=options)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


@pytest.fixture(params=list(QUANTIZERS))
def method(request):
    return request.param


def adapt(net, **options):
    config = PacaConfig(r=RANK, target_modules=["first", "second"], **options)
    return get_peft_model(net, config)


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, QuantizedLinear)]


def randomise(model):
    for layer in layers_of(model):
        torch.nn.init.normal_(layer.delta_of("default"), std=0.1)


def batch(step=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(3, 70, IN, generator=generator).to(dtype)


class Twin(nn.Module):
    """The same two layers in plain autograd, on the dequantised weights."""

    def __init__(self, model):
        super().__init__()
        self.layers = layers_of(model)
        self.weights = [
            dequantized(layer.quantization_backend, layer.base_layer, torch.float32)
            for layer in self.layers
        ]
        self.deltas = nn.ParameterList(
            layer.delta_of("default").detach().clone() for layer in self.layers
        )

    def forward(self, x):
        for i, (layer, weight) in enumerate(zip(self.layers, self.weights, strict=True)):
            bias = layer.base_layer.bias
            indices, scaling = layer.paca_indices["default"], layer.scaling["default"]
            x = torch.tanh(x) if i else x
            x = reference.paca_linear(x, weight, self.deltas[i], indices, scaling, bias)
        return x


def train(model, parameters, steps=10):
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for step in range(steps):
        loss = (model(batch(step)) - batch(step + 100)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_trains_as_plain_autograd_on_the_dequantised_weights(method):
    model = adapt(Net(method), paca_alpha=6)
    twin = Twin(model)
    losses = train(model, [layer.delta_of("default") for layer in layers_of(model)])
    assert losses == pytest.approx(train(twin, twin.deltas.parameters()), rel=1e-5)
    assert losses[-1] < losses[0]
    for layer, delta in zip(layers_of(model), twin.deltas, strict=True):
        torch.testing.assert_close(layer.delta_of("default"), delta, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("block_size", [32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_every_block_size_of_bitsandbytes(block_size):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    linear = nn.Linear(4096, 8)
    layer = bitsandbytes.nn.Linear4bit(4096, 8, quant_type="nf4", compute_dtype=torch.float32)
    layer.weight = bitsandbytes.nn.Params4bit(
        linear.weight.detach().clone(), blocksize=block_size, requires_grad=False, quant_type="nf4"
    )
    layer.bias = linear.bias
    model = get_peft_model(nn.Sequential(layer.to("cpu")), PacaConfig(r=RANK, target_modules=["0"]))
    assert model.peft_config["default"].base_quantization["block_size"] == block_size
    randomise(model)
    (layer,) = layers_of(model)
    weight = dequantized(layer.quantization_backend, layer.base_layer, torch.float32)
    assert 0 < (weight - linear.weight).abs().mean() < 1e-3
    delta, indices = layer.delta_of("default"), layer.paca_indices["default"]
    x = torch.randn(3, 4096)
    expected = reference.paca_linear(
        x, weight, delta, indices, layer.scaling["default"], layer.base_layer.bias
    )
    torch.testing.assert_close(model(x), expected)


def test_base_is_the_base_when_disabled_and_after_unload(method):
    net = Net(method).eval()
    before = net(batch()).detach()
    model = adapt(net)
    torch.testing.assert_close(model.eval()(batch()), before)
    train(model.train(), [p for p in model.parameters() if p.requires_grad], steps=2)
    assert not torch.allclose(model.eval()(batch()), before)
    with model.disable_adapter():
        assert torch.equal(model(batch()), before)
    assert torch.equal(model.unload()(batch()), before)


def test_inference_equals_training(method):
    model = adapt(Net(method))
    randomise(model)
    trained = model.train()(batch()).detach()
    # In evaluation, and on a GPU always, bitsandbytes rounds activations to 8 bits as well.
    tolerance = 0.02 if method == "bitsandbytes-int8" else 2e-5
    with torch.no_grad():
        error = (model.eval()(batch()) - trained).abs().max()
    assert error <= tolerance * trained.abs().max()


def test_keeps_the_chosen_channels_and_nothing_hidden(method):
    """Also not outside autograd's own saved tensors, as bitsandbytes' 8-bit function does."""
    model = adapt(Net(method))
    x = batch().requires_grad_()
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    layer = layers_of(model)[0]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        passing = x * 1
        alive = weakref.ref(passing)
        y = layer(passing)
        del passing
    gc.collect()
    assert alive() is None
    delta, indices = layer.delta_of("default"), layer.paca_indices["default"]
    kept = [t for t in saved if t is not delta and t is not indices]
    assert sum(t.numel() * t.itemsize for t in kept) == 3 * 70 * RANK * 4
    y.sum().backward()


class _Weights(TorchDispatchMode):
    """Notes how many floating tensors as large as a weight live at once, views not counted."""

    def __init__(self, num_elements):
        super().__init__()
        self.num_elements, self.peak = num_elements, 0
        self.live = collections.Counter()  # by memory: the tensors over it

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            is_tensor = isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
            if is_tensor and tensor.numel() >= self.num_elements:
                memory = tensor.untyped_storage().data_ptr()
                self.live[memory] += 1
                weakref.finalize(tensor, self.live.subtract, [memory])
                self.peak = max(self.peak, sum(count > 0 for count in self.live.values()))
        return result


@pytest.mark.parametrize("kind", ["bitsandbytes-nf4", "bitsandbytes-fp4-double"])
def test_peak_of_a_layer_is_one_dequantised_weight(kind):
    model = adapt(Net(kind))
    layer = layers_of(model)[0]
    x = torch.randn(2, IN, requires_grad=True)
    with _Weights(IN * OUT) as forward:
        y = layer(x)
    with _Weights(IN * OUT) as backward:
        y.sum().backward()
    assert forward.peak == backward.peak == 1


def test_save_and_load(method, tmp_path):
    model = adapt(Net(method))
    randomise(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Net(method), tmp_path)
    assert torch.equal(loaded.eval()(batch()), model.eval()(batch()))
    assert loaded.peft_config["default"].base_quantization


def test_merging_says_what_rounding_costs_and_can_be_undone(method):
    model = adapt(Net(method))
    randomise(model)
    before = model.eval()(batch()).detach()
    with pytest.warns(UserWarning, match=r"rounds the weight of every.* again.*pacatune merge"):
        model.merge_adapter()
    assert not torch.equal(model(batch()), before)
    model.unmerge_adapter()
    assert torch.equal(model(batch()), before)


def test_another_rounding_is_told(tmp_path):
    adapt(Net("bitsandbytes-nf4")).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"quantised as 'bitsandbytes nf4.*'bitsandbytes int8'"):
        PeftModel.from_pretrained(Net("bitsandbytes-int8"), tmp_path)


def test_deepcopy_trains_on_its_own(method):
    if method.startswith("hqq"):
        pytest.skip("HQQLinear keeps its bias in a form that deepcopy refuses")
    model = adapt(Net(method))
    twin = copy.deepcopy(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    others = [p for p in twin.parameters() if p.requires_grad]
    assert train(model, parameters, 3) == pytest.approx(train(twin, others, 3), rel=1e-6)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's
def test_compiles_and_trains_alike():
    model = adapt(Net("bitsandbytes-nf4"))
    twin = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    parameters = [p for p in model.parameters() if p.requires_grad]
    others = [p for p in twin.parameters() if p.requires_grad]
    assert train(compiled, parameters, 3) == pytest.approx(train(twin, others, 3), rel=1e-5)
