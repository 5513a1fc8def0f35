"""Supervised fine-tuning of a language model, by TRL's SFTTrainer."""

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import SFTTrainer
from trl.trainer.sft_trainer import (
    DataCollatorForLanguageModeling,
    DataCollatorForVisionLanguageModeling,
)

from pacatune.data.config import DataConfig
from pacatune.data.formats import open_image
from pacatune.data.prepare import prepare_data
from pacatune.pretrained import load_processor
from pacatune.training.language import Task, set_variables
from pacatune.training.task import TaskData
from pacatune.training.tasks import ModelKind
from pacatune.training.trainer import RunTrainer

_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
"""Kinds of layers in which flash attention keeps packed examples apart."""


def prepare(task: Task) -> TaskData:
    """Read, encode and check texts or chats; the model is another one where they have images."""
    training = task.config.training
    if training.packing and training.packing_strategy == "wrapped":
        raise ValueError(
            "`training.packing_strategy` ('wrapped') lets examples attend to each other; use 'bfd' "
            "or 'bfd_split'."
        )
    splits = training.packing and training.packing_strategy == "bfd_split"
    config = cast(DataConfig, task.config.data)
    encoder = task.encoder(
        max_length=None if splits else training.max_length,
        learn_all=config.loss == "all",
        special_tokens=config.special_tokens,
    )
    data = prepare_data(config, encoder, training.dataset_num_proc, partial(_load_processor, task))
    if data.processor is None:
        return TaskData(examples=data)
    if training.packing or training.padding_free:
        raise ValueError(
            "`training.packing` and `training.padding_free` are for texts, and the data has "
            "images; drop them."
        )
    collator = partial(
        collate_images, collate=DataCollatorForVisionLanguageModeling(data.processor)
    )
    return TaskData(
        examples=data,
        kind=ModelKind("AutoModelForImageTextToText", None, "image-text-to-text"),
        collator=collator,
        trainer_options={"data_collator": collator},
    )


def _load_processor(task: Task) -> Any:
    config = task.config
    processor = load_processor(task.model_path, revision=config.model.revision)
    if config.data.chat_template is not None:
        processor.chat_template = task.tokenizer.chat_template
    else:
        set_variables(processor, config)
    return processor


def collate_images(rows: list[dict[str, Any]], *, collate: Any) -> dict[str, Any]:
    """Return chats with images as a padded batch, which TRL makes, with our labels."""
    batch: dict[str, Any] = collate(
        [{"text": row["text"], "images": [*map(open_image, row["images"])]} for row in rows]
    )
    for ids, labels, row in zip(batch["input_ids"], batch["labels"], rows, strict=True):
        number = len(row["labels"])
        same = ids[:number].tolist() == row["input_ids"]
        assert same, f"{row['place']} is tokenized otherwise in a batch"
        labels[:number] = torch.tensor(row["labels"], device=labels.device)
    return batch


class TextTrainer(RunTrainer, SFTTrainer):
    """TRL's on data that is prepared; it packs where that is safe."""

    prepare = staticmethod(prepare)

    def __init__(self, *, model: Any, args: Any, **kwargs: Any) -> None:
        if packs(args, model):
            check_packing(model)
        if "data_collator" in kwargs:
            args.remove_unused_columns = False
        if not (args.packing or args.eval_packing or args.shuffle_dataset):
            args.dataset_kwargs = {"skip_prepare_dataset": True}
            args.max_length = None
        super().__init__(model=model, args=args, **kwargs)


def packs(training: Any, model: Any) -> bool:
    """Whether several examples lie in one row, in layers that may not keep them apart.

    Flash attention does; a convolution over tokens, or a state, goes on to the next example.
    """
    if not (training.packing or training.eval_packing or training.padding_free):
        return False
    config = model.config.get_text_config()
    if "flash" not in (config._attn_implementation or ""):
        return True
    if kinds := getattr(config, "layer_types", None):
        return not {*kinds} <= _ATTENTION
    return any(isinstance(layer, nn.Conv1d) for layer in model.modules())


def check_packing(model: Any) -> None:
    """Refuse a model in which packed examples see each other, or one that cannot be tried."""
    name, why = type(model).__name__, None
    if is_deepspeed_zero3_enabled():
        why = "its weights are sharded (ZeRO-3), so that it cannot be tried"
    else:
        try:
            why = f"packed examples see each other in {name}" if _mixes_examples(model) else None
        except (ValueError, RuntimeError) as error:  # as of a layer that misses its kernel
            why = f"{name} cannot be tried ({error})"
    if why is not None:
        raise ValueError(
            f"`training.packing` or `training.padding_free` with `model.attn_implementation` "
            f"({model.config._attn_implementation!r}): {why}; set it to flash_attention_2, "
            "flash_attention_3 or a flash-attn kernel if all layers are attention, or do not pack."
        )


def _mixes_examples(model: Any) -> bool:
    """Whether a packed example changes the outputs of the next.

    transformers masks the attention of packed examples by their positions, which not every model
    has and other layers than attention do not obey. So two examples are packed, as TRL does it: the
    gradients of the second's outputs by the first's inputs must be exactly 0. Flash attention is
    made for it, and gives way to one that every device and type has.
    """
    rows = [{"input_ids": list(range(1, 6))}, {"input_ids": list(range(6, 13))}]
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(rows)
    del batch["labels"]
    batch = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    inputs: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        inputs.append(output if output.requires_grad else output.requires_grad_())
        return output

    was_training, config = model.training, model.config.get_text_config()
    attention = config._attn_implementation
    hook = model.get_input_embeddings().register_forward_hook(keep)
    try:
        if "flash" in (attention or ""):
            config._attn_implementation = "eager"
        with torch.enable_grad():
            logits = model.eval()(**batch, use_cache=False).logits
        (gradient,) = torch.autograd.grad(logits[:, 5:].float().square().sum(), inputs[0])
    finally:
        hook.remove()
        config._attn_implementation = attention
        model.train(was_training)
    return bool(gradient[:, :5].any())
