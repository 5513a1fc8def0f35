"""Image models: what one says about itself, its parts and weights, and what a run has saved."""

import copy
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import AutoImageProcessor, AutoModelForImageClassification

from pacatune.adapters.base import base_name
from pacatune.adapters.folder import SIDECAR_NAME, open_adapter
from pacatune.adapters.loading import attach
from pacatune.data.formats import to_rgb
from pacatune.files.json_file import read_json_object
from pacatune.files.plain import find_file
from pacatune.methods import Method
from pacatune.pretrained import empty_model, find_model, load_config, load_weights
from pacatune.training.task import find_heads, reset_heads
from pacatune.tuner.defaults import default_targets, survey
from pacatune.tuner.layout import ConvolutionLayout


class ImageBase:
    """A pretrained model, set up for classes and a size of images; those are its own where None.

    The path may be the bare name of a timm model. `processor` is transformers': an image -> what
    the model sees, (3, size, size). Without `has_own_head` for exactly these classes it gets a new.
    """

    def __init__(
        self, path: str, revision: str | None, classes: list[str] | None, image_size: int | None
    ) -> None:
        self.path, self.revision = _find(path), revision
        self.config: Any = load_config(self.path, revision=revision)
        config, self._is_timm = self.config, self.config.model_type == "timm_wrapper"
        own = [config.id2label[number] for number in sorted(config.id2label or {})]
        self.classes = own if classes is None else classes
        self.has_own_head = own == self.classes
        config.id2label = dict(enumerate(self.classes))
        config.label2id = {name: number for number, name in enumerate(self.classes)}
        if self._is_timm:
            # timm writes these into its config.json, and transformers passes them a second time.
            known, given = ("num_classes", "in_chans"), config.model_args or {}
            config.model_args = {k: v for k, v in given.items() if k not in known}
            config.pretrained_cfg = config.pretrained_cfg or {}
            self.processor = _timm_processor(config.pretrained_cfg)
        else:
            self.processor = AutoImageProcessor.from_pretrained(
                self.path, revision=revision, trust_remote_code=False
            )
        self.size = size_of(self.processor)
        self._forward_options: dict[str, Any] = {}
        if image_size is not None:
            self._resize(image_size)

    def _resize(self, size: int) -> None:
        """Take images of another size; as large a share of each is cropped away as before."""
        if self._is_timm:
            self.config.pretrained_cfg |= {"input_size": (3, size, size)}
            self.processor = _timm_processor(self.config.pretrained_cfg)
        else:
            values = self.processor.to_dict()
            for name in ("size", "crop_size"):
                if edges := values.get(name):
                    values[name] = {edge: round(n * size / self.size) for edge, n in edges.items()}
            self.processor = type(self.processor).from_dict(values)
        if size != getattr(self.config, "image_size", self.size):
            self._fit_to(size)
        self.size = size

    def _fit_to(self, size: int) -> None:
        """Let positions be interpolated, if that is what it needs."""
        reason = None
        for interpolate in (False, True):
            if interpolate and self._is_timm:
                self.config.model_args = {**self.config.model_args, "dynamic_img_size": True}
            elif interpolate:
                self._forward_options = {"interpolate_pos_encoding": True}
            pixels = torch.empty(1, 3, size, size, device="meta")
            try:
                with torch.no_grad():
                    self.empty_model().eval()(pixel_values=pixels, **self._forward_options)
                return
            except (ValueError, AssertionError, RuntimeError, TypeError) as error:
                reason = reason or error
        raise ValueError(
            f"`data.image_size` ({size}) does not suit the model ({reason!r}). Use a size that it "
            "accepts, or leave it out for the model's own."
        )

    def empty_model(self) -> Any:
        """Build the model on the meta device: modules and shapes, no weights."""
        return empty_model(AutoModelForImageClassification, copy.deepcopy(self.config))

    def load(self, dtype: torch.dtype, attention: str | None = None) -> Any:
        """Load the weights; a new head gets random ones, from torch's global generator."""
        model, info = load_weights(
            AutoModelForImageClassification,
            self.path,
            dtype=dtype,
            revision=self.revision,
            config=self.config,
            attn_implementation=attention,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            use_safetensors=True,
        )
        new = [] if self.has_own_head else find_heads(model)
        prefixes = tuple(f"{name}." for name in new)
        random = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
        if lost := sorted(key for key in random if not key.startswith(prefixes)):
            raise ValueError(
                f"{self.path} lacks {len(lost)} weights of {type(model).__name__}, or has them in "
                f"other shapes, first {lost[0]!r}: they would be random. Use a complete model."
            )
        if not self.has_own_head:
            reset_heads(model)
        if more := self._forward_options:
            model.register_forward_pre_hook(
                lambda _, args, options: (args, {**options, **more}), with_kwargs=True
            )
        return model


def _find(path: str) -> str:
    """Return the hub id of a timm model's bare name, or the path as it is."""
    found = find_model(path)
    if "/" not in found:
        import timm

        with suppress(RuntimeError):  # it is none
            return str(timm.get_pretrained_cfg(found, allow_unregistered=False).hf_hub_id)
    return found


def _timm_processor(pretrained_cfg: dict[str, Any]) -> Any:
    """Return the image processor that does what timm's does, and can be saved and changed."""
    from timm.data import resolve_data_config
    from transformers import BitImageProcessor

    values = resolve_data_config(pretrained_cfg=pretrained_cfg)
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
    """Return the height of images that a processor has prepared; they are square."""
    image = Image.new("RGB", (300, 200))
    return int(processor(image, return_tensors="pt")["pixel_values"].shape[-2])


def find_batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Return the BatchNorm layers by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, _BatchNorm)}


def choose_targets(model: nn.Module, method: Method, rank: int) -> tuple[set[str] | str, list[str]]:
    """Return the default targets, and what to tell the user about those left out.

    Transformers get the linear layers of their blocks, as language models do. Where convolutions
    hold more weights, they are the targets, those with enough channels and of a kind that the
    method can adapt.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    reasons = survey(model)
    linear, convolutions = (
        {name for name, reason in reasons.items() if reason == wanted}
        for wanted in ("", ConvolutionLayout.word)
    )
    sizes = [sum(modules[n].weight.numel() for n in names) for names in (linear, convolutions)]
    if sizes[0] >= sizes[1]:
        return default_targets(model), []
    why = f"fewer than {rank} input channels"
    left = {name for name in convolutions if modules[name].in_channels < rank}
    if not method.is_paca:
        why += ", or grouped (depthwise), which PaCA adapts and a merge of LoRA cannot have"
        left |= {name for name in convolutions if modules[name].groups > 1}
    if left == convolutions:
        raise ValueError(f"every convolution of {type(model).__name__} has {why}; lower `r`.")
    counts = Counter(name.rpartition(".")[2] for name in sorted(left))
    some = ", ".join(f"{count} x {name}" for name, count in counts.items())
    return convolutions - left, [f"{some} left as it is: {why}."] if left else []


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
        opened = image if isinstance(image, Image.Image) else Image.open(image)
        pixels = self.processor(to_rgb(opened), return_tensors="pt")["pixel_values"]
        logits = self.model(pixel_values=pixels.to(self.model.device)).logits[0].float()
        shares = logits.softmax(-1).tolist()
        return dict(sorted(zip(self.classes, shares, strict=True), key=lambda pair: -pair[1]))


def load_result(folder: str | Path, base: str | None = None) -> ImageClassifier:
    """Load the output folder of `pacatune train-image`, a finished run.

    Args:
        folder: The output folder.
        base: Where the base of an adapter is, if not where it was when the adapter was trained.

    Returns:
        Model, image processor and classes; `classify` takes an image.

    Raises:
        FileNotFoundError: If the folder is no finished run, or the base is missing.
    """
    folder = Path(folder).expanduser()
    found = find_file(folder, "preprocessor_config.json").parent
    processor = AutoImageProcessor.from_pretrained(found, trust_remote_code=False)
    if (folder / "adapter_config.json").is_file():
        adapter = open_adapter(folder)
        classes = read_json_object(find_file(folder, SIDECAR_NAME))["classes"]
        path, revision = base_name(base, adapter.config), adapter.config.revision
        described = ImageBase(path, revision, classes, size_of(processor))
        model, _ = attach(described.load(torch.float32), adapter)
    else:
        described = ImageBase(str(folder), None, None, size_of(processor))
        model = described.load(torch.float32)
    return ImageClassifier(model=model.eval(), processor=processor, classes=described.classes)
