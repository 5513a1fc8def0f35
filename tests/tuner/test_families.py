"""Every family works without `target_modules`: tiny random models, from adapting to LoRA export."""

import copy
import logging
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model

from pacatune import PacaConfig
from pacatune.adapters.export import export_lora
from pacatune.tuner import defaults
from pacatune.tuner.defaults import survey
from tests.releases import has
from tests.tuner.nets import layers
from tools.families import FAMILIES

RANK = 4
ROOT = Path(__file__).parents[2]


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


def test_the_quick_start_names_every_family():
    page = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    listed = " ".join(page.partition("exports it to LoRA: ")[2].split()).removesuffix(".")
    assert listed.split(", ") == list(FAMILIES)
