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


def train(model, path, rows, output, **arguments):
    """Train on rows in their order, one in a batch."""
    settings = {"num_train_epochs": EPOCHS, "learning_rate": RATE, "seed": SEED}
    settings |= {"lr_scheduler_type": "constant", "optim": "adamw_torch", "use_cpu": True}
    settings |= {"per_device_train_batch_size": 1, "train_sampling_strategy": "sequential"}
    settings |= {"save_strategy": "no", "report_to": "none"}
    padding = arguments.pop("pad_to_multiple_of", None)
    tokenizer = AutoTokenizer.from_pretrained(path)
    collator = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=padding)
    settings = TrainingArguments(str(output), **settings, **arguments)
    Trainer(model, settings, train_dataset=rows, data_collator=collator).train()
    model.save_pretrained(output)


def tensors(folder, kind="adapter_model"):
    return load_file(folder / f"{kind}.safetensors")


def deltas(folder):
    return [tensor for name, tensor in tensors(folder).items() if name.endswith("paca_delta")]


def assert_trained(folder):
    for delta in deltas(folder):
        assert delta.dtype == torch.float32
        assert delta.abs().max() > 0


def assert_same(folder, other, kind="adapter_model"):
    """Two adapters, or models, are equal, bit for bit."""
    one, two = tensors(folder, kind), tensors(other, kind)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name
