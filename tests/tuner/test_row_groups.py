"""`PacaConfig(groups=G)`: what is chosen, checked, saved and loaded. Gradients: tests/residency."""

import json
import zlib

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import GPT2Config, GPT2LMHeadModel

from pacatune import PacaConfig, lean
from pacatune.adapters.loading import hotswap_adapter
from pacatune.selection import choose_columns
from tests.conftest import build_model
from tests.releases import compiles_whole

NAME = "model.layers.0.self_attn.q_proj"
FIXED = {"r": 4, "target_modules": ["q_proj", "down_proj"]}


def adapt(groups=4, base=None, **options):
    config = PacaConfig(**{**FIXED, "groups": groups, "init_weights": False, **options})
    return get_peft_model(build_model(300) if base is None else base, config)


def layer_of(model, name=NAME):
    return model.get_base_model().get_submodule(name)


def indices_of(model, adapter="default", name=NAME):
    return layer_of(model, name).paca_indices[adapter]


def test_each_group_draws_by_a_seed_of_its_own():
    """The first one draws what a layer without groups does."""
    indices = indices_of(adapt(4, random_seed=7))
    assert indices.shape == (4, 4)
    assert indices[0].equal(indices_of(adapt(1, random_seed=7)))
    for group in range(4):
        name = f"{NAME}[{group}]" if group else NAME
        generator = torch.Generator().manual_seed(7 + zlib.crc32(name.encode()))
        assert indices[group].equal(torch.randperm(32, generator=generator)[:4].sort().values)
    assert len(indices.unique()) > 4


def test_parameters_are_as_many_as_without_groups():
    many, one = (
        {name: p.shape for name, p in adapt(groups).named_parameters() if p.requires_grad}
        for groups in (8, 1)
    )
    assert many == one


def test_one_group_writes_the_files_of_before(tmp_path):
    model = adapt(1)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "groups" not in config
    assert config["peft_type"] == "PACA"
    assert load_file(tmp_path / "adapter_model.safetensors")[
        f"base_model.model.{NAME}.paca_indices"
    ].shape == (4,)


def test_saved_and_loaded(tmp_path):
    model, ids = adapt(), torch.arange(24).view(2, 12)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["groups"], config["peft_type"]) == (4, "PACATUNE")
    loaded = PeftModel.from_pretrained(build_model(300), tmp_path)
    assert loaded.peft_config["default"].groups == 4
    assert indices_of(loaded).equal(indices_of(model))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)


def test_columns_of_another_seed_are_kept(tmp_path):
    """A reference adapter is made from the configuration alone."""
    adapt(random_seed=3).save_pretrained(tmp_path)
    model = adapt(random_seed=5)
    hotswap_adapter(model, tmp_path)
    config = model.peft_config["default"]
    assert config.columns[NAME] == indices_of(adapt(random_seed=3)).tolist()
    model.add_adapter("reference", config)
    assert indices_of(model, "reference").equal(indices_of(model))


def test_hotswap_of_other_groups(tmp_path):
    other = adapt(2)
    other.save_pretrained(tmp_path)
    model, ids = adapt(4), torch.arange(24).view(2, 12)
    hotswap_adapter(model, tmp_path)
    assert model.peft_config["default"].groups == 2
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids).logits, other.eval()(ids).logits)


def test_files_and_configuration_of_different_groups_are_refused(tmp_path):
    adapt(2).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "groups": 4}))
    with pytest.raises(ValueError, match=r"has 2 row groups, and `groups` of its config.* is 4"):
        PeftModel.from_pretrained(build_model(300), tmp_path)


def test_given_columns(tmp_path):
    columns = {"q_proj": [[3, 1], [0, 1]], "down_proj": [[5, 6], [7, 9]]}
    model = adapt(2, r=2, selection=columns)
    assert indices_of(model).tolist() == [[1, 3], [0, 1]]
    assert model.peft_config["default"].selection == "fixed"
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    loaded = PeftModel.from_pretrained(build_model(300), tmp_path)
    assert indices_of(loaded).tolist() == [[1, 3], [0, 1]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 0}, r"`groups` \(0\) must be an integer of at least 1"),
        ({"groups": 2.0}, r"`groups` \(2.0\) must be an integer"),
        ({"selection": "weight_norm"}, r"`groups` \(2\) needs `selection` 'random'.*'weight_norm'"),
        ({"selection": {"q_proj": [0, 1]}}, r"must be 2 lists of column numbers of the same"),
        ({"selection": {"q_proj": [[0, 1], [1]]}}, r"must be 2 lists of column numbers"),
        ({"selection": {"q_proj": [[0, 1], [1, 1]]}}, "repeats a column"),
        ({"groups": 1, "selection": {"q_proj": [[0], [1]]}}, "must be a list of column numbers"),
    ],
)
def test_options_that_contradict(options, message):
    with pytest.raises(ValueError, match=message):
        PacaConfig(**{"r": 2, "groups": 2, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"groups": 5},
            r"`groups` \(5\) must divide out_features=32 of 'model.layers.0.self_attn.q_proj'; "
            "choose another number, or put .* into `exclude_modules`",
        ),
        ({"selection": {"q_proj": [[0], [1]], "down_proj": [[0], [64]]}}, "gives column 64 for"),
        ({"selection": {"q_proj": [[0], [1]], "down_proj": [[0, 1], [2, 3]]}}, "whose rank is 1"),
    ],
)
def test_a_refusal_leaves_the_model_alone(options, message):
    base = build_model(300)
    before = str(base)
    with pytest.raises(ValueError, match=message):
        adapt(base=base, **{"groups": 2, "r": 1, **options})
    assert str(base) == before


def test_convolutions_with_groups_of_their_own_are_refused():
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3, groups=8))
    with pytest.raises(ValueError, match=r"`groups` \(2\) cannot be had by '1', a convolution"):
        get_peft_model(net, PacaConfig(r=2, groups=2, target_modules=["0", "1"]))
    assert type(net[0]) is nn.Conv2d
    get_peft_model(net, PacaConfig(r=2, groups=2, target_modules=["0"]))


def test_columns_chosen_before_the_adapter_is_made():
    config = choose_columns(build_model(300), PacaConfig(**FIXED, groups=4))
    assert config.columns[NAME] == indices_of(adapt(4)).tolist()


def test_weighted_sums_have_all_columns_of_all_groups():
    model = adapt(4)
    model.add_adapter("one", PacaConfig(**FIXED, init_weights=False, random_seed=9))
    model.add_weighted_adapter(["default", "one"], [0.3, -2.0], "sum")
    config, layer = model.peft_config["sum"], layer_of(model)
    assert config.groups == 1
    distinct = torch.cat([indices_of(model).flatten(), indices_of(model, "one")]).unique()
    assert indices_of(model, "sum").equal(distinct)
    parts = (0.3 * layer.get_delta_weight("default"), -2.0 * layer.get_delta_weight("one"))
    torch.testing.assert_close(layer.get_delta_weight("sum"), sum(parts))


@pytest.mark.parametrize("level", [1, 2, 3])
def test_lean_models_compute_the_same(level):
    ids = torch.randint(0, 300, (2, 80), generator=torch.Generator().manual_seed(0))
    found = []
    for is_lean in (False, True):
        torch.manual_seed(0)
        model = adapt(4, build_model(300).double(), target_modules="all-linear").double().train()
        if is_lean:
            lean.enable(model, level=level)
        losses = []
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        for _ in range(3):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        found.append(losses)
    assert found[0] == pytest.approx(found[1], rel=1e-9)


def count_graphs(groups, trains):
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8)).double()
    options = {"r": 3, "groups": groups, "target_modules": ["0", "2"], "init_weights": False}
    model = get_peft_model(net, PacaConfig(**options), autocast_adapter_dtype=False).double()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    x = torch.randn(70, 12, dtype=torch.float64)
    for _ in range(3):
        with torch.set_grad_enabled(trains):
            y = compiled(x)
            torch.testing.assert_close(y, model(x))
        if trains:
            wanted = torch.autograd.grad(model(x).square().sum(), trained)
            y.square().sum().backward()
            for parameter, grad in zip(trained, wanted, strict=True):
                torch.testing.assert_close(parameter.grad, grad)
            optimizer.step()
            optimizer.zero_grad()
    return counter.frame_count


@compiles_whole
@pytest.mark.parametrize("trains", [True, False])
def test_as_many_graphs_as_without_groups(trains):
    assert count_graphs(4, trains) == count_graphs(1, trains)


def test_every_linear_layer_of_gpt2():
    base = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32))
    model = get_peft_model(base, PacaConfig(r=2, groups=4, target_modules=["c_attn", "c_fc"]))
    indices = model.get_base_model().transformer.h[0].attn.c_attn.paca_indices["default"]
    assert indices.shape == (4, 2)
    assert int(indices.max()) < 16


def test_steps_normalised_by_column():
    """Each group's columns have rates of their own."""
    model = adapt(4, build_model(300).double(), normalize="weight", random_seed=1).double()
    rates = torch.tensor(model.peft_config["default"].column_rates[NAME], dtype=torch.float64)
    assert rates.shape == (4, 4)
    delta = layer_of(model).delta_of("default")
    before = delta.detach().clone()
    ids = torch.arange(24).view(2, 12)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(input_ids=ids, labels=ids).loss.backward()
    step = -delta.grad
    optimizer.step()
    expected = before + rates.repeat_interleave(8, 0) * step
    torch.testing.assert_close(delta.detach(), expected)
