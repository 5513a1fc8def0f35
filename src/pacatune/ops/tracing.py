"""Whether somebody records the operations of a forward pass instead of, or beside, running them.

What is recorded must be plain operations on the pretrained weight: a graph that holds hand-written
gradients cannot be saved, and one that was recorded while columns were in the weight would count
them twice, or not at all, once they are gone.
"""

import torch


def is_traced() -> bool:
    """Whether torch.compile, a torch.func transform or a tracer is at work."""
    return (
        torch.compiler.is_compiling()  # which cannot ask the following
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_tracing()
        # Asked here, too: every pass does, and a Python call costs more than the answer.
        or (torch._C._len_torch_dispatch_stack() > 0 and _is_in_make_fx())
    )


NOT_LEAN = "Call `pacatune.lean.disable(model)` before."
_TRANSFORMS = "Use torch.func's transforms, for which layers run plain operations."


def refuse_second_derivative(name: str, fix: str = _TRANSFORMS) -> None:
    """Refuse to go on in a backward pass that is itself recorded: what it keeps is too little.

    Raises:
        RuntimeError: If it is, which is what `create_graph=True` asks for.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(f"{name} has no second derivative (`create_graph=True`). {fix}")


def is_recorded() -> bool:
    """Whether torch.jit.trace, torch.onnx's exporter on it, or make_fx is at work."""
    if torch.compiler.is_compiling():  # which cannot ask the following
        return False
    if torch._C._is_tracing():
        return True
    return _is_in_make_fx()


def is_exported() -> bool:
    """Whether torch.export or make_fx is at work, whose graphs go on reading the weights."""
    if not torch.compiler.is_compiling():
        return _is_in_make_fx()
    if torch.compiler.is_dynamo_compiling():  # up to torch 2.9 it takes `is_exporting()` for True
        return _dynamo_exports()
    # Without that function (torch 2.6), nothing else compiles outside of dynamo.
    return not hasattr(torch.compiler, "is_exporting") or torch.compiler.is_exporting()


def _dynamo_exports() -> bool:
    from torch._dynamo.symbolic_convert import InstructionTranslator

    return bool(InstructionTranslator.current_tx().export)


# Dynamo runs it while it traces. The decorator would import dynamo, which takes a second.
_dynamo_exports._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _is_in_make_fx() -> bool:
    if torch._C._len_torch_dispatch_stack() == 0:
        return False
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    return get_proxy_mode() is not None
