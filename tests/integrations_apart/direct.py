"""The same training without the tool: transformers' Trainer and PEFT."""

import re
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

from pacatune import PacaConfig

PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"
SEED, RATE, EPOCHS = 7, 1e-2, 2


def documented(beginning):
    """Return the block of the page that begins so."""
    text = PAGE.read_text(encoding="utf-8")
    return re.search(rf"```\w+\n({re.escape(beginning)}.*?)```", text, re.DOTALL)[1]


def adapted(path, *, options=None, adapter=None, quantization=None):
    """Load a base in float32 with a new adapter, or one that goes on."""
    base = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, quantization_config=quantization
    )
    if adapter is not None:
        return PeftModel.from_pretrained(base, adapter, is_trainable=True)
    return get_peft_model(base, PacaConfig(task_type="CAUSAL_LM", **options))


def four_bits(**options):
    """Return bitsandbytes' configuration of QLoRA, which computes in float32."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        **options,
    )


def train_directly(model, path, rows, output, **arguments):
    """Train on rows in their order, one in a batch."""
    settings = {
        "per_device_train_batch_size": 1,
        "num_train_epochs": EPOCHS,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "seed": SEED,
        "train_sampling_strategy": "sequential",
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
    }
    padding = arguments.pop("pad_to_multiple_of", None)
    tokenizer = AutoTokenizer.from_pretrained(path)
    collator = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=padding)
    settings = TrainingArguments(str(output), **settings, **arguments)
    Trainer(model, settings, train_dataset=rows, data_collator=collator).train()
    model.save_pretrained(output)


def tensors(folder):
    """Return an adapter's tensors by name."""
    return load_file(folder / "adapter_model.safetensors")


def deltas(folder):
    return [tensor for name, tensor in tensors(folder).items() if name.endswith("paca_delta")]


def assert_trained(folder):
    """Every module of an adapter has learned, in float32."""
    for delta in deltas(folder):
        assert delta.dtype == torch.float32
        assert delta.abs().max() > 0


def assert_same(folder, other):
    """Two adapters are equal, bit for bit."""
    one, two = tensors(folder), tensors(other)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name
