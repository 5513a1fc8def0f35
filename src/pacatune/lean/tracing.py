"""Whether hand-written gradients are out of the question now."""

import torch

__all__ = ["is_traced", "refuse_second_derivative"]


def is_traced() -> bool:
    """Whether torch.compile or a torch.func transform is at work: then plain operations only."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def refuse_second_derivative(name: str) -> None:
    """Refuse to go on in a backward pass that is itself recorded.

    Raises:
        RuntimeError: If it is, which is what `create_graph=True` asks for.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} has no second derivative; call `pacatune.lean.disable(model)` before "
            "`create_graph=True`."
        )
