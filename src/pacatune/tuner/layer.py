"""The PEFT layer: per-adapter deltas and columns over one base layer, and the choice between two equal forward passes.

    resident   the columns are written into the weight (residency.py), then one GEMM: training and eager inference
    additive   base_layer(x) + x[..., indices] (scaling * delta)^T: wherever the weight must not be touched

Additive serves several active adapters, mixed batches, torch.compile, hooks on the base layer, quantised, tied, sharded and
offloaded weights. Both give the same numbers.
"""

from functools import partial
from typing import Any, cast

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from pacatune.functional import apply_paca_linear
from pacatune.residency import DeltaParameter, Residency
from pacatune.selection import seed_for, select_columns
from pacatune.tuner.config import PacaConfig
from pacatune.tuner.merging import MergeMixin

__all__ = ["Delta", "Linear", "PacaLayer"]


class Delta(nn.Module):
    """Holds one adapter's trained update of one weight.

    A module and not a bare parameter: TRL copies adapters by parameter names that contain `.default.`, FSDP1 wraps
    modules, and ZeRO-3 gathers when a module is called.
    """

    def __init__(self, out_features: int, rank: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out_features, rank))

    def forward(self, columns: Tensor, scaling: float) -> Tensor:
        """Return columns (scaling * delta)^T: (..., R) -> (..., O), in the dtype of `columns`."""
        return F.linear(columns, (self.weight * scaling).to(columns.dtype))


class PacaLayer(MergeMixin, BaseTunerLayer):
    """What every adapted layer has, whatever its base: deltas, columns, switching.

    Attributes:
        paca_delta: Adapter name -> `Delta` whose `.weight` is (O, R).
        paca_indices: Adapter name -> (R,) int64 sorted columns.
        r, paca_alpha, scaling: Adapter name -> its number; scaling = paca_alpha / r.
    """

    adapter_layer_names: tuple[str, ...] = ("paca_delta",)
    other_param_names: tuple[str, ...] = ("paca_indices", "r", "paca_alpha", "scaling")

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        self.base_layer = base_layer
        self.paca_delta = nn.ModuleDict({})
        self.paca_indices = BufferDict({}, persistent=True)
        self.r: dict[str, int] = {}
        self.paca_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._kept: list[Any] = []  # what merging replaced, innermost first
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer(), **kwargs)
        self.in_features, self.out_features = _get_in_out_features(self.get_base_layer())
        self.column_dim = 0 if isinstance(self.get_base_layer(), Conv1D) else 1
        self.shares_weight = False  # another module sees the same weight; set by the model
        self.residency: Residency | None = None
        self._attach()

    def _attach(self) -> None:
        base_layer = self.base_layer
        if type(base_layer).forward is nn.Linear.forward and "weight" in base_layer._parameters:
            self.residency = Residency(base_layer)
            self.residency.is_blocked = self.shares_weight
            self.residency.is_merged = bool(self.merged_adapters)

    def update_layer(self, adapter_name: str, name: str, config: PacaConfig, **ranks: Any) -> None:
        """Add an adapter, or replace the one of that name.

        Args:
            adapter_name: The adapter's name.
            name: The module's name in the base model; part of the seed of the columns.
            config: The adapter's configuration.
            **ranks: `r` and `paca_alpha` for this module, patterns resolved.

        Raises:
            ValueError: If `r` exceeds the in_features of the base layer.
        """
        r, paca_alpha = ranks["r"], ranks["paca_alpha"]
        if r > self.in_features:
            raise ValueError(
                f"`r` ({r}) must be in [1, in_features={self.in_features}] for {name!r}; lower it, set "
                f"`rank_pattern`, or drop {name!r} from `target_modules`."
            )
        self.restore()
        self.r[adapter_name], self.paca_alpha[adapter_name] = r, paca_alpha
        self.scaling[adapter_name] = paca_alpha / r
        delta = Delta(self.out_features, r)
        if not config.init_weights and not delta.weight.is_meta:
            nn.init.normal_(delta.weight, std=0.5)
        self.paca_delta[adapter_name] = delta
        shape = torch.empty(self.out_features, self.in_features, device="meta")
        self.paca_indices[adapter_name] = select_columns(
            config.selection, shape, r, seed=seed_for(config.random_seed, name)
        )
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def restore(self) -> None:
        """Put the pretrained columns back into the base weight, if adapted ones are there."""
        if self.residency is not None:
            self.residency.restore()

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the adapters on or off; off leaves the pretrained weight in place at once."""
        if not enabled:
            self.restore()
        super().enable_adapters(enabled)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Choose the active adapters; until the next forward pass the weight is the pretrained one."""
        self.restore()
        super().set_adapter(adapter_names, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter, and its columns from the base weight."""
        self.restore()
        super().delete_adapter(adapter_name)

    def scale_layer(self, scale: float) -> None:
        """Multiply the update of the active adapters by `scale`."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo `scale_layer`: divide by `scale`, or without it go back to paca_alpha / r."""
        for name in self.active_adapters:
            if name in self.scaling:
                original = self.paca_alpha[name] / self.r[name]
                self.scaling[name] = original if scale is None else self.scaling[name] / scale

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set one adapter's factor to `scale` times paca_alpha / r."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self.paca_alpha[adapter] / self.r[adapter]

    def __getstate__(self) -> dict[str, Any]:
        self.restore()
        state = self.__dict__.copy()
        state["residency"] = None  # belongs to this object; a copy makes its own
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        cast(nn.Module, super()).__setstate__(state)
        self._attach()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if self.residency is not None:
            self.residency.look()  # the columns may be other ones afterwards
        cast(Any, super())._load_from_state_dict(*args, **kwargs)


class Linear(PacaLayer, nn.Module):
    """An adapted nn.Linear, Conv1D (transformers) or quantised linear layer."""

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, name: str, config: PacaConfig, **kwargs: Any
    ) -> None:
        nn.Module.__init__(self)
        ranks = {key: kwargs.pop(key) for key in ("r", "paca_alpha")}
        PacaLayer.__init__(self, base_layer, **kwargs)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, name, config, **ranks)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the layer with its active adapters: (..., I) -> (..., O).

        Args:
            x: Input of the base layer.
            *args: Passed to the base layer.
            **kwargs: Passed to the base layer, except `adapter_names`: one adapter name (or
                "__base__") per row of the batch, for inference.
        """
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is not None:
            return self._mixed_batch_forward(x, adapter_names, *args, **kwargs)
        if self._disable_adapters:
            if self.merged_adapters:
                self.unmerge()
            return cast(Tensor, self.base_layer(x, *args, **kwargs))
        if self.merged_adapters:
            return cast(Tensor, self.base_layer(x, *args, **kwargs))
        active = self._active_adapter
        names = [active] if isinstance(active, str) else active
        if len(names) == 1 and not args and not kwargs and not torch.compiler.is_compiling():
            result = self._resident_forward(x, names[0])
            if result is not None:
                return result
        return self._additive_forward(x, names, *args, **kwargs)

    def _resident_forward(self, x: Tensor, name: str) -> Tensor | None:
        """The one-GEMM forward pass, or None where the weight must not be written."""
        residency = self.residency
        holder = self.paca_delta._modules.get(name)
        if residency is None or holder is None:
            return None
        base = self.base_layer.__dict__
        if base["_parameters"] is not residency.parameters or _has_hooks(base):
            return None
        delta = holder._parameters["weight"]
        indices = self.paca_indices._buffers[name]
        scaling = self.scaling[name]
        if not residency.write(delta, indices, scaling):  # type: ignore[arg-type]
            return None
        weight = residency.weight
        bias = dict.get(residency.parameters, "bias")
        if not torch.is_grad_enabled():
            return F.linear(x, weight, bias)  # type: ignore[arg-type]
        if torch.is_autocast_enabled(x.device.type) and x.is_floating_point() and x.itemsize < 8:
            x = x.to(torch.get_autocast_dtype(x.device.type))
        is_resident = partial(residency.write, delta, indices, scaling)  # type: ignore[arg-type]
        return cast(
            Tensor, apply_paca_linear(x, weight, delta, indices, scaling, bias, is_resident)
        )

    def _additive_forward(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        result = self._base_forward(x, *args, **kwargs)
        for name in names:
            if name in self.paca_delta:
                columns = x.index_select(-1, self.paca_indices[name]).to(result.dtype)
                result = result + self.paca_delta[name](columns, self.scaling[name])
        return result

    def _base_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the base layer on the pretrained weight."""
        if torch.compiler.is_compiling() and self.residency is not None:
            if self.residency.is_written:
                # A traced graph cannot restore, so it undoes the columns in a copy; the next optimiser step or look ends this.
                weight = self.residency.pretrained_weight()
                return F.linear(x, weight, self.base_layer.bias)  # type: ignore[arg-type]
        else:
            self.restore()
        result = self.base_layer(x, *args, **kwargs)
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        return cast(Tensor, result)

    def _mixed_batch_forward(
        self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any
    ) -> Tensor:
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged_adapters:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call "
                "`unmerge_adapter` first."
            )
        result = self._base_forward(x, *args, **kwargs)
        for name in dict.fromkeys(adapter_names):
            if name in self.paca_delta:
                rows = [row for row, row_name in enumerate(adapter_names) if row_name == name]
                columns = x[rows].index_select(-1, self.paca_indices[name]).to(result.dtype)
                result[rows] += self.paca_delta[name](columns, self.scaling[name])
        return result

    def __repr__(self) -> str:
        return "paca." + super().__repr__()


def _has_hooks(base: dict[str, Any]) -> bool:
    """Whether the base layer's own call does more than its forward (hooks, accelerate's offload)."""
    return bool(
        base["_forward_hooks"]
        or base["_forward_pre_hooks"]
        or base["_backward_hooks"]
        or base["_backward_pre_hooks"]
        or "forward" in base
    )
