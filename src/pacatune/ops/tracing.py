"""Whether somebody records the operations of a forward pass instead of, or beside, running them.

What is recorded must be plain operations on the pretrained weight: a graph that holds hand-written
gradients cannot be saved, and one that was recorded while columns were in the weight would count
them twice, or not at all, once they are gone.
"""

import torch

__all__ = ["is_exported", "is_recorded", "is_traced"]


def is_traced() -> bool:
    """Whether torch.compile, a torch.func transform or a tracer is at work."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or is_recorded()
    )


def is_recorded() -> bool:
    """Whether torch.jit.trace, torch.onnx's exporter on it, or make_fx is at work."""
    if torch.compiler.is_compiling():  # which cannot ask the following
        return False
    if torch._C._is_tracing():
        return True
    return _is_in_make_fx()


def is_exported() -> bool:
    """Whether torch.export or make_fx is at work, whose graphs go on reading the weights."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return _is_in_make_fx()


def _is_in_make_fx() -> bool:
    if torch._C._len_torch_dispatch_stack() == 0:
        return False
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    return get_proxy_mode() is not None
