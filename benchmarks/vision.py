"""Measure training steps of image models: PaCA against LoRA, full fine-tuning and the head alone.

    python -m benchmarks.vision       writes vision-vit-b16.json and vision-efficientnetv2-l.json

The models have the real architecture and random weights, on which neither speed nor memory
depends. All methods of a model alternate in one process, one step each per round. The bytes kept
for backward are counted exactly, at the size of real training; the steps of the CNN are timed on
smaller images.
The command fails if PaCA keeps one byte more than it should.
"""

import argparse
import copy
import sys
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.counts import check_bytes, formula_bytes
from benchmarks.image_models import (
    MODELS,
    ImageModel,
    adapted_layers,
    make_model,
    positions_of,
)
from benchmarks.methods import HEAD, METHODS, OURS, RANK, adapt
from benchmarks.record import (
    DTYPES,
    Row,
    arguments,
    at_least_1,
    measure_all,
    prepare,
    provenance,
    take_turns,
    write,
)
from benchmarks.report import make_ratios, ratio_table
from pacatune.experiments.reproduce.image_steps import choose_layers, make_batch, make_step
from pacatune.lean.batch_norm import enable_batch_norm
from pacatune.measure.counters import SavedBytes
from pacatune.measure.device import peak_process_bytes
from pacatune.measure.methods import Contender
from pacatune.methods import METHODS as TABLE

LEAN = "_lean"
IMAGE_METHODS = METHODS | {
    "frozen": "forward and input gradients of the frozen model, and its head's: no optimizer",
    HEAD: "the classifier alone, on frozen features",
    f"paca{LEAN}": "ours, with BatchNorm that keeps nothing for backward (pacatune.lean)",
    f"lora{LEAN}": "PEFT's LoRA with the same BatchNorm",
}


def parse(options: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = arguments(__doc__, seconds=60.0, methods=IMAGE_METHODS)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    for name, what in (("image-size", "height and width"), ("batch-size", "images of a step")):
        help_text = f"{what} of timed images; None: as usual"
        parser.add_argument(f"--{name}", type=at_least_1, metavar="N", help=help_text)
    return parser.parse_args(options)


def measure(model: ImageModel, dtype: str, args: argparse.Namespace) -> tuple[list[Row], list[Row]]:
    """Compare the methods on one model; return a row per method and a ratio of steps per pair."""
    size, num_images = args.image_size or model.image_size, args.batch_size or model.batch_size
    label = f"{num_images} {'image' if num_images == 1 else 'images'} of {size} px, {dtype}"
    setting = {"setting": label, "image_size": size, "batch_size": num_images, "dtype": dtype}
    base = make_model(model, args.seed).to(DTYPES[dtype])
    methods = [method for method in args.methods or model.methods if method in model.methods]
    contenders = {method: make_contender(base, method, args.seed) for method in methods}
    batch = make_batch(num_images, size, DTYPES[dtype], args.seed)
    steps = {method: make_step(one, *batch).seconds for method, one in contenders.items()}
    counts = {
        method: count(contender, model.counted_size, args.seed)
        for method, contender in contenders.items()
    }
    rows, times = take_turns(setting, steps, counts, args)
    is_usual = (size, num_images) == (model.image_size, model.batch_size)
    return rows, make_ratios(setting, times, model.step_targets if is_usual else {}, args.seed)


def make_contender(base: nn.Module, method: str, seed: int) -> Contender:
    """Return a copy of the model, ready to be trained by a method."""
    model = copy.deepcopy(base)
    plain = method.removesuffix(LEAN)
    row = TABLE["lora" if plain.startswith("lora") else "paca"]
    targets, heads = choose_layers(model, row, RANK)
    contender = adapt(model, plain, targets=targets, seed=seed, heads=heads)
    if plain == "frozen":
        for name in heads:
            contender.model.get_submodule(name).requires_grad_()
    if plain != method:
        enable_batch_norm(contender.model)
    return contender


def count(contender: Contender, size: int, seed: int) -> dict[str, Any]:
    """Return what is exact about a method: parameters, and bytes kept for one image."""
    model = contender.model
    layers = adapted_layers(model)
    dtype = next(model.parameters()).dtype
    images, labels = make_batch(1, size, dtype, seed)
    with SavedBytes(model, layers) as saved:
        loss = nn.functional.cross_entropy(model(pixel_values=images).logits.float(), labels)
    del loss
    counts: dict[str, Any] = {
        "num_trainable_parameters": contender.num_trainable_parameters,
        "counted": f"1 image of {size} px",
        "saved_bytes": saved.num_bytes,
        "saved_bytes_by_layer": saved.num_bytes_by_kind,
    }
    if contender.method == OURS:
        with torch.no_grad():
            positions = positions_of(layers, lambda: model(pixel_values=images))
        counts["formula_bytes_by_layer"] = formula_bytes(layers, positions, dtype)
    return counts


def byte_ratios(rows: list[dict[str, Any]], targets: dict[str, float]) -> list[dict[str, Any]]:
    """Return the bytes that PaCA keeps as a share of each other method's, lean or not.

    `targets` maps other methods to the highest acceptable share of plain PaCA.
    """
    ratios = []
    for ours in rows:
        if ours["method"].removesuffix(LEAN) != OURS:
            continue
        for row in rows:
            if row["setting"] != ours["setting"] or row["method"].removesuffix(LEAN) == OURS:
                continue
            if row["method"] == HEAD:  # keeps next to nothing
                continue
            ratio = ours["saved_bytes"] / row["saved_bytes"]
            target = targets.get(row["method"]) if ours["method"] == OURS else None
            ratios.append(
                {
                    "setting": f"{row['counted']}, {row['dtype']}",
                    "method": ours["method"],
                    "reference": row["method"],
                    "ratio": ratio,
                    "target": target,
                    "is_reached": None if target is None else ratio <= target,
                }
            )
    return ratios


def byte_table(ratios: list[dict[str, Any]]) -> Table:
    """Return the shares of bytes kept for backward, as a Markdown table."""
    table = Table("setting", "kept by", "of", "share", "target", box=box.MARKDOWN)
    for ratio in ratios:
        verdict = "" if ratio["target"] is None else "reached" if ratio["is_reached"] else "missed"
        target = "" if ratio["target"] is None else f"<= {ratio['target']:.2f} {verdict}"
        share = f"{ratio['ratio']:.3f}"
        table.add_row(ratio["setting"], ratio["method"], ratio["reference"], share, target)
    return table


def main(options: list[str] | None = None) -> None:
    """Measure every model, write the results, print the ratios."""
    args = parse(options)
    prepare(args)
    console = Console(highlight=False, width=120)
    for name in args.models:
        model = MODELS[name]
        result = provenance("benchmarks.vision", args, options)
        result["versions"]["timm"] = version("timm")
        settings = [
            (f"{model.title}, {dtype}", partial(measure, model, dtype, args))
            for dtype in args.dtypes
        ]
        rows, ratios = measure_all(settings, console)
        check_bytes(rows)
        result |= {
            "model": model.title,
            "methods": {row["method"]: IMAGE_METHODS[row["method"]] for row in rows},
            "peak_process_bytes": peak_process_bytes(),
            "rows": rows,
            "ratios": ratios,
            "byte_ratios": byte_ratios(rows, model.byte_targets),
        }
        path = write(result, args.output, f"vision-{name}")
        console.print(ratio_table(result))
        console.print(byte_table(result["byte_ratios"]))
        console.print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
