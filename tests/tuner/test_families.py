"""Every family works without `target_modules`: tiny random models, from adapting to LoRA export."""

import copy
import logging

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from pacatune import PacaConfig
from pacatune.adapters.export import export_lora
from pacatune.measure.counters import SavedBytes
from pacatune.tuner import defaults
from pacatune.tuner.defaults import survey
from tests.releases import has, needs
from tests.tuner.nets import layers
from tools import doc_block, families
from tools.families import FAMILIES

RANK = 4


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def base(family):
    return family.build()


@pytest.fixture(scope="module")
def trained(family, base):
    """The adapted model after three optimizer steps, and the losses before each and after."""
    model = adapt(base)
    lr = 2e-3 if family.batch == "pairs" else 2e-2  # CLIP's first weights are other ones by release
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(3):
        loss = model(**family.make_batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    with torch.no_grad():
        losses.append(model(**family.make_batch()).loss.item())
    return model, losses


def adapt(base):
    # In evaluation mode: some of these models drop layers or tokens at random in training.
    return get_peft_model(copy.deepcopy(base), PacaConfig(r=RANK, paca_alpha=8)).eval()


def outputs(model, family):
    with torch.no_grad():
        result = model(**family.make_batch())
    return result["logits_per_image" if family.batch == "pairs" else "logits"]


def test_the_default_adapts_what_the_survey_says(base, trained):
    for model in (base, trained[0].get_base_model()):
        chosen = {name for name, reason in survey(model).items() if not reason}
        assert set(layers(trained[0])) == chosen


def test_every_layer_is_trained_and_the_loss_falls(trained):
    model, losses = trained
    assert losses[3] < losses[2] < losses[1] < losses[0]
    for name, layer in layers(model).items():
        assert layer.delta_of("default").any(), name


def test_the_base_is_bit_identical_when_disabled(family, base, trained):
    model, _ = trained
    with model.disable_adapter():
        assert torch.equal(outputs(model, family), outputs(base, family))
    for name, layer in layers(model).items():
        assert torch.equal(layer.base_layer.weight, base.get_submodule(name).weight), name
    assert not torch.equal(outputs(model, family), outputs(base, family))


def test_kept_bytes_beyond_the_frozen_model_are_the_formula(family, base):
    """N * R elements per layer; where the base layer is called, the scaled delta, O * R, too."""
    model = adapt(base)
    expected = []
    for layer in layers(model).values():
        num_scaled = layer.out_features * RANK if type(layer.base_layer) is Conv1D else 0

        def count(layer, args, num_scaled=num_scaled):
            num_tokens = args[0].numel() // layer.in_features
            expected.append((num_tokens * RANK + num_scaled) * args[0].itemsize)

        layer.register_forward_pre_hook(count)
    kept = saved_bytes(model, family)
    assert kept - saved_bytes(copy.deepcopy(base), family) == sum(expected)
    assert len(expected) == len(layers(model))


def saved_bytes(model, family):
    """Bytes kept where every input of a linear layer needs a gradient, and its weight none."""
    linear = [module for module in model.modules() if isinstance(module, (nn.Linear, Conv1D))]
    model.requires_grad_()
    for layer in linear:
        layer.weight.requires_grad_(False)
    with SavedBytes(model) as saved:
        loss = model(**family.make_batch()).loss
    del loss
    return saved.num_bytes


def test_the_exported_lora_computes_the_same(family, base, trained, tmp_path):
    is_moe = any(name.endswith(".experts") for name, _ in base.named_modules())
    if is_moe and has("peft", "0.19") and not has("peft", "0.20"):
        pytest.skip("PEFT 0.19 loads no LoRA adapter of experts models of this transformers")
    model, _ = trained
    base.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    result = export_lora(str(tmp_path / "base"), tmp_path / "adapter", tmp_path / "lora")
    assert result.num_modules == len(layers(model))
    lora = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora").eval()
    torch.testing.assert_close(outputs(lora, family), outputs(model, family), atol=1e-5, rtol=1e-4)


def test_what_was_chosen_is_logged_once(caplog):
    base = FAMILIES["Llama"].build()
    defaults.log_once.cache_clear()
    with caplog.at_level(logging.WARNING, "pacatune"):
        adapt(base)
        adapt(base)
    (record,) = caplog.records
    assert record.getMessage() == (
        "`target_modules` is not set: PaCA adapts the 14 linear layers in the blocks of "
        "LlamaForCausalLM (2 x down_proj, 2 x gate_proj, 2 x k_proj, 2 x o_proj, 2 x q_proj, "
        "2 x up_proj, 2 x v_proj); it leaves out embed_tokens, lm_head."
    )


@needs("transformers", "5.24")  # names of layers
def test_the_table_of_families_is_up_to_date():
    expected = doc_block.render(families.DOCUMENT, "families", families.families_table)
    assert families.DOCUMENT.read_text(encoding="utf-8") == expected, "run `make docs`"
