import json
import os
import shutil

import pytest
import torch

from pacatune import PacaConfig
from pacatune.adapters.base import (
    base_name,
    empty_base,
    find_tokenizer,
    load_base,
    load_tokenizer,
)


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_given_base_comes_before_the_adapters_own():
    config = PacaConfig(base_model_name_or_path="theirs")
    assert base_name("mine", config) == "mine"
    assert base_name(None, config) == "theirs"
    with pytest.raises(ValueError, match="`model` is not given and the adapter does not name"):
        base_name(None, PacaConfig())


def test_task_and_saved_class_decide_the_head(tiny_model_dir):
    assert type(load_base(str(tiny_model_dir), task_type=None)).__name__ == "LlamaForCausalLM"
    headless = empty_base(str(tiny_model_dir), task_type="FEATURE_EXTRACTION")
    assert type(headless).__name__ == "LlamaModel"
    classifier = empty_base(str(tiny_model_dir), task_type="SEQ_CLS")
    assert type(classifier).__name__ == "LlamaForSequenceClassification"


def test_a_base_is_loaded_for_inference_in_the_dtype_asked_for(tiny_model_dir):
    model = load_base(str(tiny_model_dir), task_type="CAUSAL_LM", dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert not model.training


def test_a_missing_base_is_named(tmp_path, adapter_dir):
    with pytest.raises(FileNotFoundError, match=r"'nowhere'\) is neither a file or folder here"):
        load_base("nowhere", task_type=None)
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json; `model` must be a mod"):
        load_base(str(tmp_path), task_type=None)
    with pytest.raises(
        FileNotFoundError, match=r"holds no config\.json \(it is an adapter, not a base\)"
    ):
        load_base(str(adapter_dir), task_type=None)


def test_an_unknown_architecture_is_refused_and_its_code_not_run(model_copy, tmp_path):
    (model_copy / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    edit_config(model_copy, auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})
    edit_config(model_copy, model_type="nonsense")
    with pytest.raises(ValueError, match="comes with code of its own, which is never executed"):
        load_base(str(model_copy), task_type="CAUSAL_LM")
    edit_config(model_copy, model_type="llama", architectures=["EvilForCausalLM"])
    with pytest.raises(ValueError, match=r"is a 'EvilForCausalLM', which transformers .* not run"):
        load_base(str(model_copy), task_type=None)
    assert not (tmp_path / "ran").exists()


def test_damaged_weights_are_named(model_copy):
    (model_copy / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"weights of .* cannot be read"):
        load_base(str(model_copy), task_type=None)
    (model_copy / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"weights of .* cannot be read"):
        load_base(str(model_copy), task_type=None)


def test_a_tokenizer_is_found_missing_or_damaged(model_copy, tmp_path):
    assert load_tokenizer(str(model_copy)).eos_token == "</s>"
    (model_copy / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"the tokenizer of .* cannot be read"):
        load_tokenizer(str(model_copy))
    assert load_tokenizer(str(tmp_path)) is None
    with pytest.raises(FileNotFoundError, match=r"`model` .* is neither a file or folder here"):
        load_tokenizer("someone/unreachable")


def test_the_tokenizer_of_training_comes_first(model_copy, adapter_copy):
    assert find_tokenizer(str(model_copy), adapter_copy).chat_template is not None
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(model_copy / name, adapter_copy)
    (adapter_copy / "chat_template.jinja").write_text("ours")
    assert find_tokenizer(str(model_copy), adapter_copy).chat_template == "ours"
    assert find_tokenizer(str(model_copy), None).chat_template != "ours"


@pytest.fixture
def with_tokenizer(model_copy, adapter_copy):
    """An adapter with a tokenizer of its own."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(model_copy / name, adapter_copy / name)
    (adapter_copy / "additional_chat_templates").mkdir()
    return adapter_copy


@pytest.mark.parametrize(
    "name",
    [
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
        "added_tokens.json",
        "additional_chat_templates/other.jinja",
    ],
)
def test_no_file_of_a_tokenizer_is_outside_of_the_adapter(with_tokenizer, tmp_path, name):
    path, secret = with_tokenizer / name, tmp_path / "secret"
    secret.write_text(path.read_text() if path.exists() else "{}")
    path.unlink(missing_ok=True)
    path.symlink_to(secret)
    with pytest.raises(ValueError, match=rf"{name} is a link to .*secret, outside of the folder"):
        load_tokenizer(str(with_tokenizer))
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match=rf"{name} is not a regular file"):
        load_tokenizer(str(with_tokenizer))


@pytest.mark.parametrize(
    "values",
    [{"merges_file": "/etc/passwd"}, {"vocab_file": "x"}, {"init_inputs": ["/etc/x"]}],
)
def test_no_tokenizer_names_a_file_of_its_own(with_tokenizer, values):
    path = with_tokenizer / "tokenizer_config.json"
    good = json.loads(path.read_text())
    path.write_text(json.dumps(good | {"vocab_file": None, "special_tokens_map_file": "/a"}))
    (with_tokenizer / "notes").symlink_to("nowhere")  # nobody reads that
    load_tokenizer(str(with_tokenizer))
    path.write_text(json.dumps(good | values))
    with pytest.raises(ValueError, match=rf"tokenizer_config.json gives `{next(iter(values))}`"):
        load_tokenizer(str(with_tokenizer))


@pytest.mark.parametrize("inner", ["", "checkpoint-10"])
def test_the_hubs_cache_is_read_through_its_links(with_tokenizer, tmp_path, monkeypatch, inner):
    from huggingface_hub import constants

    from pacatune.adapters.folder import read_adapter

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository, revision = tmp_path / "hub" / "models--someone--adapter", "0" * 40
    blobs, snapshot = repository / "blobs", repository / "snapshots" / revision
    (snapshot / inner).mkdir(parents=True)
    shutil.copytree(with_tokenizer, blobs)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    for path in blobs.iterdir():
        if path.is_file():
            (snapshot / inner / path.name).symlink_to(os.path.relpath(path, snapshot / inner))
    for folder in (snapshot / inner, *([] if inner else ["someone/adapter"])):
        adapter = read_adapter(folder)
        assert adapter.folder == snapshot / inner
        assert load_tokenizer(str(adapter.folder)).chat_template is not None
    (blobs / "secret").symlink_to(tmp_path)
    (snapshot / inner / "tokenizer.model").symlink_to(blobs / "secret" / "adapter" / "README.md")
    with pytest.raises(ValueError, match="outside of the folder"):
        load_tokenizer(str(snapshot / inner))
