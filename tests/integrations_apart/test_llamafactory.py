"""LLaMA-Factory 0.9.5's version 1 trains PaCA, as a plain loop over its batches does."""

import json
import sys

import pytest
import torch
import yaml
from llamafactory.v1.accelerator.interface import DistributedInterface
from llamafactory.v1.config import get_args
from llamafactory.v1.core.data_engine import DataEngine
from llamafactory.v1.core.model_engine import ModelEngine
from llamafactory.v1.core.utils.batching import BatchGenerator
from llamafactory.v1.utils.helper import compute_valid_tokens
from torch.nn import functional
from transformers import AutoModelForCausalLM

from pacatune.adapters.merge import merge
from pacatune.integrations.llamafactory import adapt, main
from tests.integrations_apart.direct import (
    EPOCHS,
    RATE,
    SEED,
    adapted,
    assert_same,
    assert_trained,
    documented,
    four_bits,
)

PACA = {"r": 4, "paca_alpha": 8, "selection": "weight_norm"}


@pytest.fixture
def options(tiny_model_dir, chats, tmp_path):
    """A configuration of version 1, and its data in its format."""
    path = tmp_path / "messages.jsonl"
    with path.open("w") as file:
        for line in chats.read_text().splitlines():
            messages = [
                {
                    "role": turn["role"],
                    "content": [{"type": "text", "value": turn["content"]}],
                    "loss_weight": float(turn["role"] == "assistant"),
                }
                for turn in json.loads(line)["messages"]
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    return {
        "model": str(tiny_model_dir),
        "train_dataset": str(path),
        "output_dir": str(tmp_path / "run"),
        "micro_batch_size": 1,
        "global_batch_size": 1,
        "cutoff_len": 256,
        "learning_rate": RATE,
        "num_train_epochs": EPOCHS,
        "bf16": False,
        "batching_workers": 0,
        "enable_activation_checkpointing": False,
        "seed": SEED,
    }


@pytest.fixture
def run(options, tmp_path, monkeypatch):
    """Run a command with a configuration, as a shell would."""

    def start(command, peft_config, **changes):
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump({**options, **changes, "peft_config": peft_config}))
        monkeypatch.setattr(sys, "argv", ["llamafactory", command, str(path)])
        main()

    return start


def train_directly(model, options, output):
    """Train by a loop of our own over the tool's batches, with its loss."""
    model_arguments, data, training, _ = get_args(dict(options))
    DistributedInterface(None)
    renderer = ModelEngine(model_arguments, is_train=False).renderer
    batches = BatchGenerator(
        DataEngine(data.train_dataset),
        renderer,
        micro_batch_size=1,
        global_batch_size=1,
        cutoff_len=training.cutoff_len,
        seed=SEED,
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE)
    model.train()
    for epoch in range(EPOCHS):
        batches.set_epoch(epoch)
        for (batch,) in batches:
            inputs = {name: value for name, value in batch.items() if torch.is_tensor(value)}
            logits = model(**inputs).logits.float()[:, :-1].flatten(0, 1)
            losses = functional.cross_entropy(
                logits, batch["labels"][:, 1:].flatten(), reduction="none"
            )
            weights = batch["loss_weights"][..., 1:]
            loss = (losses.view(weights.shape) * weights).sum() / (weights.sum() + 1e-6)
            tokens = compute_valid_tokens([batch])
            (loss * tokens / (tokens + 1e-6)).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
    model.save_pretrained(output)


def test_trains_as_a_plain_loop_does(run, options, tiny_model_dir, tmp_path):
    own = {"lora_alpha": 8, "r": 4, "selection": "weight_norm", "target_modules": "all"}
    run("sft", {"name": "paca", **own})
    assert_trained(tmp_path / "run")
    model = adapted(tiny_model_dir, options={**PACA, "target_modules": "all-linear"})
    train_directly(model, options, tmp_path / "direct")
    assert_same(tmp_path / "run", tmp_path / "direct")

    # On from there.
    adapter = str(tmp_path / "run")
    again = {"output_dir": str(tmp_path / "again")}
    run("sft", {"name": "paca", "adapter_name_or_path": adapter}, **again)
    model = adapted(tiny_model_dir, adapter=adapter)
    train_directly(model, options, tmp_path / "direct2")
    assert_same(tmp_path / "again", tmp_path / "direct2")

    # Answers come from merged weights, which are those of `pacatune merge`.
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    served = adapt(base, {"name": "paca", "adapter_name_or_path": adapter})
    merge(str(tiny_model_dir), adapter, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    for name, tensor in merged.state_dict().items():
        assert torch.equal(tensor, served.get_parameter(name)), name


def test_quantised_base(run, options, tiny_model_dir, tmp_path):
    quant_config = {"name": "bnb", "quantization_bit": 4, "compute_dtype": "float32"}
    run("sft", {"name": "paca", **PACA}, quant_config=quant_config)
    assert_trained(tmp_path / "run")
    quantization = four_bits(bnb_4bit_quant_storage=torch.float32)
    model = adapted(tiny_model_dir, options=PACA, quantization=quantization)
    train_directly(model, options, tmp_path / "direct")
    assert_same(tmp_path / "run", tmp_path / "direct")


def test_the_page(tiny_model_dir):
    shown = yaml.safe_load(documented("# lf.yaml"))
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    config = adapt(base, shown["peft_config"], is_train=True).peft_config["default"]
    assert (config.r, config.paca_alpha, len(config.target_modules)) == (16, 16, 2 * 7)


@pytest.mark.parametrize(
    ("peft_config", "message"),
    [
        ({"lora_dropout": 0.1}, r"`lora_dropout` \(0.1\) is not for `name: paca`: .* dropped"),
        ({"use_dora": True}, "`use_dora`"),
        (
            {"lora_alpha": 8, "paca_alpha": 4},
            "`lora_alpha` .* and `peft_config.paca_alpha` .* diff",
        ),
        ({"nd": 2}, "`peft_config.nd` does not exist"),
        ({"r": 4, "adapter_name_or_path": "there"}, r"drop .* \(\['r'\]\)"),
    ],
)
def test_refusals(peft_config, message):
    with pytest.raises(ValueError, match=message):
        adapt(torch.nn.Linear(2, 2), {"name": "paca", **peft_config}, is_train=True)


def test_its_merge_is_refused(run):
    with pytest.raises(ValueError, match="merge with `pacatune merge`"):
        run("merge", {"name": "paca", "adapter_name_or_path": "there"})
