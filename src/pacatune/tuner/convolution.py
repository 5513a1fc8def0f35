"""The adapted convolution, and the choice between equal ways to compute it.

    transient  the adapted kernel is a copy that lives as long as one convolution runs
    additive   conv(x, W) + conv(x[:, indices], scaling * delta), on top of the base layer's forward
    whole      the base layer's own forward with the adapted kernel in place of its weight

Transient is the rule, compiled or not, and keeps x[:, indices] for backward. Additive serves
several active adapters, mixed batches, torch.func's transforms, hooks on the base layer, and
sharded and offloaded weights. Whole serves subclasses with a forward of their own, which may
standardise the kernel, say, and is right for any of them; in 16 bits, where W' is rounded, torch's
own convolution takes the adapted kernel where there are no hooks, too. In these two torch's own
convolution runs, which keeps all of x even if its weight is frozen. None writes the weight.

One such subclass is known: timm's Conv2dSame, which the strided layers of its TensorFlow-born
EfficientNets are, pads by the size of the input and then does what torch does.
"""

import math
import threading
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pacatune.ops import paca_conv
from pacatune.ops.columns import (
    CONVOLUTIONS,
    adapted_kernel,
    conv_of_columns,
    select_channels,
)
from pacatune.ops.tracing import is_recorded
from pacatune.ops.whole import is_whole
from pacatune.tuner.additive import AdditiveLayer, has_hooks

_KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_FORWARDS = {(kind.forward, kind._conv_forward) for kind in _KINDS}
# functional_call puts its tensors into the module for that time.
_ONE_AT_A_TIME = threading.RLock()
_PADS_BY_SIZE = ("timm.layers.conv2d_same", "Conv2dSame")


def _of_base(name: str) -> Any:
    def get(self: "Conv") -> Any:
        return getattr(self.get_base_layer(), name)

    return property(get)


class Conv(AdditiveLayer):
    """An adapted nn.Conv1d, nn.Conv2d or nn.Conv3d, or a subclass of one."""

    has_torchs_forward: bool
    """Once it has been padded as `_padded` does."""
    pads_by_size: bool

    # Read by networks that pad for their layers (transformers' MobileNets).
    in_channels, out_channels = _of_base("in_channels"), _of_base("out_channels")
    kernel_size, stride, padding = _of_base("kernel_size"), _of_base("stride"), _of_base("padding")
    dilation, groups = _of_base("dilation"), _of_base("groups")
    padding_mode = _of_base("padding_mode")

    def _attach(self) -> None:
        # Once, while nothing (FSDP, checkpoint_wrapper) has been put around the base layer.
        if "has_torchs_forward" in self.__dict__:
            return
        kind = type(self._base)
        self.pads_by_size = (kind.__module__, kind.__name__) == _PADS_BY_SIZE
        self.has_torchs_forward = self.pads_by_size or runs_torchs_forward(self._base)

    @property
    def _base(self) -> Any:
        return self.get_base_layer()

    @staticmethod
    def _is_traced() -> bool:
        # torch.compile traces the hand-written gradients, and then keeps what they keep.
        return torch._C._are_functorch_transforms_active() or is_recorded()

    def _fast_forward(self, x: Tensor) -> Tensor | None:
        update, base = self._single_update(), cast(Any, self.base_layer)
        if update is None or not self.has_torchs_forward:
            return None
        weight = base._parameters.get("weight")
        # Dictionaries and weights of other types are DeepSpeed's or FSDP2's, and may be a part.
        if type(base._parameters) is not dict or type(weight) not in (nn.Parameter, Tensor):
            return None
        if weight.requires_grad and torch.is_grad_enabled():
            return None
        x, padding = self._padded(x)
        sizes = self.stride, padding, self.dilation, self.groups
        return paca_conv(x, weight, update, base.bias, *sizes)

    def _update(self, x: Tensor, name: str, dtype: torch.dtype) -> Tensor:
        indices, sizes = self.paca_indices[name], (self.in_channels, self.groups)

        def apply(columns: Tensor, delta: Tensor) -> Tensor:
            return conv_of_columns(columns, delta, indices, *sizes, self._convolve)

        columns = select_channels(x, indices, len(self.kernel_size)).to(dtype)
        return cast(Tensor, self.paca_delta[name](columns, self.scaling[name], apply))

    def _convolve(
        self, x: Tensor, kernel: Tensor, groups: int, bias: Tensor | None = None
    ) -> Tensor:
        x, padding = self._padded(x)
        convolution = CONVOLUTIONS[len(self.kernel_size)]
        return convolution(x, kernel, bias, self.stride, padding, self.dilation, groups)

    def _padded(self, x: Tensor) -> tuple[Tensor, Any]:
        """Pad as the base layer does where torch's operation cannot; return what is left to pad."""
        if self.pads_by_size:
            return _pad_by_size(x, self.kernel_size, self.stride, self.dilation), 0
        if self.padding_mode == "zeros":
            return x, self.padding
        both_sides = self._base._reversed_padding_repeated_twice
        return F.pad(x, both_sides, mode=self.padding_mode), 0

    def _is_whole(self) -> bool:
        return is_whole(self._base.weight, 2 + len(self.kernel_size))

    def _is_additive(self) -> bool:
        """Whether the base layer runs as it is; in 16 bits W' is rounded as a whole."""
        base = self.base_layer
        is_bare = base is self._base and not has_hooks(base.__dict__)
        is_rounded = is_bare and self._base.weight.itemsize <= 2 and self._is_whole()
        return self.has_torchs_forward and not is_rounded

    def _additive_forward(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        if self._is_additive():
            return super()._additive_forward(x, names, *args, **kwargs)
        if self.has_torchs_forward:
            return self._convolve(x, self._kernel(names), self.groups, self._base.bias)
        with nullcontext() if torch.compiler.is_compiling() else _ONE_AT_A_TIME:
            weight = {"weight": self._kernel(names)}
            result = torch.func.functional_call(self.base_layer, weight, (x, *args), kwargs)
        return cast(Tensor, result)

    def _with_update(self, result: Tensor, x: Tensor, name: str) -> Tensor:
        if self._is_additive():
            return super()._with_update(result, x, name)
        return self._additive_forward(x, [name])

    def _kernel(self, names: list[str]) -> Tensor:
        """Return the kernel with adapters in it, as merging them would make it."""
        base = self._base
        weight: Tensor = base.weight
        if not self._is_whole():
            raise ValueError(
                f"The weight of a {type(base).__name__} is offloaded or sharded, so its adapted "
                "kernel cannot be built. Keep the layer on one device or drop it from "
                "`target_modules`."
            )
        for name in names:
            if name in self.paca_delta:
                weight = adapted_kernel(weight, self.update_of(name), self.groups)
        return weight

    @property
    def weight(self) -> Tensor:
        """The kernel that is in use: with the active adapters in it, or the base layer's own.

        Mixers with a fused causal convolution (Mamba, Qwen3-Next, LFM2) read their layer's weight
        and never call the layer; what they do with it is right, and trains the adapter.
        """
        weight: Tensor = self._base.weight
        if self.disable_adapters or self.merged_adapters or not self._is_whole():
            return weight
        return self._kernel(self.active_adapters)

    def _get_name(self) -> str:
        return type(self._base).__name__


def runs_torchs_forward(base: nn.Module) -> bool:
    """Whether a convolution does what torch's own class does, or is a subclass that differs."""
    kind: Any = type(base)
    return (kind.forward, kind._conv_forward) in _FORWARDS


def _pad_by_size(
    x: Tensor, kernel_size: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> Tensor:
    """Pad with zeros so that the output has ceil(size / stride) positions, the odd one at the end.

    Source: TensorFlow's padding "SAME".
    """
    pads: list[int] = []
    for size, k, step, d in zip(
        x.shape[-len(kernel_size) :], kernel_size, stride, dilation, strict=True
    ):
        total = max((math.ceil(size / step) - 1) * step + (k - 1) * d + 1 - size, 0)
        pads = [total // 2, total - total // 2, *pads]  # F.pad wants the last dimension first
    return F.pad(x, pads) if any(pads) else x
