"""What a pretrained image model says about itself, set up for the data; no weights are read."""

import copy
import inspect
from dataclasses import dataclass, field
from typing import Any

import torch

from pacatune.data.images import Preprocessing
from pacatune.pretrained import empty_model, find_model, load_config


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

    Args:
        path: Hub id, name of a timm model, or folder.
        revision: Branch, tag or commit of a hub model.
        classes: Names of the classes, in the order of their numbers; the model's own where None.
        image_size: Height and width; the model's own where None.

    Raises:
        FileNotFoundError: If there is no such model, or it cannot be reached.
        ValueError: If it is no image classifier, or cannot take images of this size.
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
    found = find_model(path, others=True)
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
