"""Steps normalised per column: which rates, and that optimisers step by them and nothing else."""

import copy
import io
import json
import pickle

import pytest
import torch
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import nn

from pacatune import PacaConfig
from pacatune.adapters.folder import read_adapter
from pacatune.adapters.loading import hotswap_adapter
from pacatune.ops import reference
from pacatune.selection import choose_columns, collect_statistics
from pacatune.tuner.rates import rates_by_input, rates_by_weight
from tests.selection.nets import TARGETS, build, loss_of, make_batches
from tests.tuner import moe
from tests.tuner import test_quantized as quantized
from tests.tuner.nets import deltas, layers

NUM_STEPS = 5


def adapt(model, **options):
    options = {"r": 3, "paca_alpha": 6, "target_modules": TARGETS, **options}
    return get_peft_model(model, PacaConfig(**options))


def adamw(model):
    return torch.optim.AdamW(deltas(model), lr=1e-2)


def assert_same(ours, theirs):
    assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


def rates_of(model, name="default"):
    """Each layer's rates, in the shape that its update has them in."""
    found = {}
    for layer, module in layers(model).items():
        rates = torch.tensor(model.peft_config[name].column_rates[layer], dtype=torch.float64)
        delta, dim = module.delta_of(name), module.layout.delta_dim
        if rates.dim() == 2:
            rates = rates.repeat_interleave(delta.shape[dim - 1] // len(rates), 0)
        found[layer] = rates.view(*rates.shape, *[1] * (delta.dim() - dim - 1))
    return found


def train(model, optimizer, batches=None, **options):
    for batch in batches or make_batches(NUM_STEPS):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step(**options)


def assert_first_step_is_by_rates(model, loss):
    """Adam moves each value by the learning rate, and so times its column's rate."""
    optimizer = torch.optim.Adam(deltas(model), lr=1e-3, eps=1e-30)
    before = [delta.detach().clone() for delta in deltas(model)]
    loss.backward()
    optimizer.step()
    for delta, old, rates in zip(deltas(model), before, rates_of(model).values(), strict=True):
        moved = (delta.detach() - old).abs().double()
        expected = 1e-3 * rates.expand_as(moved)
        assert (moved > 0).any()
        assert len(rates.unique()) > 1
        torch.testing.assert_close(moved[moved > 0], expected[moved > 0], rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize(("groups", "targets"), [(1, TARGETS), (2, TARGETS[2:])])
def test_every_kind_of_layer(groups, targets):
    """Embedding, convolution with groups, linear layer, Conv1D, attention; row groups of some."""
    options = {"normalize": "weight", "init_weights": False}
    model = adapt(build(), groups=groups, target_modules=targets, **options)
    assert_first_step_is_by_rates(model, loss_of(model, make_batches(1)[0]))


@pytest.mark.parametrize(("kind", "groups"), [("mixtral", 1), ("gpt_oss", 2)])
def test_experts(kind, groups):
    options = {"normalize": "weight", "groups": groups}
    model = moe.adapt(moe.build(kind), random=False, **options)
    assert_first_step_is_by_rates(model, moe.loss_of(model, moe.ids()))


@pytest.mark.parametrize("normalize", ["weight", "input"])
def test_quantised_weights(normalize):
    pytest.importorskip("bitsandbytes")
    base = quantized.Net("bitsandbytes-nf4")
    config = PacaConfig(r=4, target_modules=["first", "second"], normalize=normalize)
    if normalize == "input":
        batches = [{"x": quantized.batch(step)} for step in range(2)]
        config = choose_columns(base, config, collect_statistics(base, batches, config))
    model = get_peft_model(base, config)
    assert_first_step_is_by_rates(model, model(quantized.batch()).square().sum())


def test_equals_a_learning_rate_for_each_column():
    """The reference in plain autograd, with a parameter and a rate for each column."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 7)).double()
    weight, bias = base[0].weight.detach().clone(), base[0].bias.detach().clone()
    model = adapt(base, normalize="weight", target_modules=["0"], r=4)
    layer = layers(model)["0"]
    rates = model.peft_config["default"].column_rates["0"]
    columns = [nn.Parameter(torch.zeros(7, dtype=torch.float64)) for _ in rates]
    groups = [{"params": [c], "lr": 1e-2 * rate} for c, rate in zip(columns, rates, strict=True)]
    plain = torch.optim.AdamW(groups, weight_decay=0.1)
    optimizer = torch.optim.AdamW(deltas(model), lr=1e-2, weight_decay=0.1)
    indices, scaling = layer.paca_indices["default"], layer.scaling["default"]
    for seed in range(NUM_STEPS):
        torch.manual_seed(seed)
        x, target = torch.randn(70, 12).double(), torch.randn(70, 7).double()
        loss = (model(x) - target).square().mean()
        delta = torch.stack(columns, 1)
        y = reference.paca_linear(x, weight, delta, indices, scaling, bias)
        expected = (y - target).square().mean()
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        for one, by in ((loss, optimizer), (expected, plain)):
            by.zero_grad()
            one.backward()
            by.step()
    torch.testing.assert_close(
        layer.delta_of("default").detach(), torch.stack(columns, 1).detach(), rtol=1e-9, atol=1e-13
    )


def test_by_input_the_first_step_changes_the_output_by_as_much_in_each_column():
    model = build()
    config = PacaConfig(r=3, paca_alpha=6, target_modules=TARGETS[1:], normalize="input")
    statistics = collect_statistics(model, make_batches(), config, loss_fn=loss_of)
    config = choose_columns(model, config, statistics)
    assert config.selection == "random"
    assert config.selection_options == {"num_batches": 4}
    model = get_peft_model(model, config)
    train(model, torch.optim.Adam(deltas(model), lr=1e-3, eps=1e-30), make_batches(1))
    for name, layer in layers(model).items():
        moved = layer.delta_of("default").detach().abs().movedim(layer.layout.delta_dim, -1)
        moved = moved.flatten(0, -2).amax(0)
        inputs = statistics.of(name)["activation"].sqrt()
        rates = torch.tensor(config.column_rates[name])
        changes = (moved * inputs[layer.paca_indices["default"]])[(moved > 0) & (rates < 16)]
        assert len(changes) >= 1
        torch.testing.assert_close(changes, changes[:1].expand_as(changes), rtol=1e-3, atol=0)
        typical = inputs.log().mean().exp()
        torch.testing.assert_close(changes[0], 1e-3 * typical, rtol=1e-3, atol=0)


def test_rates_do_not_depend_on_what_is_chosen():
    """A typical column of the layer keeps its rate, so rates suit any strategy and rank."""
    squares = torch.tensor([1.0, 4.0, 16.0, 0.25, 1.0]).double()
    expected = torch.tensor([1.0, 0.5, 0.25, 2.0, 1.0]).double() * 16 ** (1 / 10)
    torch.testing.assert_close(rates_by_input(squares), expected)
    torch.testing.assert_close(rates_by_input(squares * 1e-6), expected)
    rare = rates_by_input(torch.tensor([1.0, 1e-30, 1e30, 0.0]).double())
    torch.testing.assert_close(rare, torch.tensor([1.0, 16.0, 2.0**-10, 16.0]).double())
    assert rates_by_weight(torch.zeros(3, 2)).tolist() == [1.0, 1.0]


def test_both_agree_about_a_channel_that_is_scaled():
    """x_j times a and W[:, j] over a is the same layer; a step must then be over a, too."""
    torch.manual_seed(0)
    x, weight = torch.randn(50, 6).double(), torch.randn(4, 6).double()
    scale = torch.ones(6).double()
    scale[2] = 4.0
    for before, after in (
        (rates_by_input(x.square().sum(0)), rates_by_input((x * scale).square().sum(0))),
        (rates_by_weight(weight), rates_by_weight(weight / scale)),
    ):
        ratio = (after / before) / (after / before)[0]
        torch.testing.assert_close(ratio, scale.reciprocal())


def test_a_rate_of_one_and_no_rates_step_to_the_same_bits():
    results = []
    for options in ({}, {"normalize": "weight"}):
        model = build().float()
        if options:
            columns = adapt(build().float(), selection="weight_norm").peft_config["default"].columns
            options["column_rates"] = {name: [1.0] * 3 for name in columns}
        model = adapt(model, selection="weight_norm", **options)
        has_rates = [layer.paca_delta["default"].rates for layer in layers(model).values()]
        assert (None in has_rates) is not bool(options)
        train(model, adamw(model))
        results.append(deltas(model))
    assert_same(*results)


def test_columns_in_the_weight_are_those_of_the_normalised_steps():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(32, 24), nn.Linear(24, 8)).to(torch.bfloat16)
    model = adapt(base, normalize="weight", target_modules=["0", "1"], r=6)
    optimizer, x = adamw(model), torch.randn(80, 32).bfloat16()
    for _ in range(3):
        optimizer.zero_grad()
        model(x).float().square().mean().backward()
        optimizer.step()
    y = model(x)
    assert all(layer.residency.is_written for layer in layers(model).values())
    assert torch.equal(model.merge_and_unload()(x), y)


class TestSavedAndContinued:
    @pytest.fixture(params=[1, 2], ids=["plain", "groups"])
    def model(self, request):
        groups = request.param
        targets = TARGETS if groups == 1 else TARGETS[2:]
        self.options = {"groups": groups, "target_modules": targets}
        model = adapt(build(), normalize="weight", **self.options)
        self.optimizer = adamw(model)
        train(model, self.optimizer)
        return model

    def test_files_hold_the_plain_delta(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        assert config["normalize"] == "weight"
        assert config["column_rates"].keys() == layers(model).keys()
        tensors = load_file(tmp_path / "adapter_model.safetensors")
        kinds = {name.rpartition(".")[2] for name in tensors}
        assert kinds == {"paca_delta", "paca_indices"}
        for name, layer in layers(model).items():
            delta = tensors[f"base_model.model.{name}.paca_delta"]
            assert torch.equal(delta, layer.layout.to_file(layer.delta_of("default")))

    def assert_continues_alike(self, model, other):
        state = io.BytesIO()
        torch.save(self.optimizer.state_dict(), state)
        state.seek(0)
        optimizer = adamw(other)
        optimizer.load_state_dict(torch.load(state))
        for one, by in ((model, self.optimizer), (other, optimizer)):
            train(one.eval(), by)
        assert_same(deltas(model), deltas(other))

    def test_training_goes_on_to_the_same_bits(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(build(), tmp_path, is_trainable=True)
        rates, expected = (one.peft_config["default"].column_rates for one in (loaded, model))
        assert rates == expected
        self.assert_continues_alike(model, loaded)

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_copies_step_by_the_same_rates(self, model, copied):
        self.assert_continues_alike(model, copied(model))

    def test_a_sum_of_adapters_has_no_rates(self, model):
        model.add_weighted_adapter(["default", "default"], [0.5, 0.5], "sum")
        config = model.peft_config["sum"]
        assert (config.normalize, config.column_rates) == ("none", None)
        assert all(layer.paca_delta["sum"].rates is None for layer in layers(model).values())

    def test_a_second_adapter_of_the_configuration_has_the_same_rates(self, model):
        """As TRL makes its reference."""
        model.add_adapter("ref", copy.deepcopy(model.peft_config["default"]))
        assert all(
            torch.equal(*(layer.paca_delta[one].rates.factors for one in ("default", "ref")))
            for layer in layers(model).values()
        )

    def test_hotswap_brings_the_rates(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        for normalize in ("weight", "none"):
            options = {**self.options, "groups": 1, "r": 2, "random_seed": 7}
            other = adapt(build(), normalize=normalize, **options)
            hotswap_adapter(other, tmp_path)
            assert other.peft_config["default"].normalize == "weight"
            for name, layer in layers(other).items():
                ours = layers(model)[name].paca_delta["default"].rates.factors
                assert torch.equal(layer.paca_delta["default"].rates.factors, ours)

    def test_other_columns_are_refused(self, model):
        other = adapt(build(), random_seed=7, **self.options)
        with pytest.raises(ValueError, match="has `column_rates`, which are of other columns"):
            set_peft_model_state_dict(model, get_peft_model_state_dict(other))


class Around(torch.optim.Optimizer):
    """An optimiser around another one, whose parameters it has, too."""

    def __init__(self, inner):
        super().__init__([p for group in inner.param_groups for p in group["params"]], {})
        self.inner = inner

    def step(self, closure=None):
        return self.inner.step()


def one_step(wrap=lambda optimizer: optimizer, **options):
    model = adapt(build(), normalize="weight")
    train(model, wrap(adamw(model)), **options)
    return deltas(model)


def test_an_optimiser_around_another_one_steps_once():
    assert_same(one_step(Around), one_step())


def test_closures_and_a_step_that_fails_and_leaves_no_trace():
    model = adapt(build(), normalize="weight")
    optimizer = adamw(model)
    before = [delta.detach().clone() for delta in deltas(model)]

    def fail():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(fail)
    assert_same(deltas(model), before)
    for batch in make_batches(NUM_STEPS):

        def closure(batch=batch):
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            return loss

        optimizer.step(closure)
    assert_same(deltas(model), one_step())


def test_optimisers_that_keep_what_they_stepped_to_are_refused():
    model = adapt(build(), normalize="weight")
    optimizer = torch.optim.LBFGS(deltas(model))
    with pytest.raises(ValueError, match="LBFGS keeps the values that it has stepped to"):
        optimizer.step(lambda: loss_of(model, make_batches(1)[0]))


def test_flat_parameters_are_refused():
    model = adapt(build(), normalize="weight")
    delta = deltas(model)[0]
    with torch.no_grad():
        delta.data = delta.data.flatten()
    optimizer = torch.optim.AdamW([delta], lr=1e-2)
    delta.grad = torch.ones_like(delta)
    with pytest.raises(
        ValueError, match=r"has an update of shape \(33,\).* shard the model by FSDP2"
    ):
        optimizer.step()
    assert not delta.any()


WEIGHT = {"normalize": "weight", "target_modules": ["up"]}
GIVEN = {"selection": {"up": [0, 1, 2]}, **WEIGHT}
INPUT = {"normalize": "input", "target_modules": ["up", "conv"]}


@pytest.mark.parametrize(
    ("device", "options", "message"),
    [
        ("cpu", INPUT, r"'conv': .* collect them with .*collect_statistics"),
        ("meta", WEIGHT, "'up': .* on the meta device: load them"),
        ("cpu", {**GIVEN, "column_rates": {"down": [1.0] * 3}}, "gives 0 rates .* the rank is 3"),
        ("cpu", {**GIVEN, "column_rates": {"up": [1.0] * 2}}, r"2 rates .* the rank is 3"),
    ],
)
def test_what_is_missing(device, options, message):
    with pytest.raises(ValueError, match=message):
        adapt(build().to(device), **options)


def test_embeddings_have_no_inputs_to_normalise_by():
    config = PacaConfig(r=3, normalize="input", target_modules=["embed"])
    with pytest.raises(ValueError, match="normalise by weight, or leave it out"):
        collect_statistics(build(), make_batches(), config, loss_fn=loss_of)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_a_compiled_step():
    expected = one_step()
    model = adapt(build(), normalize="weight")
    optimizer = adamw(model)
    step = torch.compile(optimizer.step, backend="eager")
    for batch in make_batches(NUM_STEPS):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        step()
    torch.testing.assert_close(deltas(model), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("ranks", [{}, {"up": 4, "conv": 2}])
def test_rank_stabilised_scaling(ranks, tmp_path):
    alphas = {"down": 5.0, "conv": 3.0}
    model = adapt(build(), use_rslora=True, rank_pattern=ranks, alpha_pattern=alphas)
    model.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    assert adapter.config.use_rslora is False
    for name, layer in layers(model).items():
        want = pytest.approx(alphas.get(name, 6) / ranks.get(name, 3) ** 0.5)
        assert layer.scaling["default"] == want
        assert adapter.scaling(name) == layer.scaling["default"]
        layer.set_scale("default", 2.0)
        layer.unscale_layer()
        assert layer.scaling["default"] == want


def test_any_reader_knows_the_rank_stabilised_scale(tmp_path):
    options = {"use_rslora": True, "normalize": "weight", "target_modules": ["0"]}
    adapt(nn.Sequential(nn.Linear(8, 4)), r=4, **options).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["paca_alpha"], config["r"]) == ("PACA", 12.0, 4)
    assert config["alpha_pattern"] == {}
