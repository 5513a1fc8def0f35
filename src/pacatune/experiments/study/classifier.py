"""A small recipe for classifiers of texts: PEFT's adapters in transformers' Trainer.

It is what studies need of an encoder; texts and labels are the columns `text` and `label` of the
same files that `pacatune train` reads.
"""

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from torch import nn
from transformers import DataCollatorWithPadding, Trainer, set_seed

from pacatune.experiments.study.classifier_config import ClassifierConfig
from pacatune.methods import METHODS, adapter_config
from pacatune.precision import torch_dtype
from pacatune.pretrained import load_weights
from pacatune.training.checkpoints import WholeCheckpoints
from pacatune.training.model import adapter_options
from pacatune.training.progress import Meter
from pacatune.training.running import add_callbacks, adjusted_arguments, make_lean
from pacatune.training.selecting import choose_from_data, share_of_batches

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftConfig


class ClassifierTrainer(WholeCheckpoints, Trainer):  # type: ignore[misc]
    """Trainer with what is measured by all recipes."""


def make_adapter_config(config: ClassifierConfig) -> "PeftConfig | None":
    """Return the PEFT configuration; None for `full` and `head`. PEFT adds the new head to it."""
    method = METHODS[config.method]
    if not method.has_adapter:
        return None
    return adapter_config(method, task_type="SEQ_CLS", **adapter_options(config))


def complete_adapter_config(config: ClassifierConfig, model: nn.Module) -> Any:
    """Return the PEFT configuration with the same default targets for every method."""
    from pacatune.tuner.config import refuse_idle_layers
    from pacatune.tuner.defaults import default_targets

    adapter: Any = make_adapter_config(config)
    if adapter is not None and adapter.target_modules is None:
        adapter.target_modules = default_targets(model)
    if adapter is not None:
        refuse_idle_layers(adapter)
    return adapter


def make_trainable(model: Any, config: ClassifierConfig, adapter: Any) -> Any:
    """Put the adapter on a model, or set which of its weights are trained."""
    if adapter is None:
        if config.method == "head":
            model.base_model.requires_grad_(False)
        return model
    from pacatune.tuner.ignored import get_strict_peft_model

    is_empty = any(parameter.is_meta for parameter in model.parameters())
    if is_empty and getattr(adapter, "columns", True) is None:
        adapter.selection = "random"  # a plan reads no weights
    return get_strict_peft_model(model, adapter, low_cpu_mem_usage=is_empty)


def make_trainer(
    config: ClassifierConfig,
    model: Any,
    tokenizer: Any,
    train: "Dataset",
    console: Console,
) -> ClassifierTrainer:
    """Return the trainer, with columns chosen from the data where the strategy looks at it."""
    adapter = complete_adapter_config(config, model)
    collate = DataCollatorWithPadding(tokenizer)
    rows = partial(_rows, train, collate)
    batches = share_of_batches(len(train), config, rows)
    adapter = choose_from_data(config, adapter, model, batches, None, console)
    meter = Meter("texts")
    trainer = ClassifierTrainer(
        meter=meter,
        model=make_trainable(model, config, adapter),
        args=adjusted_arguments(config, has_evaluation=False, checkpoint=None),
        train_dataset=train,
        data_collator=collate,
        compute_metrics=_accuracy,
        callbacks=[meter],
    )
    make_lean(trainer, config, console)
    add_callbacks(trainer, config, None, meter, console)
    return trainer


def load_classifier(config: ClassifierConfig, classes: list[str]) -> Any:
    """Load an encoder and put a new head for the classes on it."""
    from transformers import AutoModelForSequenceClassification

    set_seed(config.training.seed)
    return load_weights(
        AutoModelForSequenceClassification,
        config.model.path,
        dtype=torch.float32 if config.model.dtype == "auto" else torch_dtype(config.model.dtype),
        revision=config.model.revision,
        num_labels=len(classes),
        attn_implementation=config.model.attn_implementation,
        ignore_mismatched_sizes=True,
        use_safetensors=True,
    )


def _rows(data: "Dataset", collate: Any, places: list[int]) -> dict[str, torch.Tensor]:
    return dict(collate([data[place] for place in places]))


def _accuracy(prediction: Any) -> dict[str, float]:
    logits = prediction.predictions
    logits = logits[0] if isinstance(logits, tuple) else logits
    return {"accuracy": float((np.argmax(logits, axis=-1) == prediction.label_ids).mean())}
