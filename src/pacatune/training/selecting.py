"""Chooses the columns of a run from its training data, before the adapter is made."""

import copy
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig
from rich.console import Console
from rich.progress import track
from torch import nn

from pacatune.training.language import Task
from pacatune.training.progress import say


def check_selection(adapter_config: PeftConfig | None, arguments: Any) -> None:
    """Refuse a choice from data where no process has the whole model."""
    options, plugin = cast(Any, adapter_config), arguments.deepspeed_plugin
    is_sharded = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    is_sharded |= plugin is not None and plugin.zero_stage == 3
    if is_sharded and _needs_gradients(options):
        raise ValueError(
            f"`paca.selection` ({options.selection!r}) needs the whole model, which FSDP and "
            "ZeRO-3 shard; choose without data (random, weight_norm), or give the folder of a run "
            "without them, for one step."
        )


def choose_from_data(
    task: Task, model: nn.Module, checkpoint: Path | None, console: Console
) -> PeftConfig | None:
    """Return a copy of the adapter's configuration, with columns where data decides about them.

    Only then is the model moved to the run's device, if it is not quantised. A run that goes on
    from a checkpoint has its columns.
    """
    adapter: Any = copy.deepcopy(task.plan.adapter)
    if not _needs_gradients(adapter):
        return cast(PeftConfig | None, adapter)
    if checkpoint is not None:
        from pacatune.adapters.folder import CONFIG_NAME, read_config
        from pacatune.selection import load_columns

        adapter.columns = load_columns(checkpoint)
        adapter.selection_options = read_config(checkpoint / CONFIG_NAME).selection_options
        return cast(PeftConfig, adapter)
    from pacatune.selection import choose_columns, collect_statistics

    arguments, number = task.arguments, task.config.paca.selection_batches
    if not getattr(model, "is_quantized", False):
        model.to(arguments.device)
    was_training = model.training
    if arguments.gradient_checkpointing:
        # Renamed within version 5 of transformers.
        enable = getattr(model, "activation_checkpointing_enable", None)
        enable = enable or cast(Any, model).gradient_checkpointing_enable
        enable(arguments.gradient_checkpointing_kwargs)
        model.train()  # transformers checkpoints in training only
    start = time.perf_counter()
    collate = partial(task.collate, task.train)
    batches = share_of_batches(len(task.train), number, arguments, collate)
    shown = track(batches, "collecting gradients", number, console=console, transient=True)
    statistics = collect_statistics(model, shown, adapter, loss_fn=task.data.loss)
    model.train(was_training)
    seconds = time.perf_counter() - start
    chosen = f"columns chosen by {adapter.selection}"
    say(console, f"{chosen} from {statistics.num_batches} batches ({seconds:.1f} s)")
    return choose_columns(model, adapter, statistics)


def share_of_batches(
    num_examples: int, num_batches: int, arguments: Any, collate: Callable[[list[int]], Any]
) -> Iterator[Any]:
    """Yield this process's share of the batches, drawn from the data in a seeded order.

    All processes together see the batches that one process alone would see.
    """
    generator = torch.Generator().manual_seed(arguments.seed)
    order = torch.randperm(num_examples, generator=generator, device="cpu")
    parts = order.split(arguments.per_device_train_batch_size)[:num_batches]
    for part in islice(parts, arguments.process_index, None, arguments.world_size):
        yield collate(part.tolist())


def describe_columns(model: Any) -> str | None:
    """Return how the columns of a trained model were chosen; None without PaCA."""
    config: Any = getattr(model, "peft_config", {}).get("default")
    if getattr(config, "peft_type", None) != "PACA":
        return None
    said = [f"{key} {value}" for key, value in (config.selection_options or {}).items()]
    return ", ".join([config.selection, *said])


def _needs_gradients(adapter: Any) -> bool:
    return getattr(adapter, "peft_type", None) == "PACA" and adapter.needs_gradients()
