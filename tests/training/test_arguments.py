import re

import pytest
import torch

from pacatune.training import TrainingConfig
from pacatune.training.arguments import training_class


@pytest.mark.parametrize("fast", [True, False])
def test_mixed_precision_is_pinned_to_what_is_fast(monkeypatch, fast):
    monkeypatch.setattr("pacatune.training.arguments.bfloat16_is_fast", lambda use_cpu: fast)
    training = TrainingConfig(use_cpu=True)
    assert training.resolved().bf16 is fast
    training.pin_bf16()
    assert training.bf16 is fast
    assert training_class("classifier")(use_cpu=True, bf16=True).resolved().bf16


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
@pytest.mark.parametrize("bf16", [True, False])
def test_the_cpu_is_said_to_be_the_device_where_there_is_no_other(bf16):
    """Otherwise accelerate, under torchrun, takes each process for the only one."""
    training = TrainingConfig(bf16=bf16)
    assert (training.use_cpu, training.resolved().use_cpu) == (False, True)


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("sft", {"chat_template_path": "x", "dataset_text_field": "body", "push_to_hub": True}),
        ("sft", {"completion_only_loss": False, "assistant_only_loss": True, "hub_token": "a"}),
        ("sft", {"hub_model_id": "a", "hub_private_repo": True, "hub_strategy": "end"}),
        ("sft", {"dataset_kwargs": {"skip_prepare_dataset": True}, "resume_from_checkpoint": "x"}),
        ("sft", {"trust_remote_code": True, "truncation_mode": "keep_end"}),
        ("sft", {"remove_unused_columns": False, "logging_nan_inf_filter": True}),
        ("sft", {"fp16_full_eval": True, "bf16_full_eval": True}),
        ("dpo", {"sync_ref_model": True, "truncation_mode": "keep_end"}),
        ("grpo", {"use_transformers_paged": True}),
        ("classifier", {"remove_unused_columns": False, "bf16_full_eval": True}),
    ],
)
def test_options_decided_elsewhere(task, options):
    for option, value in options.items():
        found = re.escape(f"`training.{option}` ({value!r})")
        with pytest.raises(ValueError, match=f"{found} is not offered: [^.]+"):
            training_class(task)(**{option: value})


def test_options_of_gpus():
    for option in ("fp16", "activation_offloading"):
        with pytest.raises(ValueError, match=rf"`training.{option}` \(True\) needs a GPU; drop it"):
            TrainingConfig(use_cpu=True, **{option: True})
