"""Training in folders of FP8 and INT4: read by transformers, written back as codes."""

import json
import shutil

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from pacatune import PacaConfig, patch
from pacatune.adapters.base import load_base
from pacatune.adapters.folder import read_adapter
from pacatune.cli import main
from pacatune.grid.folder import PackedFolder
from pacatune.grid.layers import PackedLayer
from pacatune.patch.packed import open_packed
from tests.grid.conftest import build, digest, train_in
from tests.grid.test_packed import assert_equal_training, both
from tests.releases import needs

pytestmark = needs("compressed_tensors")


def fp8(weight, rows, columns):
    """Codes and scales of blocks of rows x columns."""
    blocks = weight.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).float()
    scale = blocks.abs().amax((1, 3)) / 448
    codes = (blocks / scale[:, None, :, None]).reshape(weight.shape)
    return codes.to(torch.float8_e4m3fn), scale


def fp8_in_blocks(weight):
    codes, scale = fp8(weight, 16, 32)
    return {"weight": codes, "weight_scale_inv": scale}


def fp8_in_rows(weight):
    codes, scale = fp8(weight, 1, weight.shape[1])
    return {"weight": codes, "weight_scale": scale.bfloat16()}


def int4_in_groups(weight):
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    groups = weight.unflatten(1, (-1, 32)).float()
    scale = (groups.abs().amax(-1) / 7.5).bfloat16()
    codes = (groups / scale[..., None].float()).round().clamp(-8, 7).to(torch.int8).flatten(1)
    shape = torch.tensor(weight.shape)
    return {"weight_packed": pack_to_int32(codes, 4), "weight_scale": scale, "weight_shape": shape}


def scheme(form, **weights):
    weights = {"symmetric": True, "dynamic": False} | weights
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    names = {"quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head"]}
    return names | {"config_groups": groups, "quantization_status": "compressed"}


KINDS = {
    "fp8": (
        fp8_in_blocks,
        {
            "quant_method": "fp8",
            "weight_block_size": [16, 32],
            "modules_to_not_convert": ["lm_head"],
        },
    ),
    "fp8-rows": (
        fp8_in_rows,
        scheme("float-quantized", num_bits=8, type="float", strategy="channel"),
    ),
    "int4": (
        int4_in_groups,
        scheme("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32),
    ),
}


@pytest.fixture(params=KINDS)
def folder(request, tmp_path, tiny_tokenizer):
    """A small Llama, quantised as the hub's models are."""
    pack, section = KINDS[request.param]
    path = tmp_path / "base"
    build(tiny_tokenizer).bfloat16().save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    tensors = {}
    for name, tensor in load_file(path / "model.safetensors").items():
        module, _, kind = name.rpartition(".")
        is_packed = module.endswith("_proj") and kind == "weight"
        parts = pack(tensor) if is_packed else {kind: tensor}
        tensors |= {f"{module}.{part}": one for part, one in parts.items()}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": section}))
    return path


def test_it_is_trained_written_and_taken_out(folder, tmp_path, capsys):
    run_dir, held_out = tmp_path / "run", ["--data.eval_path", tmp_path / "chats.jsonl"]
    train_in(folder, tmp_path, *held_out, "--training.learning_rate", "0.002", "--paca.r", "4")
    capsys.readouterr()
    before, output = digest(folder / "model.safetensors"), tmp_path / "tuned"
    words = ["--model", str(folder), "--adapter", str(run_dir), "--output", str(output)]
    assert main(["merge", *words, "--held_out"]) == 0
    said = capsys.readouterr().out
    assert "trained codes moved" in said
    assert "as trained, " in said
    assert digest(folder / "model.safetensors") == before
    assert (output / "config.json").read_text() == (folder / "config.json").read_text()
    # Trained columns are the nearest codes; no other byte of the weights differs.
    plain, tuned = (load_base(str(p), task_type="CAUSAL_LM") for p in (folder, output))
    adapter, checkpoint = read_adapter(run_dir), PackedFolder.open(folder)
    for module, update in adapter.modules.items():
        old, new = (m.get_submodule(module).weight.detach().float() for m in (plain, tuned))
        wanted = old.clone()
        wanted[:, update.indices] += adapter.scaling(module) * update.delta
        is_free = torch.ones(old.shape[1], dtype=torch.bool)
        is_free[update.indices] = False
        assert torch.equal(new[:, is_free], old[:, is_free])
        name = checkpoint.name_of(f"{module}.weight", 2)
        grid, (scale, _) = checkpoint.grid(name), checkpoint.scales(name, update.indices)
        levels = grid._levels_on(scale.device)
        levels = levels[~levels.isnan()] * scale[..., None]
        least = (levels - wanted[:, update.indices, None]).abs().amin(-1)
        error = (new - wanted)[:, update.indices].abs()
        assert (error <= least + 0.005 * wanted.abs().max()).all()
    old, new = (load_file(path / "model.safetensors") for path in (folder, output))
    changed = {
        name
        for name in old
        if not torch.equal(old[name].view(torch.uint8), new[name].view(torch.uint8))
    }
    assert changed == {checkpoint.name_of(f"{module}.weight", 2) for module in adapter.modules}
    # As a patch, in place and back.
    patch, copy = str(tmp_path / "p.safetensors"), tmp_path / "copy"
    shutil.copytree(folder, copy)
    assert main(["patch", "make", *words[:4], "--output", patch]) == 0
    for word, expected in (("apply", digest(output / "model.safetensors")), ("revert", before)):
        assert main(["patch", word, "--model", str(copy), "--patch", patch, "--in_place"]) == 0
        assert digest(copy / "model.safetensors") == expected
    whole = ["--output", str(tmp_path / "plain"), "--base", "dequantized"]
    assert main(["merge", *words[:4], *whole]) == 0
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())


def test_training_in_codes_is_training_dequantised(folder, tmp_path):
    plain, packed = both(folder)
    layers = [layer for layer in packed.modules() if isinstance(layer, PackedLayer)]
    assert len(layers) == 2 * 7  # the head is in 16 bits
    for name, weight in plain.named_parameters():
        assert torch.equal(packed.get_submodule(name.rpartition(".")[0]).weight, weight), name
    assert_equal_training(plain, packed, steps=3)
    digests = []
    for kept in ("true", "false"):
        run, output = tmp_path / kept, tmp_path / f"tuned-{kept}"
        said = train_in(folder, run, "--paca.r", "4", "--model.packed", kept)
        assert ("they stay in " in said) == (kept == "true")
        words = ["--model", folder, "--adapter", run / "run", "--output", output]
        assert main(["merge", *map(str, words)]) == 0
        digests.append(digest(output / "model.safetensors"))
    assert digests[0] == digests[1]


def test_the_same_codes_with_other_scales_are_another_base(folder, tmp_path):
    base = load_base(str(folder), task_type="CAUSAL_LM")
    config = PacaConfig(r=4, target_modules="all-linear", init_weights=False, task_type="CAUSAL_LM")
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    changes, _ = patch.make(folder, tmp_path / "adapter")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight_scale"
    name = name if name in tensors else f"{name}_inv"
    save_file(tensors | {name: 2 * tensors[name]}, path, {"format": "pt"})
    before = digest(path)
    message = (
        r"not the base .* columns of 'model\.layers\.1\.mlp\.up_proj.*' beside the patch's dif"
    )
    with pytest.raises(ValueError, match=message):
        patch.apply_to_folder(folder, changes, tmp_path / "out")
    assert digest(path) == before
    assert not (tmp_path / "out").exists()
    (note,) = patch.apply_to_folder(folder, changes, tmp_path / "out", allow_other_base=True).notes
    assert "sampled columns beside the patch's differ from its base" in note


@pytest.mark.parametrize(
    ("part", "size", "message"),
    [
        ("weight_zero_point", (64, 1), r"weight_zero_point; codes can be trained where"),
        ("weight_scale", (5, 7), "does not divide the weight"),
        ("weight_scale", (0, 4), r"of \(0, 4\), which does not divide the weight"),
    ],
)
def test_scales_that_are_refused(folder, part, size, message):
    path, module = folder / "model.safetensors", "model.layers.0.mlp.down_proj"
    tensors = load_file(path)
    name = next((n for n in tensors if f"{module}.{part}" in n), f"{module}.{part}")
    save_file(tensors | {name: torch.ones(size)}, path, {"format": "pt"})
    checkpoint = PackedFolder.open(folder)
    codes = checkpoint.name_of(f"{module}.weight", 2)
    with pytest.raises(ValueError, match=message):
        checkpoint.scales(codes, torch.tensor([0]))


@pytest.mark.parametrize("folder", ["int4"], indirect=True)
def test_packed_weights_that_are_no_matrices(folder):
    """They keep the format that the file names, whose codes cannot be trained."""
    path, name = folder / "model.safetensors", "model.layers.0.mlp.down_proj.weight_packed"
    tensors, shape = load_file(path), name.replace("packed", "shape")
    whole = PackedFolder.open(folder).entries[name]
    assert (whole.dtype, whole.shape) == ("INT4", (64, 96))
    for changed in (
        {name: tensors[name][0, 0].clone()},
        {name: tensors[name][None].clone()},
        {shape: torch.tensor(64)},
        {shape: torch.tensor([[[64, 96]]])},
        {shape: torch.tensor([1, 64, 96])},
    ):
        save_file(tensors | changed, path, {"format": "pt"})
        assert PackedFolder.open(folder).entries[name].dtype == "I32"
    save_file(tensors | {shape: torch.tensor([64.0, 96.0])}, path, {"format": "pt"})
    checkpoint = PackedFolder.open(folder)
    assert checkpoint.columns(name, 1, torch.tensor([5])).shape == (64, 1)
    assert len(checkpoint.touched(name, 1, torch.tensor([5]), 4096))


def test_it_needs_a_tensor_of_the_name(folder):
    with pytest.raises(ValueError, match=r"has no tensor 'model\.other\.weight'"):
        PackedFolder.open(folder).name_of("model.other.weight", 2)


def test_plain_folders_have_no_codes(tiny_model_dir):
    with pytest.raises(ValueError, match="holds plain numbers and no codes"):
        open_packed(tiny_model_dir)
