"""Finds weights that two modules share, such as an lm_head tied to the embedding."""

from torch import Tensor, nn

from pacatune.tuner.layer import PacaLayer

__all__ = ["mark_shared_weights"]


def mark_shared_weights(model: nn.Module) -> None:
    """Tell every adapted layer whether another module sees its weight, so that it is not written.

    Args:
        model: Whole model: sharing is seen from above only. Tie weights before adapting.
    """
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and not parameter.is_meta:
                address = _address(parameter)
                owners[address] = owners.get(address, 0) + 1
    for layer in model.modules():
        if isinstance(layer, PacaLayer):
            weight = layer.base_layer._parameters.get(layer.parameter_name)
            if weight is not None and owners.get(_address(weight), 0) > 1:
                layer.shares_weight = True
                if layer.residency is not None:
                    layer.residency.restore()
                    layer.residency.is_shared = True


def _address(parameter: Tensor) -> int:
    """What two tensors over one memory have in common."""
    try:
        return parameter.untyped_storage().data_ptr() or id(parameter)
    except (NotImplementedError, RuntimeError):  # tensor subclasses without a storage of their own
        return id(parameter)
