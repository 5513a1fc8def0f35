"""Runs in the blocks of a GGUF file."""

import weakref

import pytest
import torch
import transformers

from pacatune.grid.layers import PackedLayer
from pacatune.training import train
from pacatune.training.codes import about_weights
from pacatune.training.language import Task
from tests.conftest import build_model


def test_a_run_in_blocks_is_resumed(make_config, assert_resumes, tiny_tokenizer, tmp_path):
    pytest.importorskip("gguf")
    from tests.grid.files import write_gguf

    model = build_model(len(tiny_tokenizer), hidden_size=64, intermediate_size=96)
    path = write_gguf(tmp_path / "base.gguf", model, tiny_tokenizer)
    training = {"warmup_steps": 0, "max_steps": 6, "save_steps": 2, "use_cpu": True}
    assert_resumes(3, make_config, model={"path": str(path), "packed": True}, training=training)


def test_a_run_decodes_one_weight_at_a_time(make_config, tiny_tokenizer, tmp_path, monkeypatch):
    """The trainer's loss holds the head's, when no other is needed."""
    pytest.importorskip("gguf")
    from tests.grid.files import write_gguf

    model = build_model(len(tiny_tokenizer), hidden_size=64, intermediate_size=96)
    others = {"token_embd": "Q4_0", "output.weight": "Q4_0"}
    path = write_gguf(tmp_path / "base.gguf", model, tiny_tokenizer, others=others)
    alive, most, real = weakref.WeakSet(), [], PackedLayer.decoded

    def counted(self, rows=None):
        tensor = real(self, rows)
        if rows is None:
            alive.add(tensor)
            most.append(len(alive))
        return tensor

    monkeypatch.setattr(PackedLayer, "decoded", counted)
    training = {"max_steps": 2, "use_cpu": True, "gradient_accumulation_steps": 2}
    train(make_config(model={"path": str(path), "packed": True}, training=training))
    assert len(most) > 2 * 2 * 2 * 14
    assert max(most) == 1


def test_blocks_are_the_default_on_a_gpu_alone(make_config, tiny_tokenizer, tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    from tests.grid.files import write_gguf

    model = build_model(len(tiny_tokenizer), hidden_size=64, intermediate_size=96)
    path = write_gguf(tmp_path / "base.gguf", model, tiny_tokenizer)

    def is_packed(packed=None, **options):
        model = {"path": str(path), "packed": packed, **options.pop("model", {})}
        return Task(make_config(model=model, **options)).is_packed

    assert (is_packed(), is_packed(True), is_packed(False)) == (False, True, False)
    cuda = torch.device("cuda")
    monkeypatch.setattr(transformers.TrainingArguments, "device", property(lambda self: cuda))
    assert (is_packed(), is_packed(False)) == (True, False)
    # What cannot be packed is loaded in 16 bits, unless it was asked for.
    adapter = {"paca": {"modules_to_save": ["lm_head"]}}
    assert not is_packed(**adapter)
    reason = "`modules_to_save` trains whole weights"
    with pytest.raises(ValueError, match=rf"`model.packed` \(true\): {reason}"):
        is_packed(True, **adapter)
    assert about_weights(model, f"{reason}, ...").endswith(f"; {reason}, ...")
