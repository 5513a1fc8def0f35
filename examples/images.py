"""Fine-tune image models with PaCA in transformers' Trainer: `make demo-vision`.

EfficientNet-Lite0, a CNN of timm, and DINOv2-S, a vision transformer, learn CIFAR-10: the new head
alone, with LoRA, and with PaCA at as many parameters. Models and images come as Python packages.
"""

import argparse
import time
import warnings
from pathlib import Path

# Name in `packaged`, and a size of images that a CPU is fast with.
MODELS = {"efficientnet-lite0": ("efficientnet", 96), "dinov2-small": ("dinov2", 98)}
# Rank and learning rate. LoRA has two factors where PaCA has columns.
METHODS = {"head": (0, 3e-3), "lora": (4, 3e-3), "paca": (8, 3e-3), "full": (0, 3e-4)}
HEAD_RATE = 3e-3  # beside every method


def load_images(folder, seed=0):
    """Return images to train on and others to test with; without a folder `test`, a quarter."""
    from datasets import load_dataset

    data = load_dataset("imagefolder", data_dir=str(folder))
    if "label" not in data["train"].features:
        raise SystemExit(f"{folder}: put the images of each class into a folder of its name.")
    if "test" not in data:
        data = data["train"].train_test_split(0.25, stratify_by_column="label", seed=seed)
    return data["train"], data["test"]


def adapt(model, method, rank, seed=0, **changes):
    """Let a method train its part of a model, and the head; return the model and the head's name.

    LoRA and PaCA get the linear layers, and convolutions with at least `rank` channels. `changes`
    are further options of their configurations.
    """
    from peft import LoraConfig, get_peft_model
    from torch import nn

    from pacatune import PacaConfig

    def evaluate(layer, _):
        layer.eval()

    targets, is_timm = [], hasattr(model, "timm_model")
    classifier = model.timm_model.get_classifier() if is_timm else model.classifier
    (head,) = (name for name, layer in model.named_modules() if layer is classifier)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.BatchNorm2d):  # which would take its statistics from small batches
            layer.register_forward_pre_hook(evaluate)
        is_wide = isinstance(layer, nn.Conv2d) and layer.in_channels >= rank
        # PEFT merges no LoRA of grouped convolutions.
        if isinstance(layer, nn.Linear) or (is_wide and (method == "paca" or layer.groups == 1)):
            targets += [] if name.startswith(head) else [name]
    if method in ("head", "full"):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(method == "full" or name.startswith(head))
        return model, head
    options = {"r": rank, "target_modules": targets, "modules_to_save": [head]}
    if method == "paca":
        options |= {"paca_alpha": rank, "random_seed": seed, **changes}
        return get_peft_model(model, PacaConfig(**options)), head
    return get_peft_model(model, LoraConfig(**options | {"lora_alpha": rank, **changes})), head


def make_trainer(
    path,
    method,
    images,
    output,
    rank,
    rate,
    steps,
    *,
    seed=0,
    size=None,
    head_rate=HEAD_RATE,
    bf16=False,
    attention=None,
    **changes,
):
    """Return transformers' Trainer of a model with a new head for the classes of the images."""
    import torch
    import transformers

    transformers.set_seed(seed)  # every method begins with the same head
    kinds = {"num_labels": images[0].features["label"].num_classes, "ignore_mismatched_sizes": True}
    kinds["attn_implementation"] = attention
    model = transformers.AutoModelForImageClassification.from_pretrained(path, **kinds)
    processor = transformers.AutoImageProcessor.from_pretrained(path)
    model, head = adapt(model, method, rank, seed, **changes)
    groups = [{"params": [], "lr": head_rate}, {"params": [], "lr": rate}]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[f"{head}." not in name]["params"].append(parameter)

    def see(rows):
        colours = [image.convert("RGB") for image in rows["image"]]
        pixels = processor(colours, return_tensors="pt")["pixel_values"]
        if size is not None:
            pixels = torch.nn.functional.interpolate(pixels, size, mode="bilinear", antialias=True)
        return {"pixel_values": pixels, "labels": rows["label"]}

    options = {"output_dir": str(output), "per_device_train_batch_size": 32, "seed": seed}
    # Without a GPU, transformers takes bf16 only where the CPU is asked for.
    options |= {"bf16": bf16, "use_cpu": not torch.accelerator.is_available()}
    options |= {"save_strategy": "no", "report_to": "none"}
    options |= {"remove_unused_columns": False, "label_names": ["labels"]}
    # A random head sends random gradients, so the rate rises at first.
    options |= {"max_steps": steps, "warmup_steps": steps // 5, "lr_scheduler_type": "cosine"}
    train, test = (part.with_transform(see) for part in images)
    return transformers.Trainer(
        model,
        transformers.TrainingArguments(**options),
        train_dataset=train,
        eval_dataset=test,
        compute_metrics=lambda p: {"accuracy": (p.predictions.argmax(-1) == p.label_ids).mean()},
        optimizers=(torch.optim.AdamW(groups, weight_decay=0.0), None),
    )


def kept_bytes(model, batch):
    """Return how many bytes autograd keeps of a batch, beside the weights."""
    from torch.autograd.graph import saved_tensors_hooks

    kept = []
    with saved_tensors_hooks(kept.append, lambda _: None):  # there is no backward that asks
        model.train()(**batch)
    weights = {w.untyped_storage().data_ptr() for w in (*model.parameters(), *model.buffers())}
    storages = {s.data_ptr(): s.nbytes() for s in (tensor.untyped_storage() for tensor in kept)}
    return sum(size for place, size in storages.items() if place not in weights)


def main():
    """Train each model by each method, save the results and show them."""
    parser = argparse.ArgumentParser(description=__doc__)
    add, names = parser.add_argument, " or ".join(MODELS)
    add("--model", action="append", help=f"{names} (both), a folder or hub id; may be repeated")
    add("--method", action="append", choices=METHODS, help="(head, lora, paca); may be repeated")
    add("--data", metavar="FOLDER", help="other images: a folder per class, or train/ and test/")
    add("--steps", type=int, default=40, help="steps of each run (%(default)s)")
    add("--output", metavar="DIR", default="demo-vision-output", help="gets a folder (%(default)s)")
    options = parser.parse_args()
    output = Path(options.output, time.strftime("%Y-%m-%d-%H%M%S"))  # always a new folder

    from packaged import prepare
    from transformers import PrinterCallback, logging

    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    train, test = load_images(options.data or prepare("cifar10"))
    images = train, test.shuffle(seed=0).select(range(min(len(test), 300)))
    for name in options.model or MODELS:
        packaged, size = MODELS.get(name, (None, None))
        path = str(prepare(packaged)) if packaged else name
        for method in options.method or ("head", "lora", "paca"):
            how = (output / Path(name).name / method, *METHODS[method], options.steps)
            trainer = make_trainer(path, method, images, *how, size=size)
            trainer.remove_callback(PrinterCallback)
            before, trained, after = trainer.evaluate(), trainer.train(), trainer.evaluate()
            kept = kept_bytes(trainer.model, next(iter(trainer.get_train_dataloader())))
            scores = f"accuracy {before['eval_accuracy']:.3f} -> {after['eval_accuracy']:.3f}"
            costs = f"{trained.metrics['train_runtime']:.1f} s, {kept / 1e6:.1f} MB"
            print(f"{Path(name).name}, {method}: {scores}, {costs} kept for backward")
            trainer.save_model()
    print(f"One seed and few steps do not show which method learns better. Results: {output}")


if __name__ == "__main__":
    main()
