"""Supervised fine-tuning of a language model, by TRL's SFTTrainer."""

from functools import partial
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from pacatune.data import PreparedData, prepare_data, show_preview
from pacatune.data.encode import ImageCollator
from pacatune.pretrained import load_processor
from pacatune.training.config import RunConfig
from pacatune.training.language import LanguageTask, LanguageTrainer, find_stop_ids, model_path
from pacatune.training.report import Report


class SftTask(LanguageTask[RunConfig]):
    """A run of supervised fine-tuning."""

    tags = ("sft", "trl")

    processor: Any = None
    """What makes images into tensors, where the data has some."""

    def read_data(self) -> PreparedData:
        """Encode the data."""
        config = self.config
        refuse_packing_of_shards(config)
        data = read_data(config, self.tokenizer)
        self.processor = data.processor
        if self.processor is not None:
            if config.training.packing or config.training.padding_free:
                raise ValueError(
                    "`training.packing` and `training.padding_free` are for texts, and the data "
                    "has images; drop them."
                )
            self.auto_class, self.task_type = AutoModelForImageTextToText, None
            self.pipeline_tag = "image-text-to-text"
        return data

    def collate(self, examples: Any, places: list[int]) -> dict[str, Tensor]:
        """Return some rows as one padded batch with labels, and images if they have some."""
        if self.processor is None:
            return super().collate(examples, places)
        return ImageCollator(self.processor)([examples[place] for place in places])

    def make_trainer(
        self, model: nn.Module, adapter_config: PeftConfig | None, **options: Any
    ) -> "SftRunTrainer":
        """Return TRL's trainer, which puts the adapter on the model."""
        arguments = options["args"]
        if packs(self.config):
            check_packing(model, self.config)
        if self.processor is not None:
            arguments.remove_unused_columns = False
            options["data_collator"] = ImageCollator(self.processor)
        if not (arguments.packing or arguments.eval_packing or arguments.shuffle_dataset):
            arguments.dataset_kwargs = {"skip_prepare_dataset": True}
            arguments.max_length = None
        return SftRunTrainer(
            model=model,
            processing_class=self.processor or self.tokenizer,
            peft_config=adapter_config,
            **options,
        )

    def show(self, data: Dataset, num_examples: int, console: Console) -> None:
        """Print the first examples with the tokens that are learned."""
        show_preview(data, self.tokenizer, num_examples, console)

    def make_report(self, known: dict[str, Any], trainer: Any, items_per_second: float) -> Report:
        """Return the report, with tokens per second."""
        return Report(**known, tokens_per_second=items_per_second)


class SftRunTrainer(LanguageTrainer, SFTTrainer):
    """SFTTrainer with what the recipe needs."""


def packs(config: RunConfig) -> bool:
    """Whether several examples lie in one row, with attention that is not made for it."""
    training = config.training
    packed = training.packing or training.eval_packing or training.padding_free
    return bool(packed) and "flash" not in (config.model.attn_implementation or "")


def refuse_packing_of_shards(config: RunConfig) -> None:
    """Refuse to pack where no process has the whole model to look at."""
    if packs(config) and is_deepspeed_zero3_enabled():
        raise ValueError(
            f"`training.packing` or `training.padding_free` with `model.attn_implementation` "
            f"({config.model.attn_implementation!r}) and ZeRO-3: sharded weights cannot be tried, "
            "and flash attention alone keeps packed examples apart in every model; set it to "
            "flash_attention_2, flash_attention_3 or a flash-attn kernel, or do not pack."
        )


def check_packing(model: Any, config: RunConfig) -> None:
    """Refuse a model in which packed examples see each other.

    transformers masks the attention of packed examples by their positions, which not every model
    has and other layers than attention do not obey. So two examples are packed, as TRL does it: the
    gradients of the second's outputs by the first's inputs must be exactly 0.
    """
    rows = [{"input_ids": list(range(1, 6))}, {"input_ids": list(range(6, 13))}]
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(rows)
    del batch["labels"]
    batch = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    inputs: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        inputs.append(output if output.requires_grad else output.requires_grad_())
        return output

    was_training = model.training
    hook = model.get_input_embeddings().register_forward_hook(keep)
    try:
        with torch.enable_grad():
            logits = model.eval()(**batch, use_cache=False).logits
        (gradient,) = torch.autograd.grad(logits[:, 5:].float().square().sum(), inputs[0])
    finally:
        hook.remove()
        model.train(was_training)
    if gradient[:, :5].any():
        raise ValueError(
            f"`training.packing` or `training.padding_free` with `model.attn_implementation` "
            f"({config.model.attn_implementation!r}): packed examples see each other in "
            f"{type(model).__name__}; set it to flash_attention_2, flash_attention_3 or a "
            "flash-attn kernel if all of its layers use attention, or do not pack."
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
        load_processor=partial(_load_processor, config, tokenizer),
    )


def _load_processor(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Any:
    processor = load_processor(model_path(config), revision=config.model.revision)
    if config.data.chat_template is not None:
        processor.chat_template = tokenizer.chat_template
    return processor
