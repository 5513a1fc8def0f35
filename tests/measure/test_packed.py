"""The estimate of training in the blocks of a GGUF file."""

import pytest
import torch

from pacatune.measure.estimate import estimate_memory
from pacatune.measure.setting import Setting
from pacatune.pretrained import load_packed
from tests.conftest import build_model

SMALL = {"rank": 4, "seq_len": 16}


def test_a_usual_mix_has_the_size_of_such_files():
    """LLaMA3-8B's Q4_K_M on the hub has 4,920,734,272 bytes, header and tokenizer included."""
    setting = Setting(model="llama3-8b", quantization="q4_k_m", rank=4, seq_len=16)
    weights = estimate_memory(setting).by_category["weights"]
    assert weights == pytest.approx(4_920_734_272, rel=0.003)


def test_a_file_counts_as_it_is_loaded(tmp_path, tiny_tokenizer):
    pytest.importorskip("gguf")
    from transformers import AutoModelForCausalLM

    from tests.grid.files import write_gguf

    model = build_model(len(tiny_tokenizer), hidden_size=64, intermediate_size=96)
    path = str(write_gguf(tmp_path / "base.gguf", model, tiny_tokenizer))  # embeddings in F32
    weights = estimate_memory(Setting(model=path, **SMALL)).by_category["weights"]
    loaded = load_packed(AutoModelForCausalLM, path, dtype=torch.bfloat16)
    held = {id(p): p.nbytes for p in (*loaded.parameters(), *loaded.buffers())}
    assert weights == pytest.approx(sum(held.values()), rel=0.01)
    with pytest.raises(ValueError, match=r"`quantization` \('q4_0'\) with a GGUF file"):
        estimate_memory(Setting(model=path, quantization="q4_0", **SMALL))


def test_blocks_that_do_not_divide_are_refused(tiny_model_dir):
    with pytest.raises(ValueError, match=r"Q\d_K has blocks of 256 elements, and '.*' has rows of"):
        estimate_memory(Setting(model=str(tiny_model_dir), quantization="q4_k_m", **SMALL))
