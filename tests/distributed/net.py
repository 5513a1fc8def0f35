"""A tiny Llama through PEFT, and five steps that one process takes or two share."""

import functools
import warnings
from contextlib import contextmanager, nullcontext

import torch
from torch.nn import functional as F

from tests.conftest import build_model

NUM_STEPS = 5
VOCAB_SIZE = 64
# Half a batch has more tokens than those for which the columns are not written.
BATCH_SHAPE = (8, 40)
# The out_features of o_proj, gate_proj, up_proj and down_proj are odd.
UNEVEN = {
    "hidden_size": 37,
    "intermediate_size": 63,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 6,
}


def build_base(dtype="float64", sizes=(), rounded=False):
    """The pretrained model; `rounded` to the values that bfloat16 has."""
    base = build_model(VOCAB_SIZE, **dict(sizes))
    return (base.bfloat16() if rounded else base).to(getattr(torch, dtype))


def adapt(dtype="float64", sizes=(), rounded=False, **options):
    from peft import get_peft_model

    from pacatune import PacaConfig

    config = PacaConfig(r=4, paca_alpha=8, target_modules="all-linear", **options)
    return get_peft_model(build_base(dtype, sizes, rounded), config)


def layers_of(model):
    return [module for module in model.modules() if hasattr(module, "paca_delta")]


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def frozen(model):
    """Copies of all frozen parameters: of this process's part where they are sharded."""
    copies = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            values = parameter.detach()
            copies[name] = (values.to_local() if hasattr(values, "to_local") else values).clone()
    return copies


def is_unchanged(model, before):
    after = frozen(model)
    return all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def adapter_of(model, state_dict=None):
    from peft import get_peft_model_state_dict

    saved = get_peft_model_state_dict(model, state_dict=state_dict)
    return {name: tensor.clone() for name, tensor in saved.items()}


def checkpoint(model, *, use_reentrant):
    """Let each block recompute its activations in the backward pass."""
    options = {"use_reentrant": use_reentrant}
    with warnings.catch_warnings():
        # transformers 5.24 renames it; 5.17 has only this name.
        warnings.filterwarnings("ignore", ".*gradient_checkpointing_enable", FutureWarning)
        model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    model.enable_input_require_grads()
    model.train()


def batches():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, VOCAB_SIZE, (NUM_STEPS, *BATCH_SHAPE), generator=generator)


@contextmanager
def counted_writes():
    """Yield a list that gets the address of each weight whose columns are written or restored."""
    from pacatune.residency import put as residency_put

    put, writes = residency_put.put_columns_, []

    def counted(*call):
        writes.append(call[0].data_ptr())
        put(*call)

    residency_put.put_columns_ = counted
    try:
        yield writes
    finally:
        residency_put.put_columns_ = put


def whole(ids):
    return ids


def half(ids):
    """The rows of this process."""
    return ids.chunk(torch.distributed.get_world_size())[torch.distributed.get_rank()]


def loss_of(model, ids):
    # Not the model's own loss, which is float32 in a float64 model.
    logits = model(input_ids=ids).logits
    logits = logits if logits.dtype is torch.float64 else logits.float()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def step(model, optimizer, ids):
    loss_of(model, ids).backward()
    optimizer.step()
    optimizer.zero_grad()


def train(
    model, optimizer=None, *, accumulation=1, part=whole, no_sync=nullcontext, loss_of=loss_of
):
    """Five steps of AdamW; `no_sync` surrounds all but the last micro-batch of each."""
    optimizer = optimizer or torch.optim.AdamW(trained(model), lr=1e-2)
    losses = []
    for batch in batches():
        losses.append(0.0)
        for number, ids in enumerate(batch.chunk(accumulation)):
            with no_sync() if number < accumulation - 1 else nullcontext():
                loss = loss_of(model, part(ids)) / accumulation
                loss.backward()
            losses[-1] += loss.item()
        optimizer.step()
        optimizer.zero_grad()
    return losses


@functools.cache
def one_process(dtype="float64", sizes=(), rounded=False, **options):
    """Losses and adapter of one process on whole batches."""
    model = adapt(dtype, sizes, rounded, **options)
    return train(model), adapter_of(model)


def assert_equal_to_one(results, one=None, atol=1e-10):
    """Losses (the mean over the processes) and each process's adapter are those of one process.

    Args:
        results: What each process returned: losses, adapter, and what else must be true.
        one: What one process gives; None: `one_process()`.
        atol: Largest difference.
    """
    losses, adapter = one or one_process()
    means = torch.tensor([result[0] for result in results], dtype=torch.float64).mean(0)
    torch.testing.assert_close(means, torch.tensor(losses, dtype=torch.float64), rtol=0, atol=atol)
    for _, found, *others in results:
        assert all(others)
        assert found.keys() == adapter.keys()
        for name, tensor in adapter.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=atol, msg=name)
    assert any(tensor.abs().max() > 0.01 for name, tensor in adapter.items() if "delta" in name)
