"""Chooses the columns of a run from its training data, before the adapter is made."""

import copy
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import PeftConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from torch import nn

from pacatune.methods import METHODS
from pacatune.training.config import RunConfig
from pacatune.training.progress import say

if TYPE_CHECKING:
    from pacatune.selection import ColumnStatistics


# What is decided when an adapter is made, and stays.
_SETTLED = (
    *("columns", "rank_pattern", "alpha_pattern", "selection_options"),
    *("column_rates", "paca_alpha", "use_rslora"),
)


def check_selection(
    config: RunConfig, adapter_config: PeftConfig | None, *, streamed: bool
) -> None:
    """Refuse a choice from data where no process has the whole model, or the data."""
    options = cast(Any, adapter_config)
    if config.adapter is not None or not _kinds(config, adapter_config):
        return
    if streamed:
        raise ValueError(
            f"`paca.selection` ({options.selection!r}), `paca.normalize` ({options.normalize!r}) "
            f"or `paca.budget` ({config.paca.budget!r}) looks at examples from all of the data, "
            "which `data.streaming` does not have; choose without data (random, weight_norm), or "
            "give the folder of a run on a part of it as `paca.selection`."
        )
    plugin = config.training.deepspeed_plugin
    by = "FSDP" if os.environ.get("ACCELERATE_USE_FSDP") == "true" else None
    if plugin is not None and plugin.zero_stage == 3:
        by = "DeepSpeed"
    if by is not None:
        raise ValueError(
            f"`paca.selection` ({options.selection!r}) or `paca.normalize` ({options.normalize!r}) "
            f"looks at gradients or activations of the whole model, which {by} shards; run it "
            f"without {by} for one step, and give that run's folder as `paca.selection`."
        )


def choose_from_data(
    config: Any,
    adapter_config: PeftConfig | None,
    model: nn.Module,
    batches: Iterable[Any],
    checkpoint: Path | None,
    console: Console,
    *,
    loss_fn: Callable[[Any, Any], torch.Tensor] | None = None,
) -> PeftConfig | None:
    """Return a copy of the adapter's configuration, with columns where data decides about them.

    The batches, this process's share, are made only if they are needed; so is the model moved to
    the run's device, if it is not quantised. A run that goes on from a checkpoint has its columns.
    """
    adapter_config = copy.deepcopy(adapter_config)
    kinds = _kinds(config, adapter_config)
    shares = (
        adapter_config is not None and METHODS[config.method].is_paca and config.paca.share_columns
    )
    if adapter_config is None or config.adapter is not None or not (kinds or shares):
        return adapter_config
    if checkpoint is not None:
        return _as_in(checkpoint, adapter_config)
    from pacatune.selection import allocate_ranks, choose_columns, share_columns

    adapter: Any = adapter_config
    statistics = None
    if kinds:
        statistics = _collect(config, adapter, model, batches, kinds, console, loss_fn)
        if config.paca.budget == "gradient":
            adapter = allocate_ranks(model, adapter, statistics)
    if shares:
        adapter = share_columns(model, adapter, statistics)
    return choose_columns(model, adapter, statistics)


def _collect(
    config: Any,
    adapter_config: Any,
    model: nn.Module,
    batches: Iterable[Any],
    kinds: tuple[str, ...],
    console: Console,
    loss_fn: Callable[[Any, Any], torch.Tensor] | None,
) -> "ColumnStatistics":
    from pacatune.selection import collect_statistics

    if not getattr(model, "is_quantized", False):
        model.to(config.training.device)
    was_training = model.training
    if config.training.gradient_checkpointing:
        options = config.training.gradient_checkpointing_kwargs
        with warnings.catch_warnings():
            # transformers 5.24 renames it; 5.17 has only this name.
            warnings.filterwarnings("ignore", ".*gradient_checkpointing_enable", FutureWarning)
            cast(Any, model).gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        model.train()  # transformers checkpoints in training only
    total = config.paca.selection_batches
    start = time.perf_counter()
    with _progress(console, f"collecting {' and '.join(kinds)}", total) as progress:
        statistics = collect_statistics(
            model,
            batches,
            adapter_config,
            kinds=kinds,
            loss_fn=loss_fn,
            progress=progress,
        )
    model.train(was_training)
    seconds = time.perf_counter() - start
    chosen = f"columns chosen by {adapter_config.selection}"
    if adapter_config.normalize == "input":
        chosen += " and normalised by input"
    say(console, f"{chosen} from {statistics.num_batches} batches ({seconds:.1f} s)")
    return statistics


def share_of_batches(
    num_examples: int, config: Any, collate: Callable[[list[int]], Any]
) -> Iterator[Any]:
    """Yield this process's share of the batches, drawn from the data in a seeded order.

    All processes together see the batches that one process alone would see.
    """
    training = config.training
    order = torch.randperm(num_examples, generator=torch.Generator().manual_seed(training.seed))
    parts = order.split(training.per_device_train_batch_size)[: config.paca.selection_batches]
    for part in islice(parts, training.process_index, None, training.world_size):
        yield collate(part.tolist())


def describe_columns(model: Any) -> str | None:
    """Return how the columns of a trained model were chosen; None without PaCA."""
    config: Any = getattr(model, "peft_config", {}).get("default")
    if config is None or config.peft_type != "PACA":
        return None
    options = dict(config.selection_options or {})
    if config.normalize != "none":
        options["normalize"] = config.normalize
    return ", ".join([config.selection, *(f"{key} {value}" for key, value in options.items())])


def _kinds(config: Any, adapter_config: PeftConfig | None) -> tuple[str, ...]:
    """Return the statistics that columns, ranks and rates are chosen by."""
    if getattr(adapter_config, "peft_type", None) != "PACA":
        return ()
    from pacatune.strategies import KINDS

    kinds = set(cast(Any, adapter_config).statistics())
    if config.paca.budget == "gradient":
        kinds.add("gradient")
    return tuple(kind for kind in KINDS if kind in kinds)


def _as_in(checkpoint: Path, adapter_config: Any) -> PeftConfig:
    from pacatune.adapters.folder import CONFIG_NAME, read_config

    saved = read_config(checkpoint / CONFIG_NAME)
    for name in _SETTLED:
        setattr(adapter_config, name, getattr(saved, name))
    return adapter_config


@contextmanager
def _progress(console: Console, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar; yields what moves it."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)
