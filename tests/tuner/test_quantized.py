"""QPaCA over every quantiser that runs on a CPU: plain autograd on the dequantised weights (R1)."""

import copy
import types

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from pacatune import PacaConfig
from pacatune.measure.tracker import StorageTracker
from pacatune.tuner.quantized import dequantized, forbid_packing
from tests.tuner.nets import Reference, assert_equal, deltas, evaluate, fill, layers
from tests.tuner.quantizers import QUANTIZERS, quantise

IN, OUT, RANK = 64, 96, 4


class Net(nn.Module):
    """Two quantised layers, beside which transformers would hold what torchao asks for."""

    def __init__(self, method=None):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(IN, OUT)
        self.second = nn.Linear(OUT, IN, bias=False)
        if method is not None:
            self.first, self.second = quantise(self.first, method), quantise(self.second, method)
        if method is not None and method.startswith("torchao"):
            from torchao.quantization import Int8WeightOnlyConfig as Config

            options = types.SimpleNamespace(get_apply_tensor_subclass=Config)
            self.hf_quantizer = types.SimpleNamespace(quantization_config=options)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


@pytest.fixture(params=list(QUANTIZERS))
def method(request):
    return request.param


def adapt(net, **options):
    config = PacaConfig(**{"r": RANK, "target_modules": ["first", "second"], **options})
    return get_peft_model(net, config)


def batch(step=0):
    return torch.randn(3, 70, IN, generator=torch.Generator().manual_seed(step))


def reference_of(model, plain):
    """The same layers in plain autograd, on the dequantised weights."""
    for name, layer in layers(model).items():
        weight = dequantized(layer.quantization_backend, layer.base_layer, torch.float32)
        plain.get_submodule(name).weight.data = weight
    return Reference(plain, model)


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
    reference = reference_of(model, Net())
    losses = train(model, deltas(model))
    assert losses == pytest.approx(train(reference, reference.deltas), rel=1e-5)
    assert losses[-1] < losses[0]
    torch.testing.assert_close(deltas(model), list(reference.deltas), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("block_size", [32, 512, 4096])
def test_block_sizes_of_bitsandbytes(block_size):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    linear = nn.Linear(4096, 8)
    layer = bitsandbytes.nn.Linear4bit(4096, 8, quant_type="nf4", compute_dtype=torch.float32)
    layer.weight = bitsandbytes.nn.Params4bit(
        linear.weight.detach().clone(), blocksize=block_size, requires_grad=False, quant_type="nf4"
    )
    layer.bias = linear.bias
    model = adapt(nn.Sequential(layer.to("cpu")), target_modules=["0"])
    assert model.peft_config["default"].base_quantization["block_size"] == block_size
    fill(model)
    reference = reference_of(model, nn.Sequential(copy.deepcopy(linear)))
    assert 0 < (reference.base[0].weight - linear.weight).abs().mean() < 1e-3
    assert_equal(model, reference, torch.randn(3, 4096).requires_grad_(), tolerance=1e-5)


def test_the_base_is_the_base_when_disabled_unmerged_and_unloaded(method):
    net = Net(method).eval()
    before = evaluate(net, batch())
    model = adapt(net)
    torch.testing.assert_close(evaluate(model, batch()), before)
    train(model.train(), deltas(model), steps=2)
    trained = evaluate(model, batch())
    assert not torch.allclose(trained, before)
    with pytest.warns(UserWarning, match=r"rounds the weight of every.* again.*pacatune merge"):
        model.merge_adapter()
    assert not torch.equal(evaluate(model, batch()), trained)
    model.unmerge_adapter()
    assert torch.equal(evaluate(model, batch()), trained)
    with model.disable_adapter():
        assert torch.equal(evaluate(model, batch()), before)
    assert torch.equal(evaluate(model.unload(), batch()), before)


def test_inference_equals_training(method):
    model = adapt(Net(method))
    fill(model)
    trained = model.train()(batch()).detach()
    # In evaluation, and on a GPU always, bitsandbytes rounds activations to 8 bits as well.
    tolerance = 0.02 if method == "bitsandbytes-int8" else 2e-5
    with torch.no_grad():
        error = (model.eval()(batch()) - trained).abs().max()
    assert error <= tolerance * trained.abs().max()


@pytest.mark.parametrize("kind", ["bitsandbytes-nf4", "bitsandbytes-fp4-double"])
def test_peak_of_a_layer_is_one_dequantised_weight(kind):
    layer = layers(adapt(Net(kind)))["first"]
    x = torch.randn(2, IN, requires_grad=True)
    with StorageTracker() as tracker:
        y = layer(x).sum()
        forward = tracker.peak_bytes
        tracker.reset_peak()
        y.backward()
    for peak in (forward, tracker.peak_bytes):
        assert 1 <= peak / (4 * IN * OUT) < 1.5


def test_save_and_load(method, tmp_path):
    model = adapt(Net(method))
    fill(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Net(method), tmp_path)
    assert torch.equal(evaluate(loaded, batch()), evaluate(model, batch()))
    assert loaded.peft_config["default"].base_quantization


def test_another_rounding_is_told(tmp_path):
    adapt(Net("bitsandbytes-nf4")).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"quantised as 'bitsandbytes nf4.*'bitsandbytes int8'"):
        PeftModel.from_pretrained(Net("bitsandbytes-int8"), tmp_path)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's
def test_compiles_and_trains_alike():
    torch._dynamo.reset()
    model = adapt(Net("bitsandbytes-nf4"))
    twin = copy.deepcopy(model)
    losses = train(torch.compile(model, backend="aot_eager"), deltas(model), 3)
    assert losses == pytest.approx(train(twin, deltas(twin), 3), rel=1e-5)


# bitsandbytes' reordering of 4-bit weights for AVX-512 CPUs, by its own functions on any CPU.


class Backend:
    backend_name = "bnb 4bit"


def weight_of(layer):
    return dequantized(Backend, layer, torch.float32)


def pack_(layer):
    """What the first evaluation does."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    layer.support_avx512bf16_for_cpu = True
    layer.weight.data, _ = _convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )


@pytest.fixture(params=["bitsandbytes-nf4", "bitsandbytes-fp4-double"])
def net(request):
    torch.manual_seed(0)
    layers = (quantise(nn.Linear(128, 64), request.param) for _ in range(2))
    return nn.ModuleDict(dict(zip(("first", "second"), layers, strict=True)))


def test_packed_weights_are_put_back(net):
    layer = net["first"]
    before = weight_of(layer)
    pack_(layer)
    assert layer.weight.shape == (64, 64)
    forbid_packing(net)
    assert layer.support_avx512bf16_for_cpu is False
    # What the scales lost to bfloat16 while they were packed is gone; nested ones lose once more.
    torch.testing.assert_close(weight_of(layer), before, rtol=2**-7, atol=1e-3)


def test_whole_model_keeps_its_weights_from_adapting_on(net):
    """Layers beside the adapted one as well: else an evaluation would change them."""
    for layer in net.values():
        layer.support_avx512bf16_for_cpu = True
    before = {name: weight_of(layer) for name, layer in net.items()}
    model = get_peft_model(net, PacaConfig(r=4, target_modules=["first"]))
    x = torch.randn(3, 128)
    with torch.no_grad():
        model.eval().base_model.model["second"](x)
        model.base_model.model["first"](x)
    net = model.unload()
    for name, layer in net.items():
        assert type(layer).__name__ == "Linear4bit"
        assert torch.equal(weight_of(layer), before[name])
