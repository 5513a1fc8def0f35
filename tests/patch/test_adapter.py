"""R7: from adapters to patches and back, with the bits of a merge, for every kind of weight."""

import shutil
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaModel

from pacatune import patch
from tests.adapters import kinds
from tests.adapters.fixtures import edit_json, edit_tensors, save_adapter, scale
from tests.conftest import build_model
from tests.patch.conftest import contents
from tests.releases import needs

pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
CONFIG, DOWN = "adapter_config.json", "model.layers.0.mlp.down_proj.weight"


def test_an_adapter_without_a_fingerprint_comes_back_exactly(bf16_dir, tmp_path):
    save_adapter(bf16_dir, tmp_path / "a", dtype="bfloat16", with_fingerprint=False)
    made, _ = patch.make(bf16_dir, tmp_path / "a")
    assert made.base == "my-base"
    patch.save(made, tmp_path / "p.safetensors")
    patch.to_adapter(patch.load(tmp_path / "p.safetensors"), tmp_path / "b")
    before, after = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert "pacatune.json" not in after
    assert after == {name: before[name] for name in after}


def test_without_its_adapter_a_patch_is_smaller(bf16_dir, bf16_adapter, bf16_patch, tmp_path):
    made, notes = patch.make(bf16_dir, bf16_adapter, with_adapter=False)
    assert notes == ["the patch is without its adapter (--no_adapter), which it cannot give back."]
    small, large = (patch.save(p, tmp_path / n) for p, n in ((made, "a"), (bf16_patch, "b")))
    assert large - small > sum(file.nbytes for file in bf16_patch.adapter.values()) > 0
    with pytest.raises(ValueError, match="without the adapter it was made of; make it again"):
        patch.to_adapter(made, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_an_adapter_that_a_stranger_put_into_a_patch_is_checked(bf16_patch, tmp_path):
    evil = torch.frombuffer(bytearray(b'{"peft_type": "EVIL"}'), dtype=torch.uint8)
    forged = {**bf16_patch.adapter, CONFIG: evil, "config.json": evil}
    with pytest.raises(ValueError, match="This is not a PaCA adapter"):
        patch.to_adapter(replace(bf16_patch, adapter=forged), tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
    other = replace(bf16_patch, adapter={**bf16_patch.adapter, "config.json": evil})
    patch.to_adapter(other, tmp_path / "x")
    assert not (tmp_path / "x" / "config.json").exists()


def test_a_checkpoint_of_the_bare_model(tmp_path):
    """transformers loads it under a head, whose names have a prefix."""
    model = build_model(64)
    model.model.save_pretrained(tmp_path / "bare")
    model.save_pretrained(tmp_path / "whole")
    save_adapter(tmp_path / "whole", tmp_path / "adapter")
    made, _ = patch.make(tmp_path / "bare", tmp_path / "adapter")
    assert "layers.0.self_attn.q_proj.weight" in made.after
    patch.apply_to_folder(tmp_path / "bare", made, tmp_path / "patched")
    patch.apply(model, made)
    bare = LlamaModel.from_pretrained(tmp_path / "patched")
    for name, parameter in bare.named_parameters():
        assert torch.equal(parameter, model.get_parameter(f"model.{name}")), name


def test_tied_weights_stay_tied_or_are_refused(tmp_path):
    base = tmp_path / "base"
    build_model(64, tie_word_embeddings=True).save_pretrained(base)
    save_adapter(base, tmp_path / "adapter")
    patch.apply_to_folder(base, patch.make(base, tmp_path / "adapter")[0], tmp_path / "patched")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "patched")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for target in ("lm_head", "embed_tokens"):
        save_adapter(base, tmp_path / target, target_modules=[target, "q_proj"])
        message = r"ties 'lm_head.weight' to .* would change both\. Merge"
        with pytest.raises(ValueError, match=message):
            patch.make(base, tmp_path / target)


def test_another_base_is_refused(bf16_adapter, tmp_path):
    build_model(300, seed=1).bfloat16().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="choose the right base, or pass `allow_other_base`"):
        patch.make(tmp_path / "other", bf16_adapter)
    assert patch.make(tmp_path / "other", bf16_adapter, allow_other_base=True)[1]


NF4 = {"method": "bitsandbytes", "type": "nf4"}


def configured(**changes):
    return lambda base, adapter: edit_json(adapter / CONFIG, **changes)


def train_head(base, adapter):
    head = {"base_model.model.lm_head.weight": torch.ones(300, 32)}
    edit_tensors(adapter, lambda tensors: tensors.update(head))


def declare_packed(base, adapter):
    few_bits = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    edit_json(base / "config.json", quantization_config=few_bits)


def pack(base, adapter):
    def change(tensors):
        tensors[DOWN] = tensors[DOWN].to(torch.float8_e4m3fn)

    edit_tensors(base / "model.safetensors", change)


def overflow(base, adapter):
    scale(adapter, 1e37)
    edit_json(adapter / CONFIG, paca_alpha=1e4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (configured(peft_type="LORA"), "This is not a PaCA adapter"),
        (configured(base_quantization=NF4), "quantised as 'bitsandbytes nf4'.* --base original"),
        (train_head, "trains what are no columns, first .*patch diff"),
        (overflow, "columns that are not finite in torch.bfloat16"),
        (declare_packed, "is saved quantised: its numbers are packed"),
        (pack, "is saved quantised: its numbers are packed"),
    ],
)
def test_what_a_patch_cannot_hold_is_refused(single, bf16_adapter, tmp_path, change, message):
    adapter = shutil.copytree(bf16_adapter, tmp_path / "adapter")
    change(single, adapter)
    with pytest.raises(ValueError, match=message):
        patch.make(single, adapter)


@needs("transformers", "5")
def test_experts_that_the_checkpoint_has_otherwise(tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    kinds.build("mixtral").bfloat16().save_pretrained(base)
    kinds.save("mixtral", base, adapter, dtype="bfloat16")

    def change(tensors):  # loads as other bits than it is stored in
        name = next(one for one in tensors if "layers.0." in one and "experts.0.w2" in one)
        tensors[name] = tensors[name].float() + 1e-9

    edit_tensors(base / "model.safetensors", change)
    with pytest.raises(ValueError, match=r"does not hold .* as transformers would save it"):
        patch.make(base, adapter, allow_other_base=True)
