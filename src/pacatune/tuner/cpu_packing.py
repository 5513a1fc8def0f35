"""Keeps bitsandbytes' 4-bit weights as they are on CPUs with AVX-512 BF16.

There bitsandbytes reorders a weight in place the first time its layer is evaluated. That rounds the
scales to bfloat16, so the base is another one afterwards; the reordered weight passes no gradient
back, so a model that is evaluated before training cannot be trained; and saving it spoils the
scales. `support_avx512bf16_for_cpu` decides about it and about nothing else. It stays off when the
adapter is unloaded: the base is then what it was.
"""

from typing import Any, cast

from torch import nn

__all__ = ["forbid_packing"]

_SWITCH = "support_avx512bf16_for_cpu"


def forbid_packing(model: nn.Module) -> None:
    """Let every 4-bit layer keep its weight in the common order; put back what is reordered."""
    for module in model.modules():
        if getattr(module, _SWITCH, False):
            _unpack(cast(Any, module))
            setattr(module, _SWITCH, False)


def _unpack(layer: Any) -> None:
    state = getattr(layer.weight, "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        layer.state_dict()  # unpacks on the way
        state = layer.weight.quant_state
        if state.absmax.dim() == 2:  # bitsandbytes 0.50 leaves the scales transposed here
            state.absmax = state.absmax.t().reshape(-1).float()
