"""Columns of experts in a real vLLM on the CPU."""

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


def test_columns_of_experts(folder):
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from pacatune import PacaConfig

    base = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    config = PacaConfig(r=8, paca_alpha=8, target_modules=["q_proj"], target_parameters=parameters)
    model = get_peft_model(base, config)
    source = ColumnSource(model)
    llm = start(folder)
    try:
        transport = VllmTransport(llm)
        transport.check_base(source)
        before = served_digests(llm)
        for layer in model.modules():
            if hasattr(layer, "paca_delta"):
                layer.paca_delta["default"].weight.data.normal_(std=0.1)
        source.send(transport)
        served = served_digests(llm)
        changed = {name.rpartition(".")[2] for name in served if served[name] != before[name]}
        print("CHANGED", changed)
        transport.revert()
        assert served_digests(llm) == before
    finally:
        stop(llm)
