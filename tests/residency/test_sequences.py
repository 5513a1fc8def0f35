"""Random sequences of everything that is done to adapters leave the base as it was, bit for bit.

A sequence works on one layer through PEFT. Beside it a plain copy of the layer and the adapters'
values are kept, from which `reference.py` says after each operation what the layer must compute.
"""

import math
import random
import warnings

import pytest
import torch
from safetensors.torch import load_file

from pacatune import PacaConfig
from pacatune.adapters.hotswap import hotswap_adapter
from pacatune.tuner.kinds import _KINDS
from tests.residency.twin import KINDS, Twin, adapted, targets_of

NUM_OPERATIONS, MAX_ADAPTERS = 8, 4
NUM_SEQUENCES = 250  # per type of layer and dtype: 500 per type


def add(twin: Twin) -> None:
    if len(twin.adapters) < MAX_ADAPTERS:
        name = f"added{len(twin.done)}"
        rank, seed = twin.rng.randint(1, 5), twin.rng.randrange(100)
        alpha = twin.rng.choice([1, 4, 6.5])
        config = PacaConfig(
            r=rank,
            paca_alpha=alpha,
            random_seed=seed,
            init_weights=False,
            **targets_of(twin.kind),
        )
        twin.model.add_adapter(name, config)


def switch(twin: Twin) -> None:
    twin.model.set_adapter(twin.rng.choice(twin.adapters))


def activate_two(twin: Twin) -> None:
    two = twin.rng.sample(twin.adapters, min(2, len(twin.adapters)))
    twin.model.set_adapter(two[0])  # PeftModel itself knows of one only
    twin.model.base_model.set_adapter(two)


def forward(twin: Twin) -> None:
    with torch.inference_mode(twin.rng.random() < 0.3), torch.set_grad_enabled(False):
        x = twin.inputs()
        twin.close(twin.model(x), twin.expected(x, twin.merged or twin.active)[0])


def step(twin: Twin) -> None:
    if twin.merged:
        return
    deltas = [twin.layer.delta_of(name) for name in twin.active]
    optimizer = twin.rng.choice([torch.optim.SGD, torch.optim.AdamW])(deltas, lr=0.05)
    before = [delta.detach().clone() for delta in deltas]
    for _ in range(twin.rng.randint(1, 3)):
        twin.model(twin.inputs()).float().square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    assert not any(torch.equal(*pair) for pair in zip(before, deltas, strict=True))


def edit(twin: Twin) -> None:
    name = twin.rng.choice(twin.adapters)
    delta = twin.layer.delta_of(name)
    if name in twin.merged:
        return
    if twin.rng.random() < 0.5:
        delta.data.mul_(-1)
    else:
        with torch.no_grad():
            delta.add_(1)


def merge(twin: Twin) -> None:
    names = twin.rng.choice([None, twin.rng.sample(twin.adapters, 1)])
    before = twin.merged
    twin.model.merge_adapter(names, safe_merge=twin.rng.random() < 0.5)
    assert twin.merged == list(dict.fromkeys([*before, *(names or twin.active)]))


def unmerge(twin: Twin) -> None:
    twin.model.unmerge_adapter()
    assert not twin.merged
    twin.check_base()


def disable(twin: Twin) -> None:
    x = twin.inputs()
    with torch.no_grad(), twin.model.disable_adapter():
        assert torch.equal(twin.model(x), twin.kind.call(twin.plain, x))
        twin.check_base()


def delete(twin: Twin) -> None:
    name = twin.rng.choice(twin.adapters)
    if name in twin.merged:
        with pytest.raises(ValueError, match="while they are merged"):
            twin.model.delete_adapter(name)
    elif len(twin.adapters) > 1:
        twin.model.delete_adapter(name)
        if len(twin.active) > 1 or twin.model.active_adapter not in twin.adapters:
            twin.model.set_adapter(twin.adapters[0])  # PeftModel may still name the deleted one


def hotswap(twin: Twin) -> None:
    name, rank = twin.rng.choice(twin.adapters), twin.rng.choice([2, 3])
    if name in twin.merged:
        with pytest.raises(ValueError, match="is merged"):
            hotswap_adapter(twin.model, twin.saved[rank], name)
        return
    hotswap_adapter(twin.model, twin.saved[rank], name)
    delta, indices, _ = twin.update(name)
    tensors = load_file(twin.saved[rank] / "adapter_model.safetensors")
    assert torch.equal(delta, tensors[f"base_model.model.{twin.key}.paca_delta"])
    assert torch.equal(indices, tensors[f"base_model.model.{twin.key}.paca_indices"])


def weighted_sum(twin: Twin) -> None:
    if len(twin.adapters) < MAX_ADAPTERS:
        names = twin.rng.sample(twin.adapters, min(2, len(twin.adapters)))
        weights = [twin.rng.uniform(-1, 1) for _ in names]
        new = f"sum{len(twin.done)}"
        twin.model.add_weighted_adapter(names, weights, new)
        parts = zip(weights, names, strict=True)
        wanted = sum(weight * twin.layer.get_delta_weight(name) for weight, name in parts)
        torch.testing.assert_close(twin.layer.get_delta_weight(new), wanted)


def save(twin: Twin) -> None:
    name = twin.rng.choice(twin.adapters)
    twin.model.save_pretrained(twin.folder, selected_adapters=[name])
    folder = twin.folder / (name if name != "default" else "")
    tensors = load_file(folder / "adapter_model.safetensors")
    assert torch.equal(tensors[f"base_model.model.{twin.key}.paca_delta"], twin.update(name)[0])


def look(twin: Twin) -> None:
    if not twin.merged:
        state = twin.model.state_dict()
        name = f"base_model.model.layer.base_layer.{twin.kind.parameter}"
        assert torch.equal(state[name], twin.weight_of(twin.plain))


OPERATIONS = (
    *(add, switch, activate_two, forward, forward, step, step, edit, merge, unmerge),
    *(disable, delete, hotswap, weighted_sum, save, look),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_any_sequence_leaves_the_base_alone(kind: str, dtype: torch.dtype, tmp_path) -> None:
    plain = KINDS[kind].build().to(dtype).requires_grad_(False)
    for parameter in plain.parameters():
        if parameter.is_floating_point():
            parameter.normal_(std=0.3)
    saved = {rank: tmp_path / f"rank-{rank}" for rank in (2, 3)}
    for rank, folder in saved.items():
        adapted(plain, KINDS[kind], rank).save_pretrained(folder)
    variants = [name for name in KINDS if name.partition(",")[0] == kind.partition(",")[0]]
    for seed in range(math.ceil(NUM_SEQUENCES / len(variants))):
        torch.manual_seed(seed)
        twin = Twin(
            adapted(plain, KINDS[kind]),
            plain,
            KINDS[kind],
            saved,
            tmp_path / "out",
            random.Random(seed),
        )
        try:
            with warnings.catch_warnings():
                # PEFT says when it merges twice, or unmerges by itself.
                warnings.filterwarnings("ignore", category=UserWarning, module="peft")
                warnings.filterwarnings("ignore", message="Merging into a quantised model")
                run(twin)
        except Exception as error:
            error.add_note(f"sequence {seed}: {', '.join(twin.done)}")
            raise


def run(twin: Twin) -> None:
    for operation in (add, *twin.rng.choices(OPERATIONS, k=NUM_OPERATIONS)):
        twin.done.append(operation.__name__)
        operation(twin)
    twin.check()
    unmerge(twin)
    twin.check()
    twin.check_base()
    assert torch.equal(twin.weight_of(twin.model.unload().layer), twin.weight_of(twin.plain))


def test_every_kind_of_layer_has_its_line() -> None:
    layers = [kind.build() for kind in KINDS.values()]
    for kinds, name, _ in _KINDS:
        assert any(isinstance(layer, kinds) for layer in layers), name
