"""Image models: what one says about itself, its parts and weights, and what a run has saved."""

import copy
import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pacatune.adapters.base import base_name
from pacatune.adapters.folder import SIDECAR_NAME, open_adapter
from pacatune.adapters.loading import attach
from pacatune.data.images import Preprocessing
from pacatune.data.images.dataset import PREPROCESSOR_NAME
from pacatune.data.images.sources import to_rgb
from pacatune.files.json_file import read_json_object
from pacatune.files.plain import find_file
from pacatune.pretrained import empty_model, find_model, load_config, load_weights

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
    preprocessing: Preprocessing
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
    preprocessing, warnings = _find_preprocessing(path, revision, config)
    options: dict[str, Any] = {}
    if image_size is not None:
        own_size = getattr(config, "image_size", preprocessing.size)
        if image_size != own_size:
            options = _fit_to_size(config, image_size)
        preprocessing = preprocessing.resized_to(image_size)
    if is_timm(config):
        config.pretrained_cfg = {**_timm_cfg(config), **preprocessing.to_timm()}
    return ImageBase(
        path=path,
        revision=revision,
        config=config,
        preprocessing=preprocessing,
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

    if not timm.is_model(found.partition(".")[0]):
        return found
    try:
        known = timm.get_pretrained_cfg(found)
    except RuntimeError:  # an unknown tag
        known = None
    if known is None or known.hf_hub_id is None:
        raise FileNotFoundError(
            f"timm has no weights {found!r}; see timm.list_pretrained("
            f"'{found.partition('.')[0]}*')."
        )
    return str(known.hf_hub_id)


def _load_config(path: str, revision: str | None) -> Any:
    config = load_config(path, revision=revision)
    if getattr(config, "num_channels", 3) != 3:
        raise ValueError(
            f"{path} takes images of {config.num_channels} channels; they have 3 here. Use another."
        )
    if is_timm(config) and config.model_args:
        # timm writes these into its config.json, and transformers passes them a second time.
        known = ("num_classes", "in_chans")
        config.model_args = {k: v for k, v in config.model_args.items() if k not in known}
    return config


def _find_preprocessing(
    path: str, revision: str | None, config: Any
) -> tuple[Preprocessing, list[str]]:
    if is_timm(config):
        return Preprocessing.from_timm(_timm_cfg(config)), []
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(
            path, revision=revision, trust_remote_code=False
        )
    except OSError:
        size = getattr(config, "image_size", None)
        size = size if isinstance(size, int) else 224
        warning = f"{path} does not say how images are prepared: {size} pixels, ImageNet's mean."
        return Preprocessing(size=size, resize=size), [warning]
    return Preprocessing.from_transformers(processor.to_dict()), []


def _timm_cfg(config: Any) -> dict[str, Any]:
    """Return timm's description of the weights: that of the model, else of its architecture."""
    import timm

    stored: dict[str, Any] | None = getattr(config, "pretrained_cfg", None)
    known = timm.get_pretrained_cfg(config.architecture)
    return stored or (known.to_dict() if known else {"input_size": (3, 224, 224)})


def _fit_to_size(config: Any, size: int) -> dict[str, Any]:
    """Return what forward needs to take this size; timm's configuration is changed if need be."""
    plain = _try_size(config, size, {})
    if plain is None:
        return {}
    if is_timm(config):
        before = config.model_args
        config.model_args = {**(before or {}), "dynamic_img_size": True}
        if _try_size(config, size, {}) is None:
            return {}
        config.model_args = before
    elif _try_size(config, size, {"interpolate_pos_encoding": True}) is None:
        return {"interpolate_pos_encoding": True}
    raise ValueError(
        f"`data.image_size` ({size}) does not suit the model: {plain.partition(chr(10))[0]} Use a "
        "size that it accepts, or leave it out for the model's own."
    )


def _try_size(config: Any, size: int, options: dict[str, Any]) -> str | None:
    """Return why a model refuses images of this size, None if it takes them."""
    try:
        model = _build(config).eval()
        if options.keys() - inspect.signature(model.forward).parameters.keys():
            return "unknown options"
        with torch.no_grad():
            model(pixel_values=torch.empty(1, 3, size, size, device="meta"), **options)
    except (ValueError, AssertionError, RuntimeError, TypeError) as error:
        return str(error)
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
    timm_model = getattr(model, "timm_model", None)
    if timm_model is None:
        body = getattr(model, model.base_model_prefix, None)
        children = list(model.named_children())
        heads = [name for name, child in children if child is not body and _has_weights(child)]
    else:
        found = timm_model.get_classifier()
        wanted = set(found if isinstance(found, tuple) else (found,))
        heads = [n for n, child in model.named_modules() if child in wanted and _has_weights(child)]
    if not heads:
        raise ValueError(
            f"{type(model).__name__} has no classifier of its own to train; use another model."
        )
    return heads


def reset_heads(model: nn.Module, heads: list[str]) -> None:
    """Give the heads new random weights, by torch's own rule for each kind of layer."""
    for name in heads:
        for module in model.get_submodule(name).modules():
            reset = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()


def find_batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Return the BatchNorm layers by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, _BatchNorm)}


def _has_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


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
    if not base.has_own_head:
        reset_heads(model, heads)
    return model


@dataclass(frozen=True, kw_only=True)
class ImageClassifier:
    """A fine-tuned model with everything that goes with it."""

    model: Any
    """In evaluation mode; a PeftModel where an adapter was trained."""
    preprocessing: Preprocessing
    classes: list[str]
    forward_options: dict[str, Any]

    @torch.no_grad()
    def logits(self, pixels: Tensor) -> Tensor:
        """Return (B, C) for prepared images (B, 3, size, size)."""
        pixels = pixels.to(next(self.model.parameters()).device)
        logits: Tensor = self.model(pixel_values=pixels, **self.forward_options).logits
        return logits.float()

    def classify(self, image: str | Path | Image.Image) -> dict[str, float]:
        """Return the probability of each class, the likeliest first, of an image or a file."""
        if not isinstance(image, Image.Image):
            with Image.open(image) as opened:
                return self.classify(opened)
        pixels = self.preprocessing(to_rgb(image)).unsqueeze(0)
        shares = self.logits(pixels)[0].softmax(-1).tolist()
        return dict(sorted(zip(self.classes, shares, strict=True), key=lambda pair: -pair[1]))


def load_result(folder: str | Path, base: str | None = None) -> ImageClassifier:
    """Load the output folder of `pacatune train-image`, a finished run.

    `base` is where the base of an adapter is, if not where it was trained.
    """
    folder = Path(folder).expanduser()
    if not (folder / PREPROCESSOR_NAME).is_file():
        raise FileNotFoundError(
            f"{folder} holds no {PREPROCESSOR_NAME}, so it is no finished run of "
            "`pacatune train-image`; check the path."
        )
    values = read_json_object(find_file(folder, PREPROCESSOR_NAME))
    preprocessing = Preprocessing.from_transformers(values)
    adapter, path, revision, classes = None, str(folder), None, None
    if (folder / "adapter_config.json").is_file():
        adapter = open_adapter(folder)
        path, revision = base_name(base, adapter.config), adapter.config.revision
        classes = read_json_object(find_file(folder, SIDECAR_NAME))[CLASSES_KEY]
    described = describe_base(path, revision, classes, preprocessing.size)
    model = load_model(described, torch.float32)
    if adapter is not None:
        model, _ = attach(model, adapter)
    return ImageClassifier(
        model=model.eval(),
        preprocessing=preprocessing,
        classes=list(described.config.id2label.values()),
        forward_options=described.forward_options,
    )
