"""Experts in a real vLLM on the CPU."""

import pytest

from pacatune.integrations.vllm import VllmTransport
from pacatune.sync import ColumnSource
from tests.vllm.conftest import save_small_model, served_digests, start, stop


def test_packed_experts_are_refused(model_path, tmp_path):
    """Their shape is the same, so that columns would go to wrong places without a word."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from pacatune import PacaConfig

    folder = str(tmp_path)
    save_small_model(model_path, folder, "Mixtral", num_local_experts=4)
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
