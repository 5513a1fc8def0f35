"""The dial: c columns in place, whose update is a product of rank r.

What every kind of layer does with it is in test_every_kind.py and in the random walks, as for plain
columns; here is what plain columns have not.
"""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from pacatune import PacaConfig
from pacatune.adapters.export import export_lora
from pacatune.adapters.folder import read_adapter
from pacatune.adapters.from_lora import adapter_from_lora
from pacatune.adapters.inspect import inspect_adapter
from pacatune.ops.columns import Update, mixed
from pacatune.residency import resident
from tests.tuner.nets import evaluate, fill, layers

IN, OUT, RANK = 24, 32, 4


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(IN, OUT, dtype=dtype), nn.Linear(OUT, 8, dtype=dtype)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def adapt(base: nn.Module, **options):
    options = {"r": RANK, "channels": 12, "target_modules": ["up", "down"], **options}
    return get_peft_model(copy.deepcopy(base), PacaConfig(**options))


@pytest.mark.parametrize(
    ("channels", "wanted"),
    [(None, (4, 4)), (4, (4, 4)), (12, (12, 12)), (30, (24, 30)), (0.25, (6, 8)), (1.0, (24, 32))],
)
def test_how_many_columns_are_trained(channels, wanted):
    """A share is of each weight's own columns; narrow weights train all they have."""
    own = layers(adapt(Net(), channels=channels))
    assert tuple(len(layer.paca_indices["default"]) for layer in own.values()) == wanted
    for layer in own.values():
        delta, indices, scaling, mix = layer.update_of("default")
        assert scaling == 8 / RANK
        assert delta.shape == (layer.out_features, RANK)
        assert (mix is None) == (channels is None)
        assert mix is None or mix.shape == (RANK, len(indices))


def test_a_share_is_never_less_than_the_rank():
    own = layers(adapt(Net(), channels=0.01))
    assert {len(layer.paca_indices["default"]) for layer in own.values()} == {RANK}


@pytest.mark.parametrize("channels", [3, 0, -1, True, 0.0, 1.5, "all", float("nan")])
def test_other_channels_are_refused(channels):
    with pytest.raises(ValueError, match=r"`channels` .* at least `r` \(4\), or a share"):
        PacaConfig(r=4, channels=channels)


def test_it_starts_at_the_base_with_loras_random_factor():
    """Uniform within 1 / sqrt(inputs); the same seed gives the same, another name another."""
    base, x = Net(), torch.randn(5, IN)
    own, again = (layers(adapt(base, random_seed=3)) for _ in range(2))
    for name, layer in own.items():
        mix = layer.update_of("default").mix.detach()
        assert torch.equal(mix, again[name].update_of("default").mix)
        assert 0.8 < float(mix.abs().max()) * 12**0.5 <= 1
        assert not layer.update_of("default").delta.any()
    assert not torch.equal(*(layer.update_of("default").mix for layer in own.values()))
    other = layers(adapt(base, random_seed=4))["up"].update_of("default").mix
    assert not torch.equal(other, own["up"].update_of("default").mix)
    assert torch.equal(adapt(base)(x), base(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_weight_whether_written_added_or_merged(dtype):
    """R7, bit for bit where the output shows the weight."""
    base = Net(dtype)
    model = adapt(base)
    fill(model)
    layer, x = layers(model)["up"], torch.eye(IN, dtype=dtype)
    layer.base_layer.bias.data.zero_()
    update, weight = layer.update_of("default"), base.up.weight.detach()
    columns = weight[:, update.indices].float()
    product = update.scaling * (update.delta.double() @ update.mix.double()).float()
    wanted = weight.index_copy(1, update.indices, (columns + product).to(dtype))
    assert torch.equal(layer(x).detach().t(), wanted)
    assert layer.residency.is_written
    with torch.no_grad(), resident(model):
        assert torch.equal(layer(x).t(), wanted)
    if dtype != torch.float32:
        assert torch.equal(evaluate(layer, x).t(), wanted)
    model.merge_adapter()
    assert torch.equal(layer.base_layer.weight, wanted)
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight, weight)


def test_the_product_does_not_depend_on_the_order_of_sums_or_on_tf32():
    """Summed in any order in float64, it rounds to the same float32."""
    torch.manual_seed(0)
    delta, mix, order = torch.randn(64, 16), torch.randn(16, 96), torch.randperm(16)
    one, other = mixed(delta, mix), mixed(delta[:, order], mix[order])
    assert one.dtype == torch.float32
    assert torch.equal(one, other)
    assert not torch.equal(delta @ mix, one)


def test_a_change_of_either_factor_is_written():
    model, x = adapt(Net()), torch.randn(5, IN)
    fill(model)
    outputs = [model(x)]
    for place in (0, 1):
        with torch.no_grad():
            layers(model)["up"].update_of("default").trained()[place].mul_(2)
        outputs.append(model(x))
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])
    merged = copy.deepcopy(model).merge_and_unload()
    assert torch.equal(merged(x), outputs[2])


@pytest.mark.parametrize("frozen", [0, 1])
def test_one_factor_may_be_frozen(frozen):
    """LoRA-FA freezes the random one."""
    model, x = adapt(Net()), torch.randn(5, IN)
    fill(model)
    for layer in layers(model).values():
        layer.update_of("default").trained()[frozen].requires_grad_(False)
    model(x).square().sum().backward()
    free = adapt(Net())
    fill(free)
    free(x).square().sum().backward()
    for layer, other in zip(layers(model).values(), layers(free).values(), strict=True):
        own, others = layer.update_of("default").trained(), other.update_of("default").trained()
        assert own[frozen].grad is None
        torch.testing.assert_close(own[1 - frozen].grad, others[1 - frozen].grad)


def test_the_file_says_that_pefts_paca_cannot_read_it(tmp_path):
    model = adapt(Net())
    fill(model)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["channels"], config["r"]) == ("PACATUNE", 12, RANK)
    update = read_adapter(tmp_path).modules["up"]
    assert (update.rank, update.delta.shape, update.mix.shape) == (4, (OUT, 4), (4, 12))
    torch.testing.assert_close(update.dense(), layers(model)["up"].delta_of("default"))
    loaded = PeftModel.from_pretrained(Net(), tmp_path)
    x = torch.randn(5, IN)
    assert torch.equal(evaluate(loaded, x), evaluate(model, x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("base_model.model.up.paca_mix"), r"`paca_indices` has shape \(12,\)"),
        (lambda t: _cut(t, "up.paca_mix", 0), r"`paca_mix` has shape \(3, 12\); it must be"),
        (lambda t: _cut(t, "up.paca_mix", 1), r"`paca_mix` has shape \(4, 11\); it must be"),
        (lambda t: t["base_model.model.up.paca_mix"].fill_(torch.nan), "paca_mix.* not finite"),
    ],
    ids=["missing", "other rank", "other columns", "not finite"],
)
def test_a_damaged_file_is_refused(change, message, tmp_path):
    adapt(Net()).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=message):
        read_adapter(tmp_path)


def _cut(tensors, name, dim):
    tensor = tensors[f"base_model.model.{name}"]
    tensors[f"base_model.model.{name}"] = tensor.narrow(dim, 1, tensor.shape[dim] - 1).clone()


def test_plain_columns_with_a_mix_are_refused(tmp_path):
    adapt(Net()).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "channels": None}))
    with pytest.raises(ValueError, match="has a `paca_mix` but the configuration says `channels`"):
        read_adapter(tmp_path)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=2)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning")
@pytest.mark.parametrize("build", [Net, Convolutions])
def test_the_exported_lora_has_its_rank_and_factors(build, tmp_path):
    """Whatever c is; of a grouped convolution alone the rank is another."""
    base = build()
    model = adapt(base, channels=0.5)
    fill(model)
    model.save_pretrained(tmp_path / "adapter")
    result = export_lora(base, tmp_path / "adapter", tmp_path / "lora")
    assert result.rounding == 0
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    update = layers(model)["up"].update_of("default")
    factor_a, factor_b = (tensors[f"base_model.model.up.lora_{n}.weight"] for n in "AB")
    assert torch.equal(factor_a[:, update.indices], update.mix)
    assert torch.equal(factor_b.flatten(1), update.delta)
    assert len(factor_a) == RANK
    assert not factor_a.index_fill(1, update.indices, 0).any()
    lora = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora")
    x = torch.randn(5, IN) if build is Net else torch.randn(2, 6, 5, 5)
    torch.testing.assert_close(evaluate(lora, x), evaluate(model, x))


def test_all_columns_are_lora_without_its_layers():
    """The same numbers as PEFT's LoRA from the same start, step by step."""
    base, x = Net(), torch.randn(16, IN)
    ours = adapt(base, channels=1.0, paca_alpha=8)
    config = LoraConfig(r=RANK, lora_alpha=8, target_modules=["up", "down"])
    theirs = get_peft_model(copy.deepcopy(base), config)
    for name, layer in layers(ours).items():
        update, lora = layer.update_of("default"), theirs.base_model.model.get_submodule(name)
        lora.lora_A["default"].weight.data.copy_(update.mix)
    optimizers = [
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.01)
        for m in (ours, theirs)
    ]
    for _ in range(10):
        losses = []
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"modules_to_save": ["down"]}])
def test_a_lora_is_trained_in_place_and_a_lora_again(options, tmp_path):
    if "modules_to_save" in options:
        options = {**options, "target_modules": ["up"]}
    torch.manual_seed(1)
    config = LoraConfig(**{"r": RANK, "lora_alpha": 6, "target_modules": ["up", "down"]} | options)
    theirs = get_peft_model(Net(), config)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(tmp_path / "lora")
    num_modules = adapter_from_lora(tmp_path / "lora", tmp_path / "paca")
    assert num_modules == len(config.target_modules)
    ours = PeftModel.from_pretrained(Net(), tmp_path / "paca", is_trainable=True)
    x = torch.randn(5, IN)
    torch.testing.assert_close(ours(x), theirs(x))
    assert layers(ours)["up"].residency.is_written
    optimizer = torch.optim.SGD([p for p in ours.parameters() if p.requires_grad], lr=0.1)
    ours(x).square().sum().backward()
    optimizer.step()
    ours.save_pretrained(tmp_path / "trained")
    keep = {"keep_extra": "modules_to_save" in options}
    export_lora(Net(), tmp_path / "trained", tmp_path / "again", **keep)
    again = PeftModel.from_pretrained(Net(), tmp_path / "again")
    torch.testing.assert_close(evaluate(again, x), evaluate(ours, x))


def test_a_lora_that_is_more_is_refused(tmp_path):
    config = LoraConfig(r=RANK, target_modules=["up"], use_dora=True)
    get_peft_model(Net(), config).save_pretrained(tmp_path / "dora")
    with pytest.raises(ValueError, match="has `use_dora` = True, so it is more than B A"):
        adapter_from_lora(tmp_path / "dora", tmp_path / "out")
    adapt(Net()).save_pretrained(tmp_path / "paca")
    with pytest.raises(ValueError, match="is no LoRA adapter"):
        adapter_from_lora(tmp_path / "paca", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_update_says_what_it_adds():
    delta, mix = torch.randn(3, 5, 2), torch.randn(3, 2, 4)  # experts
    dense = Update(delta, torch.arange(4), 0.5, mix).dense()
    torch.testing.assert_close(dense, torch.einsum("eor,erc->eoc", delta, mix))
    delta, mix = torch.randn(5, 2), torch.randn(2, 4, 3, 3)  # a convolution
    dense = Update(delta, torch.arange(4), 0.5, mix).dense()
    torch.testing.assert_close(dense, torch.einsum("or,rcxy->ocxy", delta, mix))


@pytest.mark.parametrize("name", ["up.paca_delta", "up.paca_mix", "up.paca_indices"])
def test_tensors_of_any_shape_are_read_or_refused(name, tmp_path):
    """Whatever a stranger writes: an error that says what is wrong, or an update of one shape."""
    adapt(Net()).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors, key, generator = load_file(path), f"base_model.model.{name}", torch.Generator()
    plain = tensors[key]
    for _ in range(60):
        number = int(torch.randint(0, 5, (), generator=generator))
        sizes = torch.randint(0, 5, (number,), generator=generator)
        tensors[key] = torch.zeros(sizes.tolist()).to(plain)
        save_file(tensors, path)
        try:
            update = read_adapter(tmp_path).modules["up"]
        except ValueError as error:
            assert "up" in str(error)  # noqa: PT017
        else:
            assert tuple(update.dense().shape) == update.dense_shape


def test_a_report_says_how_many_columns_are_trained(tmp_path):
    adapt(Net(), channels=0.25).save_pretrained(tmp_path)
    report = inspect_adapter(tmp_path)
    assert (report.rank, report.channels) == (4, 0.25)
    assert {module.name: len(module.columns) for module in report.modules} == {"up": 6, "down": 8}
