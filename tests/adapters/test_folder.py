import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from pacatune.adapters.folder import LoraAdapter, locate_folder, open_adapter, read_adapter
from pacatune.adapters.inspect import inspect_adapter
from pacatune.files.plain import find_file


def rewrite(folder, change):
    """Let a function change the tensors of an adapter in place."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_an_adapter_is_read_without_its_base(adapter_dir):
    adapter = read_adapter(adapter_dir)
    assert len(adapter.modules) == 6
    delta, indices = adapter.modules["model.layers.1.mlp.down_proj"]
    assert delta.shape == (32, 4)
    assert indices.shape == (4,)
    assert adapter.scaling("model.layers.1.mlp.down_proj") == 2
    assert adapter.config.r == 4
    assert not adapter.extra
    assert "base_fingerprint" in adapter.sidecar


def test_patterns_give_modules_their_own_scaling(adapter_copy):
    path = adapter_copy / "adapter_config.json"
    config = json.loads(path.read_text())
    config |= {"rank_pattern": {r"layers\.0\..*v_proj": 2}, "alpha_pattern": {"v_proj": 5}}
    path.write_text(json.dumps(config))

    def shrink(tensors):
        prefix = "base_model.model.model.layers.0.self_attn.v_proj"
        for kind, keep in (("paca_delta", (slice(None), slice(2))), ("paca_indices", slice(2))):
            tensors[f"{prefix}.{kind}"] = tensors[f"{prefix}.{kind}"][keep].contiguous()

    rewrite(adapter_copy, shrink)
    adapter = read_adapter(adapter_copy)
    assert adapter.scaling("model.layers.0.self_attn.v_proj") == 2.5
    assert adapter.scaling("model.layers.1.self_attn.v_proj") == 1.25
    assert adapter.scaling("model.layers.0.self_attn.q_proj") == 2


def test_other_tensors_are_kept_under_their_names(adapter_copy):
    head = torch.ones(3, 2)
    rewrite(adapter_copy, lambda tensors: tensors.update({"base_model.model.head.weight": head}))
    adapter = read_adapter(adapter_copy)
    assert torch.equal(adapter.extra["base_model.model.head.weight"], head)


def test_a_missing_folder_or_file_is_named(adapter_copy, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"adapter folder '.*nowhere' does not exist"):
        read_adapter(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"is a file; give the folder that holds it"):
        read_adapter(adapter_copy / "adapter_config.json")
    (adapter_copy / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no adapter_model\.safetensors; is it the"):
        read_adapter(adapter_copy)
    (adapter_copy / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config\.json; is it the"):
        read_adapter(adapter_copy)


def test_a_hub_id_that_cannot_be_reached_is_named():
    with pytest.raises(FileNotFoundError, match=r"'someone/adapter' is neither a local folder nor"):
        locate_folder("someone/adapter")


def test_pickled_tensors_are_refused_unopened(adapter_copy, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path}/exploded",))

    (adapter_copy / "adapter_model.safetensors").unlink()
    (adapter_copy / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match=r"adapter_model\.bin but no .* can run code when opened"):
        read_adapter(adapter_copy)
    assert not (tmp_path / "exploded").exists()


def test_a_link_to_outside_is_refused(adapter_copy, tmp_path):
    for name in ("adapter_model.safetensors", "adapter_config.json", "pacatune.json"):
        target = shutil.move(adapter_copy / name, tmp_path / name)
        (adapter_copy / name).symlink_to(target)
        with pytest.raises(ValueError, match=rf"{name} is a link to .*, outside of the folder"):
            read_adapter(adapter_copy)
        (adapter_copy / name).unlink()
        shutil.move(target, adapter_copy / name)
    read_adapter(adapter_copy)


def test_links_of_the_hub_cache_are_followed(adapter_dir, tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "abc"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    shutil.copytree(adapter_dir, blobs)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    assert len(read_adapter(snapshot).modules) == 6
    (snapshot / "other").symlink_to(adapter_dir / "adapter_config.json")
    with pytest.raises(ValueError, match="outside of the folder"):
        find_file(snapshot, "other")


def test_a_pipe_is_refused_instead_of_waited_for(adapter_copy):
    (adapter_copy / "adapter_config.json").unlink()
    os.mkfifo(adapter_copy / "adapter_config.json")
    with pytest.raises(ValueError, match=r"adapter_config\.json is not a regular file"):
        read_adapter(adapter_copy)


def test_tensors_of_another_rank_than_configured_are_refused(adapter_copy):
    path = adapter_copy / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 8}))
    with pytest.raises(ValueError, match=r"rank 4 in 1 row groups but .* 8 in 1 \(`r` = 8"):
        read_adapter(adapter_copy)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 4, "groups": 2}))
    with pytest.raises(ValueError, match=r"in 1 row groups but .* 4 in 2 .* `groups` = 2\)"):
        read_adapter(adapter_copy)


def test_patterns_are_refused_that_would_be_tried_for_ever_on_names_of_the_file(adapter_copy):
    path = adapter_copy / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"alpha_pattern": {".*a.*a.*b": 8}}))
    read_adapter(adapter_copy)
    long = {f"{'a.' * 200}{n}.paca_delta": torch.ones(4, 4) for n in range(200)}
    indices = {name.replace("delta", "indices"): torch.arange(4) for name in long}
    rewrite(adapter_copy, lambda tensors: tensors.update(long | indices))
    with pytest.raises(ValueError, match=r"adapter_config.json: `alpha_pattern` .* too many ways"):
        read_adapter(adapter_copy)


def test_a_file_without_tensors_of_paca_is_refused(adapter_copy):
    rewrite(adapter_copy, lambda tensors: tensors.clear())
    with pytest.raises(
        ValueError, match="holds no `paca_delta`; it is empty or belongs to another"
    ):
        read_adapter(adapter_copy)


def test_wrong_tensors_are_refused_with_the_file_named(adapter_copy):
    name = "base_model.model.model.layers.0.self_attn.q_proj.paca_delta"
    rewrite(adapter_copy, lambda tensors: tensors[name].fill_(torch.nan))
    with pytest.raises(
        ValueError, match=r"adapter_model\.safetensors: tensor 'model\.layers\.0.*not finite"
    ):
        read_adapter(adapter_copy)


def test_a_damaged_sidecar_is_refused(adapter_copy):
    (adapter_copy / "pacatune.json").write_text("{")
    with pytest.raises(ValueError, match=r"pacatune\.json is not valid JSON"):
        read_adapter(adapter_copy)


def test_adapters_that_can_be_run_are_opened(adapter_dir, lora_dir):
    assert len(open_adapter(adapter_dir).modules) == 6
    adapter = open_adapter(lora_dir)
    assert isinstance(adapter, LoraAdapter)
    assert (adapter.folder, adapter.config.r) == (lora_dir, 4)


@pytest.mark.parametrize("read", [open_adapter, inspect_adapter])
def test_a_lora_adapter_with_infinite_values_is_refused(lora_dir, tmp_path, read):
    folder = shutil.copytree(lora_dir, tmp_path / "lora")
    rewrite(folder, lambda tensors: next(iter(tensors.values())).fill_(torch.inf))
    with pytest.raises(ValueError, match=r"tensor '.*lora_A.weight' holds values that are not"):
        read(folder)


@pytest.mark.parametrize(
    "wrong",
    [
        torch.tensor([[1.0, torch.nan]]),
        torch.tensor([torch.inf], dtype=torch.bfloat16),
        torch.tensor([torch.nan]).to(torch.float8_e4m3fn),
    ],
)
def test_tensors_beside_the_columns_are_finite_too(adapter_copy, wrong):
    name = "base_model.model.lm_head.weight"
    for tensor in (torch.ones(2).to(wrong.dtype), torch.arange(3)):
        rewrite(adapter_copy, lambda tensors, tensor=tensor: tensors.update({name: tensor}))
        read_adapter(adapter_copy)
    rewrite(adapter_copy, lambda tensors: tensors.update({name: wrong}))
    with pytest.raises(ValueError, match=rf"tensor '{name}' holds values that are not finite"):
        read_adapter(adapter_copy)
