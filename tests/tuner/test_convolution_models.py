"""Networks with adapted convolutions: training, files, merging, and what is refused."""

import copy
import json
import pickle

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.save_and_load import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from pacatune import PacaConfig
from pacatune.adapters.loading import hotswap_adapter
from pacatune.ops import reference
from pacatune.tuner import PacaLayer
from tests.releases import compiles_whole
from tests.tuner.conv_nets import CNN_TARGETS, Cnn, adapt, layers, randomise

# Dynamo itself instantiates autograd Functions while it traces them.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    torch._dynamo.reset()


@pytest.mark.parametrize("optimizer_name", ["SGD", "AdamW"])
def test_ten_steps_equal_masked_full_fine_tuning(optimizer_name):
    full = Cnn().double()
    before = {name: weight.clone() for name, weight in full.state_dict().items()}
    model = get_peft_model(
        copy.deepcopy(full),
        PacaConfig(r=3, paca_alpha=3, target_modules=CNN_TARGETS),
        autocast_adapter_dtype=False,
    )
    adapted = {n: m for n, m in model.base_model.model.named_modules() if isinstance(m, PacaLayer)}
    assert len(adapted) == 9
    full.requires_grad_(False)
    for name, layer in adapted.items():
        weight = full.get_submodule(name).weight.requires_grad_()
        delta, indices = torch.ones_like(layer.delta_of("default")), layer.paca_indices["default"]
        if weight.dim() == 2:
            mask = torch.zeros_like(weight)
            mask[:, indices] = 1
        else:
            groups = full.get_submodule(name).groups
            mask = reference.adapted_kernel(torch.zeros_like(weight), delta, indices, 1.0, groups)
        weight.register_hook(lambda grad, mask=mask: grad * mask)
    losses = []
    for one in (full, model):
        lr = 0.05 if optimizer_name == "SGD" else 0.01
        parameters = [p for p in one.parameters() if p.requires_grad]
        options = {"weight_decay": 0.0} if optimizer_name == "AdamW" else {"momentum": 0.9}
        optimizer = getattr(torch.optim, optimizer_name)(parameters, lr=lr, **options)
        generator = torch.Generator().manual_seed(1)
        losses.append([])
        for _ in range(10):
            x = torch.randn(4, 3, 12, 12, generator=generator, dtype=torch.float64)
            loss = F.cross_entropy(one(x), torch.arange(4))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
    for name, layer in adapted.items():
        assert torch.equal(layer.base_layer.weight, before[f"{name}.weight"])
    merged = model.merge_and_unload()
    for name in adapted:
        ours, theirs = merged.get_submodule(name).weight, full.get_submodule(name).weight
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)


class TestWholeModels:
    X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(5))

    def outputs(self, model, **kwargs):
        with torch.no_grad():
            return model.eval()(self.X, **kwargs)

    def test_names_and_shapes_in_the_file(self, tmp_path):
        adapt(Cnn(), CNN_TARGETS).save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "adapter_model.safetensors")
        shapes = {
            name.removeprefix("base_model.model."): tuple(t.shape) for name, t in tensors.items()
        }
        assert shapes["stem.paca_delta"] == (8, 2, 3, 3)
        assert shapes["blocks.0.expand.paca_delta"] == (16, 2, 1, 1)
        assert shapes["blocks.0.depthwise.paca_delta"] == (1, 2, 3, 3)
        assert shapes["grouped.paca_delta"] == (3, 2, 3, 3)
        assert shapes["grouped.paca_indices"] == (2,)

    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_save_and_load(self, tmp_path, low_cpu_mem_usage):
        base = Cnn()
        model = adapt(copy.deepcopy(base), CNN_TARGETS, bias="paca_only")
        model.save_pretrained(tmp_path)
        path = tmp_path / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "random_seed": 999}))
        loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(self.outputs(loaded), self.outputs(model))

    @pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_copies(self, twin):
        model = adapt(Cnn(), CNN_TARGETS)
        want, other = self.outputs(model), twin(model)
        randomise(model, 8)
        assert torch.equal(self.outputs(other), want)

    def test_weighted_sum_is_exact(self, tmp_path):
        base = Cnn()
        model = adapt(copy.deepcopy(base), CNN_TARGETS)
        model.add_adapter("b", PacaConfig(r=3, paca_alpha=5, target_modules=CNN_TARGETS[:4]))
        randomise(model, 3, "b")
        model.add_weighted_adapter(["default", "b"], [0.5, -2.0], "sum")
        for layer in layers(model):
            parts = [(0.5, "default")] + [(-2.0, "b")] * ("b" in layer.r)
            want = sum(weight * layer.get_delta_weight(name) for weight, name in parts)
            torch.testing.assert_close(layer.get_delta_weight("sum"), want)
        model.set_adapter("sum")
        model.save_pretrained(tmp_path, selected_adapters=["sum"])
        loaded = PeftModel.from_pretrained(base, tmp_path / "sum")
        torch.testing.assert_close(self.outputs(loaded), self.outputs(model))

    @pytest.mark.parametrize("rank", [2, 3])
    def test_hotswap(self, tmp_path, rank):
        base = Cnn()
        other = adapt(copy.deepcopy(base), CNN_TARGETS, 1, r=rank, random_seed=8)
        other.save_pretrained(tmp_path)
        model = adapt(base, CNN_TARGETS)
        hotswap_adapter(model, tmp_path)
        assert torch.equal(self.outputs(model), self.outputs(other))

    def test_hotswap_of_another_kernel_is_refused(self, tmp_path):
        adapt(nn.Sequential(nn.Conv2d(3, 4, 5))).save_pretrained(tmp_path)
        model = adapt(nn.Sequential(nn.Conv2d(3, 4, 3)))
        with pytest.raises(ValueError, match=r"delta of \(4, 2, 5, 5\).* needs \(4, 2, 3, 3\)"):
            hotswap_adapter(model, tmp_path)

    def test_merging_a_hundred_times_in_bfloat16_changes_nothing(self):
        model = adapt(Cnn().bfloat16(), CNN_TARGETS)
        before = {n: p.clone() for n, p in model.named_parameters() if "paca_" not in n}
        for _ in range(100):
            model.merge_adapter()
            model.unmerge_adapter()
        assert all(torch.equal(dict(model.named_parameters())[n], p) for n, p in before.items())

    def test_safe_merge_refuses_values_that_are_not_finite(self):
        model = adapt(Cnn(), CNN_TARGETS)
        layers(model)[-2].delta_of("default").data[0, 0, 0] = float("nan")
        with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
            model.merge_adapter(safe_merge=True)

    def test_channels_last_models_stay_channels_last(self):
        model = adapt(Cnn(), CNN_TARGETS).to(memory_format=torch.channels_last)
        seen = []
        for module in model.modules():
            if isinstance(module, PacaLayer) and module.base_layer.weight.dim() == 4:
                module.register_forward_hook(lambda module, args, y: seen.append(y))
        want = self.outputs(model)
        seen.clear()
        x = self.X.contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(model(x), want, atol=1e-5, rtol=1e-5)
        assert len(seen) == 8
        assert all(y.is_contiguous(memory_format=torch.channels_last) for y in seen)

    def test_autocast(self):
        model = adapt(Cnn(), CNN_TARGETS).eval()
        with torch.autocast("cpu", torch.bfloat16):
            y = model(self.X)
            y.float().sum().backward()
            with torch.no_grad():
                merged = copy.deepcopy(model).merge_and_unload()(self.X)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y, merged, atol=0.05, rtol=0.05)
        assert all(layer.delta_of("default").grad.dtype == torch.float32 for layer in layers(model))

    @compiles_whole
    def test_trains_compiled_as_eagerly_in_one_graph(self):
        model = adapt(Cnn().double(), CNN_TARGETS)
        twin = copy.deepcopy(model)
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        losses = []
        for one, run in ((model, compiled), (twin, twin)):
            optimizer = torch.optim.AdamW([p for p in one.parameters() if p.requires_grad], lr=0.01)
            losses.append([])
            for _ in range(4):
                loss = F.cross_entropy(run(self.X.double()), torch.arange(2))
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses[-1].append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-10)
        assert counter.frame_count == 1

    def test_bias_is_trained_and_saved(self):
        model = adapt(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)), bias="paca_only")
        model(self.X).sum().backward()
        gradient = layers(model)[0].base_layer.bias.grad
        y = model.base_model.model[1].weight.sum((0, 2, 3)) * 2 * 8 * 8
        torch.testing.assert_close(gradient, y)
        assert any(name.endswith("bias") for name in get_peft_model_state_dict(model))

    def test_two_convolutions_that_share_their_weight(self):
        base = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1))
        base[1].weight = base[0].weight
        weight = base[0].weight.clone()
        model = adapt(base, ["1"])
        want = self.outputs(model)
        model.merge_adapter()
        assert torch.equal(base[0].weight, weight)
        assert torch.equal(self.outputs(model), want)
        model.unmerge_adapter()
        assert model.base_model.model[1].base_layer.weight is base[0].weight

    def test_repr_names_the_kind(self):
        assert repr(layers(adapt(nn.Sequential(nn.Conv3d(2, 2, 1))))[0]).startswith("paca.Conv3d(")
