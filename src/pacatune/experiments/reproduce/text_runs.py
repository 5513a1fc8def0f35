"""Runs of `pacatune train` with settings in the words of the paper's tables."""

from typing import Any

from pacatune.experiments.paper.settings import Settings
from pacatune.measure.presets import PRESETS
from pacatune.methods import METHODS
from pacatune.training import (
    DataConfig,
    LoraSection,
    ModelConfig,
    PacaSection,
    RunConfig,
    TrainingConfig,
)

__all__ = ["GUANACO", "MMLU", "SEED", "hub_id", "text_run"]

# The seed of the authors' scripts for MMLU and for Oasst1 on the 8B model.
SEED = 42
# MMLU's training questions, in the words of the evaluation, loss on the answers.
MMLU: dict[str, Any] = {"path": "cais/mmlu", "name": "auxiliary_train", "format": "mmlu"}
# Oasst1 as the authors' scripts take it: its best paths as plain texts.
GUANACO: dict[str, Any] = {
    "path": "timdettmers/openassistant-guanaco",
    "format": "text",
    "eval_split": "test",
}


def hub_id(model: str) -> str:
    """Return the hub's name of a model of the paper."""
    return PRESETS[model].hub_id


def text_run(
    stated: Settings,
    method: str,
    *,
    model: str,
    data: dict[str, Any],
    rate: float,
    dtype: str = "bfloat16",
    seed: int = SEED,
    selection: str = "random",
    selection_batches: int = 100,
    **training: Any,
) -> RunConfig:
    """Return a run with stated settings.

    Args:
        stated: Everything but model, data and learning rate.
        method: Its name in `METHODS`.
        model: Hub id or folder.
        data: Options of the data section.
        rate: Learning rate.
        dtype: Of the frozen weights.
        seed: Of the data's order, the columns and LoRA.
        selection: Of PaCA's columns.
        selection_batches: Looked at by a selection that needs data.
        **training: Further options of training.
    """
    alpha = stated.alpha if stated.alpha is not None else float(stated.rank or 1)
    options = {"learning_rate": rate, "bf16": dtype == "bfloat16", "seed": seed}
    adapter: dict[str, Any] = {}
    if METHODS[method].is_paca:
        adapter["paca"] = PacaSection(
            r=stated.rank or 1,
            paca_alpha=alpha,
            selection=selection,
            selection_batches=selection_batches,
            random_seed=seed,
        )
    elif METHODS[method].has_adapter:
        adapter["lora"] = LoraSection(
            r=stated.rank or 1, lora_alpha=int(alpha), lora_dropout=stated.dropout or 0.0
        )
    return RunConfig(
        method=method,
        model=ModelConfig(path=model, dtype=dtype),  # type: ignore[arg-type]
        data=DataConfig(**data),
        **adapter,
        training=TrainingConfig(**_schedule(stated) | options | training),
        # As the paper's code computes; its memory and times are without lean layers.
        lean="off",
    )


def _schedule(stated: Settings) -> dict[str, Any]:
    """Return what a run's training options take from stated settings."""
    micro_batches = stated.micro_batches or 1
    length = (
        {"num_train_epochs": stated.epochs or 1.0}
        if stated.steps is None
        else {"max_steps": stated.steps}
    )
    return {
        "output_dir": "run",
        "lr_scheduler_type": stated.scheduler or "linear",
        "warmup_steps": stated.warmup or 0.0,
        "per_device_train_batch_size": (stated.batch_size or 1) // micro_batches,
        "gradient_accumulation_steps": micro_batches,
        "max_length": stated.seq_len,
        "report_to": "none",
        **length,
    }
