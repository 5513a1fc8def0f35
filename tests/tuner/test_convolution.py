"""What no other adapted layer does: torch.func through a kernel, forwards of subclasses, mixers.

test_every_kind.py has all that every layer does, ops/test_convolution.py the gradients.
"""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import MambaConfig, MambaForCausalLM

from tests.releases import compiles_whole
from tests.residency.twin import Standardises, twin_of
from tests.tuner import nets
from tests.tuner.nets import layers


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    torch._dynamo.reset()


def adapt(base, targets="0", **options):
    return nets.adapt(base, target_modules=targets, **{"r": 2, "paca_alpha": 3, **options})


class ReadsTwice(nn.Conv2d):
    def forward(self, x):
        weight = self.weight
        time.sleep(0.02)
        assert self.weight is weight
        return super().forward(x)


def test_threads_that_evaluate_a_subclass_take_turns():
    """Its kernel is in the module while its own forward runs."""
    model = adapt(nn.Sequential(ReadsTwice(5, 4, 3)))
    x = torch.randn(2, 5, 6, 6)
    want = model(x).detach()
    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(model, [x] * 4):
            assert torch.equal(found, want)


# Dynamo itself instantiates autograd Functions while it traces them.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("is_compiled", [False, pytest.param(True, marks=compiles_whole)])
def test_per_sample_gradients_by_torch_func(is_compiled):
    twin = twin_of("Conv2d", torch.float64)
    x = twin.inputs()
    rowwise = torch.func.vmap(torch.func.grad(lambda row: twin.layer(row).square().sum()))
    if is_compiled:
        rowwise = torch.compile(rowwise, fullgraph=True, backend="aot_eager")
    loss = twin.expected(x.requires_grad_(), ["default"])[0].square().sum()
    torch.testing.assert_close(rowwise(x.detach()), torch.autograd.grad(loss, x)[0])


def test_an_offloaded_layer_with_a_forward_of_its_own_is_refused():
    layer = layers(adapt(nn.Sequential(Standardises(3, 4, 3))))["0"]
    layer.base_layer.to("meta")
    assert layer.weight.is_meta
    with pytest.raises(ValueError, match="weight of a Standardises is offloaded or sharded"):
        layer(torch.randn(1, 3, 5, 5))


class TestMixersThatReadTheWeight:
    """Mamba's cached steps and its fused kernels never call their convolution."""

    @pytest.fixture
    def model(self):
        config = MambaConfig(vocab_size=40, hidden_size=16, state_size=4, num_hidden_layers=2)
        return adapt(MambaForCausalLM(config).eval(), ["conv1d"], r=8)

    def test_generation_is_that_of_the_merged_model(self, model):
        def generated(model):
            options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True}
            ids = torch.arange(3, 9)[None]
            result = model.generate(input_ids=ids, return_dict_in_generate=True, **options)
            return torch.stack(result.logits)

        ours = generated(model)
        with model.disable_adapter():
            base = generated(model)
        theirs = generated(model.merge_and_unload())
        torch.testing.assert_close(ours, theirs)
        assert not torch.allclose(base, theirs)

    def test_the_weight_that_is_read_trains_the_adapter_or_is_the_base(self, model):
        layer = next(iter(layers(model).values()))
        x = torch.randn(2, 32, 6)
        y = F.conv1d(x, layer.weight, layer.bias, padding=3, groups=32)
        ours = torch.autograd.grad(y.square().sum(), layer.delta_of("default"))
        theirs = torch.autograd.grad(layer(x).square().sum(), layer.delta_of("default"))
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
        with model.disable_adapter():
            assert layer.weight is layer.base_layer.weight
        model.merge_adapter()
        assert layer.weight is layer.base_layer.weight
