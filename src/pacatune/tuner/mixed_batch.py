"""Hands the rows' adapter names of a mixed batch to the layers, for one call of the model."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from pacatune.tuner.layer import PacaLayer
from pacatune.tuner.parameter import ParameterLayer

__all__ = ["adapter_names_passed"]

_LAYERS = (PacaLayer, AuxiliaryTrainingWrapper)


@contextmanager
def adapter_names_passed(
    model: nn.Module, adapter_names: list[str], num_beams: int
) -> Iterator[None]:
    """Let every adapted layer see which adapter each row is for.

    Args:
        model: The base with the adapted layers in it.
        adapter_names: One name, or "__base__", per row.
        num_beams: How often generation repeats each row.

    Raises:
        ValueError: If the model is in training mode, a name is unknown, or a layer cannot tell
            the rows of a batch apart.
    """
    if model.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    layers = [module for module in model.modules() if isinstance(module, _LAYERS)]
    _check(layers, adapter_names)
    repeated = [name for name in adapter_names for _ in range(num_beams)]
    handles = [_pass_names(layer, repeated) for layer in layers]
    encoder = _encoder_of(model)
    if num_beams > 1 and encoder is not None:  # an encoder sees each sample once
        handles += [
            _pass_names(module, adapter_names)
            for module in encoder.modules()
            if isinstance(module, _LAYERS)
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check(layers: list[Any], adapter_names: list[str]) -> None:
    if any(isinstance(layer, ParameterLayer) for layer in layers):
        raise ValueError(
            "Cannot pass `adapter_names` to a model with adapted experts, which see single tokens "
            "and not the rows of the batch, or an adapted torch.nn.MultiheadAttention. Run the "
            "rows of each adapter by themselves."
        )
    known = {"__base__"}
    known |= {name for layer in layers if isinstance(layer, PacaLayer) for name in layer.paca_delta}
    if unknown := set(adapter_names) - known:
        raise ValueError(
            f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}"
        )


def _pass_names(module: nn.Module, adapter_names: list[str]) -> Any:
    return module.register_forward_pre_hook(
        partial(_add_names, adapter_names=adapter_names), with_kwargs=True
    )


def _add_names(
    module: nn.Module, args: Any, kwargs: dict[str, Any], *, adapter_names: list[str]
) -> tuple[Any, dict[str, Any]]:
    kwargs["adapter_names"] = adapter_names
    return args, kwargs


def _encoder_of(model: nn.Module) -> nn.Module | None:
    get_encoder = getattr(model, "get_encoder", None)
    encoder = get_encoder() if get_encoder is not None else None
    return encoder if encoder is not model else None
