"""What is saved, after whatever PEFT was asked to do, is what is active."""

import random

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaForSequenceClassification

from pacatune import PacaConfig
from pacatune.adapters.folder import read_adapter
from pacatune.adapters.loading import answered_warnings, hotswap_adapter
from pacatune.format.tensors import PEFT_PREFIX
from tests.adapters.fixtures import edit_json, edit_tensors
from tests.conftest import build_model

IDS = torch.arange(10)[None]
CHOICES = [
    {"r": 4, "paca_alpha": 8},
    {"r": 4, "paca_alpha": 2, "random_seed": 7},
    {"r": 2, "rank_pattern": {"down_proj": 5}, "alpha_pattern": {"layers.1.*q_proj": 3}},
    {"r": 4, "selection": "weight_norm"},
    {"r": 2, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
]


def make_base(task_type):
    config = build_model(50, num_labels=3).config
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config).eval()
    return model if task_type else model.model


def make_adapters(folder, task_type):
    for number, options in enumerate(CHOICES):
        options = {"target_modules": r".*(q_proj|down_proj)", **options}
        model = get_peft_model(make_base(task_type), PacaConfig(task_type=task_type, **options))
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder / str(number))


def outputs_of(model):
    with torch.no_grad():
        return model(input_ids=IDS)[0]


@pytest.mark.parametrize("task_type", [None, "SEQ_CLS"])
@pytest.mark.parametrize("seed", range(4))
def test_walk(tmp_path, task_type, seed):
    """Load, swap, add up, choose, delete; save what is active each time, and load it elsewhere."""
    rng = random.Random(seed)
    make_adapters(tmp_path, task_type)
    saved = [str(tmp_path / str(number)) for number in range(len(CHOICES))]
    with answered_warnings():
        model = PeftModel.from_pretrained(make_base(task_type), saved[0])
        for step in range(12):
            names, new = [*model.peft_config], f"n{step}"
            rule = rng.choice(["load", "swap", "swap", "sum", "set", "delete"])
            if rule == "load":
                model.load_adapter(rng.choice(saved), new)
                model.set_adapter(new)
            elif rule == "swap":
                hotswap_adapter(model, rng.choice(saved), model.active_adapter)
            elif rule == "sum" and task_type is None:
                model.add_weighted_adapter(
                    rng.sample(names, min(2, len(names))), [0.5, -1][: len(names)], new
                )
                model.set_adapter(new)
            elif rule == "sum":
                with pytest.raises(ValueError, match=r"trains more than columns \(`modules_to_s"):
                    model.add_weighted_adapter(names[:1], [0.5], new)
            elif rule == "delete" and len(names) > 1:
                gone = names.pop(names.index(model.active_adapter))
                model.set_adapter(rng.choice(names))
                model.delete_adapter(gone)
            else:
                model.set_adapter(rng.choice(names))
            active, out = model.active_adapter, tmp_path / "saved" / str(step)
            model.save_pretrained(out, selected_adapters=[active])
            out = out if active == "default" else out / active
            expected = outputs_of(model)
            reloaded = PeftModel.from_pretrained(make_base(task_type), out)
            assert torch.equal(outputs_of(reloaded), expected), (step, rule)
            adapter = read_adapter(out)  # ours reads it the same
            for name, update in adapter.modules.items():
                layer = model.get_base_model().get_submodule(name)
                assert adapter.scaling(name) == pytest.approx(layer.scaling[active])
                assert torch.equal(update.indices, layer.paca_indices[active])
            hotswap_adapter(model, out, active)
            assert torch.equal(outputs_of(model), expected)


def test_what_cannot_be_swapped(tmp_path):
    """A file without the head that this model has, and one for another base; nothing is changed."""
    make_adapters(tmp_path, "SEQ_CLS")
    model = PeftModel.from_pretrained(make_base("SEQ_CLS"), tmp_path / "0")
    before = outputs_of(model)
    edit_json(tmp_path / "1" / "adapter_config.json", modules_to_save=None)
    edit_tensors(tmp_path / "1", lambda tensors: tensors.pop(f"{PEFT_PREFIX}score.weight"))
    quantization = {"method": "bitsandbytes", "type": "nf4"}
    changes = {"base_quantization": quantization, "columns_from": "original"}
    edit_json(tmp_path / "2" / "adapter_config.json", **changes)
    for name, message in (
        ("1", "only one of them has 'score.weight' of its shape"),
        ("2", "with columns that start from the original weights; this base is not quantised"),
    ):
        with pytest.raises(ValueError, match=message):
            hotswap_adapter(model, tmp_path / name)
        assert torch.equal(outputs_of(model), before)
