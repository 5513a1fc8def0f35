"""Collected statistics equal what plain autograd says, and leave everything as it was."""

import copy
import gc
import warnings
import weakref

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pacatune import PacaConfig
from pacatune.selection import collect_statistics
from pacatune.tuner.quantized import weight_matrix
from tests.conftest import build_model
from tests.selection.nets import TARGETS, build, gradient_sums, loss_of, make_batches
from tests.tuner import moe
from tests.tuner.quantizers import QUANTIZERS, quantise


def config_of(selection="gradient", targets=TARGETS, **options):
    return PacaConfig(r=2, target_modules=list(targets), selection=selection, **options)


def collect(model, batches=None, selection="gradient", targets=TARGETS, **options):
    batches = make_batches() if batches is None else batches
    return collect_statistics(
        model, batches, config_of(selection, targets, **options), loss_fn=loss_of
    )


@pytest.mark.parametrize("sparse", [False, True])
def test_gradients_are_those_of_plain_autograd(sparse):
    model, batches = build(sparse=sparse), make_batches()
    statistics = collect(model, batches)
    expected = gradient_sums(model, batches)
    assert statistics.num_batches == len(batches)
    assert statistics.values.keys() == expected.keys()
    for name, sums in expected.items():
        values = statistics.of(name)["gradient"]
        assert values.shape == sums.shape
        torch.testing.assert_close(values, sums.detach(), rtol=1e-9, atol=0, msg=name)


def test_one_number_for_each_column_and_one_gradient_at_a_time():
    """O(I) for each layer, and never two gradients of weights, however many layers there are."""
    model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(6)])
    alive, most = [], []

    def watch(weight):
        alive.append(weakref.ref(weight.grad))
        most.append(sum(one() is not None for one in alive))

    for layer in model:  # before ours, so that the gradient is still there
        layer.weight.register_post_accumulate_grad_hook(watch)
    statistics = collect_statistics(
        model,
        [torch.ones(3, 16)] * 2,
        config_of(targets=[str(number) for number in range(6)]),
        loss_fn=lambda model, x: model(x).square().sum(),
    )
    gc.collect()
    assert most == [1] * 12
    assert all(one() is None for one in alive)
    kept = sum(values.numel() for kinds in statistics.values.values() for values in kinds.values())
    assert kept == 6 * 16


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same(use_reentrant):
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}
    config = PacaConfig(selection="gradient", target_modules=["q_proj", "down_proj"])
    plain = collect_statistics(build_model(64), [batch], config)
    model = build_model(64)
    with warnings.catch_warnings():
        # transformers 5.24 renames it; 5.17 has only this name.
        warnings.filterwarnings("ignore", ".*gradient_checkpointing_enable", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.train()  # it has no dropout
    if use_reentrant:  # which needs an input that requires a gradient
        model.get_input_embeddings().register_forward_hook(lambda m, a, y: y.requires_grad_())
    checkpointed = collect_statistics(model, [batch], config)
    for name, kinds in plain.values.items():
        other = checkpointed.of(name)["gradient"]
        torch.testing.assert_close(kinds["gradient"], other, rtol=1e-5, atol=0, msg=name)


def state_of(model):
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()},
        {name: module.training for name, module in model.named_modules()},
        sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
        torch.get_rng_state(),
    )


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails):
    model = build().train()
    model.up.weight.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    before = state_of(model)
    if fails:
        with pytest.raises(TypeError):
            collect(model, [*make_batches(1), None], targets=["up"])
    else:
        collect(model)
    after = state_of(model)
    assert all(torch.equal(before[0][name], value) for name, value in after[0].items())
    assert before[1] == after[1]
    assert before[2:4] == after[2:4]
    assert torch.equal(before[4], after[4])


def test_the_mode_is_the_caller_s_except_for_batch_norm():
    modes = []

    def see(model, batch):
        modes.append((model.drop.training, model.norm.training))
        return loss_of(model, batch)

    model = build().train()
    collect_statistics(model, make_batches(1), config_of(), loss_fn=see)
    assert modes == [(True, False)]


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "llama4"])  # the last two: transposed
def test_gradients_of_experts(kind):
    model, tokens = moe.build(kind), [moe.ids(0), moe.ids(1)]
    config = PacaConfig(selection="gradient", target_modules=[], target_parameters=moe.BOTH)
    statistics = collect_statistics(model, tokens, config, loss_fn=moe.loss_of)
    weights = {n: p for n, p in model.named_parameters() if n.endswith(tuple(moe.BOTH))}
    assert statistics.values.keys() == weights.keys()
    expected = dict.fromkeys(weights, 0.0)
    for one in tokens:
        gradients = torch.autograd.grad(moe.loss_of(model, one), list(weights.values()))
        for name, gradient in zip(weights, gradients, strict=True):
            columns = gradient if kind == "mixtral" else gradient.transpose(1, 2)
            expected[name] = expected[name] + columns.square().sum((0, 1))
    for name, sums in expected.items():
        values = statistics.of(name)["gradient"]
        torch.testing.assert_close(values, sums, rtol=1e-6, atol=0, msg=name)


@pytest.mark.parametrize("name", sorted(QUANTIZERS))
def test_gradients_of_quantised_layers(name):
    """dy^T x, which for the dequantised weight is what autograd says; the kernels round x too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(inplace=True), nn.Linear(64, 64))
        x = torch.randn(5, 7, 64)
    model[0], model[2] = quantise(model[0], name), quantise(model[2], name)
    plain = copy.deepcopy(model)
    for place in (0, 2):
        linear = nn.Linear(64, 64)
        linear.weight.data = weight_matrix(model[place]).clone()
        linear.bias.data = model[place].bias.data.float()
        plain[place] = linear

    def loss(net, batch):
        return net(batch).square().sum()

    config = config_of(targets=["0", "2"])
    values, expected = (
        collect_statistics(net, [x[:2], x[2:]], config, loss_fn=loss) for net in (model, plain)
    )
    for layer in ("0", "2"):
        one, other = values.of(layer)["gradient"], expected.of(layer)["gradient"]
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.05 * float(other.mean()))


# What cannot be collected is said.


@pytest.mark.parametrize(
    ("selection", "targets", "batches", "message"),
    [
        ("random", TARGETS, None, r"`selection` \('random'\) needs no statistics"),
        ("gradient", ["up", "unused"], None, "1 targets have no gradient in 4 .*first 'unused'"),
    ],
)
def test_what_has_no_statistics(selection, targets, batches, message):
    model = build()
    model.unused = nn.Linear(4, 4).double()
    with pytest.raises(ValueError, match=message):
        collect(model, batches, selection, targets)


def test_models_that_cannot_be_observed():
    model = build()
    adapted = get_peft_model(copy.deepcopy(model), config_of("random"))
    wrapped = DistributedDataParallel.__new__(DistributedDataParallel)
    nn.Module.__init__(wrapped)
    for one, message in (
        (adapted, r"`model` is adapted \('.*down.*'\); collect from"),
        (copy.deepcopy(model).to("meta"), r"`model` is on the meta device or sharded \('.*'\);"),
        (wrapped, "wrapped by DistributedDataParallel; collect from"),
    ):
        with pytest.raises(ValueError, match=message):
            collect(one)


IDS = torch.ones(1, 4, dtype=torch.long)
LOSSES = [
    (None, r"a batch is a tuple; it must be a dictionary"),
    (lambda model, batch: model.up.weight, r"loss of batch 0 \(\(16, 12\)\) must be one number"),
    (lambda model, batch: torch.zeros(()), r"loss of batch 0 \(\(\)\) must be one number that"),
    (lambda model, batch: loss_of(model, batch) * torch.nan, "'up' have 'gradient'.*is not finite"),
]


@pytest.mark.parametrize(
    ("batch", "loss_fn", "message"),
    [
        *((make_batches(1)[0], *row) for row in LOSSES),
        ({"input_ids": IDS}, None, r"the loss of batch 0 \(None\) must be .* add `labels`"),
        (
            {"input_ids": IDS, "labels": -100 * IDS},
            None,
            "2 targets have no gradient .*no batch has a label",
        ),
    ],
)
def test_batches_and_losses_that_are_none(batch, loss_fn, message):
    is_llama = isinstance(batch, dict)
    model = build_model(64) if is_llama else build()
    config = config_of(targets=["q_proj"] if is_llama else ["up"])
    with pytest.raises((ValueError, TypeError), match=message):
        collect_statistics(model, [batch], config, loss_fn=loss_fn)
