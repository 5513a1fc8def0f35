"""From adapters to patches and back, for every kind of weight; the bits are those of a merge."""

import filecmp
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    ConvNextConfig,
    ConvNextForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from pacatune import patch
from pacatune.adapters.merge import merge
from pacatune.files.checkpoint import Checkpoint
from tests.adapters.fixtures import save_adapter
from tests.conftest import build_model
from tests.releases import has
from tests.tuner import moe

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]
EXPERTS = {"target_modules": ["q_proj"], "target_parameters": moe.BOTH}
KINDS = {
    "conv1d": {"target_modules": ["c_attn", "c_fc"]},
    "convolution": {
        "target_modules": ["patch_embeddings", "dwconv", "pwconv1"],
        "rank_pattern": {"patch_embeddings": 2},
        "task_type": None,
    },
    "attention": {"target_modules": ["attention", "fc1"], "task_type": None},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "mixtral": EXPERTS,
    "gpt_oss": EXPERTS,
    "llama4": EXPERTS,
}


def build(kind):
    torch.manual_seed(0)
    if kind == "conv1d":
        sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 50, "n_positions": 64}
        return GPT2LMHeadModel(GPT2Config(**sizes))
    if kind == "convolution":
        sizes = {"hidden_sizes": [6, 8], "depths": [1, 1], "num_stages": 2, "image_size": 32}
        return ConvNextForImageClassification(ConvNextConfig(**sizes, num_labels=4))
    if kind == "attention":
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
        config = SiglipVisionConfig(**sizes, num_attention_heads=2, image_size=16, patch_size=8)
        return SiglipVisionModel(config)
    if kind == "embedding":
        return build_model(64)
    return moe.build(kind, dtype=torch.bfloat16)


def tensors_of(folder):
    checkpoint = Checkpoint.open(folder)
    return {name: checkpoint.tensor(name) for name in checkpoint.entries}


def assert_same_tensors(one, other):
    one, other = tensors_of(one), tensors_of(other)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(patch.edit.bits(tensor), patch.edit.bits(other[name])), name


@pytest.mark.parametrize(
    ("dtype", "groups"), [("float32", 1), ("bfloat16", 1), ("float16", 1), ("bfloat16", 4)]
)
def test_a_patched_checkpoint_is_the_merged_one(tiny_model_dir, tmp_path, dtype, groups):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    torch_dtype = getattr(torch, dtype)
    AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch_dtype).save_pretrained(base)
    options = {"rank_pattern": {"q_proj": 2}, "groups": groups}
    adapted = save_adapter(base, adapter, dtype=dtype, **options)
    made, notes = patch.make(base, adapter)
    assert notes == []
    assert made.base == "base"
    patch.apply_to_folder(base, made, tmp_path / "patched")
    merge(str(base), adapter, tmp_path / "merged", verify=False)
    files = ["model.safetensors", "config.json"]
    assert filecmp.cmpfiles(tmp_path / "patched", tmp_path / "merged", files, shallow=False)[0] == [
        "model.safetensors",
        "config.json",
    ]
    # And it is what training computes with: the same logits to the last bit.
    tokens = torch.arange(256).view(2, 128)
    patched = AutoModelForCausalLM.from_pretrained(tmp_path / "patched", dtype="auto").eval()
    trained = adapted.train()(tokens).logits
    assert trained.requires_grad
    assert torch.equal(patched(tokens).logits, trained)
    patch.apply_to_folder(tmp_path / "patched", made, tmp_path / "back", revert=True)
    files.append("generation_config.json")
    assert filecmp.cmpfiles(base, tmp_path / "back", files, shallow=False)[1:] == ([], [])


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_weight(kind, groups, tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    build(kind).save_pretrained(base)
    dtype = "bfloat16" if kind in ("mixtral", "gpt_oss", "llama4") else "float32"
    options = dict(KINDS[kind])
    if groups > 1 and kind == "convolution":  # depthwise ones have groups of their own
        options["target_modules"] = ["patch_embeddings", "pwconv1"]
    save_adapter(base, adapter, dtype=dtype, groups=groups, **options)
    made, _ = patch.make(base, adapter)
    merge(str(base), adapter, tmp_path / "merged", verify=False)
    patch.apply_to_folder(base, made, tmp_path / "patched")
    assert_same_tensors(tmp_path / "patched", tmp_path / "merged")
    patch.apply_to_folder(tmp_path / "patched", made, tmp_path / "back", revert=True)
    assert filecmp.cmp(base / "model.safetensors", tmp_path / "back/model.safetensors", False)
    assert made.num_bytes < Checkpoint.open(base).num_bytes / 2


def test_row_groups_in_a_file_and_in_place(bf16_dir, tmp_path):
    """Only what the groups train is in the patch, and written."""
    base = shutil.copytree(bf16_dir, tmp_path / "base")
    save_adapter(base, tmp_path / "adapter", dtype="bfloat16", groups=4)
    made, notes = patch.make(base, tmp_path / "adapter")
    assert notes == []
    assert made.num_bytes == 2 * 2 * 4 * (32 + 16 + 32)
    patch.save(made, tmp_path / "p.safetensors")
    found = patch.load(tmp_path / "p.safetensors")
    assert patch.compare_patches(found, made).differing == []
    assert all(edit.is_grouped for edit in found.edits.values())
    result = patch.apply_in_place(base, found)
    assert result.column_bytes == made.num_bytes
    merge(str(bf16_dir), tmp_path / "adapter", tmp_path / "merged", verify=False)
    assert_same_tensors(base, tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    patch.revert(model, found)
    for name, tensor in tensors_of(bf16_dir).items():
        assert torch.equal(model.state_dict()[name], tensor), name
    patch.apply_in_place(base, found, revert=True)
    assert_same_tensors(base, bf16_dir)
    patch.to_adapter(found, tmp_path / "again")
    files = ["adapter_config.json", "adapter_model.safetensors"]
    assert filecmp.cmpfiles(tmp_path / "adapter", tmp_path / "again", files, False)[0] == files


def test_grouped_convolutions_change_their_own_rows_alone(tmp_path):
    build("convolution").save_pretrained(tmp_path / "base")
    save_adapter(tmp_path / "base", tmp_path / "adapter", **KINDS["convolution"])
    made, _ = patch.make(tmp_path / "base", tmp_path / "adapter")
    edit = next(edit for name, edit in made.edits.items() if "dwconv" in name)
    assert edit.indices.tolist() == [0]  # depthwise: one column, of as many rows as channels
    changed = (edit.original != edit.new).flatten(1).any(1)
    assert int(changed.sum()) == 4


@pytest.mark.skipif(not has("transformers", "5"), reason="transformers 4 fuses no experts")
def test_experts_are_edited_as_the_checkpoint_has_them(tmp_path):
    build("mixtral").save_pretrained(tmp_path / "base")
    save_adapter(tmp_path / "base", tmp_path / "adapter", dtype="bfloat16", **EXPERTS)
    made, _ = patch.make(tmp_path / "base", tmp_path / "adapter")
    stored = Checkpoint.open(tmp_path / "base").entries
    assert made.edits.keys() <= stored.keys()
    assert not any("gate_up_proj" in name for name in made.edits)
    with pytest.raises(ValueError, match="tensors in another form, patch the checkpoint"):
        patch.apply(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), made)


def test_a_base_in_several_files(bf16_adapter, bf16_patch, tmp_path):
    build_model(300).bfloat16().save_pretrained(tmp_path / "base", max_shard_size="30KB")
    made, _ = patch.make(tmp_path / "base", bf16_adapter)
    assert patch.compare_patches(made, bf16_patch).differing == []
    assert made.fingerprint == bf16_patch.fingerprint


def test_a_checkpoint_of_the_bare_model(tmp_path):
    """transformers loads it under a head, whose names have a prefix."""
    model = build_model(64)
    model.model.save_pretrained(tmp_path / "bare")
    model.save_pretrained(tmp_path / "whole")
    save_adapter(tmp_path / "whole", tmp_path / "adapter")
    made, _ = patch.make(tmp_path / "bare", tmp_path / "adapter")
    assert "layers.0.self_attn.q_proj.weight" in made.edits
    patch.apply_to_folder(tmp_path / "bare", made, tmp_path / "patched")
    patch.apply(model, made)
    bare = LlamaModel.from_pretrained(tmp_path / "patched")
    for name, parameter in bare.named_parameters():
        assert torch.equal(parameter, model.get_parameter(f"model.{name}")), name


@pytest.mark.parametrize("with_fingerprint", [True, False])
def test_the_adapter_comes_back_exactly(bf16_dir, tmp_path, with_fingerprint):
    save_adapter(bf16_dir, tmp_path / "a", dtype="bfloat16", with_fingerprint=with_fingerprint)
    made, _ = patch.make(bf16_dir, tmp_path / "a")
    patch.save(made, tmp_path / "p.safetensors")
    patch.to_adapter(patch.load(tmp_path / "p.safetensors"), tmp_path / "b")
    names = sorted(path.name for path in (tmp_path / "b").iterdir())
    assert ("pacatune.json" in names) == with_fingerprint
    assert filecmp.cmpfiles(tmp_path / "a", tmp_path / "b", names, shallow=False)[0] == names
    again, _ = patch.make(bf16_dir, tmp_path / "b")
    for name, edit in made.edits.items():
        assert torch.equal(edit.new, again.edits[name].new)


def test_without_its_adapter_a_patch_is_smaller(bf16_dir, bf16_adapter, bf16_patch, tmp_path):
    made, notes = patch.make(bf16_dir, bf16_adapter, with_adapter=False)
    assert notes == ["the patch is without its adapter (--no-adapter), which it cannot give back."]
    small, large = (patch.save(p, tmp_path / n) for p, n in ((made, "a"), (bf16_patch, "b")))
    assert large - small > sum(t.nbytes for t in bf16_patch.adapter.tensors.values())
    with pytest.raises(ValueError, match="without the adapter it was made of; make it again"):
        patch.to_adapter(made, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_an_adapter_that_a_stranger_put_into_a_patch_is_checked(bf16_patch, tmp_path):
    part = bf16_patch.adapter
    config = json.loads(part.config) | {"peft_type": "EVIL"}
    forged = patch.AdapterPart(config=json.dumps(config), sidecar=None, tensors=part.tensors)
    with pytest.raises(ValueError, match="This is not a PaCA adapter"):
        patch.to_adapter(patch.Patch(edits=bf16_patch.edits, adapter=forged), tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def tied_base(folder):
    build_model(64, tie_word_embeddings=True).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_tied_weights_are_refused(tmp_path, target):
    base = tied_base(tmp_path / "base")
    save_adapter(base, tmp_path / "adapter", target_modules=[target, "q_proj"])
    with pytest.raises(ValueError, match=r"ties 'lm_head.weight' to .* would change both\. Merge"):
        patch.make(base, tmp_path / "adapter")


def test_tied_weights_beside_the_patch_stay_tied(tmp_path):
    base = tied_base(tmp_path / "base")
    save_adapter(base, tmp_path / "adapter")
    made, _ = patch.make(base, tmp_path / "adapter")
    patch.apply_to_folder(base, made, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    merge(str(base), tmp_path / "adapter", tmp_path / "merged", verify=False)
    assert_same_tensors(tmp_path / "out", tmp_path / "merged")


def edit_config(folder, name, **changes):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_another_base_is_refused(bf16_adapter, bf16_dir, tmp_path):
    build_model(300, seed=1).bfloat16().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="choose the right base, or pass `allow_other_base`"):
        patch.make(tmp_path / "other", bf16_adapter)
    made, notes = patch.make(tmp_path / "other", bf16_adapter, allow_other_base=True)
    assert notes
    with pytest.raises(ValueError, match=r"is not the base that the patch is for \('other'\)"):
        patch.apply_to_folder(bf16_dir, made, tmp_path / "out")


def test_what_a_patch_cannot_hold_is_refused(bf16_dir, bf16_adapter, tmp_path):
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(bf16_dir)
    get_peft_model(base, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="This is not a PaCA adapter"):
        patch.make(bf16_dir, tmp_path / "lora")
    shutil.copytree(bf16_adapter, tmp_path / "quantised")
    few_bits = {"method": "bitsandbytes", "type": "nf4"}
    edit_config(tmp_path / "quantised", "adapter_config.json", base_quantization=few_bits)
    with pytest.raises(ValueError, match=r"quantised as 'bitsandbytes nf4'.* --base original"):
        patch.make(bf16_dir, tmp_path / "quantised")
    save_adapter(bf16_dir, tmp_path / "head", dtype="bfloat16", modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match=r"trains what are no columns, first .*patch diff"):
        patch.make(bf16_dir, tmp_path / "head")


def test_a_quantised_base_is_refused(bf16_dir, bf16_adapter, tmp_path):
    shutil.copytree(bf16_dir, tmp_path / "base")
    quantised = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    edit_config(tmp_path / "base", "config.json", quantization_config=quantised)
    with pytest.raises(ValueError, match="is saved quantised: its numbers are packed"):
        patch.make(tmp_path / "base", bf16_adapter)
    shutil.copytree(bf16_dir, tmp_path / "bytes")
    path = tmp_path / "bytes" / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="is saved quantised: its numbers are packed"):
        patch.make(tmp_path / "bytes", bf16_adapter)


def test_values_that_the_dtype_cannot_hold_are_refused(tiny_model_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float16)
    model.save_pretrained(tmp_path / "base")
    save_adapter(tmp_path / "base", tmp_path / "adapter", paca_alpha=1e7, dtype="float16")
    with pytest.raises(ValueError, match=r"columns that are not finite in torch\.float16"):
        patch.make(tmp_path / "base", tmp_path / "adapter")


def test_experts_that_the_checkpoint_has_otherwise(tmp_path):
    if not has("transformers", "5"):
        pytest.skip("transformers 4 fuses no experts")
    build("mixtral").save_pretrained(tmp_path / "base")
    save_adapter(tmp_path / "base", tmp_path / "adapter", dtype="bfloat16", **EXPERTS)
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    (name,) = [one for one in tensors if one.endswith("layers.0.mlp.experts.0.w2.weight")] or [
        next(one for one in tensors if "experts.0.w2" in one)
    ]
    tensors[name] = tensors[name].float() + 1e-9  # loads as other bits than it is stored in
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"does not hold .* as transformers would save it"):
        patch.make(tmp_path / "base", tmp_path / "adapter", allow_other_base=True)
