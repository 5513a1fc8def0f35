"""Tensor parallel models (transformers' plans): two processes train as one does."""

import pytest
import torch

from tests.distributed import net
from tests.distributed.tensor_parallel import (
    UNEVEN,
    WITH_BIAS,
    adapt,
    gradients,
    load,
    logits_of,
    marks,
    step,
    whole,
)

pytestmark = marks

# Every other style of linear layers.
OTHER_STYLES = {
    "model.layers.*.self_attn.k_proj": "colwise_gather_output",
    "model.layers.*.self_attn.v_proj": "colwise_rep",
    "model.layers.*.self_attn.q_proj": "colwise_gather_output",
    "model.layers.*.self_attn.o_proj": "rowwise_split_input",
    "model.layers.*.mlp.gate_proj": "colwise_gather_output",
    "model.layers.*.mlp.up_proj": "colwise_gather_output",
    "model.layers.*.mlp.down_proj": "rowwise_rep",
}


WHOLE = {f"model.layers.*.mlp.{one}_proj": "replicate" for one in ("gate", "up", "down")}


def train(folder, reentrant):
    model = adapt(load(folder))
    if reentrant is not None:
        net.checkpoint(model, use_reentrant=reentrant)
    before = net.frozen(model)
    losses = net.train(model)
    return losses, net.adapter_of(model), net.is_unchanged(model, before)


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_five_steps(pair, save_base, reentrant):
    net.assert_equal_to_one(pair.run(train, save_base(), reentrant), atol=1e-12)


def train_otherwise(make, bias, groups=1):
    model = adapt(make(), bias=bias, groups=groups)
    return [*gradients(model), logits_of(step(model))]


PLANS = {"auto": "auto", "others": OTHER_STYLES, "whole": WHOLE}


@pytest.mark.parametrize(
    ("plan", "bias", "groups"),
    [
        ("auto", "none", 1),
        *((plan, "all", 1) for plan in PLANS),
        *(("auto", "none", groups) for groups in (2, 4)),
        ("others", "none", 4),
        ("whole", "none", 2),
    ],
)
def test_styles_biases_and_row_groups(assert_equal, plan, bias, groups):
    assert_equal(train_otherwise, bias, groups, sizes=WITH_BIAS, plan=PLANS[plan])


@pytest.mark.parametrize("groups", [1, 3])
def test_sizes_that_cannot_be_halved(assert_equal, groups):
    """Both processes have a part of the second of three row groups."""
    assert_equal(train_otherwise, "none", groups, sizes=UNEVEN)


def train_given_columns(make, columns, groups):
    """All of them in the first process's part of a row-wise layer."""
    model = adapt(make(), selection=columns, target_modules=list(columns), groups=groups)
    return [*gradients(model), logits_of(step(model))]


def test_process_without_columns(assert_equal):
    columns = {"o_proj": [0, 1, 3, 5], "down_proj": [2, 3, 4, 9]}
    assert_equal(train_given_columns, columns, 1)


def test_process_without_columns_of_a_row_group(assert_equal):
    columns = {
        "o_proj": [[0, 1, 3, 5], [0, 1, 18, 30]],
        "down_proj": [[2, 3, 4, 9], [40, 41, 50, 63]],
    }
    assert_equal(train_given_columns, columns, 2)
    assert_equal(train_given_columns, {k: [v[0], v[0]] for k, v in columns.items()}, 2)


def train_after_inference(make):
    model = adapt(make())
    with torch.inference_mode():
        logits_of(model)
    return gradients(model)


def test_training_after_inference(assert_equal):
    assert_equal(train_after_inference)


def clip(make, options):
    model = step(adapt(make()))
    optimizer = torch.optim.AdamW(net.trained(model), lr=1e-2, **options)
    net.loss_of(model, net.batches()[0]).backward()
    norm = torch.nn.utils.clip_grad_norm_(net.trained(model), 1e-3)
    optimizer.step()
    return [whole(norm), logits_of(model)]


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=str)
def test_clipping_and_optimizers(assert_equal, options):
    assert_equal(clip, options)


def parts_of(folder):
    model = adapt(load(folder))
    layer = model.get_base_model().model.layers[0]
    for one, shape in ((layer.mlp.up_proj, (64, 4)), (layer.mlp.down_proj, (32, 4))):
        delta = one.paca_delta["default"].weight
        assert (delta.shape, delta.to_local().shape) == (shape, (32, 4))


def test_column_wise_deltas_are_split(pair, save_base):
    pair.run(parts_of, save_base())


def compute_otherwise(make, how):
    model = adapt(make())
    if how == "compiled":
        if not torch.distributed.is_initialized():
            return gradients(model)
        model.get_base_model().model.layers[0].mlp.compile(backend="aot_eager")
    elif how == "lean":
        import pacatune.lean

        pacatune.lean.enable(model)
    else:  # the base layers must run
        for layer in net.layers_of(model):
            layer.base_layer.register_forward_hook(lambda module, args, output: output * 1.01)
    return gradients(model)


@pytest.mark.parametrize("how", ["compiled", "lean", "hooks"])
def test_other_ways_to_compute(assert_equal, how):
    assert_equal(compute_otherwise, how)


def add_tiny_updates(make):
    """Logits without and with updates of less than half a unit in the columns' last place."""
    model = adapt(make("bfloat16"))
    before = logits_of(model)
    for layer in net.layers_of(model):
        indices = layer.paca_indices["default"]
        columns = whole(layer.base_layer.weight)[:, indices]
        layer.replace_update("default", columns * 2**-11, indices, 4.0)
    after = logits_of(model)
    assert torch.equal(before, after)
    return [gradients(model)[0]]


def test_columns_are_rounded_as_a_merge_rounds_them(assert_equal):
    assert_equal(add_tiny_updates, atol=1e-2)


def start_at_random(folder):
    torch.manual_seed(torch.distributed.get_rank())
    return logits_of(adapt(load(folder), init_weights=False))


def test_processes_start_from_the_same_random_values(pair, save_base):
    first, second = pair.run(start_at_random, save_base())
    assert torch.equal(first, second)
