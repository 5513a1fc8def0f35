"""What a merged model must have: the right columns, and outputs that differ by rounding alone."""

import torch
from torch import Tensor, nn

from pacatune.adapters.folder import Adapter
from pacatune.adapters.probe import OutputError, output_error, run_probe
from pacatune.adapters.quantized import MergeBase
from pacatune.adapters.target import read_target_columns

_FACTOR = 4  # docs/decisions.md has what was measured.


def check_columns(model: nn.Module, adapter: Adapter, pretrained: dict[str, Tensor]) -> None:
    """Hold every merged column against round(W + scaling * delta).

    Args:
        model: The merged model.
        adapter: What was merged.
        pretrained: Module name -> its trained columns before, (out, r).

    Raises:
        ValueError: If one differs by more than rounding.
    """
    for name, (delta, indices) in adapter.modules.items():
        merged = read_target_columns(model, name, indices)
        update = delta.to(merged.device, torch.float64) * adapter.scaling(name)
        expected = pretrained[name].double() + update
        # A float32 sum rounds its product first, so it may be off by 1.5 units in the last place.
        info = torch.finfo(merged.dtype)
        allowed = 2 * info.eps * torch.maximum(expected.abs(), pretrained[name].abs().double())
        if not ((merged.double() - expected).abs() <= allowed + info.eps * info.tiny).all():
            raise ValueError(
                f"module {name!r}: the merged columns are not W + scaling * delta in "
                f"{merged.dtype}; nothing was written. Another package may have changed PEFT."
            )


@torch.no_grad()
def rounding_limit(
    model: nn.Module, inputs: list[dict[str, Tensor]], outputs: list[Tensor]
) -> float:
    """Measure how far the outputs may be from right ones by rounding alone, absolutely.

    Every weight is moved at random within its rounding, as one more merge would, and the change of
    the outputs is taken four times: kernels that round elsewhere are as far apart as that once.

    Args:
        model: A merged model, in the dtype that it was written in; spoiled afterwards.
        inputs: What `probe_inputs` returns.
        outputs: What `run_probe` gave for them.
    """
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1 and parameter.is_floating_point():
            part = torch.rand(parameter.shape, generator=generator).to(parameter.device) - 0.5
            weight = parameter.double()
            parameter.copy_(weight + weight.abs() * torch.finfo(parameter.dtype).eps * part)
    return _FACTOR * output_error(outputs, run_probe(model, inputs)).max_absolute


def check_outputs(
    error: OutputError, limit: float, effect: float, dtype: str, onto: MergeBase
) -> float:
    """Refuse a merged model whose outputs are not those of the adapter.

    Args:
        error: The error of the written model's outputs.
        limit: What `rounding_limit` returns; infinite where weights are rounded to few bits.
        effect: Largest absolute change of the outputs by the adapter.
        dtype: That the weights were rounded to, for messages.
        onto: Base that was merged onto.

    Returns:
        The limit that was kept: what rounding explains, and no more than half of `effect`.

    Raises:
        ValueError: If they differ by more.
    """
    found = f"the merged model's outputs differ from the unmerged ones by {error.max_absolute:.1e}"
    # Both written so that NaN fails.
    if not error.max_absolute <= limit:
        raise ValueError(
            f"{found} ({error.max_relative:.1e} of their size), and rounding to {dtype} explains "
            f"{limit:.1e} at most; nothing was written. Another package may have changed PEFT or "
            "transformers: compare with a fresh environment."
        )
    if effect and not error.max_absolute <= effect / 2:
        fix = "--base dequantized" if onto == "nf4" else "--dtype float32"
        raise ValueError(
            f"{found} by rounding to {dtype}, more than half of what the adapter changes "
            f"({effect:.1e}); nothing was written. Merge with {fix}, serve the adapter unmerged, "
            "or take the loss unmeasured with --no-verify."
        )
    return min(limit, effect / 2) if effect else limit


def notes_on_change(change: float, effect: float, onto: MergeBase) -> list[str]:
    """Return what the user should know if the chosen base itself changes the outputs.

    Args:
        change: Largest absolute change by the base, with the same adapter.
        effect: The same by the adapter.
        onto: Base that was merged onto.
    """
    if effect == 0:
        return ["the adapter changes no output of the probe: it may be untrained."]
    if change == 0:
        return []
    sizes = f"by up to {change:.1e}, the adapter by {effect:.1e}"
    if onto == "original":
        note = f"the original weights, which were not trained with, change outputs {sizes}"
        advice = "; compare the losses of this model and of one merged onto `dequantized`"
        return [f"{note}{advice if change > effect / 2 else ''}."]
    return [
        "the quantised layers round activations as well, which no merged model repeats: that "
        f"changes outputs {sizes}."
    ]
