"""`pacatune demo-vision`: fine-tune real image models on real images and show what changed."""

import argparse
import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from pacatune.cli.demo import Row, cache_of, common_rows, make_table, print_dim
from pacatune.cli.options import new_parser, positive, program_name, quiet_libraries

if TYPE_CHECKING:
    from rich.console import Console

    from pacatune.training.image import ImageDataConfig, ImageRunConfig

NUM_STEPS = 40
# Of each class: enough to learn from, few enough for minutes on two cores.
NUM_TRAIN, NUM_HELD_OUT = 80, 30


def run(argv: list[str]) -> int:
    """Run `pacatune demo-vision` with the words after it; return the exit status."""
    options = _parse(argv)
    output = Path(options.output)

    from rich.console import Console

    from pacatune.experiments import demo
    from pacatune.training.image import train

    console = Console(highlight=False)
    folder = demo.result_folder(output)
    folder.start_anew()
    quiet_libraries()
    data = _prepare_data(options, console)
    tables, reports, unequal = [], {}, list[str]()
    for name in options.model or demo.IMAGE_MODELS:
        runs, title = _make_runs(name, data, options, output, console)
        console.rule(f"[bold]{title}", align="left")
        outcomes = demo.run_all(runs, train, console)
        unequal = unequal or demo.unequal_cores(outcomes)
        reports[name] = {method: outcome.report.to_dict() for method, outcome in outcomes.items()}
        before = reports[name]["head"]
        rows: list[Row] = [
            (
                "held-out accuracy",
                lambda r: f"{r.accuracy_after:.3f}",
                f"{before['accuracy_before']:.3f}",
            ),
            (
                "held-out loss",
                lambda r: f"{r.eval_loss_after:.3f}",
                f"{before['eval_loss_before']:.3f}",
            ),
            *common_rows(),
            ("images", lambda r: f"{r.num_train_examples:,} + {r.num_eval_examples:,}", ""),
        ]
        tables.append(make_table(runs, outcomes, rows, title=f"\n{title}"))
    console.rule("[bold]result", align="left")
    for table in tables:
        console.print(table)
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
    print_dim([*notes, *unequal], console)
    _print_next(output, runs["paca"], console)
    folder.write_json("demo.json", {"finished": True, "models": reports})
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = new_parser(
        "demo-vision",
        "Fine-tune EfficientNet-Lite0 and DINOv2-S on images of CIFAR-10: the head alone, with "
        "LoRA, and with PaCA at as many trained parameters; show accuracies and cost.",
    )
    add, default = parser.add_argument, "(default: %(default)s)"
    name = "efficientnet-lite0, dinov2-small, or a folder or hub id; may be repeated"
    add("--output", metavar="DIR", default="demo-vision-output", help=f"output folder {default}")
    add("--model", action="append", help=f"{name} (default: the first two)")
    add("--data", metavar="FOLDER", help="other images: a folder per class, as for train-image")
    add("--steps", type=positive, default=NUM_STEPS, help=f"steps of each run {default}")
    add("--image-size", type=positive, help="height and width (default: the demo's own)")
    add("--seed", type=int, default=0, help=f"seed of images, head, columns {default}")
    add("--cache", metavar="DIR", help="keeps models and data (default: ~/.cache/pacatune)")
    return parser.parse_args(argv)


def _prepare_data(options: argparse.Namespace, console: "Console") -> "ImageDataConfig":
    """Return the images, fetched where the user gave none."""
    from pacatune.data.packaged import prepare_cifar10
    from pacatune.training.image import ImageDataConfig

    if options.data is not None:
        return ImageDataConfig(path=options.data, seed=options.seed, image_size=options.image_size)
    folder = prepare_cifar10(cache_of(options), lambda line: console.print(line, soft_wrap=True))
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
    from pacatune.experiments.demo import IMAGE_MODELS, image_runs

    path, title, rates = name, name, dict[str, float]()
    if known := IMAGE_MODELS.get(name):
        path = str(
            known.prepare(cache_of(options), lambda line: console.print(line, soft_wrap=True))
        )
        title, rates = known.title, known.learning_rates
        data = dataclasses.replace(data, image_size=options.image_size or known.image_size)
    folder = output / Path(name).name
    runs = image_runs(path, data, folder, rates, num_steps=options.steps, seed=options.seed)
    return runs, title


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
