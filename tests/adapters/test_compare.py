import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from pacatune.adapters.folder import read_adapter
from pacatune.adapters.inspect import compare
from tests.adapters.fixtures import save_adapter


def dense(folder):
    """The whole update of an adapter as dense matrices."""
    adapter = read_adapter(folder)
    result = {}
    for name, (delta, indices) in adapter.modules.items():
        result[name] = torch.zeros(delta.shape[0], 64, dtype=torch.float64)
        groups = len(indices) if indices.dim() == 2 else 1
        parts = result[name].chunk(groups), delta.chunk(groups), indices.view(groups, -1)
        for rows, own, columns in zip(*parts, strict=True):
            rows[:, columns] = own.double() * adapter.scaling(name)
    return result


def test_an_adapter_equals_itself(adapter_dir):
    result = compare(adapter_dir, read_adapter(adapter_dir))
    assert result.cosine == pytest.approx(1)
    assert result.norm_a == result.norm_b
    assert all(module.num_shared_columns == 4 for module in result.modules)
    assert (result.only_a, result.only_b) == ([], [])


@pytest.mark.parametrize("groups", [1, 4])
def test_numbers_are_those_of_the_dense_updates(adapter_dir, tiny_model_dir, tmp_path, groups):
    options = {"seed": 1, "random_seed": 7, "r": 20, "target_modules": ["q_proj", "k_proj"]}
    options["groups"] = groups
    save_adapter(tiny_model_dir, tmp_path / "other", **options)
    result = compare(adapter_dir, tmp_path / "other")
    a, b = dense(adapter_dir), dense(tmp_path / "other")
    dot = sum(float((a[name] * b[name]).sum()) for name in a.keys() & b.keys())
    assert dot != 0
    norm_a, norm_b = (sum(float(x.square().sum()) for x in u.values()) ** 0.5 for u in (a, b))
    assert (result.norm_a, result.norm_b) == pytest.approx((norm_a, norm_b))
    assert result.cosine == pytest.approx(dot / norm_a / norm_b)
    assert set(result.only_a) == a.keys() - b.keys()
    assert set(result.only_b) == b.keys() - a.keys()
    for module in result.modules:
        flat = (updates[module.name].flatten() for updates in (a, b))
        assert module.cosine == pytest.approx(float(torch.cosine_similarity(*flat, dim=0)))
        distinct = len(read_adapter(tmp_path / "other").modules[module.name].indices.unique())
        assert (module.rank_a, module.rank_b) == (4, distinct)


def test_a_zero_update_is_like_nothing(adapter_dir, adapter_copy):
    path = adapter_copy / "adapter_model.safetensors"
    save_file({n: t * 0 if "delta" in n else t for n, t in load_file(path).items()}, path)
    result = compare(adapter_dir, adapter_copy)
    assert (result.cosine, result.norm_b) == (0, 0)


def test_adapters_of_different_sizes_are_refused(adapter_dir, adapter_copy):
    path = adapter_copy / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({n: t[:5].contiguous() if "delta" in n else t for n, t in tensors.items()}, path)
    with pytest.raises(ValueError, match=r"kernel \(\d+,\) in .* but \(5,\) in .*one base"):
        compare(adapter_dir, adapter_copy)


def test_another_method_is_refused(adapter_dir, tmp_path):
    other = shutil.copytree(adapter_dir, tmp_path / "lora")
    (other / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(ValueError, match="it must be 'PACA'"):
        compare(adapter_dir, other)
