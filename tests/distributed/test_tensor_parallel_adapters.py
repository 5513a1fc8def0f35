"""Adapters of tensor parallel models: several, merged, exported, saved and loaded."""

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
    assert net.is_unchanged(model, before)
    base = model.merge_and_unload()
    assert not net.layers_of(base)
    weights = [whole(parameter) for parameter in base.parameters()]
    return [adapted, merged, logits_of(base), *adapter, *weights]


@pytest.mark.parametrize(
    ("sizes", "groups"),
    [(WITH_BIAS, 2), (UNEVEN, 1), (UNEVEN, 3)],
    ids=["even-2", "uneven-1", "uneven-3"],
)
def test_merging(assert_equal, sizes, groups):
    assert_equal(merge, groups, sizes=sizes)


def merge_tied(folder):
    model = adapt(load(folder), target_modules=["lm_head", "o_proj"])
    expected = logits_of(step(model))
    with pytest.raises(ValueError, match=r"Cannot merge into a weight .* each process has a part"):
        model.merge_adapter()
    assert torch.equal(expected, logits_of(model))


def test_merging_tied_parts_is_refused_and_changes_nothing(pair, save_base):
    pair.run(merge_tied, save_base((("tie_word_embeddings", True),)))


def export(make):
    from peft import convert_to_lora

    model = step(adapt(make()))
    updates = [layer.get_delta_weight("default") for layer in net.layers_of(model)]
    return [*updates, *dict(sorted(convert_to_lora(model, 4)[1].items())).values()]


def test_dense_updates_and_lora(assert_equal):
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
