"""Image models: what one says about itself, its parts and weights, and what a run has saved."""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pacatune.adapters.base import base_name
from pacatune.adapters.folder import SIDECAR_NAME, open_adapter
from pacatune.adapters.loading import attach
from pacatune.data.images import to_rgb
from pacatune.files.json_file import read_json_object
from pacatune.files.plain import find_file
from pacatune.pretrained import empty_model, find_model, load_config, load_weights

PROCESSOR_NAME = "preprocessor_config.json"
CLASSES_KEY = "classes"
"""Entry of an adapter's sidecar with the names of the classes."""


@dataclass(frozen=True, kw_only=True)
class ImageBase:
    """A pretrained model without its weights, set up for the classes of the data."""

    path: str
    """Hub id or absolute path of a folder."""
    revision: str | None
    config: Any
    """transformers' configuration, with the classes of the data."""
    processor: Any
    """transformers' image processor: an image -> what the model sees, (3, size, size)."""
    size: int
    forward_options: dict[str, Any]
    """What its forward needs besides pixels."""
    has_own_head: bool
    """Whether its head already tells exactly these classes apart; otherwise a new one is made."""
    warnings: list[str] = field(default_factory=list)

    def empty_model(self) -> Any:
        """Build the model on the meta device: modules and shapes, no weights."""
        return _build(self.config)


def describe_base(
    path: str, revision: str | None, classes: list[str] | None, image_size: int | None
) -> ImageBase:
    """Read what a model says about itself, and set it up for other classes and sizes.

    The path may be the bare name of a timm model. Where classes or size are None they are its own.
    """
    path = _find(path)
    config = _load_config(path, revision)
    own_classes = [config.id2label[number] for number in sorted(config.id2label or {})]
    classes = own_classes if classes is None else classes
    config.id2label = dict(enumerate(classes))
    config.label2id = {name: number for number, name in enumerate(classes)}
    processor, warnings = _find_processor(path, revision, config)
    own_size = size = size_of(processor)
    options: dict[str, Any] = {}
    if image_size is not None:
        size = image_size
        if size != getattr(config, "image_size", own_size):
            options = _fit_to_size(config, size)
        processor = resized(processor, config, own_size, size)
    return ImageBase(
        path=path,
        revision=revision,
        config=config,
        processor=processor,
        size=size,
        forward_options=options,
        has_own_head=own_classes == classes,
        warnings=warnings,
    )


def is_timm(config: Any) -> bool:
    """Whether a configuration is that of a timm model."""
    return bool(config.model_type == "timm_wrapper")


def _find(path: str) -> str:
    """Return the hub id of a timm model's bare name, or the path as it is."""
    found = find_model(path)
    if "/" in found:
        return found
    import timm

    try:
        known = timm.get_pretrained_cfg(found)
    except RuntimeError as error:  # an unknown tag
        name = found.partition(".")[0]
        raise FileNotFoundError(
            f"timm has no weights {found!r}; see timm.list_pretrained('{name}*')."
        ) from error
    return str(known.hf_hub_id) if known else found


def _load_config(path: str, revision: str | None) -> Any:
    config = load_config(path, revision=revision)
    if getattr(config, "num_channels", 3) != 3:
        raise ValueError(
            f"{path} takes images of {config.num_channels} channels; they have 3 here. Use another."
        )
    if is_timm(config):
        # timm writes these into its config.json, and transformers passes them a second time.
        known = ("num_classes", "in_chans")
        config.model_args = {k: v for k, v in (config.model_args or {}).items() if k not in known}
        config.pretrained_cfg = getattr(config, "pretrained_cfg", None) or {}
    return config


def _find_processor(path: str, revision: str | None, config: Any) -> tuple[Any, list[str]]:
    from transformers import AutoImageProcessor

    if is_timm(config):
        return _timm_processor(config.pretrained_cfg), []
    try:
        return AutoImageProcessor.from_pretrained(
            path, revision=revision, trust_remote_code=False
        ), []
    except OSError:
        size = getattr(config, "image_size", None)
        size = size if isinstance(size, int) else 224
        warning = f"{path} does not say how images are prepared: {size} pixels, ImageNet's mean."
        return _timm_processor({"input_size": (3, size, size), "crop_pct": 1.0}), [warning]


def _timm_processor(pretrained_cfg: dict[str, Any]) -> Any:
    """Return the image processor that does what timm's does, and can be saved and changed."""
    from timm.data import resolve_data_config
    from transformers import BitImageProcessor

    values = resolve_data_config(pretrained_cfg=pretrained_cfg)
    if values["crop_mode"] not in ("center", "squash"):
        raise ValueError(
            f"the model's `crop_mode` ({values['crop_mode']!r}) is not supported; it must be "
            "'center' or 'squash'. Edit it in the model's config.json."
        )
    _, height, width = values["input_size"]
    edge = int(height / values["crop_pct"])
    squash = values["crop_mode"] == "squash"
    return BitImageProcessor(
        size={"height": edge, "width": edge} if squash else {"shortest_edge": edge},
        crop_size={"height": height, "width": width},
        resample=Image.Resampling[values["interpolation"].upper()],
        image_mean=values["mean"],
        image_std=values["std"],
    )


def size_of(processor: Any) -> int:
    """Return the height and width of images that a processor has prepared."""
    image = Image.new("RGB", (300, 200))
    height, width = processor(image, return_tensors="pt")["pixel_values"].shape[-2:]
    if height != width:
        raise ValueError(
            f"the model takes images of {height} x {width} pixels; only squares are supported. Use "
            "another model."
        )
    return int(height)


def resized(processor: Any, config: Any, old: int, new: int) -> Any:
    """Return the processor for another size, with the same share of the image cropped away."""
    if is_timm(config):
        config.pretrained_cfg = {**config.pretrained_cfg, "input_size": (3, new, new)}
        return _timm_processor(config.pretrained_cfg)
    values = processor.to_dict()
    for name in ("size", "crop_size"):
        if values.get(name):
            values[name] = {edge: round(n * new / old) for edge, n in values[name].items()}
    return type(processor).from_dict(values)


def _fit_to_size(config: Any, size: int) -> dict[str, Any]:
    """Return what forward needs to take this size; timm's configuration is changed if need be."""
    options: dict[str, Any] = {}
    problem = _try_size(config, size, options)
    if problem and is_timm(config):
        config.model_args = {**config.model_args, "dynamic_img_size": True}
    elif problem:
        options = {"interpolate_pos_encoding": True}
    if problem and _try_size(config, size, options):
        raise ValueError(
            f"`data.image_size` ({size}) does not suit the model: {problem.splitlines()[0]} Use a "
            "size that it accepts, or leave it out for the model's own."
        )
    return options


def _try_size(config: Any, size: int, options: dict[str, Any]) -> str | None:
    """Return why a model refuses images of this size, None if it takes them."""
    try:
        with torch.no_grad():
            pixels = torch.empty(1, 3, size, size, device="meta")
            _build(config).eval()(pixel_values=pixels, **options)
    except (ValueError, AssertionError, RuntimeError, TypeError) as error:
        return str(error) or type(error).__name__
    return None


def _build(config: Any) -> Any:
    from transformers import AutoModelForImageClassification

    try:
        return empty_model(AutoModelForImageClassification, copy.deepcopy(config))
    except (KeyError, ValueError) as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        raise ValueError(
            f"a {config.model_type!r} model is no image classifier; use one that is."
        ) from error


def find_heads(model: Any) -> list[str]:
    """Return the names of the modules that turn features into classes; timm's in its wrapper."""
    if hasattr(model, "timm_model"):
        found = model.timm_model.get_classifier()
        found = found if isinstance(found, tuple) else (found,)
    else:
        body = getattr(model, model.base_model_prefix, None)
        found = [child for child in model.children() if child is not body]
    modules = model.named_modules()
    heads = [name for name, one in modules if one in found and any(True for _ in one.parameters())]
    if not heads:
        raise ValueError(
            f"{type(model).__name__} has no classifier of its own to train; use another model."
        )
    return heads


def find_batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Return the BatchNorm layers by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, _BatchNorm)}


def load_model(base: ImageBase, dtype: torch.dtype, attention: str | None = None) -> Any:
    """Load the weights; a new head gets random ones, from torch's global generator."""
    from transformers import AutoModelForImageClassification

    model, info = load_weights(
        AutoModelForImageClassification,
        base.path,
        dtype=dtype,
        revision=base.revision,
        config=base.config,
        attn_implementation=attention,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        use_safetensors=True,
    )
    heads = find_heads(model)
    mismatched = [key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]]
    prefixes = () if base.has_own_head else tuple(f"{name}." for name in heads)
    lost = [k for k in [*info["missing_keys"], *mismatched] if not k.startswith(prefixes)]
    if lost:
        raise ValueError(
            f"{base.path} lacks {len(lost)} weights of {type(model).__name__}, or has them in "
            f"other shapes, first {sorted(lost)[0]!r}: they would be random. Use a complete model."
        )
    for name in [] if base.has_own_head else heads:
        for module in model.get_submodule(name).modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    if base.forward_options:
        model.register_forward_pre_hook(
            lambda _, args, options: (args, {**options, **base.forward_options}), with_kwargs=True
        )
    return model


@dataclass(frozen=True, kw_only=True)
class ImageClassifier:
    """A fine-tuned model with everything that goes with it."""

    model: Any
    """In evaluation mode; a PeftModel where an adapter was trained."""
    processor: Any
    """transformers' image processor: an image -> what the model sees."""
    classes: list[str]

    @torch.no_grad()
    def classify(self, image: str | Path | Image.Image) -> dict[str, float]:
        """Return the probability of each class, the likeliest first, of an image or a file."""
        if not isinstance(image, Image.Image):
            with Image.open(image) as opened:
                return self.classify(opened)
        pixels = self.processor(to_rgb(image), return_tensors="pt")["pixel_values"]
        logits = self.model(pixel_values=pixels.to(self.model.device)).logits[0].float()
        shares = logits.softmax(-1).tolist()
        return dict(sorted(zip(self.classes, shares, strict=True), key=lambda pair: -pair[1]))


def load_result(folder: str | Path, base: str | None = None) -> ImageClassifier:
    """Load the output folder of `pacatune train-image`, a finished run.

    `base` is where the base of an adapter is, if not where it was trained.
    """
    from transformers import AutoImageProcessor

    folder = Path(folder).expanduser()
    if not (folder / PROCESSOR_NAME).is_file():
        raise FileNotFoundError(
            f"{folder} holds no {PROCESSOR_NAME}, so it is no finished run of "
            "`pacatune train-image`; check the path."
        )
    processor = AutoImageProcessor.from_pretrained(
        find_file(folder, PROCESSOR_NAME).parent, trust_remote_code=False
    )
    adapter, path, revision, classes = None, str(folder), None, None
    if (folder / "adapter_config.json").is_file():
        adapter = open_adapter(folder)
        path, revision = base_name(base, adapter.config), adapter.config.revision
        classes = read_json_object(find_file(folder, SIDECAR_NAME))[CLASSES_KEY]
    described = describe_base(path, revision, classes, size_of(processor))
    model = load_model(described, torch.float32)
    if adapter is not None:
        model, _ = attach(model, adapter)
    return ImageClassifier(
        model=model.eval(),
        processor=processor,
        classes=list(described.config.id2label.values()),
    )
