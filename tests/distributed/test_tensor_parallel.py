"""Tensor parallel models (transformers' plans): two processes compute what one does."""

import functools

import pytest
import torch
from torch import nn

from tests.distributed import net
from tests.releases import has

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not has("transformers", "5.17"), reason="needs transformers >= 5.17"),
]

UNEVEN = {
    "hidden_size": 30,
    "intermediate_size": 63,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 6,
}
WITH_BIAS = {"attention_bias": True, "mlp_bias": True}
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


def load(folder, dtype="float64", plan="auto", parts=True, **sizes):
    """The pretrained model, in one process or in a part on each."""
    from transformers import AutoModelForCausalLM

    options = {}
    if parts:
        from transformers.distributed import DistributedConfig

        sizes = sizes or {"tp_size": torch.distributed.get_world_size()}
        options["distributed_config"] = DistributedConfig(tp_plan=plan, **sizes)
    dtype = getattr(torch, dtype)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)


def adapt(base, **options):
    from peft import get_peft_model

    from pacatune import PacaConfig

    options = {"r": 4, "paca_alpha": 8, "target_modules": "all-linear", **options}
    return get_peft_model(base, PacaConfig(**options))


@pytest.fixture(scope="module")
def save_base(tmp_path_factory):
    """Makes a folder with a pretrained model of some sizes, whose biases are not zero."""

    @functools.cache
    def save(sizes=()):
        base = net.build_base("float64", sizes)
        for name, parameter in base.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
        folder = str(tmp_path_factory.mktemp("base"))
        base.save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def assert_equal(pair, save_base):
    """Checks that work(make) returns the same tensors in parts as in one process.

    `make` takes a dtype, and returns the pretrained model.
    """

    def check(work, *args, sizes=None, plan="auto", atol=1e-12):
        folder = save_base(tuple((sizes or {}).items()))
        expected = work(functools.partial(load, folder, parts=False), *args)
        for found in pair.run(in_parts, work, folder, plan, *args):
            assert len(found) == len(expected) > 0
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=atol)

    return check


def in_parts(work, folder, plan, *args):
    return work(functools.partial(load, folder, plan=plan), *args)


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def gradients(model, batch=0):
    """Logits' loss and gradients on one batch, which are then forgotten."""
    loss = net.loss_of(model, net.batches()[batch])
    loss.backward()
    found = [loss.detach(), *(whole(parameter.grad) for parameter in net.trained(model))]
    model.zero_grad()
    return found


def logits_of(model, **options):
    with torch.no_grad():
        return model(input_ids=net.batches()[0], **options).logits


def step(model, num_steps=2):
    optimizer = torch.optim.AdamW(net.trained(model), lr=1e-2)
    for batch in net.batches()[:num_steps]:
        net.loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def train(folder, reentrant):
    model = adapt(load(folder))
    if reentrant is not None:
        net.checkpoint(model, use_reentrant=reentrant)
    before = net.frozen(model)
    losses = net.train(model)
    after = net.frozen(model)
    same = all(torch.equal(before[name], after[name]) for name in before)
    return losses, net.adapter_of(model), same


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_five_steps(pair, save_base, reentrant):
    results = pair.run(train, save_base(), reentrant)
    net.assert_equal_to_one(results, atol=1e-12)
    assert all(same for *_, same in results)


def train_otherwise(make, bias, groups=1):
    model = adapt(make(), bias=bias, groups=groups)
    return [*gradients(model), logits_of(step(model))]


@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize("plan", ["auto", OTHER_STYLES, WHOLE], ids=["auto", "others", "whole"])
def test_styles_and_biases(assert_equal, plan, bias):
    assert_equal(train_otherwise, bias, sizes=WITH_BIAS, plan=plan)


def test_sizes_that_cannot_be_halved(assert_equal):
    assert_equal(train_otherwise, "none", sizes=UNEVEN)


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("plan", ["auto", OTHER_STYLES, WHOLE], ids=["auto", "others", "whole"])
def test_row_groups(assert_equal, plan, groups):
    assert_equal(train_otherwise, "none", groups, sizes=WITH_BIAS, plan=plan)


def test_row_groups_that_are_cut(assert_equal):
    """Both processes have a part of the second of three."""
    assert_equal(train_otherwise, "none", 3, sizes=UNEVEN)


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
    found = []
    for one in (layer.mlp.up_proj, layer.mlp.down_proj):
        delta = one.paca_delta["default"].weight
        found.append((tuple(delta.shape), tuple(delta.to_local().shape), one.in_features))
    return found


def test_column_wise_deltas_are_split(pair, save_base):
    for up, down in pair.run(parts_of, save_base()):
        assert up == ((64, 4), (32, 4), 32)
        assert down == ((32, 4), (32, 4), 64)


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


def count_fast(folder):
    """How many layers run by the hand-written gradients, which take no pass more for the update."""
    from pacatune.tuner import tensor_parallel

    model, calls = adapt(load(folder)), []
    apply = tensor_parallel.apply_paca_linear
    tensor_parallel.apply_paca_linear = lambda *args: calls.append(args) or apply(*args)
    try:
        gradients(model)
    finally:
        tensor_parallel.apply_paca_linear = apply
    return len(calls), len(net.layers_of(model))


def test_all_layers_run_by_hand_written_gradients(pair, save_base):
    assert pair.run(count_fast, save_base()) == [(14, 14)] * 2


def use_several(make, groups):
    from pacatune import PacaConfig

    model = step(adapt(make(), groups=groups))
    config = PacaConfig(r=3, random_seed=5, target_modules="all-linear")
    model.add_adapter("other", config)
    model.set_adapter("other")
    step(model)
    model.base_model.set_adapter(["default", "other"])
    found = [logits_of(model), *gradients(model)]
    model.set_adapter("default")
    model.eval()
    found.append(logits_of(model, adapter_names=["other", "default", "__base__", "other"] * 2))
    model.base_model.add_weighted_adapter(["default", "other"], [0.5, 2.0], "sum")
    model.set_adapter("sum")
    found.append(logits_of(model))
    with model.disable_adapter():
        found.append(logits_of(model))
    return found


@pytest.mark.parametrize("groups", [1, 4])
def test_several_adapters(assert_equal, groups):
    assert_equal(use_several, groups)


def merge(make, groups):
    model = step(adapt(make(), groups=groups))
    adapted, before = logits_of(model), net.frozen(model)
    model.merge_adapter()
    merged, adapter = logits_of(model), list(net.adapter_of(model).values())
    model.unmerge_adapter()
    after = net.frozen(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    base = model.merge_and_unload()
    assert not net.layers_of(base)
    weights = [whole(parameter) for parameter in base.parameters()]
    return [adapted, merged, logits_of(base), *adapter, *weights]


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("sizes", [WITH_BIAS, UNEVEN], ids=["even", "uneven"])
def test_merging(assert_equal, sizes, groups):
    groups = 2 if groups > 1 and sizes is WITH_BIAS else groups
    assert_equal(merge, groups, sizes=sizes)


def merge_tied(folder):
    model = adapt(load(folder), target_modules=["lm_head", "o_proj"])
    expected = logits_of(step(model))
    with pytest.raises(ValueError, match=r"Cannot merge into a weight .* each process has a part"):
        model.merge_adapter()
    return expected, logits_of(model)


def test_merging_tied_parts_is_refused_and_changes_nothing(pair, save_base):
    for expected, logits in pair.run(merge_tied, save_base((("tie_word_embeddings", True),))):
        assert torch.equal(expected, logits)


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


def dense_updates(make):
    layers = net.layers_of(step(adapt(make())))
    return [layer.get_delta_weight("default") for layer in layers]


def test_dense_updates(assert_equal):
    assert_equal(dense_updates)


def export(make):
    from peft import convert_to_lora

    return list(dict(sorted(convert_to_lora(step(adapt(make())), 4)[1].items())).values())


def test_lora(assert_equal):
    assert_equal(export, atol=1e-7)  # PEFT rounds the factors to float32


def train_and_save(folder, output, part):
    """Give the state_dict of the adapter alone, or let PEFT take and gather that of the model."""
    model = step(adapt(load(folder)))
    rank = torch.distributed.get_rank()
    state_dict = {name: tensor for name, tensor in model.state_dict().items() if ".paca_" in name}
    model.save_pretrained(f"{output}/{rank}", state_dict=state_dict if part else None)
    return logits_of(model)


@pytest.mark.parametrize("part", [False, True])
def test_each_process_saves_the_whole_adapter(pair, save_base, tmp_path, part):
    from peft import PeftModel
    from safetensors.torch import load_file

    for rank, logits in enumerate(pair.run(train_and_save, save_base(), str(tmp_path), part)):
        saved = load_file(tmp_path / str(rank) / "adapter_model.safetensors")
        base = load(save_base(), parts=False)
        one = PeftModel.from_pretrained(base, tmp_path / str(rank))
        torch.testing.assert_close(logits_of(one), logits, rtol=0, atol=1e-12)
        assert len(saved) == 2 * len(net.layers_of(one))


def load_saved(make, saved, how):
    from peft import PeftModel, set_peft_model_state_dict
    from safetensors.torch import load_file

    from pacatune.adapters.loading import hotswap_adapter

    if how == "transformers":
        model = make()
        model.load_adapter(saved)
    elif how == "hotswap":
        model = adapt(make())
        hotswap_adapter(model, saved)
    elif how == "state_dict":
        model = adapt(make())
        set_peft_model_state_dict(model, load_file(f"{saved}/adapter_model.safetensors"))
    else:
        low = how == "low_cpu_mem_usage"
        model = PeftModel.from_pretrained(make(), saved, low_cpu_mem_usage=low, is_trainable=True)
        return [logits_of(model), logits_of(step(model))]
    return [logits_of(model)]


@pytest.mark.parametrize(
    "how", ["peft", "low_cpu_mem_usage", "transformers", "hotswap", "state_dict"]
)
def test_adapter_of_one_process_in_parts(assert_equal, save_base, tmp_path, how):
    step(adapt(load(save_base(), parts=False))).save_pretrained(tmp_path)
    assert_equal(load_saved, str(tmp_path), how)


def start_at_random(folder):
    torch.manual_seed(torch.distributed.get_rank())
    return logits_of(adapt(load(folder), init_weights=False))


def test_processes_start_from_the_same_random_values(pair, save_base):
    first, second = pair.run(start_at_random, save_base())
    assert torch.equal(first, second)


def refused(folder, options):
    base = load(folder)
    before = {name: type(module) for name, module in base.named_modules()}
    try:
        adapt(base, **options)
    except ValueError as error:
        return str(error), before == {name: type(m) for name, m in base.named_modules()}
    return "", False


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target_modules": ["q_proj", "embed_tokens"]},
            "'model.embed_tokens' shares its work .* its style is 'embedding_rowwise' and its "
            "module a Embedding. Supported are nn.Linear layers",
        ),
        (
            {"modules_to_save": ["lm_head"]},
            r"`modules_to_save` .*'lm_head' is split .*style 'colwise_gather_output'",
        ),
        ({"selection": "weight_norm"}, "choose the columns before the model is sharded"),
    ],
)
def test_refusals_change_nothing(pair, save_base, options, message):
    import re

    for found, is_unchanged in pair.run(refused, save_base(), options):
        assert re.search(message, found)
        assert is_unchanged


def refused_experts(folder):
    try:
        adapt(load(folder), target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    except ValueError as error:
        return str(error)
    return ""


def test_experts_are_refused(pair, tmp_path):
    from tests.tuner import moe

    moe.build("mixtral", num_key_value_heads=2).save_pretrained(tmp_path)
    for message in pair.run(refused_experts, str(tmp_path)):
        assert "layers.0.mlp.experts.down_proj' shares its work" in message
        assert "it is inside 'model.layers.0.mlp.experts', whose style is 'moe_tp" in message


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def refused_by_hand(with_fsdp):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    model = parallelize_module(Net(), mesh["tensor"], plan)
    if with_fsdp:
        fully_shard(model, mesh=mesh["data"])
    before = {name: type(module) for name, module in model.named_modules()}
    try:
        adapt(model, r=2, target_modules=["up", "down"])
    except ValueError as error:
        return str(error), before == {name: type(m) for name, m in model.named_modules()}
    return "", False


@pytest.mark.parametrize("with_fsdp", [False, True])
def test_plans_of_torch_are_refused(pair, with_fsdp):
    for message, is_unchanged in pair.run(refused_by_hand, with_fsdp):
        assert "'up' shares its work" in message
        assert "it was split by something else than a plan of transformers >= 5.17" in message
        assert is_unchanged


# Two processes share each weight, and two such pairs have half of the batch each.


def half(ids):
    return ids.chunk(2)[torch.distributed.get_rank() // 2]


def train_four(folder, when):
    if when == "sharded before":
        model = adapt(load(folder, tp_size=2, fsdp_size=2))
    else:
        model = shard_after(folder)
    adapter = {}
    losses = net.train(model, part=half)
    for name, tensor in net.adapter_of(model).items():
        adapter[name] = whole(tensor)
    return losses, adapter


def shard_after(folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    base = load(folder, parts=False)
    apply_tensor_parallelism(base, mesh["tp"], base._expand_parallel_plan(base.tp_plan))
    base._device_mesh, base._tp_size = mesh, 2
    model = adapt(base)
    for block in base.model.layers:
        fully_shard(block, mesh=mesh["fsdp"])
    return fully_shard(model, mesh=mesh["fsdp"])


@pytest.mark.parametrize("when", ["sharded before", "sharded after"])
def test_with_fsdp2(four, save_base, when):
    net.assert_equal_to_one(four.run(train_four, save_base(), when), atol=1e-12)


class Rows(torch.utils.data.Dataset):
    rows = net.batches().flatten(0, 1)[:32]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def train_by_trainer(folder, output, num_pairs):
    import os

    from accelerate import ParallelismConfig
    from transformers import Trainer, TrainingArguments

    parts = num_pairs > 0
    if parts:  # accelerate takes such models on accelerators only
        ParallelismConfig._validate_accelerator = lambda self, accelerator: None
        os.environ.update(LOCAL_RANK=os.environ["RANK"], ACCELERATE_USE_CPU="1")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    sizes = {"tp_size": 2, "fsdp_size": num_pairs} if parts else {}
    model = adapt(load(folder, "float32", parts=parts, **sizes))
    args = TrainingArguments(
        output,
        per_device_train_batch_size=8 // max(num_pairs, 1),
        max_steps=6,
        learning_rate=1e-2,
        max_grad_norm=0.01,
        logging_steps=1,
        save_only_model=True,
        save_steps=6,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(model, args, train_dataset=Rows())
    trainer.train()
    log = [line for line in trainer.state.log_history if "grad_norm" in line]
    return [(line["loss"], line["grad_norm"]) for line in log], net.adapter_of(model)


@pytest.mark.parametrize("processes", ["pair", "four"])
def test_trainer(request, save_base, tmp_path, processes):
    from peft import PeftModel

    log, adapter = train_by_trainer(save_base(), str(tmp_path / "one"), 0)
    group = request.getfixturevalue(processes)
    num_pairs = 1 if processes == "pair" else 2
    for found in group.run(train_by_trainer, save_base(), str(tmp_path / "parts"), num_pairs):
        torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(log), rtol=0, atol=1e-5)
        for name, tensor in adapter.items():
            torch.testing.assert_close(found[1][name], tensor, rtol=0, atol=1e-5)
    base = load(save_base(), "float32", parts=False)
    saved = PeftModel.from_pretrained(base, tmp_path / "parts" / "checkpoint-6")
    for name, tensor in net.adapter_of(saved).items():
        torch.testing.assert_close(tensor, adapter[name], rtol=0, atol=1e-5)
