"""Fine-tune: config -> data -> plan -> model -> trainer -> report."""

import copy
from pathlib import Path

import torch
from rich.console import Console
from transformers import EarlyStoppingCallback, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from pacatune.adapters.fingerprint import write_fingerprint
from pacatune.data import show_preview
from pacatune.training import model as models
from pacatune.training.card import write_card
from pacatune.training.config import RunConfig
from pacatune.training.config_file import CONFIG_NAME, save_config
from pacatune.training.interrupt import StopOnSignal, TrainingInterrupted
from pacatune.training.output import (
    check_folder,
    clear_folder,
    clear_staging,
    publish,
    read_state,
    refuse_empty_tensors,
    staged,
)
from pacatune.training.preparation import (
    Run,
    check_same_options,
    find_checkpoint,
    fingerprint,
    main_console,
    prepare_run,
    prepare_run_data,
    show_warnings,
)
from pacatune.training.progress import Meter, ProgressReporter, peak_memory_bytes
from pacatune.training.report import Report, eval_curve, train_curve, versions, write_report
from pacatune.training.trainer import LogBeforeSave, RunTrainer, TrainedOn


def train(
    config: RunConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> Report:
    """Fine-tune a model as `config` says and write the result into its output folder.

    Everything that can be checked is checked before the model's weights are loaded. The folder
    then holds the adapter (or the model, for `full`), config.yaml, report.json, report.md,
    loss.png, README.md and the last checkpoints.

    Args:
        config: The run.
        resume: Continue the run in the output folder from its last checkpoint.
        overwrite: Delete another run's files in the output folder first.
        console: Where to show progress; standard output when None.

    Returns:
        What report.json holds.

    Raises:
        ValueError: If the configuration, the data or the folder cannot be used.
        FileExistsError: If the output folder holds another run.
        TrainingInterrupted: If Ctrl-C or SIGTERM ended the run, after its checkpoint was saved.
    """
    console = main_console(config, console)
    folder = Path(str(config.training.output_dir))
    check_folder(folder, resume=resume, overwrite=overwrite)
    if resume:
        check_same_options(config, folder)
    run = prepare_run(config, console)
    checkpoint = find_checkpoint(run, folder, config.training.world_size) if resume else None
    trainer = _make_trainer(config, run, checkpoint, console)
    # Only now, when training can start, is anything of an older run deleted.
    _open_folder(config, folder, checkpoint, console)
    _train(trainer, checkpoint, folder, console)
    report = _make_report(config, run, trainer)
    _save_result(config, report, trainer, folder)
    _show_result(report, folder, console)
    return report


def preview(config: RunConfig, num_examples: int, *, console: Console | None = None) -> None:
    """Show the first training examples and what is learned of them, without loading weights."""
    console = main_console(config, console)
    tokenizer = models.load_tokenizer(config)
    data = prepare_run_data(config, tokenizer)
    show_preview(data.train, tokenizer, num_examples, console)
    show_warnings(data.warnings, console)


def _open_folder(
    config: RunConfig, folder: Path, checkpoint: Path | None, console: Console
) -> None:
    from accelerate import PartialState

    PartialState().wait_for_everyone()  # until all have looked at the folder as it was
    if config.training.process_index == 0 and checkpoint is not None:
        clear_staging(folder)
    elif config.training.process_index == 0:
        deleted = clear_folder(folder)
        if deleted:
            console.print(
                f"deleted from {folder}: {', '.join(deleted)}", soft_wrap=True, highlight=False
            )
        folder.mkdir(parents=True, exist_ok=True)
        save_config(config, folder / CONFIG_NAME)
    PartialState().wait_for_everyone()


def _make_trainer(
    config: RunConfig, run: Run, checkpoint: Path | None, console: Console
) -> RunTrainer:
    arguments = copy.copy(config.training)
    if run.data.evaluation is None:
        arguments.eval_strategy = type(arguments.eval_strategy)("no")
        arguments.do_eval = False
    # The loss before training; a resumed run has it in its log.
    arguments.eval_on_start = run.data.evaluation is not None and checkpoint is None
    if checkpoint is not None:
        # Resolved to whole steps by the first process of the run; shares would look changed.
        state = read_state(checkpoint) or {}
        for name in ("logging_steps", "eval_steps", "save_steps"):
            setattr(arguments, name, state.get(name, getattr(arguments, name)))
    if not (arguments.packing or arguments.eval_packing or arguments.shuffle_dataset):
        arguments.dataset_kwargs = {"skip_prepare_dataset": True}
        arguments.max_length = None
    set_seed(arguments.seed)
    meter = Meter()
    trainer = RunTrainer(
        meter=meter,
        model=models.load_model(config),
        args=arguments,
        train_dataset=run.data.train,
        eval_dataset=run.data.evaluation,
        processing_class=run.tokenizer,
        peft_config=copy.deepcopy(run.adapter_config),
        callbacks=[meter, TrainedOn(fingerprint(run.data.train), arguments.world_size)],
    )
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(ProgressReporter(console, meter))
    if config.early_stopping_patience is not None:
        trainer.add_callback(_early_stopping(config.early_stopping_patience, checkpoint))
    return trainer


def _early_stopping(patience: int, checkpoint: Path | None) -> EarlyStoppingCallback:
    callback = EarlyStoppingCallback(early_stopping_patience=patience)
    state = (read_state(checkpoint) if checkpoint else None) or {}
    saved = state.get("stateful_callbacks", {}).get("EarlyStoppingCallback", {})
    for name, value in saved.get("attributes", {}).items():
        setattr(callback, name, value)
    return callback


def _train(trainer: RunTrainer, checkpoint: Path | None, folder: Path, console: Console) -> None:
    stop = StopOnSignal(
        trainer.accelerator,
        lambda: console.print("stopping after this step; again to stop at once", style="yellow"),
    )
    trainer.add_callback(stop)
    trainer.add_callback(LogBeforeSave())
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        with stop.listening():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"the device ran out of memory ({str(error).partition('.')[0]}); lower "
            "`training.per_device_train_batch_size` (and raise gradient_accumulation_steps) or "
            "`training.max_length`, or set `training.gradient_checkpointing` to true."
        ) from error
    finally:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, ProgressReporter):
                callback.close()
    if stop.stopped and trainer.state.global_step < trainer.state.max_steps:
        raise TrainingInterrupted(
            f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}; continue "
            f"with `pacatune train --config {folder / CONFIG_NAME} --resume`"
        )


def _make_report(config: RunConfig, run: Run, trainer: RunTrainer) -> Report:
    log = trainer.state.log_history
    train_losses, train_loss = train_curve(log)
    eval_losses = eval_curve(log)
    before = eval_losses[0][1] if eval_losses else None
    after = None
    if run.data.evaluation is not None:
        last_step, after = eval_losses[-1]
        # The best checkpoint may have replaced the last weights since they were evaluated.
        if last_step != trainer.state.global_step or trainer.args.load_best_model_at_end:
            after = float(trainer.evaluate()["eval_loss"])
        if last_step != trainer.state.global_step:
            eval_losses.append((trainer.state.global_step, after))
    meter: Meter = next(c for c in trainer.callback_handler.callbacks if isinstance(c, Meter))
    speed = torch.tensor(meter.tokens_per_second, device=trainer.args.device)
    peak, peak_kind = peak_memory_bytes()
    return Report(
        eval_loss_before=before,
        eval_loss_after=after,
        train_loss=train_loss,
        num_trainable_parameters=models.count_trainable(trainer.model),
        step_ms=meter.step_ms,
        tokens_per_second=float(trainer.accelerator.reduce(speed, "sum")),
        peak_memory_bytes=peak,
        saved_activation_bytes=trainer.saved_activation_bytes,
        seed=config.training.seed,
        versions=versions(),
        targets=list(run.plan.targets),
        method=config.method,
        model=models.model_path(config),
        num_parameters=run.plan.num_parameters,
        num_steps=trainer.state.global_step,
        num_train_examples=len(run.data.train),
        num_eval_examples=0 if run.data.evaluation is None else len(run.data.evaluation),
        device=str(trainer.args.device),
        dtype=str(models.weights_dtype(config)).removeprefix("torch."),
        learning_rate=config.training.learning_rate or 0.0,
        peak_memory_kind=peak_kind,
        train_losses=train_losses,
        eval_losses=eval_losses,
        warnings=run.data.warnings,
    )


def _save_result(config: RunConfig, report: Report, trainer: RunTrainer, folder: Path) -> None:
    main = trainer.args.process_index == 0
    with staged(folder, "the result", owner=main) as staging:
        trainer.save_model(str(staging), _internal_call=True)
        trainer.accelerator.wait_for_everyone()
        if main:
            refuse_empty_tensors(staging)
            if config.method == "paca":
                write_fingerprint(staging, trainer.accelerator.unwrap_model(trainer.model))
            (staging / "training_args.bin").unlink(missing_ok=True)
            write_report(report, staging)
            write_card(config, report, staging)
            # report.json last: it says that the run is finished.
            for path in sorted(staging.iterdir(), key=lambda p: p.name == "report.json"):
                publish(path, folder / path.name)
        trainer.accelerator.wait_for_everyone()


def _show_result(report: Report, folder: Path, console: Console) -> None:
    from rich.table import Table

    table = Table(show_header=False, box=None)
    for name, value in report.table():
        table.add_row(name, value)
    console.print(table)
    what = "model" if report.method == "full" else "adapter"
    console.print(f"{what}, report and model card are in {folder}", soft_wrap=True, highlight=False)
