"""Which models TRL sends columns of; the sending itself is in tests/vllm."""

import pytest
from peft import LoraConfig, get_peft_model
from trl.trainer import grpo_trainer, rloo_trainer

from pacatune.integrations.trl import ColumnGeneration, column_sync
from tests.conftest import build_model
from tests.sync.conftest import VOCABULARY, adapt


def generation(model, mode="server", *, enable_sleep_mode=False):
    found = object.__new__(ColumnGeneration)
    found.model, found.mode, found.enable_sleep_mode = model, mode, enable_sleep_mode
    return found


def test_trainers_of_the_block_have_ours():
    plain = grpo_trainer.VLLMGeneration
    with column_sync():
        assert grpo_trainer.VLLMGeneration is rloo_trainer.VLLMGeneration is ColumnGeneration
    assert grpo_trainer.VLLMGeneration is rloo_trainer.VLLMGeneration is plain
    with pytest.raises(KeyError), column_sync():
        raise KeyError
    assert grpo_trainer.VLLMGeneration is plain


def test_columns_are_sent_for_paca():
    assert generation(adapt())._why_not() is None
    assert generation(adapt(), "colocate")._why_not() is None


def test_others_are_sent_as_trl_does_it():
    lora = get_peft_model(build_model(VOCABULARY), LoraConfig(target_modules="all-linear"))
    assert "no PaCA layers" in generation(lora)._why_not()
    assert "discards" in generation(adapt(), "colocate", enable_sleep_mode=True)._why_not()
    assert "trains" in generation(adapt(modules_to_save=["lm_head"]))._why_not()
