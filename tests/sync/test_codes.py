"""Codes of FP8 from a trainer that computes with just these to what serves them."""

import json

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from pacatune import PacaConfig
from pacatune.adapters.base import load_base
from pacatune.adapters.loading import hotswap_adapter
from pacatune.patch.packed import merge_packed, open_packed
from pacatune.sync import ColumnReceiver, ColumnSource, GridSteps
from pacatune.sync.message import Reader, to_wire
from tests.distributed import net
from tests.grid.test_folder import KINDS, folder
from tests.releases import needs
from tests.sync.conftest import step

__all__ = ["folder"]

pytestmark = needs("compressed_tensors")
fp8 = pytest.mark.parametrize("folder", [kind for kind in KINDS if "fp8" in kind], indirect=True)


def adapted(folder, dtype="bfloat16", **options):
    options = {"r": 4, "paca_alpha": 8, "target_modules": "all-linear", **options}
    base = load_base(str(folder), task_type="CAUSAL_LM", dtype=dtype)
    return get_peft_model(base, PacaConfig(**options, task_type="CAUSAL_LM"))


def bits_of(tensors):
    return {name: tensor.view(torch.uint8) for name, tensor in tensors.items()}


@fp8
@torch.no_grad()
def test_the_sampler_has_the_trainers_function(folder, tmp_path):
    model, checkpoint = adapted(folder), open_packed(folder)
    server = load_file(folder / "model.safetensors")
    plain = {name: tensor.clone() for name, tensor in server.items()}
    optimizer = torch.optim.AdamW(net.trained(model), lr=3e-3)
    steps = GridSteps(model, checkpoint, optimizer)
    source = ColumnSource(model, codes=checkpoint)
    receiver = ColumnReceiver(server, is_partial=False)
    reader = Reader()
    receiver.apply(reader.read(*to_wire(source.columns())))
    assert bits_of(server).keys() == plain.keys()
    ids = torch.arange(3, 60)[None]
    for seed in range(3):
        with torch.enable_grad():
            step(model, optimizer, seed)
            trained = model.train()(ids).logits
        assert receiver.apply(reader.read(*to_wire(source.columns())))
        save_file(server, folder / "model.safetensors", {"format": "pt"})
        served = load_base(str(folder), task_type="CAUSAL_LM", dtype="bfloat16")
        assert torch.equal(served(ids).logits, trained)
    # It is what a merge of the adapter writes into the file.
    save_file(plain, folder / "model.safetensors", {"format": "pt"})
    model.save_pretrained(tmp_path / "adapter")
    merge_packed(folder, tmp_path / "adapter", tmp_path / "merged", verify=False)
    merged = bits_of(load_file(tmp_path / "merged" / "model.safetensors"))
    found = bits_of(server)
    assert all(torch.equal(found[name], merged[name]) for name in merged)
    changed = [n for n, one in found.items() if not torch.equal(one, bits_of(plain)[n])]
    assert len(changed) == 14
    # Steps go on from what the optimiser has reached, not from the codes.
    reached = [one.update.delta + one.rest for one in steps._trained]
    assert any(one.rest.any() for one in steps._trained)
    with torch.enable_grad():
        step(model, optimizer, 3)
    for one, before in zip(steps._trained, reached, strict=True):
        assert (one.update.delta + one.rest - before).abs().max() < 4e-3
    receiver.apply(source.base_columns())
    receiver.revert()
    assert all(torch.equal(one, bits_of(plain)[name]) for name, one in bits_of(server).items())


@fp8
@pytest.mark.parametrize("load", [lambda m, f: m.load_adapter(f, "default"), hotswap_adapter])
@pytest.mark.parametrize("random_seed", [42, 7])
def test_steps_go_on_from_an_adapter_that_is_loaded_after(folder, tmp_path, random_seed, load):
    """As a trainer resumes; the columns of another seed are loaded with it."""
    checkpoint, options = open_packed(folder), {"random_seed": random_seed}
    model = adapted(folder, **options)
    optimizer = torch.optim.AdamW(net.trained(model), lr=3e-3)
    GridSteps(model, checkpoint, optimizer)
    for seed in range(3):
        step(model, optimizer, seed)
    model.save_pretrained(tmp_path)

    resumed = adapted(folder)
    optimizer = torch.optim.AdamW(net.trained(resumed), lr=0.0)
    steps = GridSteps(resumed, checkpoint, optimizer)
    step(resumed, optimizer, 0)
    load(resumed, tmp_path)
    for seed in range(2):
        step(resumed, optimizer, seed)
        for one, layer in zip(steps._trained, net.layers_of(model), strict=True):
            assert torch.equal(one.update.delta, layer.delta_of("default"))
            assert torch.equal(one.update.indices, layer.paca_indices["default"])


@fp8
def test_a_step_that_raises_leaves_the_columns_at_codes(folder):
    model = adapted(folder)
    optimizer = torch.optim.AdamW(net.trained(model), lr=3e-3)
    steps = GridSteps(model, open_packed(folder), optimizer)
    step(model, optimizer, 0)
    assert any(one.rest.any() for one in steps._trained)
    before = [delta.detach().clone() for delta in net.trained(model)]

    def assert_the_same():
        assert all(map(torch.equal, net.trained(model), before))

    def closure():  # computes gradients there, as Lightning's do
        assert_the_same()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert_the_same()


@fp8
@torch.no_grad()
def test_without_its_steps_the_nearest_codes_are_sent(folder):
    model, checkpoint = adapted(folder), open_packed(folder)
    server = load_file(folder / "model.safetensors")
    source, receiver = ColumnSource(model, codes=checkpoint), ColumnReceiver(server)
    receiver.check_base(source.base_columns())
    for layer in net.layers_of(model):
        layer.delta_of("default").normal_(std=0.0005)
    receiver.apply(source.columns())
    save_file(server, folder / "model.safetensors", {"format": "pt"})
    served = load_base(str(folder), task_type="CAUSAL_LM", dtype="bfloat16")
    merged = model.merge_and_unload()
    for name, weight in merged.state_dict().items():
        error = (served.state_dict()[name] - weight).abs()
        assert (error <= 0.07 * weight.abs() + 0.004).all(), name
    assert any((served.state_dict()[n] != w).any() for n, w in merged.state_dict().items())


@fp8
def test_what_cannot_be_at_codes_exactly(folder):
    checkpoint = open_packed(folder)

    def refuse(match, model):
        with pytest.raises(ValueError, match=match):
            GridSteps(model, checkpoint, torch.optim.AdamW(net.trained(model)))

    refuse(r"has alpha / r = 3, by which values of codes would", adapted(folder, paca_alpha=12))
    refuse(r"is in torch.float32 and its delta in", adapted(folder, dtype="float32"))
    model = adapted(folder)
    with torch.no_grad():
        net.layers_of(model)[0].get_base_layer().weight.mul_(2)
    refuse("does not hold 'model.layers.0.self_attn.q_proj.weight' as the model", model)
    with torch.no_grad():
        net.layers_of(model := adapted(folder))[0].delta_of("default")[0, 0] = float("nan")
    with pytest.raises(
        ValueError, match=r"columns of '.*q_proj.weight' are not finite: training has diverged"
    ):
        ColumnSource(model, codes=checkpoint).columns()


@pytest.mark.parametrize("folder", ["fp8-rows"], indirect=True)
def test_a_weight_of_plain_numbers_is_trained_and_sent_as_ever(folder):
    module, path = "model.layers.0.mlp.up_proj", folder / "model.safetensors"
    config, server = json.loads((folder / "config.json").read_text()), load_file(path)
    config["quantization_config"]["ignore"].append(module)
    (folder / "config.json").write_text(json.dumps(config))
    scale = server.pop(f"{module}.weight_scale")
    server[f"{module}.weight"] = server[f"{module}.weight"].bfloat16() * scale
    save_file(server, path, {"format": "pt"})
    model, checkpoint = adapted(folder), open_packed(folder)
    optimizer = torch.optim.AdamW(net.trained(model), lr=3e-3)
    steps = GridSteps(model, checkpoint, optimizer)
    assert len(steps._trained) == 13
    source, receiver = ColumnSource(model, codes=checkpoint), ColumnReceiver(server)
    step(model, optimizer, 0)
    receiver.apply(source.columns())
    dtypes = {server[f"{name}.weight"].dtype for name in (module, module.replace("up", "down"))}
    assert dtypes == {torch.bfloat16, torch.float8_e4m3fn}
    merged = model.merge_and_unload().state_dict()
    assert torch.equal(server[f"{module}.weight"], merged[f"{module}.weight"])


@pytest.mark.parametrize("folder", ["int4"], indirect=True)
def test_codes_that_share_bytes_are_refused(folder):
    with pytest.raises(
        ValueError, match=r"as INT4, and codes of F8_E4M3 alone are synced; serve a"
    ):
        ColumnSource(adapted(folder), codes=open_packed(folder))
