"""Which models TRL sends columns of; the sending itself is in tests/vllm."""

import pytest
from peft import LoraConfig, get_peft_model
from trl.trainer import grpo_trainer, rloo_trainer

from pacatune.integrations.trl import ColumnGeneration, _sends_columns, column_sync
from tests.conftest import build_model
from tests.sync.conftest import VOCABULARY, adapt, in_few_bits


def test_trainers_of_the_block_have_ours():
    plain = grpo_trainer.VLLMGeneration
    with column_sync():
        assert grpo_trainer.VLLMGeneration is rloo_trainer.VLLMGeneration is ColumnGeneration
    assert grpo_trainer.VLLMGeneration is rloo_trainer.VLLMGeneration is plain
    with pytest.raises(KeyError), column_sync():
        raise KeyError
    assert grpo_trainer.VLLMGeneration is plain


def test_columns_are_sent_for_paca(caplog):
    assert _sends_columns(adapt(), sleeps=False)
    lora = get_peft_model(build_model(VOCABULARY), LoraConfig(target_modules="all-linear"))
    assert not _sends_columns(lora, sleeps=False)
    assert not caplog.records


@pytest.mark.parametrize(
    ("build", "sleeps", "reason"),
    [
        (adapt, True, "discards the weights"),
        (lambda: adapt(modules_to_save=["lm_head"]), False, "trains"),
        (lambda: in_few_bits("bitsandbytes-nf4"), False, "the base is quantised"),
    ],
)
def test_where_everything_is_sent_it_is_said(build, sleeps, reason, caplog):
    assert not _sends_columns(build(), sleeps)
    (record,) = caplog.records
    assert record.message.startswith("vLLM gets every parameter at each sync, not columns: ")
    assert reason in record.message
