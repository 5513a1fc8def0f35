"""Operations of a training step: torch's own counter, and the products that it leaves out."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

__all__ = ["count_flops"]


def count_flops(
    forward: Callable[[], torch.Tensor], backward: Callable[[torch.Tensor], None]
) -> dict[str, int]:
    """Return `forward_flops` and `backward_flops`, a multiplication and an addition being two.

    Args:
        forward: Returns the loss.
        backward: Takes the loss.
    """
    with FlopCounterMode(display=False, custom_mapping=_missing()) as counter:
        loss = forward()
    num_forward = counter.get_total_flops()
    with FlopCounterMode(display=False, custom_mapping=_missing()) as counter:
        backward(loss)
    return {"forward_flops": num_forward, "backward_flops": counter.get_total_flops()}


def _missing() -> dict[Any, Any]:
    aten, quantized = torch.ops.aten, torch.ops.bitsandbytes
    # There from bitsandbytes' first import on, which a quantised model has behind it.
    products = [
        getattr(quantized, name) for name in ("gemm_4bit", "gemv_4bit") if hasattr(quantized, name)
    ]
    return dict.fromkeys(products, _quantized_flop) | {
        aten.addmm_: _addmm_flop,
        aten._scaled_dot_product_flash_attention_for_cpu: _attention_flop,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flop,
    }


def _addmm_flop(self: Any, a: Any, b: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """In place: (M, K) by (K, N), as the additive form of PaCA adds what the columns give."""
    return int(2 * a[0] * a[1] * b[1])


def _quantized_flop(x: Any, packed: Any, shape: Any, *args: Any, **kwargs: Any) -> int:
    """(..., I) by a packed (O, I)."""
    return 2 * int(math.prod(x)) * int(shape[0])


def _attention_flop(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward_flop(
    grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any
) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))
