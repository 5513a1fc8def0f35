"""Folders that a stranger made: read in full without the base, or refused by what is wrong."""

import json
import os
import pickle
import shutil

import peft
import pytest
import torch
from peft import TaskType

from pacatune.adapters.folder import (
    AUTO_CLASSES,
    LoraAdapter,
    locate_folder,
    open_adapter,
    read_adapter,
    read_config,
    read_lora_config,
)
from pacatune.adapters.inspect import inspect_adapter
from pacatune.methods import METHODS, adapter_config
from tests.adapters.fixtures import edit_json, edit_tensors

CONFIG, TENSORS, SIDECAR = "adapter_config.json", "adapter_model.safetensors", "pacatune.json"
Q = "base_model.model.model.layers.0.self_attn.q_proj"
HEAD = "base_model.model.lm_head.weight"


def test_an_adapter_is_read_without_its_base(adapter_dir, lora_dir):
    adapter = read_adapter(adapter_dir)
    assert len(adapter.modules) == 6 == len(open_adapter(adapter_dir).modules)
    delta, indices, _ = adapter.modules["model.layers.1.mlp.down_proj"]
    assert (delta.shape, indices.shape) == ((32, 4), (4,))
    assert adapter.scaling("model.layers.1.mlp.down_proj") == 2
    assert adapter.config.r == 4
    assert not adapter.extra
    assert "base_fingerprint" in adapter.sidecar
    lora = open_adapter(lora_dir)
    assert isinstance(lora, LoraAdapter)
    assert (lora.folder, lora.config.r) == (lora_dir, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn, torch.int64])
def test_other_tensors_are_kept_under_their_names(adapter_copy, dtype):
    head = torch.ones(3, 2).to(dtype)
    edit_tensors(adapter_copy, lambda tensors: tensors.update({HEAD: head}))
    found = read_adapter(adapter_copy).extra
    assert torch.equal(found[HEAD].view(torch.uint8), head.view(torch.uint8))


def add(name, tensor):
    return lambda folder: edit_tensors(folder, lambda tensors: tensors.update({name: tensor}))


def link(name):
    def replace(folder):
        target = shutil.move(folder / name, folder.parent / name)
        (folder / name).symlink_to(target)

    return replace


def pipe(folder):
    (folder / CONFIG).unlink()
    os.mkfifo(folder / CONFIG)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: edit_json(folder / CONFIG, r=8), r"rank 4 but the .* says 8 \(`r` = 8"),
        (
            lambda folder: edit_json(folder / CONFIG, groups=2),
            "`groups` is of .* row groups.* d5ebc774",
        ),
        (lambda folder: edit_tensors(folder, dict.clear), "holds no `paca_delta`; it is empty or"),
        (add(f"{Q}.paca_delta", torch.full((32, 4), torch.nan)), rf"{TENSORS}: .*q_.* not finite"),
        (add(HEAD, torch.tensor([[1.0, torch.nan]])), rf"tensor '{HEAD}' holds .* not finite"),
        (add(HEAD, torch.tensor([torch.inf]).bfloat16()), rf"tensor '{HEAD}' .* not finite"),
        (add(HEAD, torch.tensor([torch.nan]).to(torch.float8_e4m3fn)), rf"'{HEAD}' .* not finite"),
        (lambda folder: (folder / SIDECAR).write_text("{"), r"pacatune\.json is not valid JSON"),
        (link(TENSORS), rf"{TENSORS} is a link to .*, outside of the folder"),
        (link(CONFIG), rf"{CONFIG} is a link to .*, outside of the folder"),
        (link(SIDECAR), rf"{SIDECAR} is a link to .*, outside of the folder"),
        (pipe, r"adapter_config\.json is not a regular file"),
    ],
)
def test_damaged_folders_are_refused(adapter_copy, damage, message):
    damage(adapter_copy)
    with pytest.raises(ValueError, match=message):
        read_adapter(adapter_copy)


@pytest.mark.parametrize("read", [open_adapter, inspect_adapter])
def test_a_lora_adapter_with_infinite_values_is_refused(lora_dir, tmp_path, read):
    folder = shutil.copytree(lora_dir, tmp_path / "lora")
    edit_tensors(folder, lambda tensors: next(iter(tensors.values())).fill_(torch.inf))
    with pytest.raises(ValueError, match=r"tensor '.*lora_A.weight' holds values that are not"):
        read(folder)


def test_a_missing_folder_or_file_is_named(adapter_copy, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"adapter folder '.*nowhere' does not exist"):
        read_adapter(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"is a file; give the folder that holds it"):
        read_adapter(adapter_copy / CONFIG)
    for name in (TENSORS, CONFIG):
        (adapter_copy / name).unlink()
        with pytest.raises(FileNotFoundError, match=rf"has no {name}; is it the"):
            read_adapter(adapter_copy)
    with pytest.raises(FileNotFoundError, match=r"'someone/adapter' is neither a local folder nor"):
        locate_folder("someone/adapter")


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_pickled_tensors_are_refused_unopened(adapter_copy, tmp_path):
    (adapter_copy / TENSORS).unlink()
    (adapter_copy / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    with pytest.raises(ValueError, match=r"adapter_model\.bin but no .* can run code when opened"):
        read_adapter(adapter_copy)
    assert not (tmp_path / "exploded").exists()


# The configuration.

HANGS = "(([a-z_.0-9]+)+)+!"
NO_PATTERN = r"`{}` \('{}'\) is no regular expression"


@pytest.fixture
def path(adapter_copy):
    return adapter_copy / CONFIG


def test_a_configuration_is_read(path):
    config = read_config(edit_json(path, rank_pattern={"v_proj": 2}, paca_alpha=4.5))
    assert config.peft_type == "PACA"
    assert (config.r, config.paca_alpha, config.rank_pattern) == (4, 4.5, {"v_proj": 2})
    assert set(config.target_modules) == {"q_proj", "v_proj", "down_proj"}
    # The keys of another reader are enough.
    theirs = {"peft_type": "PACA", "r": 8, "paca_alpha": 16, "target_modules": "all-linear"}
    path.write_text(json.dumps({**theirs, "random_seed": 1, "init_weights": True}))
    assert read_config(path).paca_alpha == 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"paca_alfa": 8}, "unknown key 'paca_alfa'; the nearest known one is 'paca_alpha'"),
        ({"auto_map": {}}, "unknown key 'auto_map'; the nearest .* 'auto_mapping'"),
        ({"peft_type": "LORA"}, "gives `peft_type` = 'LORA'; it must be 'PACA'"),
        ({"r": "8"}, r"gives `r` = '8' \(str\); it must be int"),
        ({"rank_pattern": {"q": "x"}}, r"gives `rank_pattern` = .* it must be dict\[str, int\]"),
        ({"alpha_pattern": [1]}, r"`alpha_pattern` \(\[1\]\) must be a dictionary"),
        ({"target_modules": [1]}, r"gives `target_modules` = .* list\[str\] \| str \| None"),
        ({"bias": "some"}, "gives `bias` = 'some' .*'none', 'all', 'paca_only'"),
        ({"task_type": "NONSENSE"}, "Invalid task type: 'NONSENSE'"),
        ({"target_modules": "(q_proj"}, NO_PATTERN.format("target_modules", r"\(q_proj")),
        ({"selection": {"[": [4]}}, NO_PATTERN.format("columns", r"\[")),
        ({"selection": {HANGS: [4]}}, "`columns` .* in more ways"),
    ],
)
def test_a_wrong_configuration_is_refused(path, changes, message):
    with pytest.raises(ValueError, match=rf"{CONFIG}.*{message}"):
        read_config(edit_json(path, **changes))


def test_keys_of_another_peft_do_not_matter_while_they_are_off(path):
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 0.5, "use_future": False, "new": None}
    path.write_text(json.dumps(config))
    assert read_lora_config(path).lora_alpha == 0.5
    for method in ("SHIRA", "GRALORA", "MISS"):
        path.write_text(json.dumps(config | {"peft_type": method, "lora_alpha": None}))
        if hasattr(peft, f"{method.capitalize()}Config"):
            assert read_lora_config(path).r == 4


def test_a_method_that_this_peft_does_not_have(path, monkeypatch):
    monkeypatch.delattr(peft, "GraloraConfig", raising=False)
    path.write_text(json.dumps({"peft_type": "GRALORA", "r": 4}))
    for use in (lambda: read_lora_config(path), lambda: adapter_config(METHODS["gralora"])):
        with pytest.raises(ValueError, match=r"GraLoRA needs a newer PEFT than .*; pip install -U"):
            use()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "gives `peft_type` = 'IA3'; only adapters of the methods"),
        ({"use_future": True}, "holds the unknown key 'use_future'; the nearest"),
        ({"megatron_config": {"a": 1}}, "sets `megatron_config`, which makes PEFT import a module"),
        ({"target_modules": "("}, NO_PATTERN.format("target_modules", r"\(")),
        ({"target_modules": [1]}, NO_PATTERN.format("target_modules", "1")),
        ({"task_type": "NONSENSE"}, "Invalid task type"),
        ({"rank_pattern": {HANGS: 4}}, "`rank_pattern` .* in more ways"),
        ({"use_dora": True, "target_modules": 3}, NO_PATTERN.format("target_modules", "3")),
    ],
)
def test_a_wrong_lora_configuration_is_refused(path, changes, message):
    path.write_text(json.dumps({"peft_type": "LORA", **changes}))
    with pytest.raises(ValueError, match=rf"{CONFIG}.*{message}"):
        read_lora_config(path)


def test_task_types_are_those_of_peft():
    assert list(AUTO_CLASSES) == [task.value for task in TaskType]
