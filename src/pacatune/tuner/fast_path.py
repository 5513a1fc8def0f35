"""Keeps torch's fused inference of transformer encoders from passing by the adapter.

nn.TransformerEncoderLayer evaluates by one kernel that reads the weights of its layers and never
calls them; nn.TransformerEncoder then hands nested tensors to its layers. Each has an attribute
that decides about it and about nothing else.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from pacatune.tuner.layer import PacaLayer

_SWITCHES: dict[type[nn.Module], str] = {
    nn.TransformerEncoderLayer: "activation_relu_or_gelu",
    nn.TransformerEncoder: "use_nested_tensor",
}
_KEPT = "_paca_fast_path"


def forbid_fast_path(model: nn.Module, *, everywhere: bool = False) -> None:
    """Let every encoder in which something is adapted call its layers, or every one."""
    for module in model.modules():
        for kind, switch in _SWITCHES.items():
            if not isinstance(module, kind):
                continue
            if everywhere or any(isinstance(m, PacaLayer) for m in module.modules()):
                module.__dict__.setdefault(_KEPT, getattr(module, switch))
                setattr(module, switch, False)


def allow_fast_path(model: nn.Module) -> None:
    """Undo `forbid_fast_path`."""
    for module in model.modules():
        for kind, switch in _SWITCHES.items():
            if isinstance(module, kind) and _KEPT in module.__dict__:
                setattr(module, switch, module.__dict__.pop(_KEPT))


@contextmanager
def without_fast_path(model: nn.Module) -> Iterator[None]:
    """Let every encoder call its layers for a while, so that hooks on them see what passes."""
    forbid_fast_path(model, everywhere=True)
    try:
        yield
    finally:
        allow_fast_path(model)
