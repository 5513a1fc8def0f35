"""Bases and tokenizers of strangers: found, loaded in the dtype asked for, and no code run."""

import os
import shutil

import pytest
import torch

from pacatune import PacaConfig
from pacatune.adapters.base import base_name, empty_base, find_tokenizer, load_base, load_tokenizer
from pacatune.adapters.folder import read_adapter
from tests.adapters.fixtures import edit_json, edit_tensors

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def test_the_given_base_with_the_head_of_the_task(tiny_model_dir):
    config = PacaConfig(base_model_name_or_path="theirs")
    assert [base_name(name, config) for name in ("mine", None)] == ["mine", "theirs"]
    with pytest.raises(ValueError, match="`model` is not given and the adapter does not name"):
        base_name(None, PacaConfig())
    for task, kind in (
        (None, "LlamaForCausalLM"),
        ("FEATURE_EXTRACTION", "LlamaModel"),
        ("SEQ_CLS", "LlamaForSequenceClassification"),
    ):
        assert type(empty_base(str(tiny_model_dir), task_type=task)).__name__ == kind
    model = load_base(str(tiny_model_dir), task_type="CAUSAL_LM", dtype="bfloat16")
    assert (model.dtype, model.training) == (torch.bfloat16, False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "nonsense"}, "comes with code of its own, which is never executed"),
        ({"architectures": ["EvilLM"]}, r"is a 'EvilLM', which transformers .* not run"),
    ],
)
def test_an_unknown_architecture_is_refused_and_its_code_not_run(
    model_copy, tmp_path, changes, message
):
    (model_copy / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    own_code = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    edit_json(model_copy / "config.json", auto_map=own_code, **changes)
    with pytest.raises(ValueError, match=message):
        load_base(str(model_copy), task_type=None)
    assert not (tmp_path / "ran").exists()


def test_damaged_weights_are_named(model_copy):
    path = model_copy / "model.safetensors"
    for damage in (lambda: path.write_bytes(b"no tensors"), path.unlink):
        damage()
        with pytest.raises(ValueError, match=r"weights of .* cannot be read"):
            load_base(str(model_copy), task_type=None)


@pytest.mark.parametrize("change", [lambda w: w[0, 0], lambda w: w[None], lambda w: w[:4]])
def test_weights_of_other_shapes(model_copy, change):
    def reshape(tensors):
        name = "model.layers.0.mlp.down_proj.weight"
        tensors[name] = change(tensors[name]).clone()

    edit_tensors(model_copy / "model.safetensors", reshape)
    with pytest.raises(ValueError, match="have other shapes than its configuration says; copy the"):
        load_base(str(model_copy), task_type="CAUSAL_LM")


def test_a_tokenizer_is_found_missing_or_damaged(model_copy, tmp_path):
    assert load_tokenizer(str(model_copy)).eos_token == "</s>"
    (model_copy / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"(?s)tokenizer of .* cannot be read \(\w+: .*; copy its"):
        load_tokenizer(str(model_copy))
    assert load_tokenizer(str(tmp_path)) is None


@pytest.fixture
def with_tokenizer(tiny_model_dir, adapter_copy):
    """An adapter with a tokenizer of its own."""
    for name in TOKENIZER:
        shutil.copy(tiny_model_dir / name, adapter_copy / name)
    (adapter_copy / "additional_chat_templates").mkdir()
    return adapter_copy


def test_the_tokenizer_of_training_comes_first(tiny_model_dir, adapter_dir, with_tokenizer):
    (with_tokenizer / "chat_template.jinja").write_text("ours")
    base = str(tiny_model_dir)
    assert find_tokenizer(base, with_tokenizer).chat_template == "ours"
    for other in (None, adapter_dir):  # which has none
        assert find_tokenizer(base, other).chat_template not in (None, "ours")


@pytest.mark.parametrize(
    "name", [*TOKENIZER, "added_tokens.json", "additional_chat_templates/other.jinja"]
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
    ("key", "value"),
    [("merges_file", "/etc/passwd"), ("vocab_file", "x"), ("init_inputs", ["/etc/x"])],
)
def test_no_tokenizer_names_a_file_of_its_own(with_tokenizer, key, value):
    path = with_tokenizer / "tokenizer_config.json"
    edit_json(path, vocab_file=None, special_tokens_map_file="/a")
    (with_tokenizer / "notes").symlink_to("nowhere")  # nobody reads that
    load_tokenizer(str(with_tokenizer))
    edit_json(path, **{key: value})
    with pytest.raises(ValueError, match=rf"tokenizer_config.json gives `{key}`"):
        load_tokenizer(str(with_tokenizer))


@pytest.mark.parametrize("inner", ["", "checkpoint-10"])
def test_the_hubs_cache_is_read_through_its_links(with_tokenizer, tmp_path, monkeypatch, inner):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository, revision = tmp_path / "hub" / "models--someone--adapter", "0" * 40
    snapshot = repository / "snapshots" / revision / inner
    snapshot.mkdir(parents=True)
    blobs = shutil.copytree(with_tokenizer, repository / "blobs")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    for path in blobs.iterdir():
        if path.is_file():
            (snapshot / path.name).symlink_to(os.path.relpath(path, snapshot))
    for folder in (snapshot, *([] if inner else ["someone/adapter"])):
        adapter = read_adapter(folder)
        assert adapter.folder == snapshot
        assert load_tokenizer(str(adapter.folder)).chat_template is not None
    (blobs / "secret").symlink_to(tmp_path)
    (snapshot / "tokenizer.model").symlink_to(blobs / "secret" / "adapter" / "README.md")
    with pytest.raises(ValueError, match="outside of the folder"):
        load_tokenizer(str(snapshot))
