"""Experts in a real vLLM on the CPU."""

import pytest
import torch

from pacatune.integrations.vllm import VllmTransport
from pacatune.sync import ColumnSource
from tests.vllm.conftest import served_digests, start, stop


@pytest.fixture(scope="module")
def folder(model_path, tmp_path_factory):
    from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

    folder = str(tmp_path_factory.mktemp("mixtral"))
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=49152,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        tie_word_embeddings=True,
    )
    MixtralForCausalLM(config).bfloat16().save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_path).save_pretrained(folder)
    return folder


def test_packed_experts_are_refused(folder):
    """Their shape is the same, so that columns would go to wrong places without a word."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from pacatune import PacaConfig

    base = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    config = PacaConfig(r=8, paca_alpha=8, target_modules=["q_proj"], target_parameters=parameters)
    source = ColumnSource(get_peft_model(base, config))
    llm = start(folder)
    try:
        before = served_digests(llm)
        for bring in (
            VllmTransport(llm).check_base,
            lambda source: source.send(VllmTransport(llm)),
        ):
            with pytest.raises(Exception, match="packs the weights of experts for CPUs"):
                bring(source)
            assert served_digests(llm) == before
    finally:
        stop(llm)
