"""What of a model an adapter's file holds: its tensors, under the names of the base model.

PEFT asks the tuner (`model.PacaModel`) for them when it saves and loads.
"""

import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from typing import Any, cast

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from pacatune.format.tensors import DELTA, INDICES, MIX, is_equal, plain_name
from pacatune.ops.columns import check_columns
from pacatune.tuner.config import PacaConfig
from pacatune.tuner.experts import ExpertParameter
from pacatune.tuner.layer import PacaLayer

_OURS = re.compile(rf"(^|\.)({DELTA}|{MIX}|{INDICES})(\.|$)")
_WRAPPERS = re.compile(r"(_fsdp_wrapped_module|_checkpoint_wrapped_module)(\.|$)")


class Selected(dict[str, Tensor]):
    """The tensors of an adapter, to which PEFT adds the base weights of adapted embeddings."""

    frozen: Collection[str] = ()
    """Those that are the base's own, which is there wherever the adapter is loaded."""

    def update(self, others: Mapping[str, Tensor]) -> None:  # type: ignore[override]
        """As dict's, of all but the frozen."""
        super().update({name: t for name, t in others.items() if name not in self.frozen})


def _embeddings(model: Any) -> list[nn.Module]:
    try:
        return [model.get_input_embeddings(), model.get_output_embeddings()]
    except (AttributeError, NotImplementedError):  # not of transformers, or of images
        return []


def frozen_embeddings(model: Any, config: PeftConfig) -> set[str]:
    """Return the frozen weights under adapted embeddings, unless the vocabulary is another one."""
    layers = [layer for layer in _embeddings(model) if isinstance(layer, PacaLayer)]
    names = {
        f"{name}.base_layer.{own}"
        for name, module in PlainNames(model).named_modules()
        if any(module is layer for layer in layers)
        for own, parameter in cast(PacaLayer, module).base_layer.named_parameters()
        if not parameter.requires_grad
    }
    if not names:
        return names
    try:
        name, revision = config.base_model_name_or_path, config.revision or "main"
        before = type(model.config).from_pretrained(name, revision=revision)
        is_same = before.get_text_config().vocab_size == model.config.get_text_config().vocab_size
    except (AttributeError, OSError, TypeError, ValueError):  # not of transformers, or not here
        is_same = False
    return names if is_same else set()


class PlainNames:
    """A model under the names of its state_dict, in which wrappers leave no trace.

    FSDP1 and torch's checkpoint_wrapper (accelerate's `fsdp_activation_checkpointing`) put modules
    into the tree but take their names out of the state_dict. PEFT compares the two, so it would
    find nothing, save an empty adapter and say nothing.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """As a module's."""
        for name, module in self.model.named_modules():
            yield _WRAPPERS.sub("", name).rstrip("."), module

    def state_dict(self) -> dict[str, Tensor]:
        """As a module's."""
        return self.model.state_dict()


def warn_of_replaced(
    model: nn.Module, config: PacaConfig, adapter_name: str, state_dict: dict[str, Tensor]
) -> None:
    """Name weights of the base that the configuration does not train and that change on loading.

    PEFT saves an embedding whose vocabulary grew, and loads biases for a configuration without.
    """
    base = model.state_dict()
    for name, tensor in state_dict.items():
        if name not in base or _OURS.search(name) or config.trains(plain_name(name)):
            continue
        if not is_equal(tensor, base[name]):
            warnings.warn(
                f"Adapter {adapter_name!r}: {name!r} takes the place of that weight of the base. "
                "It should where the vocabulary grew in training; otherwise remove it.",
                stacklevel=2,
            )


def check_fits(model: PlainNames, adapter_name: str, state_dict: dict[str, Tensor]) -> None:
    """Refuse tensors that a model has no adapted module for, and columns that it has not."""
    in_features: dict[str, int] = {}
    for name, module in model.named_modules():
        layer: Any = module if isinstance(module, PacaLayer) or is_foreign(module) else None
        if layer is None or adapter_name not in layer.r:
            continue
        prefix = f"{name}." if name else ""
        delta, indices = (f"{prefix}{kind}.{adapter_name}" for kind in (DELTA, INDICES))
        in_features[delta if is_foreign(layer) else f"{delta}.weight"] = layer.in_features
        in_features[f"{delta}.mix"] = layer.in_features
        in_features[indices] = layer.in_features
    for key, tensor in state_dict.items():
        if not _OURS.search(key):
            continue
        if key not in in_features:
            raise ValueError(
                f"Adapter {adapter_name!r} has {key!r}, but this model has no such adapted module: "
                "it was made for another base model, or its configuration was changed."
            )
        if INDICES in key:
            check_columns(tensor, in_features[key], f"Adapter {adapter_name!r}: {key!r}")


# What PEFT's own PaCA (0.22 and newer) would do with an adapter, or with a model that it made.
#
# It adapts `nn.Linear` and quantised linear layers. It multiplies by a layer's weight itself, past
# a forward of the layer's own; and it does not see who reads that weight without calling the layer,
# as torch's attention and encoders do: there its outputs are silently those of the base.


def kinds_beyond_peft(model: Any, adapter_name: str) -> list[str]:
    """Return the kinds of adapted modules that PEFT's own PaCA does not adapt rightly, sorted."""
    modules: dict[str, nn.Module] = dict(model.named_modules())
    kinds = {
        _kind_beyond_peft(layer, modules.get(name.rpartition(".")[0]))
        for name, layer in modules.items()
        if isinstance(layer, PacaLayer) and adapter_name in layer.r
    }
    return sorted(kinds - {""})


def is_foreign(module: nn.Module) -> bool:
    """Whether a module is a layer of PEFT's own PaCA."""
    is_paca = isinstance(module, BaseTunerLayer) and hasattr(module, "paca_indices")
    return is_paca and not isinstance(module, PacaLayer)


def _kind_beyond_peft(layer: PacaLayer, parent: nn.Module | None) -> str:
    base = layer.get_base_layer()
    if isinstance(layer, ExpertParameter):
        return type(base).__name__
    if isinstance(parent, nn.TransformerEncoderLayer):
        return "TransformerEncoderLayer"
    if layer.quantization_backend is not None:
        return "" if layer.quantization_backend.layer_type == "linear" else type(base).__name__
    is_linear = isinstance(base, nn.Linear) and type(base).forward is nn.Linear.forward
    return "" if is_linear else type(base).__name__
