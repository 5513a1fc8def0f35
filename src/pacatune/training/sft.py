"""Supervised fine-tuning of a language model, by TRL's SFTTrainer."""

from typing import Any

from datasets import Dataset
from peft import PeftConfig
from rich.console import Console
from torch import nn
from transformers import PreTrainedTokenizerBase
from trl import SFTTrainer

from pacatune.data import PreparedData, prepare_data, show_preview
from pacatune.training.config import RunConfig
from pacatune.training.language import LanguageTask, LanguageTrainer, find_stop_ids
from pacatune.training.report import Report


class SftTask(LanguageTask[RunConfig]):
    """A run of supervised fine-tuning."""

    tags = ("sft", "trl")

    def read_data(self) -> PreparedData:
        """Encode the data."""
        check_attention(self.config)
        return read_data(self.config, self.tokenizer)

    def make_trainer(
        self, model: nn.Module, adapter_config: PeftConfig | None, **options: Any
    ) -> "SftRunTrainer":
        """Return TRL's trainer, which puts the adapter on the model."""
        arguments = options["args"]
        if not (arguments.packing or arguments.eval_packing or arguments.shuffle_dataset):
            arguments.dataset_kwargs = {"skip_prepare_dataset": True}
            arguments.max_length = None
        return SftRunTrainer(
            model=model, processing_class=self.tokenizer, peft_config=adapter_config, **options
        )

    def show(self, data: Dataset, num_examples: int, console: Console) -> None:
        """Print the first examples with the tokens that are learned."""
        show_preview(data, self.tokenizer, num_examples, console)

    def make_report(self, known: dict[str, Any], trainer: Any, items_per_second: float) -> Report:
        """Return the report, with tokens per second."""
        return Report(**known, tokens_per_second=items_per_second)


class SftRunTrainer(LanguageTrainer, SFTTrainer):
    """SFTTrainer with what the recipe needs."""


def check_attention(config: RunConfig) -> None:
    """Refuse to pack examples with attention that would let them see each other."""
    training = config.training
    packed = training.packing or training.eval_packing or training.padding_free
    attention = config.model.attn_implementation
    if packed and "flash" not in (attention or ""):
        raise ValueError(
            f"`training.packing` or `training.padding_free` with `model.attn_implementation` "
            f"({attention!r}): flash attention alone keeps packed examples apart in every model; "
            "set it to flash_attention_2, flash_attention_3 or a flash-attn kernel, or do not pack."
        )


def read_data(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> PreparedData:
    """Read, encode and check the data of a run."""
    training = config.training
    splits = training.packing and training.packing_strategy == "bfd_split"
    return prepare_data(
        config.data,
        tokenizer,
        max_length=None if splits else training.max_length,
        stop_ids=find_stop_ids(config, tokenizer),
        num_processes=training.dataset_num_proc,
    )
