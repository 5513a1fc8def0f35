"""Fine-tune: config -> data -> plan -> model -> trainer -> report."""

from functools import partial
from pathlib import Path

from rich.console import Console
from transformers import set_seed

from pacatune.adapters.fingerprint import write_fingerprint
from pacatune.data import show_preview
from pacatune.methods import METHODS
from pacatune.training import model as models
from pacatune.training.card import write_card
from pacatune.training.checkpoints import TrainedOn
from pacatune.training.config import RunConfig
from pacatune.training.output import check_folder
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
from pacatune.training.progress import Meter
from pacatune.training.report import Report, eval_curve, write_report
from pacatune.training.running import (
    add_callbacks,
    adjusted_arguments,
    items_per_second,
    make_lean,
    measured,
    open_folder,
    run_trainer,
    save_result,
    show_result,
)
from pacatune.training.selecting import choose_from_data, describe_columns, share_of_batches
from pacatune.training.trainer import RunTrainer, collate_rows

_LESS_MEMORY = "`training.max_length`, or set `training.gradient_checkpointing` to true"


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
    digest = fingerprint(run.data.train)
    checkpoint = find_checkpoint(digest, folder, config.training.world_size) if resume else None
    trainer = make_trainer(config, run, digest, checkpoint, console)
    # Only now, when training can start, is anything of an older run deleted.
    open_folder(config, folder, checkpoint, console)
    run_trainer(trainer, config, checkpoint, console, less_memory=_LESS_MEMORY)
    report = _make_report(config, run, trainer)
    save_result(trainer, folder, lambda staging: _write(config, report, trainer, staging))
    what = "model" if report.method == "full" else "adapter"
    show_result(report, what, folder, console)
    return report


def preview(config: RunConfig, num_examples: int, *, console: Console | None = None) -> None:
    """Show the first training examples and what is learned of them, without loading weights."""
    console = main_console(config, console)
    tokenizer = models.load_tokenizer(config)
    data = prepare_run_data(config, tokenizer)
    show_preview(data.train, tokenizer, num_examples, console)
    show_warnings(data.warnings, console)  # after the examples, where they are seen


def make_trainer(
    config: RunConfig, run: Run, digest: str, checkpoint: Path | None, console: Console
) -> RunTrainer:
    """Load the weights, choose columns where data decides about them, and return the trainer.

    Args:
        config: The run.
        run: What `prepare_run` found.
        digest: Of the training data; checkpoints keep it.
        checkpoint: Where the run goes on, if it does.
        console: Where to show progress.
    """
    arguments = adjusted_arguments(
        config, has_evaluation=run.data.evaluation is not None, checkpoint=checkpoint
    )
    if not (arguments.packing or arguments.eval_packing or arguments.shuffle_dataset):
        arguments.dataset_kwargs = {"skip_prepare_dataset": True}
        arguments.max_length = None
    set_seed(arguments.seed)
    meter = Meter()
    model = models.load_model(config)
    collate = partial(collate_rows, run.data.train, run.tokenizer)
    batches = share_of_batches(len(run.data.train), config, collate)
    adapter_config = choose_from_data(
        config, run.adapter_config, model, batches, checkpoint, console
    )
    trainer = RunTrainer(
        meter=meter,
        model=model,
        args=arguments,
        train_dataset=run.data.train,
        eval_dataset=run.data.evaluation,
        processing_class=run.tokenizer,
        peft_config=adapter_config,
        callbacks=[meter, TrainedOn(digest, arguments.world_size)],
    )
    make_lean(trainer, config, console)
    add_callbacks(trainer, config, checkpoint, meter, console)
    return trainer


def _make_report(config: RunConfig, run: Run, trainer: RunTrainer) -> Report:
    eval_losses = eval_curve(trainer.state.log_history)
    before = eval_losses[0][1] if eval_losses else None
    after = None
    if run.data.evaluation is not None:
        last_step, after = eval_losses[-1]
        # The best checkpoint may have replaced the last weights since they were evaluated.
        if last_step != trainer.state.global_step or trainer.args.load_best_model_at_end:
            after = float(trainer.evaluate()["eval_loss"])
        if last_step != trainer.state.global_step:
            eval_losses.append((trainer.state.global_step, after))
    return Report(
        **measured(config, trainer),
        eval_loss_before=before,
        eval_loss_after=after,
        eval_losses=eval_losses,
        tokens_per_second=items_per_second(trainer),
        targets=list(run.plan.targets),
        model=models.model_path(config),
        num_parameters=run.plan.num_parameters,
        num_train_examples=len(run.data.train),
        num_eval_examples=0 if run.data.evaluation is None else len(run.data.evaluation),
        dtype=str(models.weights_dtype(config)).removeprefix("torch."),
        quantization=config.model.quantization,
        warnings=run.data.warnings,
        columns=describe_columns(trainer.model),
    )


def _write(config: RunConfig, report: Report, trainer: RunTrainer, folder: Path) -> None:
    """Write what goes with the weights."""
    if METHODS[config.method].is_paca:
        write_fingerprint(folder, trainer.accelerator.unwrap_model(trainer.model))
    write_report(report, folder)
    write_card(config, report, folder)
