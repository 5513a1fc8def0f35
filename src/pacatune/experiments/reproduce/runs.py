"""Runs of a cell with settings in the words of the paper's tables: trained, scored, kept.

Everything happens in this process by `pacatune.training` and `pacatune.evaluation`; the commands
that `--print` shows do the same by hand.
"""

import contextlib
import json
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pacatune.experiments.paper.settings import Settings
from pacatune.experiments.paper.tables import Quantity, Row, Table
from pacatune.experiments.reproduce.section import Measured
from pacatune.experiments.reproduce.verdicts import Column
from pacatune.memory.presets import PRESETS
from pacatune.methods import METHODS
from pacatune.training import (
    DataConfig,
    LoraSection,
    ModelConfig,
    PacaSection,
    RunConfig,
    TrainingConfig,
)

if TYPE_CHECKING:
    from rich.console import Console

    from pacatune.adapters.loading import LoadedModel

__all__ = [
    "GUANACO",
    "MMLU",
    "SEED",
    "UNTRAINED",
    "Runs",
    "cost_columns",
    "cost_numbers",
    "costs",
    "evaluate_line",
    "hub_id",
    "loaded",
    "text_run",
    "train_line",
]

# The seed of the authors' scripts for MMLU and for Oasst1 on the 8B model.
SEED = 42
UNTRAINED = ("none", "quantized")
# MMLU's training questions, in the words of the evaluation, loss on the answers.
MMLU: dict[str, Any] = {"path": "cais/mmlu", "name": "auxiliary_train", "format": "mmlu"}
# Oasst1 as the authors' scripts take it: its best paths as plain texts.
GUANACO: dict[str, Any] = {
    "path": "timdettmers/openassistant-guanaco",
    "format": "text",
    "eval_split": "test",
}
_REPORT = "report.json"  # written last: a run that has it has ended well
_COSTS = {"memory": "full_memory", "time": "full_time"}


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
    """Return a run of `pacatune train` with stated settings.

    Args:
        stated: Everything but model, data and learning rate.
        method: Its name in `METHODS`.
        model: Hub id or folder.
        data: Options of the data section.
        rate: Learning rate.
        dtype: Type of the frozen weights.
        seed: Seed for the data's order, the columns and LoRA.
        selection: How PaCA's columns are chosen.
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


def train_line(run: Any) -> str:
    """Return the command that trains a run by hand, its configuration in RUN.yaml."""
    return f"pacatune {run.command} --config RUN.yaml"


def evaluate_line(kind: str, model: str, *more: str, has_adapter: bool) -> str:
    """Return the command that scores a run by hand.

    Args:
        kind: mmlu or mt-bench.
        model: Hub id.
        *more: Further words.
        has_adapter: Whether the run left one.
    """
    adapter = ["--adapter", "RUN"] if has_adapter else []
    words = ["pacatune", "evaluate", kind, "--model", model, *adapter, *more, "--output", "DIR"]
    return shlex.join(words)


@dataclass(frozen=True, kw_only=True)
class Runs:
    """What a cell does one after the other in its folder; what an earlier call ended is skipped."""

    folder: Path
    tell: Callable[[str], None]

    def train(self, run: Any, name: str) -> tuple[dict[str, Any], Path]:
        """Train a run, going on from its last checkpoint; return its report and its folder.

        Args:
            run: A RunConfig or ImageRunConfig; its output folder is set.
            name: Folder of the run, in the cell's.
        """
        output = self.folder / name
        run.training.output_dir = run.training.given["output_dir"] = str(output)
        if not (output / _REPORT).is_file():
            has_checkpoint = output.is_dir() and any(output.glob("checkpoint-*"))
            self.tell(f"  training {name}{', from its last checkpoint' * has_checkpoint}")
            with self.quiet(name) as console:
                _recipe(run)(
                    run, resume=has_checkpoint, overwrite=not has_checkpoint, console=console
                )
        values: dict[str, Any] = json.loads((output / _REPORT).read_text(encoding="utf-8"))
        return values, output

    def once(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return what is computed, of an earlier call if it has ended there.

        Args:
            name: Name of its file in the cell's folder.
            compute: Returns JSON values.
        """
        path = self.folder / f"{name}.json"
        if not path.is_file():
            self.tell(f"  {name}")
            with self.quiet(name):
                values = compute()
            partial = path.with_name(f".{path.name}")
            partial.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
            partial.replace(path)
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found

    @contextlib.contextmanager
    def quiet(self, name: str) -> Iterator["Console"]:
        """Send what is printed meanwhile to NAME.log, and free memory afterwards."""
        from rich.console import Console

        from pacatune.experiments.study.task import released

        self.folder.mkdir(parents=True, exist_ok=True)
        with (
            (self.folder / f"{name}.log").open("a", encoding="utf-8") as file,
            contextlib.redirect_stdout(file),
            contextlib.redirect_stderr(file),
            released(),
        ):
            yield Console(file=file, highlight=False, markup=False)


def _recipe(run: Any) -> Any:
    """Return the function that trains a run of this kind."""
    if run.command == "train-image":
        from pacatune.training import image

        return image.train
    from pacatune import training

    return training.train


@contextlib.contextmanager
def loaded(
    model: str, adapter: Path | None, *, dtype: str = "auto", device: str = "auto"
) -> Iterator["LoadedModel"]:
    """Load a model to be scored, PaCA's columns kept in its weights."""
    from pacatune import resident
    from pacatune.adapters.loading import load_language_model

    found = load_language_model(model, adapter, dtype=dtype, device=device)  # type: ignore[arg-type]
    with resident(found.model):
        yield found


def costs(report: dict[str, Any]) -> dict[str, Any]:
    """Return what a cell keeps of the report of a training."""
    return {
        "peak_memory_bytes": report["peak_memory_bytes"],
        "training_ms": (report["step_ms"] or 0.0) * report["num_steps"],
        "num_trainable_parameters": report["num_trainable_parameters"],
    }


def cost_columns(table: Table) -> list[Column]:
    """Return the columns of memory and time, measured at the paper's own size."""
    return [
        Column(
            quantity=Quantity(
                key=key,
                title=f"{table.quantity(name).title}, measured",
                unit=table.quantity(name).unit,
                kind=table.quantity(name).kind,
                margin=table.quantity(name).margin,
            ),
            paper=table.quantity(name),
            is_same=True,
            about="By `pacatune train`, on the accelerator named below.",
        )
        for name, key in _COSTS.items()
    ]


def cost_numbers(table: Table, row: Row, result: dict[str, Any]) -> dict[tuple[str, str], Measured]:
    """Return memory and time of a line that was trained in full.

    Args:
        table: The paper's.
        row: The line.
        result: With what `costs` returns.
    """
    unit_ms = {"h": 3.6e6, "min": 6e4}[table.quantity("time").unit]
    return {
        (row.key, _COSTS["memory"]): Measured.exact(result["peak_memory_bytes"] / 1e9, "measured"),
        (row.key, _COSTS["time"]): Measured.exact(result["training_ms"] / unit_ms, "measured"),
    }
