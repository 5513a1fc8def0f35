"""TRL's trainers with PacaConfig: SFT from a configuration, DPO from a loaded adapter."""

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from pacatune import PacaConfig
from pacatune.selection import choose_columns, collect_statistics
from tests.releases import needs

pytestmark = [
    needs("trl"),
    # transformers' Trainer asks torch, and itself, by names that are on their way out.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch.*"),
]


@pytest.fixture
def base(tiny_model_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)


@pytest.fixture
def tokenizer(tiny_model_dir):
    return AutoTokenizer.from_pretrained(tiny_model_dir)


def config(selection="random"):
    targets = ["q_proj", "v_proj", "up_proj"]
    return PacaConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", selection=selection)


def load_adapter(base, folder, options=None):
    model = get_peft_model(base, options or config())
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.3)
    model.save_pretrained(folder / "adapter")
    return PeftModel.from_pretrained(model.unload(), folder / "adapter", is_trainable=True)


@pytest.fixture
def train(tokenizer, tmp_path):
    """Train, and return the trainer and what it logged of each step."""

    def train(trainer, arguments, model, rows, options=None, **inputs):
        common = {
            "output_dir": str(tmp_path / "out"),
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "report_to": "none",
            "use_cpu": True,
            "bf16": False,
        }
        trainer = trainer(
            model,
            args=arguments(**{**common, **(options or {})}),
            train_dataset=Dataset.from_dict(rows),
            processing_class=tokenizer,
            **inputs,
        )
        trainer.train()
        return trainer, trainer.state.log_history[:-1]

    return train


@pytest.mark.parametrize("selection", ["random", "weight_norm", "gradient"])
def test_dpo_from_a_loaded_adapter_takes_it_as_the_reference(
    base, tokenizer, train, tmp_path, selection
):
    """The first loss is log 2 only if policy and reference are the same adapter.

    TRL makes the reference from the configuration and copies parameters, so not the columns.
    """
    from trl import DPOConfig, DPOTrainer

    options = config(selection)
    if selection == "gradient":
        batch = dict(tokenizer(["What is the capital?"], return_tensors="pt"))
        batches = [{**batch, "labels": batch["input_ids"]}]
        options = choose_columns(base, options, collect_statistics(base, batches, options))
    loaded = load_adapter(base, tmp_path, options)
    rows = {"prompt": ["What is"] * 4, "chosen": [" the capital"] * 4, "rejected": [" France"] * 4}
    sizes = {"max_steps": 3, "per_device_train_batch_size": 2}
    _, steps = train(DPOTrainer, DPOConfig, loaded, rows, sizes)
    assert steps[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert steps[-1]["loss"] < steps[0]["loss"]


def test_grpo_from_a_loaded_adapter_takes_it_as_the_reference(base, train, tmp_path):
    """The first divergence of the policy from the reference is zero."""
    from trl import GRPOConfig, GRPOTrainer

    def reward(completions, **_):
        return [float(len(text)) for text in completions]

    model, rows = load_adapter(base, tmp_path), {"prompt": ["What is"] * 8}
    options = {"num_generations": 4, "max_completion_length": 8, "beta": 0.1}
    _, (first, second) = train(GRPOTrainer, GRPOConfig, model, rows, options, reward_funcs=reward)
    assert first["kl"] == 0
    assert second["kl"] > 0
