"""What every recipe does around its trainer: open the folder, train, measure, save, show."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import EarlyStoppingCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from pacatune import lean
from pacatune.measure.device import reset_peak_process_bytes
from pacatune.training.any_run import AnyRun
from pacatune.training.checkpoints import LogBeforeSave
from pacatune.training.config_file import CONFIG_NAME, save_config
from pacatune.training.interrupt import StopOnSignal, TrainingInterrupted
from pacatune.training.model import count_trainable
from pacatune.training.output import (
    clear_folder,
    clear_staging,
    publish,
    read_state,
    refuse_empty_tensors,
    staged,
)
from pacatune.training.progress import Meter, ProgressReporter, peak_memory_bytes
from pacatune.training.report import RunReport, train_curve, versions


def adjusted_arguments(config: AnyRun, *, has_evaluation: bool, checkpoint: Path | None) -> Any:
    """Return a copy of the training arguments that fits the data and the checkpoint to continue."""
    arguments = copy.copy(config.training)
    if not has_evaluation:
        arguments.eval_strategy = type(arguments.eval_strategy)("no")
        arguments.do_eval = False
    # The loss before training; a resumed run has it in its log.
    arguments.eval_on_start = has_evaluation and checkpoint is None
    if checkpoint is not None:
        # Resolved to whole steps by the first process of the run; shares would look changed.
        state = read_state(checkpoint) or {}
        for name in ("logging_steps", "eval_steps", "save_steps"):
            setattr(arguments, name, state.get(name, getattr(arguments, name)))
    return arguments


def add_callbacks(
    trainer: Any, config: AnyRun, checkpoint: Path | None, meter: Meter, console: Console
) -> None:
    """Put our display of progress in place of the trainer's, and early stopping if asked for."""
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(ProgressReporter(console, meter))
    if config.early_stopping_patience is None:
        return
    callback = EarlyStoppingCallback(early_stopping_patience=config.early_stopping_patience)
    state = (read_state(checkpoint) if checkpoint else None) or {}
    saved = state.get("stateful_callbacks", {}).get("EarlyStoppingCallback", {})
    for name, value in saved.get("attributes", {}).items():
        setattr(callback, name, value)
    trainer.add_callback(callback)


def make_lean(trainer: Any, config: AnyRun, console: Console) -> None:
    """Let the trainer's model keep less for backward, if asked for, and say what could not be.

    Raises:
        ValueError: If `config.lean` is "require" and something could not be.
    """
    if config.lean == "off":
        return
    trainer.lean_report = lean.enable(trainer.model, config.lean)
    console.print(str(trainer.lean_report), soft_wrap=True, highlight=False)


def open_folder(config: AnyRun, folder: Path, checkpoint: Path | None, console: Console) -> None:
    """Delete what an older run left and write config.yaml, or say where an older run goes on."""
    from accelerate import PartialState

    PartialState().wait_for_everyone()  # until all have looked at the folder as it was
    if config.training.process_index == 0 and checkpoint is not None:
        clear_staging(folder)
        step = (read_state(checkpoint) or {}).get("global_step")
        console.print(f"resuming after step {step}: {checkpoint}", soft_wrap=True, highlight=False)
    elif config.training.process_index == 0:
        deleted = clear_folder(folder)
        if deleted:
            console.print(
                f"deleted from {folder}: {', '.join(deleted)}", soft_wrap=True, highlight=False
            )
        folder.mkdir(parents=True, exist_ok=True)
        save_config(config, folder / CONFIG_NAME)
    PartialState().wait_for_everyone()


def run_trainer(
    trainer: Any, config: AnyRun, checkpoint: Path | None, console: Console, *, less_memory: str
) -> None:
    """Train until the end or a signal.

    Args:
        trainer: Made for the run.
        config: The run.
        checkpoint: Where to continue.
        console: Where to say that a signal was heard.
        less_memory: Options that save memory, for the message.

    Raises:
        TrainingInterrupted: If a signal ended the run, after its checkpoint was saved.
        ValueError: If the device ran out of memory.
    """
    stop = StopOnSignal(
        trainer.accelerator,
        lambda: console.print("stopping after this step; again to stop at once", style="yellow"),
    )
    trainer.add_callback(stop)
    trainer.add_callback(LogBeforeSave())
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    reset_peak_process_bytes()
    try:
        with stop.listening():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"the device ran out of memory ({str(error).partition('.')[0]}); lower "
            "`training.per_device_train_batch_size` (and raise gradient_accumulation_steps) or "
            f"{less_memory}."
        ) from error
    finally:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, ProgressReporter):
                callback.close()
    if stop.stopped and trainer.state.global_step < trainer.state.max_steps:
        path = Path(str(config.training.output_dir)) / CONFIG_NAME
        raise TrainingInterrupted(
            f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}; continue "
            f"with `pacatune {config.command} --config {path} --resume`"
        )


def measured(config: AnyRun, trainer: Any) -> dict[str, Any]:
    """Return the entries of a report that do not depend on the task."""
    train_losses, train_loss = train_curve(trainer.state.log_history)
    peak, peak_kind = peak_memory_bytes()
    return {
        "train_loss": train_loss,
        "train_losses": train_losses,
        "num_trainable_parameters": count_trainable(trainer.model),
        "step_ms": find_meter(trainer).step_ms,
        "peak_memory_bytes": peak,
        "peak_memory_kind": peak_kind,
        "saved_activation_bytes": trainer.saved_activation_bytes,
        "lean": None if trainer.lean_report is None else trainer.lean_report.to_dict(),
        "seed": config.training.seed,
        "versions": versions(),
        "method": config.method,
        "num_steps": trainer.state.global_step,
        "device": str(trainer.args.device),
        "learning_rate": config.training.learning_rate or 0.0,
    }


def items_per_second(trainer: Any) -> float:
    """Return tokens or images per second of steps, of all processes."""
    speed = torch.tensor(find_meter(trainer).items_per_second, device=trainer.args.device)
    return float(trainer.accelerator.reduce(speed, "sum"))


def find_meter(trainer: Any) -> Meter:
    """Return the trainer's meter."""
    return next(c for c in trainer.callback_handler.callbacks if isinstance(c, Meter))


def save_result(trainer: Any, folder: Path, write: Callable[[Path], None]) -> None:
    """Save what was trained and what is known about it, all of it or nothing.

    Args:
        trainer: After training.
        folder: Output folder of the run.
        write: Writes everything else into the folder that it is given; in the main process.

    Raises:
        OSError: If writing fails; says what is still intact.
        TrainingDiverged: If a weight is not finite.
    """
    trainer.refuse_not_finite()
    main = trainer.args.process_index == 0
    with staged(folder, "the result", owner=main) as staging:
        trainer.save_model(str(staging), _internal_call=True)
        trainer.accelerator.wait_for_everyone()
        if main:
            refuse_empty_tensors(staging)
            (staging / "training_args.bin").unlink(missing_ok=True)
            write(staging)
            # report.json last: it says that the run is finished.
            for path in sorted(staging.iterdir(), key=lambda p: p.name == "report.json"):
                publish(path, folder / path.name)
        trainer.accelerator.wait_for_everyone()
    trainer.rotate_checkpoints()


def show_result(report: RunReport, what: str, folder: Path, console: Console) -> None:
    """Print the results and where they are."""
    from rich.table import Table

    table = Table(show_header=False, box=None)
    for name, value in report.table():
        table.add_row(name, value)
    console.print(table)
    console.print(f"{what}, report and model card are in {folder}", soft_wrap=True, highlight=False)
