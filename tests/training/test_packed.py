"""Runs in the blocks of a GGUF file."""

import pytest

from tests.conftest import build_model


def test_a_run_in_blocks_is_resumed(make_config, assert_resumes, tiny_tokenizer, tmp_path):
    pytest.importorskip("gguf")
    from tests.grid.files import write_gguf

    model = build_model(len(tiny_tokenizer), hidden_size=64, intermediate_size=96)
    path = write_gguf(tmp_path / "base.gguf", model, tiny_tokenizer)
    training = {"warmup_steps": 0, "max_steps": 6, "save_steps": 2, "use_cpu": True}
    assert_resumes(3, make_config, model={"path": str(path), "packed": True}, training=training)
