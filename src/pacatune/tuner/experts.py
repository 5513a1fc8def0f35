"""Adapted weights of mixtures of experts: the fused, three-dimensional parameters of transformers.

    Experts               in place of the experts module, which is its `base_layer`
      gate_up_proj        an ExpertParameter, one for each adapted parameter
      down_proj

An adapted parameter is found and saved under the name that it has in the base model. The columns
are never written: all experts together are the largest tensors of a model, and each step uses a
part of them. The tokens take the same steps as in transformers' own implementations (sort by
expert, first product, the module's own gate, second product, weigh, sum), with our products in
place of theirs.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from pacatune.ops.columns import Update
from pacatune.ops.experts import experts_linear, paca_experts_linear, paca_experts_update
from pacatune.tuner.additive import has_hooks
from pacatune.tuner.config import PacaConfig
from pacatune.tuner.layer import Delta, PacaLayer
from pacatune.tuner.layout import has_known_experts, is_transposed, takes_all_tokens


class ExpertDelta(Delta):
    """Holds one adapter's (E, O, R) update of the weights of all experts."""

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        weight: Tensor | None,
        indices: Tensor,
        scaling: float,
        offsets: Tensor,
        **options: Any,
    ) -> Tensor:
        """Apply the experts' linear maps with the update; without `weight` the update alone."""
        update = Update(self.weight, indices, scaling, self.mix)
        if weight is None:
            del options["is_transposed"]
            return paca_experts_update(x, update, offsets, **options)
        return paca_experts_linear(x, weight, update, offsets, **options)


class ExpertParameter(PacaLayer):
    """An adapted parameter of an experts module: (E, O, I), or (E, I, O) if that is transposed.

    All experts train the same columns; delta is (E, O, R). It holds the deltas and is never called.
    `base_layer` is the module. It is not registered here, since its other parameters share it.
    """

    delta_class = ExpertDelta

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, name: str, *args: Any, **options: Any
    ) -> None:
        self.parameter_name = name.rpartition(".")[2]
        super().__init__(base_layer, adapter_name, name, *args, **options)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "base_layer":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def get_base_weight(self) -> Tensor:
        """Return the parameter's data."""
        parameter: Tensor = getattr(self.get_base_layer(), self.parameter_name)
        return parameter.data

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> Any:
        weight = self.get_base_weight()
        return weight.device, weight.dtype

    def extra_repr(self) -> str:
        """Give the shape of the parameter."""
        return f"shape={tuple(self.get_base_weight().shape)}"

    def names_to_apply(self) -> list[str]:
        """Return the adapters to be added to the weight, in order.

        A layer that is merged although it is disabled is unmerged.
        """
        if self._disable_adapters and self.merged_adapters:
            self.unmerge()
        if self._disable_adapters or self.merged_adapters:
            return []
        return [name for name in self.active_adapters if name in self.paca_delta]

    def project(
        self, x: Tensor, weight: Tensor, offsets: Tensor, names: list[str], **options: Any
    ) -> Tensor:
        """Apply the linear maps of all experts with some adapters: (S, I) -> (S, O)."""
        terms: Iterator[Tensor] = (
            self.paca_delta[name](
                x,
                weight if name == names[0] else None,
                self.paca_indices[name],
                self.scaling[name],
                offsets,
                **options,
            )
            for name in names
        )
        return functools.reduce(torch.add, terms)


class Experts(nn.Module):
    """In place of an experts module, some of whose parameters are adapted.

    It runs the module's forward in our own words, because the module's own reads its parameters.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    def adapt(
        self, adapter_name: str, name: str, config: PacaConfig, **ranks: Any
    ) -> ExpertParameter:
        """Add an adapter to a parameter."""
        parameter_name = name.rpartition(".")[2]
        layer = self._modules.get(parameter_name)
        if isinstance(layer, ExpertParameter):
            layer.update_layer(adapter_name, name, config, **ranks)
        else:
            layer = ExpertParameter(self.base_layer, adapter_name, name, config, **ranks)
            self.add_module(parameter_name, layer)
        return layer

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the module without anything of ours, merged if asked for."""
        for layer in self.children():
            if merge and isinstance(layer, ExpertParameter):
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.base_layer

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the experts module's: hidden states, chosen experts and their weights -> (N, I)."""
        layers: _Layers = {}
        for name, module in self._modules.items():
            if isinstance(module, ExpertParameter) and (names := module.names_to_apply()):
                layers[name] = (module, names)
        if not layers:
            return cast(Tensor, self.base_layer(*args, **kwargs))
        experts: Any = next(m for m in self.base_layer.modules() if has_known_experts(m))
        run = _forward_of_all if takes_all_tokens(experts) else _forward
        ours = functools.partial(run, experts, layers)
        if experts is self.base_layer and not has_hooks(experts.__dict__):
            return ours(*args, **kwargs)
        with _in_place_of_forward(experts, ours):
            return cast(Tensor, self.base_layer(*args, **kwargs))


_Layers = dict[str, tuple[ExpertParameter, list[str]]]


def _forward(
    experts: Any, layers: _Layers, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Run an experts module with adapted parameters on (N, I) tokens of (N, K) experts each."""
    num_tokens, top_k = top_k_index.shape
    expert_ids, order, offsets = _sort_by_expert(top_k_index, experts.num_experts)
    is_grouped = experts.config._experts_implementation != "eager"

    def project(name: str, x: Tensor) -> Tensor:
        y = _project(experts, layers, name, x, offsets, is_grouped)
        return y + getattr(experts, f"{name}_bias")[expert_ids] if experts.has_bias else y

    x = hidden_states.index_select(0, order // top_k)
    if experts.has_gate:
        x = experts._apply_gate(project("gate_up_proj", x))
    else:
        x = experts.act_fn(project("up_proj", x))
    x = project("down_proj", x)
    if getattr(experts, "has_post_expert_norm", False):
        x = experts.post_expert_norm(x)
    x = x * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    by_token = x.index_select(0, order.argsort()).view(num_tokens, top_k, x.shape[-1])
    return by_token.sum(1).to(hidden_states.dtype)


def _forward_of_all(experts: Any, layers: _Layers, hidden_states: Tensor) -> Tensor:
    """Run experts with adapted parameters of which each gets every token, (E * N, I)."""
    num_experts = len(experts.gate_up_proj)
    numbers = torch.arange(1, num_experts + 1, dtype=torch.int32, device=hidden_states.device)
    offsets = numbers * (len(hidden_states) // num_experts)
    x = _project(experts, layers, "gate_up_proj", hidden_states, offsets, True)
    gate, up = x.chunk(2, -1)
    return _project(experts, layers, "down_proj", up * experts.act_fn(gate), offsets, True)


def _project(
    experts: Any, layers: _Layers, name: str, x: Tensor, offsets: Tensor, is_grouped: bool
) -> Tensor:
    """Apply one parameter's linear maps, adapted or not: (S, I) -> (S, O)."""
    weight = getattr(experts, name)
    # FSDP1 shows frozen weights as views into a flat one that requires a gradient.
    if weight.requires_grad and weight.is_leaf and torch.is_grad_enabled():
        raise ValueError(
            f"`{name}` of {type(experts).__name__} requires a gradient, which adapted experts "
            "do not compute; freeze it or delete the adapter."
        )
    options = {"is_transposed": is_transposed(experts), "is_grouped": is_grouped}
    if name in layers:
        layer, names = layers[name]
        return layer.project(x, weight, offsets, names, **options)
    return experts_linear(x, weight, offsets, **options)


def _sort_by_expert(top_k_index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the (S,) experts in order, the places they come from, and where each one's end."""
    expert_ids, order = top_k_index.reshape(-1).sort(stable=True)
    next_experts = torch.arange(1, num_experts + 1, device=order.device)
    # Without a look at the values, which would make a GPU wait.
    return expert_ids, order, torch.searchsorted(expert_ids, next_experts, out_int32=True)


@contextmanager
def _in_place_of_forward(module: nn.Module, forward: Any) -> Iterator[None]:
    """Let whatever surrounds a module (hooks, offloading, FSDP) run, and then `forward`."""
    if "forward" in module.__dict__ and "_old_forward" not in module.__dict__:
        raise RuntimeError(
            f"The forward of {type(module).__name__} has been replaced, and would pass by the "
            "adapter. Adapt the model before, or leave the experts out of `target_parameters`."
        )
    original = module.__dict__.get("_old_forward")  # of accelerate's offloading
    place = "forward" if original is None else "_old_forward"
    module.__dict__[place] = forward
    try:
        yield
    finally:
        if original is None:
            del module.__dict__[place]
        else:
            module.__dict__[place] = original
