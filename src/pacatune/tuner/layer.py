"""What every adapted layer has, whatever its base: deltas, columns, switching, copying."""

import copy
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from torch.nn import functional as F

from pacatune.format.options import IN_TENSORS, count_columns
from pacatune.format.tensors import INDICES, MIX
from pacatune.ops.columns import Update, adapted_columns, check_columns, mixed, widened
from pacatune.ops.whole import is_whole
from pacatune.residency import Residency
from pacatune.residency.watching import DeltaParameter, is_tracked, release
from pacatune.strategies import seed_for, select_columns
from pacatune.tuner.compat import TunerLayer, resolve_quantization_backend
from pacatune.tuner.config import PacaConfig
from pacatune.tuner.layout import Layout, layout_of

_ROUNDED_AGAIN = (
    "Merging into a quantised model rounds the weight of every adapted layer again, columns that "
    "were never trained included. Serve the adapter unmerged (`pacatune export` makes it a LoRA), "
    "or write a 16-bit model with `pacatune merge`, which reports the error."
)


class Delta(nn.Module):
    """Holds one adapter's trained update of one weight, in the shapes of `Update`.

    A module and not a bare parameter: TRL copies adapters by parameter names that contain
    `.default.`, FSDP1 wraps modules, and ZeRO-3 gathers when a module is called.
    """

    mix: DeltaParameter | None

    def __init__(self, shape: tuple[int, ...], mix_shape: tuple[int, ...] | None = None) -> None:
        super().__init__()
        # Where PEFT makes its adapters, which it moves to their base. Watched from the start: a
        # compiled graph would be made anew for another class.
        self.weight = DeltaParameter(torch.zeros(shape))
        mix = None if mix_shape is None else DeltaParameter(torch.zeros(mix_shape))
        self.register_parameter("mix", mix)

    def dense(self) -> Tensor:
        """Return the update of all columns, before scaling."""
        return self.weight if self.mix is None else mixed(self.weight, self.mix)

    def forward(
        self, columns: Tensor, scaling: float | None, apply: Callable[..., Tensor] = F.linear
    ) -> Tensor:
        """Apply scaling * delta as the weight of `apply`, in the dtype of `columns`.

        F.linear: columns (scaling * delta)^T, (..., C) -> (..., O). Without `scaling`, `apply` gets
        the update as it is.
        """
        if scaling is None:
            return apply(columns, self.dense())
        delta: Tensor = self.weight
        if self.mix is not None and apply is F.linear:
            columns = F.linear(columns, self.mix.to(columns.dtype))
        else:
            delta = self.dense()
        return apply(columns, (widened(delta) * scaling).to(columns.dtype))


class ColumnsByAdapter(BufferDict):
    """Adapter name -> (C,) int64 columns of one weight, checked where a file's come in.

    PEFT calls load_state_dict; transformers sets attributes, past PEFT and all that it checks.
    """

    def __init__(self, module_name: str, num_columns: int) -> None:
        self.module_name, self.num_columns = module_name, num_columns
        super().__init__(persistent=True)

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            self._check(name, value)
        super().__setattr__(name, value)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for name in self._buffers:
            if (loaded := state_dict.get(f"{prefix}{name}")) is not None:
                self._check(name, loaded)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _check(self, adapter_name: str, indices: Tensor) -> None:
        where = f"Adapter {adapter_name!r}: module {self.module_name!r}"
        check_columns(indices, self.num_columns, f"{where}: `{INDICES}`")


class PacaLayer(nn.Module, TunerLayer):
    """Per-adapter deltas and columns over one base layer.

    nn.Module stands first: `fully_shard` gives an instance another class, of the same layout alone.

    Attributes:
        paca_delta: Adapter name -> `Delta` whose `.weight` is (O, R), `.mix` (R, C) or None.
        paca_indices: Adapter name -> (C,) int64 sorted columns.
        r, paca_alpha, scaling: Adapter name -> its number; scaling = paca_alpha / r.
    """

    adapter_layer_names: tuple[str, ...] = ("paca_delta",)
    other_param_names: tuple[str, ...] = ("paca_indices", "r", "paca_alpha", "scaling")
    delta_class: type[Delta] = Delta
    parameter_name = "weight"  # of the base layer: what is adapted

    # Of PEFT's BaseTunerLayer, which has no types.
    active_adapters: list[str]
    get_base_layer: Callable[[], nn.Module]
    get_base_weight: Callable[[], Tensor]
    set_base_weight: Callable[[Tensor], None]
    _move_adapter_to_device_of_base_layer: Callable[[str], None]

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        name: str,
        config: PacaConfig,
        *,
        r: int,
        paca_alpha: float,
        columns: Any = None,
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        self.base_layer = base_layer
        base = self.get_base_layer()
        self.layout = layout_of(base, self.parameter_name) or Layout.of(base, self.parameter_name)
        self.paca_delta = nn.ModuleDict({})
        self.paca_indices = ColumnsByAdapter(name, self.layout.in_features)
        self.r: dict[str, int] = {}
        self.paca_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._kept: list[Any] = []  # what merging replaced, innermost first
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer(), **kwargs)
        self.shares_weight = False  # another module sees the same weight; set by the model
        self.residency: Residency | None = None
        self._attach()
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, name, config, r=r, paca_alpha=paca_alpha, columns=columns)

    def _attach(self) -> None:
        base_layer = self.base_layer
        if type(base_layer).forward is nn.Linear.forward and "weight" in base_layer._parameters:
            self.residency = Residency(base_layer)
            if self.shares_weight:
                self.residency.note_sharing()
            self.residency.is_merged = bool(self.merged_adapters)

    def __repr__(self) -> str:
        return "paca." + super().__repr__()

    @staticmethod
    def check_base(base_layer: nn.Module, name: str) -> None:
        """Refuse a base layer that cannot be adapted as it is."""

    @property
    def in_features(self) -> int:
        """I, the number of columns to choose from."""
        return self.layout.in_features

    @property
    def out_features(self) -> int:
        """O."""
        return self.layout.out_features

    def update_layer(
        self,
        adapter_name: str,
        name: str,
        config: PacaConfig,
        *,
        r: int,
        paca_alpha: float,
        columns: Any = None,
    ) -> None:
        """Add an adapter, or replace the one of that name; patterns are resolved.

        The module's name in the base model is part of the seed of its columns. They are given as
        (C,) numbers; IN_TENSORS: they will be loaded.
        """
        num_columns = self.layout.in_features
        self.layout.check(r, name)
        self.r[adapter_name], self.paca_alpha[adapter_name] = r, paca_alpha
        self.scaling[adapter_name] = paca_alpha / r
        num_trained = count_columns(num_columns, r, config.channels)
        if config.channels is None:
            delta = self.delta_class(self.layout.delta_shape(r))
        else:
            delta = self.delta_class(*self.layout.factor_shapes(r, num_trained))
        if not config.init_weights and not delta.weight.is_meta:
            nn.init.normal_(delta.weight, std=0.1)
        if delta.mix is not None and not delta.mix.is_meta:
            # As LoRA's A starts: uniformly within 1 / sqrt(number of inputs).
            bound = delta.mix.flatten(delta.weight.dim() - 1).shape[-1] ** -0.5
            generator = torch.Generator()
            generator.manual_seed(seed_for(config.random_seed or 0, f"{name}.{MIX}"))
            values = torch.rand(delta.mix.shape, generator=generator, device="cpu")
            with torch.no_grad():
                delta.mix.copy_((2 * values - 1) * bound)
        self.paca_delta[adapter_name] = delta
        if columns is None or columns == IN_TENSORS:
            # Of columns that will be loaded, only their number counts.
            seed = seed_for(0 if columns == IN_TENSORS else config.random_seed, name)
            weight = torch.empty(1, num_columns, device="meta")
            indices = select_columns("random", weight, num_trained, seed=seed)
        else:
            indices = torch.tensor(columns, device="cpu")
        self.paca_indices[adapter_name] = indices.fill_(-1) if columns == IN_TENSORS else indices
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def delta_of(self, adapter_name: str) -> Tensor:
        """Return one adapter's (O, C) update of all its columns, before scaling."""
        return cast(Delta, self.paca_delta[adapter_name]).dense()

    def update_of(self, adapter_name: str) -> Update:
        """Return one adapter's update."""
        delta = cast(Delta, self.paca_delta[adapter_name])
        indices, scaling = self.paca_indices[adapter_name], self.scaling[adapter_name]
        return Update(delta.weight, indices, scaling, delta.mix)

    @torch.no_grad()
    def replace_update(self, adapter_name: str, update: Update, rank: int) -> None:
        """Give an adapter of a rank other values; parameters stay where their shapes do."""
        holder = cast(Delta, self.paca_delta[adapter_name])
        old: Any = holder.weight
        for name, values in (("weight", update.delta), ("mix", update.mix)):
            own = getattr(holder, name)
            if values is None or own is None or own.shape != values.shape:
                is_trained = old.requires_grad
                new = None if values is None else DeltaParameter(values.to(old), is_trained)
                setattr(holder, name, new)
            else:
                own.copy_(values)
        self.paca_indices[adapter_name] = update.indices.to(old.device)
        self.r[adapter_name], self.scaling[adapter_name] = rank, update.scaling
        self.paca_alpha[adapter_name] = update.scaling * rank

    def why_additive(self) -> str | None:
        """Say why the columns are not in the base weight in training; None if they are.

        They are from the next training pass on, that is, and under FSDP2 in what it gathers.
        """
        if self.merged_adapters:
            return "an adapter is merged into its weight"
        if self._disable_adapters:
            return "its adapters are disabled"
        if len(self.active_adapters) != 1:
            return f"{len(self.active_adapters)} adapters are active"
        if self.quantization_backend is not None:
            return "its weight is quantised"
        return f"columns are written into the weights of torch.nn.Linear, not {self.layout.title}"

    def restore(self) -> None:
        """Put the pretrained columns back into the base weights, if adapted ones are there.

        Adapters are switched in all layers, as a rule: one launch serves those of one optimizer.
        """
        if self.residency is not None:
            self.residency.restore_together()

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the adapters on or off; off leaves the pretrained weight in place at once."""
        if not enabled:
            self.restore()
        super().enable_adapters(enabled)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Choose the active adapters; the weight is the pretrained one until the next forward."""
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

    # Merging: the adapted columns become the base weight, and can be taken out again bit for bit.
    #
    # What a merge overwrites is kept aside and copied back; nothing is ever subtracted, so no
    # number of merge and unmerge cycles drifts in any dtype. A quantised weight is dequantised,
    # changed and quantised again, and unmerging puts the original quantised object back.

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write adapters, the active ones if None, into the base weight.

        With `safe_merge`, a value that is not finite is refused before anything is changed.
        """
        before = len(self.merged_adapters)
        if self.residency is not None:
            self.residency.merging()
        try:
            for name in check_adapters_to_merge(self, adapter_names):
                if name in self.paca_delta:
                    self._merge_one(name, safe_merge)
                    self.merged_adapters.append(name)
        except BaseException:
            self.unmerge_to(before)
            raise
        if self.residency is not None and not self.merged_adapters:
            self.residency.unmerged()

    @torch.no_grad()
    def _merge_one(self, name: str, safe_merge: bool) -> None:
        weight = self._weight_to_merge()
        if not is_whole(weight, len(self.layout.dense_shape)):
            raise ValueError(
                f"Cannot merge into a weight of shape {tuple(weight.shape)} of which each process "
                "has a part. Save the adapter and merge it in one process (`pacatune merge`)."
            )
        indices = self.paca_indices[name].to(weight.device)
        originals = self.layout.read_columns(weight, indices)
        update = self.layout.oriented(self.delta_of(name).to(weight.device))
        merged = adapted_columns(originals, update, self.scaling[name])
        if safe_merge and not merged.isfinite().all():
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {name} seems to be broken"
            )
        if self.quantization_backend is not None:
            self._kept.append(_snapshot(self.base_layer))
            weight = weight.clone()
        elif self.shares_weight:
            self._kept.append(getattr(self.base_layer, self.parameter_name))
            weight = weight.clone()
        else:
            self._kept.append((indices, originals))
        self._put_columns_(weight, indices, merged)
        if self.quantization_backend is not None:
            warnings.warn(_ROUNDED_AGAIN, stacklevel=2)
            self.set_base_weight(weight)
        elif self.shares_weight:  # the other module keeps the pretrained weight
            adapted = nn.Parameter(weight, requires_grad=False)
            setattr(self.base_layer, self.parameter_name, adapted)

    def _weight_to_merge(self) -> Tensor:
        """Return what is merged into: of weights that can be, the parameter itself.

        Changes of a parameter are counted, so that autograd refuses a backward pass through what
        was computed before.
        """
        if self.quantization_backend is not None:
            return self.get_base_weight()
        return cast(Tensor, getattr(self.get_base_layer(), self.parameter_name))

    def _put_columns_(self, weight: Tensor, indices: Tensor, columns: Tensor) -> None:
        self.layout.put_columns_(weight, indices, columns)
        if self.residency is not None and isinstance(weight, nn.Parameter):  # not a copy of it
            self.residency.num_own_versions += 1

    def unmerge(self) -> None:
        """Take all merged adapters out of the base weight again, bit for bit."""
        self.unmerge_to(0)

    @torch.no_grad()
    def unmerge_to(self, number: int) -> None:
        """Take out what was merged last, until as many adapters are merged."""
        while len(self._kept) > number:
            kept = self._kept[-1]
            if isinstance(kept, dict):
                self.base_layer.__dict__.update(kept)
            elif isinstance(kept, nn.Parameter):
                setattr(self.base_layer, self.parameter_name, kept)
            else:
                indices, originals = kept
                weight = self._weight_to_merge()
                originals = originals.to(weight)
                self._put_columns_(weight, indices.to(weight.device), originals)
            self._kept.pop()
            del self.merged_adapters[len(self._kept) :]
        if self.residency is not None and not self.merged_adapters:
            self.residency.unmerged()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return W' - W of one adapter as a dense weight: (O, I), or (I, O) for Conv1D."""
        update = self.delta_of(adapter).detach() * self.scaling[adapter]
        dense = self.layout.oriented(update.new_zeros(self.layout.dense_shape))
        columns = self.layout.oriented(update)
        self.layout.put_columns_(dense, self.paca_indices[adapter], columns)
        return dense

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the base layer without anything of ours, merged if asked for."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        if self.residency is not None:
            self.residency.close()
        release(self.base_layer)
        return self.base_layer

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["residency"] = None  # belongs to this object; a copy makes its own
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        cast(Any, super()).__setstate__(state)
        for parameter in self.paca_delta.parameters():
            is_tracked(
                parameter
            )  # whose fused steps torch does not notice: pickled it is a plain one
        self._attach()


def _snapshot(module: nn.Module) -> dict[str, Any]:
    """What a module consists of, by reference; putting it back undoes any replacement."""
    state = {name: value for name, value in module.__dict__.items() if name != "training"}
    parameters = state.pop("_parameters")
    state["_parameters"] = parameters.copy()
    if "state" in state:  # bitsandbytes' 8-bit layers keep the quantised weight in it
        state["state"] = copy.copy(state["state"])
    return state
