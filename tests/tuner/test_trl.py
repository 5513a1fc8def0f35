"""TRL's trainers with PacaConfig: SFT from a configuration, DPO from a loaded adapter."""

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from pacatune import MosLoraConfig, PacaConfig
from pacatune.selection import choose_columns, collect_statistics
from pacatune.tuner import PacaLayer
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


@pytest.mark.parametrize("checkpointing", [False, True])
def test_sft(base, tokenizer, tmp_path, checkpointing):
    from trl import SFTConfig, SFTTrainer

    before = {name: value.clone() for name, value in base.state_dict().items()}
    trainer = SFTTrainer(
        base,
        args=SFTConfig(
            output_dir=str(tmp_path),
            max_steps=4,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=3,
            gradient_checkpointing=checkpointing,
            learning_rate=1e-2,
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=Dataset.from_dict({"text": ["What is the capital of France? Paris."] * 24}),
        processing_class=tokenizer,
        peft_config=config(),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    layers = [module for module in trainer.model.modules() if isinstance(module, PacaLayer)]
    assert len(layers) == 6
    assert all(layer.delta_of("default").abs().sum() > 0 for layer in layers)
    seen = trainer.model.unload().state_dict()
    assert all(torch.equal(seen[name], value) for name, value in before.items())


@pytest.mark.parametrize("selection", ["random", "weight_norm", "gradient", "moslora"])
def test_dpo_from_a_loaded_adapter_takes_it_as_the_reference(base, tokenizer, tmp_path, selection):
    """The first loss is log 2 only if policy and reference are the same adapter.

    TRL makes the reference from the configuration and copies parameters, so not the columns.
    """
    from trl import DPOConfig, DPOTrainer

    options = config("random" if selection == "moslora" else selection)
    if selection == "gradient":
        batch = dict(tokenizer(["What is the capital?"], return_tensors="pt"))
        batches = [{**batch, "labels": batch["input_ids"]}]
        options = choose_columns(base, options, collect_statistics(base, batches, options))
    if selection == "moslora":
        options = MosLoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    loaded = load_adapter(base, tmp_path, options)
    rows = {"prompt": ["What is"] * 4, "chosen": [" the capital"] * 4, "rejected": [" France"] * 4}
    trainer = DPOTrainer(
        loaded,
        args=DPOConfig(
            output_dir=str(tmp_path / "out"),
            max_steps=3,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)
    assert losses[-1] < losses[0]


def arguments(tmp_path):
    return {
        "output_dir": str(tmp_path / "out"),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
    }


@pytest.mark.filterwarnings("ignore:You are importing from .trl.experimental.")
def test_kto_from_a_loaded_adapter_takes_it_as_the_reference(base, tokenizer, tmp_path):
    """The first rewards, policy against reference, are zero up to rounding."""
    from trl.experimental.kto import KTOConfig, KTOTrainer

    rows = {"prompt": ["What is"] * 8, "completion": [" the capital", " France"] * 4}
    trainer = KTOTrainer(
        load_adapter(base, tmp_path),
        args=KTOConfig(**arguments(tmp_path)),
        train_dataset=Dataset.from_dict({**rows, "label": [True, False] * 4}),
        processing_class=tokenizer,
    )
    trainer.train()
    first, second, *_ = trainer.state.log_history
    for name in ("rewards/chosen", "rewards/rejected"):
        assert first[name] == pytest.approx(0, abs=1e-6)
    assert second["rewards/chosen"] > second["rewards/rejected"]


def test_grpo_from_a_loaded_adapter_takes_it_as_the_reference(base, tokenizer, tmp_path):
    """The first divergence of the policy from the reference is zero."""
    from trl import GRPOConfig, GRPOTrainer

    options = {"num_generations": 4, "max_completion_length": 8, "beta": 0.1}
    trainer = GRPOTrainer(
        load_adapter(base, tmp_path),
        args=GRPOConfig(**options, **arguments(tmp_path)),
        train_dataset=Dataset.from_dict({"prompt": ["What is"] * 8}),
        processing_class=tokenizer,
        reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
    )
    trainer.train()
    first, second, *_ = trainer.state.log_history
    assert first["kl"] == 0
    assert second["kl"] > 0
