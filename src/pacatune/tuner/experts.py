"""Adapted weights of mixtures of experts: the fused, three-dimensional parameters of transformers.

Their columns are never written: all experts together are the largest tensors of a model, and each
step uses a part of them. The tokens take the same steps as in transformers' own implementations
(sort by expert, first product, the module's own gate, second product, weigh, sum), with our
products in place of theirs.
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
from pacatune.tuner.compat import register_experts
from pacatune.tuner.layer import Delta
from pacatune.tuner.layout import has_known_experts, is_transposed, takes_all_tokens
from pacatune.tuner.parameter import (
    ParameterLayer,
    ParameterOwner,
    in_place_of_forward,
    names_to_apply,
)


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


class ExpertParameter(ParameterLayer):
    """An adapted parameter of an experts module: (E, O, I), or (E, I, O) if that is transposed.

    All experts train the same columns; delta is (E, O, R).
    """

    delta_class = ExpertDelta

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


class Experts(ParameterOwner):
    """In place of an experts module, some of whose parameters are adapted."""

    layer_class = ExpertParameter

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the experts module's: hidden states, chosen experts and their weights -> (N, I)."""
        layers: _Layers = {}
        for name, module in self._modules.items():
            names = names_to_apply(module)
            if names:
                layers[name] = (cast(ExpertParameter, module), names)
        experts: Any = self.base_layer
        if not layers:
            return experts(*args, **kwargs)
        if not has_hooks(experts.__dict__):
            if "has_gate" in experts.__dict__:
                return _forward(experts, layers, *args, **kwargs)
            if takes_all_tokens(experts):
                return _forward_of_all(experts, layers, *args, **kwargs)
        with _running_ours(experts, layers):
            return experts(*args, **kwargs)


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


_IMPLEMENTATION = "pacatune"


class _Config:
    """An experts module's configuration that asks for our forward, for one call."""

    _experts_implementation = _IMPLEMENTATION

    def __init__(self, config: Any, layers: _Layers) -> None:
        self.config, self.layers, self.has_run = config, layers, False


def _forward_from_config(experts: Any, *args: Any, **kwargs: Any) -> Tensor:
    ours: _Config = experts.config
    ours.has_run, experts.config = True, ours.config
    return _forward(experts, ours.layers, *args, **kwargs)


register_experts(_IMPLEMENTATION, _forward_from_config)


@contextmanager
def _running_ours(module: nn.Module, layers: _Layers) -> Iterator[None]:
    """Let whatever surrounds an experts module (hooks, offloading, FSDP) run, and then our forward.

    transformers asks the module's configuration for the implementation.
    """
    experts: Any = next(m for m in module.modules() if has_known_experts(m))
    if takes_all_tokens(experts):
        with in_place_of_forward(experts, functools.partial(_forward_of_all, experts, layers)):
            yield
        return
    original = experts.config
    experts.config = ours = _Config(original, layers)
    try:
        yield
    finally:
        experts.config = original
    if not ours.has_run:
        raise RuntimeError(
            f"The forward of {type(experts).__name__} has been replaced by one that passes by "
            "transformers' experts interface, and so by the adapter. Adapt the model before, or "
            "leave the experts out of `target_parameters`."
        )
