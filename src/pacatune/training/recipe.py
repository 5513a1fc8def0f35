"""Fine-tune, whatever the task: configuration -> plan -> model -> trainer -> report."""

import copy
import json
import os
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from rich.console import Console
from transformers import EarlyStoppingCallback, set_seed

from pacatune import lean
from pacatune.adapters.fingerprint import write_fingerprint
from pacatune.adapters.folder import open_adapter, read_adapter
from pacatune.adapters.loading import check_base, load_values
from pacatune.files.folder import explained_failure
from pacatune.grid import is_packed
from pacatune.installation import require
from pacatune.measure.device import reset_peak_process_bytes
from pacatune.methods import METHODS
from pacatune.precision import dtype_name
from pacatune.pretrained import refuse_no_weights
from pacatune.reports.provenance import versions
from pacatune.training.codes import CodeWatch, about_weights
from pacatune.training.config import RunConfig
from pacatune.training.config_file import CONFIG_NAME, to_values, without_folders
from pacatune.training.language import Task
from pacatune.training.output import (
    REPORT_NAME,
    check_folder,
    check_same_options,
    find_checkpoint,
    is_begun,
    is_finished,
    is_split_fixed,
    last_checkpoint,
    open_folder,
    read_state,
    refuse_missing_weights,
    run_folder,
    what_is_intact,
)
from pacatune.training.progress import (
    main_console,
    peak_memory_bytes,
    say,
    show_result,
    show_warnings,
)
from pacatune.training.report import (
    Report,
    curve_of,
    metrics_of,
    train_curve,
    write_card,
    write_report,
)
from pacatune.training.rewards import RewardError
from pacatune.training.selecting import (
    check_selection,
    choose_from_data,
    describe_columns,
)
from pacatune.training.start import check_quantization
from pacatune.training.task import count_trainable, make_trainable
from pacatune.training.trainer import StopOnSignal, TrainingDiverged, TrainingInterrupted
from pacatune.tuner.residency_report import residency_report

_SPLIT = (
    "`pacatune train` loads whole layers and whole texts. Shard the model (fsdp2.yaml, "
    "zero3.yaml), or split its layers in a training loop of your own"
)
_NO_ADAPTER = "PEFT loads no adapter from the checkpoints of version 1, and says nothing"
_NOT_SENT = "accelerate cannot send the chosen columns, which are buffers, to other processes"
# Settings of `accelerate launch`, what they must be, and why.
_SETTINGS = (
    *((f"PARALLELISM_CONFIG_{name}_SIZE", "1", _SPLIT) for name in ("TP", "CP", "SP")),
    ("FSDP_VERSION", "2", _NO_ADAPTER),
    ("FSDP_CPU_RAM_EFFICIENT_LOADING", "false", _NOT_SENT),
)


def train(
    config: RunConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> Report:
    """Fine-tune a model as `config` says and write the result into its output folder.

    Everything that can be checked is checked before the model's weights are loaded. The folder
    then holds the adapter (or the model, for `full` and `head`), config.yaml, report.json,
    report.md, loss.png, README.md, the last checkpoints, and what the task adds.

    Args:
        config: The run, of any task.
        resume: Continue the run in the output folder from its last checkpoint.
        overwrite: Delete another run's files in the output folder first.
        console: Where to show progress; standard output when None.

    Returns:
        What report.json holds.

    Raises:
        ValueError: If the configuration, the data or the folder cannot be used.
        FileNotFoundError: If the model or the data are not there.
        FileExistsError: If the output folder holds another run.
        TrainingInterrupted: If Ctrl-C or SIGTERM ended the run, after its checkpoint was saved.
    """
    task = Task(config)
    arguments, console = task.arguments, main_console(task.arguments, console)
    folder, checkpoint = Path(arguments.output_dir), None
    check_folder(config, resume=resume, overwrite=overwrite)
    refuse_no_weights(config.model.path)
    if resume:
        check_same_options(to_values(config), folder)
    show_plan(task, console)
    if resume:
        is_fixed = task.data.is_split_fixed or is_split_fixed(arguments)
        checkpoint = find_checkpoint(task.trained_on, folder, is_fixed=is_fixed)
    trainer = make_trainer(task, checkpoint, console)
    # Only now, when training can start, is anything of an older run deleted.
    open_folder(config, task.trained_on, checkpoint, arguments, console)
    run_trainer(trainer, task, checkpoint, console)
    save_weights(trainer, folder)
    report = save_report(task, trainer, folder)
    show_result(report, folder, console)
    return report


def start_or_resume(config: RunConfig, *, console: Console | None = None) -> Report | None:
    """Go on with the run in the output folder, or start it where none has a checkpoint.

    For launchers that repeat a command when a process has died; None if the run was finished.
    """
    arguments = config.training.resolved()
    console, folder = main_console(arguments, console), Path(arguments.output_dir)
    begun, checkpoint = is_begun(folder), last_checkpoint(folder)
    state = "a finished run" if is_finished(folder) else str(checkpoint or "no checkpoint")
    states = set(gather_object([state]))
    if len(states) > 1:
        raise ValueError(
            f"the processes see different things in {folder} ({', '.join(sorted(states))}); put "
            "`training.output_dir` on a disk that all nodes share."
        )
    if begun:
        check_same_options(to_values(config), folder)
    if begun and is_finished(folder):
        say(console, f"the run in {folder} is finished")
        return None
    resume = begun and checkpoint is not None
    # Without a checkpoint, what was begun is lost anyway.
    return train(config, resume=resume, overwrite=begun and not resume, console=console)


def show_plan(task: Task, console: Console) -> None:
    """Look at everything but the weights, and say what is trained."""
    config, plan = task.config, task.plan
    check_environment(task)
    check_selection(plan.adapter, task.arguments)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and task.arguments.device.type == "cpu":
        # What `accelerate launch` was told; it ignores it on CPUs without a word.
        show_warnings(["accelerate shards nothing on CPUs: this run copies the model."], console)
    everything = "the head" if config.method == "head" else "every weight"
    say(console, f"data: {task.about_data()}")
    say(
        console,
        f"training {plan.num_trainable_parameters:,} of {plan.num_parameters:,} parameters "
        f"({config.method}): {', '.join(plan.summary()) or everything}",
    )
    show_warnings(task.warnings, console)


def check_environment(task: Task) -> None:
    """Refuse what the process was started with, or lacks, and the trainer would not mind."""
    arguments, plugin = task.arguments, task.arguments.deepspeed_plugin
    method = METHODS[task.config.method]
    _ = task.is_packed  # refuses what cannot be
    if arguments.n_gpu > 1:
        raise ValueError(
            f"{arguments.n_gpu} GPUs are visible to one process; start one process per GPU with "
            f"`torchrun --nproc_per_node {arguments.n_gpu} YOUR_SCRIPT`, or set "
            "CUDA_VISIBLE_DEVICES=0 to train on one."
        )
    used = {name for name, value in os.environ.items() if value == "true"}
    if "ACCELERATE_USE_FSDP" in used:
        # Before, its checkpoints have only one process's part of each tensor of an adapter.
        require("accelerate", "1.15", "FSDP2")
    for name, needed, reason in _SETTINGS:
        switch = "FSDP" if name.startswith("FSDP") else "PARALLELISM_CONFIG"
        value = os.environ.get(name, "1" if name == "FSDP_VERSION" else needed).lower()
        matters = method.is_paca or reason is not _NOT_SENT
        if f"ACCELERATE_USE_{switch}" in used and value != needed and matters:
            raise ValueError(
                f"`{name.lower()}` ({value}) in the configuration of accelerate must be {needed}: "
                f"{reason}."
            )
    saves_none = plugin is not None and plugin.zero_stage == 3 and not plugin.zero3_save_16bit_model
    if saves_none and not method.has_adapter:
        raise ValueError(
            "`zero3_save_16bit_model` (false) in the configuration of accelerate must be true: "
            f"otherwise no process has the result of `method` ({method.name!r}) to save it."
        )


def make_trainer(task: Task, checkpoint: Path | None, console: Console) -> Any:
    """Load the weights, choose columns where data decides about them, and return the trainer."""
    config, arguments = task.config, _adjusted_arguments(task, checkpoint)
    set_seed(arguments.seed)
    start = None if config.adapter is None else open_adapter(config.adapter)
    model = task.load_model()
    if is_packed(task.model_path):
        say(console, about_weights(model, task.why_not_packed()))
    if start is not None:
        show_warnings(check_base(start, model), console)
    adapter_config = choose_from_data(task, model, checkpoint, console)
    options: dict[str, Any] = {"peft_config": adapter_config} if task.spec.is_of_trl else {}
    if not task.spec.is_of_trl:
        model = make_trainable(model, adapter_config, config.method)
    trainer = task.trainer_class(
        model=model,
        args=arguments,
        train_dataset=task.train,
        eval_dataset=task.evaluation,
        processing_class=task.data.examples.processor or task.tokenizer,
        **options,
        **task.data.trainer_options,
    )
    trainer.trained_on = task.trained_on
    trainer.has_new_head = task.data.new_head is not None
    if start is not None and checkpoint is None:
        check_quantization(start, trainer.model.peft_config["default"])
        load_values(trainer.model, start)
    if config.lean != "off":
        trainer.lean_report = lean.enable(trainer.model, config.lean, level=config.lean_level)
        say(console, str(trainer.lean_report))
    if (residency := residency_report(trainer.model)).additive:
        say(console, str(residency))
    if config.early_stopping_patience is not None:
        callback = EarlyStoppingCallback(early_stopping_patience=config.early_stopping_patience)
        states = read_state(checkpoint).get("stateful_callbacks", {}) if checkpoint else {}
        vars(callback).update(states.get("EarlyStoppingCallback", {}).get("attributes", {}))
        trainer.add_callback(callback)
    if METHODS[config.method].is_paca and is_packed(task.model_path):
        trainer.add_callback(CodeWatch(trainer.model, task.model_path, console))
    return trainer


def _adjusted_arguments(task: Task, checkpoint: Path | None) -> Any:
    """Return a copy of the training arguments that fits the data and the checkpoint to continue."""
    arguments, has_evaluation = copy.copy(task.arguments), task.evaluation is not None
    if not has_evaluation:
        arguments.eval_strategy = type(arguments.eval_strategy)("no")
        arguments.do_eval = False
    # The loss before training; a resumed run has it in its log.
    arguments.eval_on_start = has_evaluation and checkpoint is None
    if checkpoint is not None:
        # Resolved to whole steps by the first process of the run; shares would look changed.
        state = read_state(checkpoint)
        for name in ("logging_steps", "eval_steps", "save_steps"):
            setattr(arguments, name, state.get(name, getattr(arguments, name)))
    return arguments


def run_trainer(trainer: Any, task: Task, checkpoint: Path | None, console: Console) -> None:
    """Train until the end or a signal, after which a checkpoint is saved."""
    said = "\nsaving a checkpoint, then stopping; again to stop at once"
    stop = StopOnSignal(trainer.accelerator, lambda: console.print(said, style="yellow"))
    trainer.add_callback(stop)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    reset_peak_process_bytes()
    try:
        with stop.listening():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"the device ran out of memory ({str(error).partition('.')[0]}); lower "
            "`training.per_device_train_batch_size` (and raise gradient_accumulation_steps) or the "
            "length of the examples, or set `training.gradient_checkpointing` to true."
        ) from error
    except RewardError as error:
        kept = last_checkpoint(Path(trainer.args.output_dir))
        go_on = "start again" if kept is None else f"continue from {kept} with --resume"
        raise RewardError(f"{error} Mend the function, then {go_on}.") from error
    finally:
        for callback in trainer.callback_handler.callbacks:
            if (bar := getattr(callback, "training_bar", None)) is not None:
                bar.close()  # or an error would stand on its line
    if stop.stopped and trainer.state.global_step < trainer.state.max_steps:
        path = Path(trainer.args.output_dir) / CONFIG_NAME
        raise TrainingInterrupted(
            f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}; continue "
            f"with `{task.config.repeat_command(path)} --resume`"
        )


def _make_report(task: Task, trainer: Any) -> Report:
    config, log, num_steps = task.config, trainer.state.log_history, trainer.state.global_step
    train_losses, train_loss = train_curve(log)
    eval_losses = curve_of(log, "eval_loss")
    peak, peak_kind = peak_memory_bytes()
    dtype = dtype_name(task.dtype)
    values = {
        "task": config.task,
        "eval_loss_before": eval_losses[0][1] if eval_losses else None,
        "train_loss": train_loss,
        "train_losses": train_losses,
        "num_trainable_parameters": count_trainable(trainer.model),
        "num_parameters": task.plan.num_parameters,
        "num_train_examples": len(task.train),
        "num_eval_examples": 0 if task.evaluation is None else len(task.evaluation),
        "num_steps": num_steps,
        "step_ms": trainer.meter.step_ms,
        "peak_memory_bytes": peak,
        "peak_memory_kind": peak_kind,
        "saved_activation_bytes": trainer.saved_activation_bytes,
        "lean": None if trainer.lean_report is None else trainer.lean_report.to_dict(),
        "method": config.method,
        "model": task.model_path,
        "adapter": config.adapter,
        "targets": list(task.plan.targets),
        "columns": describe_columns(trainer.model),
        "dtype": dtype,
        "compute_dtype": {"fp16": "float16", "bf16": "bfloat16"}.get(
            trainer.accelerator.mixed_precision, dtype
        ),
        "quantization": config.model.quantization,
        "device": str(trainer.args.device),
        "learning_rate": config.training.learning_rate or 0.0,
        "seed": config.training.seed,
        "versions": versions("trl", "accelerate", "datasets"),
        "warnings": task.warnings,
    }
    # of all processes together, over the time of their steps
    speed = torch.tensor(trainer.meter.items_per_second, device=trainer.args.device)
    speed = trainer.accelerator.reduce(speed, "sum")
    values |= {"tokens_per_second": float(speed), "train_metrics": metrics_of(log)}
    text = without_folders(json.dumps(values | _held_out(trainer)), config)
    report = Report(**json.loads(text))
    report.warnings = [*report.warnings, *report.risen()]
    return report


def _held_out(trainer: Any) -> dict[str, Any]:
    """Evaluate what is saved, if that is not logged; return the held-out losses and metrics."""
    if trainer.eval_dataset is None:
        return {}
    log = trainer.state.log_history
    losses, metrics = curve_of(log, "eval_loss"), metrics_of(log, "eval_")
    is_known = losses[-1][0] == trainer.state.global_step
    # The best checkpoint may have replaced the last weights since they were evaluated.
    if not is_known or trainer.args.load_best_model_at_end:
        trainer.evaluate()
    after, metrics_after = curve_of(log, "eval_loss"), metrics_of(log, "eval_")
    return {
        "eval_loss_after": after[-1][1],
        "eval_losses": losses if is_known else after,
        "eval_metrics": metrics if is_known else metrics_after,
        "eval_metrics_after": {name: curve[-1][1] for name, curve in metrics_after.items()},
    }


def save_weights(trainer: Any, folder: Path) -> None:
    """Save what was trained, before anything else can fail."""
    trainer.refuse_not_finite()
    main, output = trainer.args.process_index == 0, run_folder(folder)
    with (
        explained_failure(output.path, what_is_intact(output.path)),
        output.staged(publishes=main) as staging,
    ):
        trainer.save_model(str(staging), _internal_call=True)
        trainer.accelerator.wait_for_everyone()
        if main:
            refuse_missing_weights(staging)
            (staging / "training_args.bin").unlink(missing_ok=True)
    trainer.accelerator.wait_for_everyone()


def save_report(task: Task, trainer: Any, folder: Path) -> Report:
    """Measure what was trained, and save all that is known about it beside the weights."""
    main, output = trainer.args.process_index == 0, run_folder(folder)
    try:
        report = _make_report(task, trainer)
        with (
            explained_failure(output.path, "make room."),
            # The report last: it says that the run is finished.
            output.staged(last=REPORT_NAME, publishes=main) as staging,
        ):
            if main:
                if METHODS[task.config.method].is_paca:
                    model = trainer.accelerator.unwrap_model(trainer.model)
                    write_fingerprint(staging, model, read_adapter(folder))
                write_report(report, staging)
                write_card(task, report, staging)
    except TrainingDiverged:
        raise
    except Exception as error:
        is_said = isinstance(error, ValueError | OSError)
        what = str(error).rstrip(".") if is_said else f"{type(error).__name__}: {error}"
        kept = last_checkpoint(folder)
        raise ValueError(
            f"{what}. What was trained is in {folder}; only the report is missing"
            + (f": mend this, then --resume makes it from {kept.name}." if kept else ".")
        ) from error
    trainer.accelerator.wait_for_everyone()
    trainer.rotate_checkpoints()
    return report
