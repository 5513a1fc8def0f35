"""What hand-written gradients cannot do."""

import torch

__all__ = ["refuse_second_derivative"]


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
