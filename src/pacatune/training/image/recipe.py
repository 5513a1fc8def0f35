"""Fine-tune on images: config -> images -> plan -> model -> trainer -> report."""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch.nn import functional as F
from transformers import default_data_collator, set_seed

from pacatune.adapters.fingerprint import write_fingerprint
from pacatune.adapters.folder import SIDECAR_NAME
from pacatune.data.images import Augmentation, ImageDataset, PreparedImages, prepare_images
from pacatune.methods import METHODS
from pacatune.precision import torch_dtype
from pacatune.training.checkpoints import TrainedOn
from pacatune.training.image.base import ImageBase, describe_base
from pacatune.training.image.card import write_card
from pacatune.training.image.config import ImageRunConfig
from pacatune.training.image.evaluation import confusion_matrix, surest_mistakes
from pacatune.training.image.load import CLASSES_KEY
from pacatune.training.image.model import (
    load_model,
    make_adapter_config,
    make_trainable,
    plan_training,
)
from pacatune.training.image.pictures import draw_confusion, draw_mistakes
from pacatune.training.image.report import ImageReport
from pacatune.training.image.trainer import ImageTrainer, NewEpoch
from pacatune.training.output import check_folder
from pacatune.training.preparation import (
    check_environment,
    check_same_options,
    find_checkpoint,
    main_console,
    show_warnings,
)
from pacatune.training.progress import Meter
from pacatune.training.report import eval_curve, write_report
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
from pacatune.training.selecting import (
    check_selection,
    choose_from_data,
    describe_columns,
    share_of_batches,
)

if TYPE_CHECKING:
    from peft import PeftConfig

    from pacatune.training.model import Plan

_LESS_MEMORY = "`data.image_size`, or set `training.gradient_checkpointing` to true"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What is known before the weights are loaded."""

    data: PreparedImages
    base: ImageBase
    adapter_config: "PeftConfig | None"
    plan: "Plan"
    train: ImageDataset
    evaluation: ImageDataset | None


def train(
    config: ImageRunConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> ImageReport:
    """Fine-tune an image classifier as `config` says and write the result into its output folder.

    Everything that can be checked is checked before the model's weights are loaded. The folder
    then holds the adapter with its head (or the model, for `full` and `head`), the transform
    (preprocessor_config.json), config.yaml, report.json, report.md, loss.png, confusion.png,
    mistakes.png, README.md and the last checkpoints.

    Args:
        config: The run.
        resume: Continue the run in the output folder from its last checkpoint.
        overwrite: Delete another run's files in the output folder first.
        console: Where to show progress; standard output when None.

    Returns:
        What report.json holds.

    Raises:
        ValueError: If the configuration, the images or the folder cannot be used.
        FileNotFoundError: If the model or the images are not there.
        FileExistsError: If the output folder holds another run.
        TrainingInterrupted: If Ctrl-C or SIGTERM ended the run, after its checkpoint was saved.
    """
    console = main_console(config, console)
    folder = Path(str(config.training.output_dir))
    check_folder(folder, resume=resume, overwrite=overwrite)
    if resume:
        check_same_options(config, folder)
    run = prepare(config, console)
    checkpoint = None
    if resume:
        checkpoint = find_checkpoint(run.data.fingerprint, folder, config.training.world_size)
    trainer = make_trainer(config, run, checkpoint, console)
    # Only now, when training can start, is anything of an older run deleted.
    open_folder(config, folder, checkpoint, console)
    run_trainer(trainer, config, checkpoint, console, less_memory=_LESS_MEMORY)
    report = _make_report(config, run, trainer)
    save_result(trainer, folder, lambda staging: _write(config, run, trainer, report, staging))
    what = "adapter" if run.adapter_config is not None else "model"
    show_result(report, what, folder, console)
    return report


def prepare(config: ImageRunConfig, console: Console) -> Run:
    """Find images and model, plan what is trained, and say so."""
    check_environment(config)
    data = prepare_images(config.data)
    base = describe_base(
        config.model.path, config.model.revision, data.classes, config.data.image_size
    )
    adapter_config, notes = make_adapter_config(config, base)
    check_selection(config, adapter_config)
    plan = plan_training(config, base, adapter_config)
    data.warnings.extend(base.warnings + notes)
    augmentation = Augmentation(config.data.augmentation, config.training.seed)
    part, preprocessing = data.evaluation, base.preprocessing
    run = Run(
        data=data,
        base=base,
        adapter_config=adapter_config,
        plan=plan,
        train=ImageDataset(data.train.source, data.train.indices, preprocessing, augmentation),
        evaluation=None if part is None else ImageDataset(part.source, part.indices, preprocessing),
    )
    _show_plan(config, run, console)
    return run


def _show_plan(config: ImageRunConfig, run: Run, console: Console) -> None:
    held_out = 0 if run.evaluation is None else len(run.evaluation)
    size, plan = run.base.preprocessing.size, run.plan
    head = "the model's own head" if run.base.has_own_head else "a new head"
    targets = ", ".join(plan.summary()) or ("the head" if config.method == "head" else "all")
    lines = [
        f"data: {len(run.train):,} images of {len(run.data.classes)} classes, {held_out:,} held "
        f"out; {size} x {size} pixels, {head}",
        f"training {plan.num_trainable_parameters:,} of {plan.num_parameters:,} parameters "
        f"({config.method}): {targets}",
    ]
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False)
    show_warnings(run.data.warnings, console)


def make_trainer(
    config: ImageRunConfig, run: Run, checkpoint: Path | None, console: Console
) -> ImageTrainer:
    """Load the weights, choose columns where data decides about them, and return the trainer.

    Args:
        config: The run.
        run: What `prepare` found.
        checkpoint: Where the run goes on, if it does.
        console: Where to show progress.
    """
    arguments = adjusted_arguments(
        config, has_evaluation=run.evaluation is not None, checkpoint=checkpoint
    )
    arguments.label_names = ["labels"]
    set_seed(arguments.seed)
    dtype = torch_dtype(config.model.dtype)
    model = load_model(run.base, dtype, config.model.attn_implementation)
    batches = share_of_batches(len(run.train), config, partial(_collate, run.train))
    adapter_config = choose_from_data(
        config,
        run.adapter_config,
        model,
        batches,
        checkpoint,
        console,
        loss_fn=partial(_loss, run.base.forward_options),
    )
    meter = Meter("images")
    trainer = ImageTrainer(
        meter=meter,
        num_classes=len(run.data.classes),
        forward_options=run.base.forward_options,
        model=make_trainable(model, config, adapter_config),
        args=arguments,
        train_dataset=run.train,
        eval_dataset=run.evaluation,
        callbacks=[
            meter,
            TrainedOn(run.data.fingerprint, arguments.world_size),
            NewEpoch(run.train),
        ],
    )
    make_lean(trainer, config, console)
    add_callbacks(trainer, config, checkpoint, meter, console)
    return trainer


def _collate(images: ImageDataset, places: list[int]) -> dict[str, torch.Tensor]:
    return default_data_collator([images[place] for place in places])  # type: ignore[no-any-return]


def _loss(options: dict[str, Any], model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    moved = {key: value.to(model.device) for key, value in batch.items()}
    labels = moved.pop("labels")
    return F.cross_entropy(model(**moved, **options)["logits"].float(), labels)


def _make_report(config: ImageRunConfig, run: Run, trainer: ImageTrainer) -> ImageReport:
    log = trainer.state.log_history
    eval_losses = eval_curve(log)
    accuracies = sorted(
        {int(e["step"]): float(e["eval_accuracy"]) for e in log if "eval_accuracy" in e}.items()
    )
    results: dict[str, Any] = {
        "eval_loss_before": eval_losses[0][1] if eval_losses else None,
        "accuracy_before": accuracies[0][1] if accuracies else None,
        **_evaluate(run, trainer),
    }
    return ImageReport(
        **measured(config, trainer),
        **results,
        eval_losses=eval_losses,
        eval_accuracies=accuracies,
        images_per_second=items_per_second(trainer),
        head="own" if run.base.has_own_head else "new",
        classes=run.data.classes,
        image_size=run.base.preprocessing.size,
        targets=list(run.plan.targets),
        model=run.base.path,
        num_parameters=run.plan.num_parameters,
        num_train_examples=len(run.train),
        num_eval_examples=0 if run.evaluation is None else len(run.evaluation),
        dtype=config.model.dtype,
        warnings=run.data.warnings,
        columns=describe_columns(trainer.model),
    )


def _evaluate(run: Run, trainer: ImageTrainer) -> dict[str, Any]:
    """Evaluate what will be saved, which may be the best checkpoint and not the last weights."""
    if run.evaluation is None:
        return {
            "eval_loss_after": None,
            "accuracy_after": None,
            "confusion": [],
            "mistakes": [],
        }
    result = trainer.predict(run.evaluation)
    logits, labels = result.predictions, result.label_ids
    counts = confusion_matrix(labels, logits.argmax(axis=1), len(run.data.classes))
    return {
        "eval_loss_after": float(result.metrics["test_loss"]),
        "accuracy_after": float(result.metrics["test_accuracy"]),
        "confusion": counts.tolist(),
        "mistakes": surest_mistakes(logits, labels, run.evaluation),
    }


def _write(
    config: ImageRunConfig, run: Run, trainer: ImageTrainer, report: ImageReport, folder: Path
) -> None:
    """Write what goes with the weights."""
    run.base.preprocessing.save(folder)
    if run.adapter_config is not None:
        sidecar = json.dumps({CLASSES_KEY: run.data.classes}, indent=2, ensure_ascii=False)
        (folder / SIDECAR_NAME).write_text(sidecar + "\n", encoding="utf-8")
    if METHODS[config.method].is_paca:
        write_fingerprint(folder, trainer.accelerator.unwrap_model(trainer.model))
    if run.evaluation is not None:
        draw_confusion(report, folder / "confusion.png")
    if run.evaluation is not None and report.mistakes:
        draw_mistakes(report.mistakes, run.evaluation, folder / "mistakes.png")
    write_report(report, folder)
    write_card(config, report, folder)
