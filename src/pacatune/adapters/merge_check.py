"""What a merged model must have: the right columns, and outputs that differ by rounding only."""

import torch
from torch import Tensor, nn

from pacatune.adapters.folder import Adapter
from pacatune.adapters.probe import TOLERANCES as FLOAT32_TOLERANCES
from pacatune.adapters.probe import OutputError, output_error
from pacatune.adapters.quantized import MergeBase
from pacatune.adapters.target import read_target_columns

__all__ = ["TOLERANCES", "check_columns", "check_outputs", "weigh_error"]

# Here the whole model computes in the dtype as well: SmolLM2-135M in bfloat16 is 0.062 away from
# itself in float32.
TOLERANCES = {**FLOAT32_TOLERANCES, torch.float16: 2e-2, torch.bfloat16: 1e-1}


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


def check_outputs(
    unmerged: list[Tensor], merged: list[Tensor], dtype: torch.dtype, *, factor: int
) -> None:
    """Compare a merged model's outputs with the unmerged ones.

    Args:
        unmerged: Of `run_probe`.
        merged: The same of the merged model.
        dtype: That the merged model computes in.
        factor: How many times its rounding is allowed.

    Raises:
        ValueError: If they differ by more.
    """
    error, tolerance = output_error(unmerged, merged), factor * TOLERANCES[dtype]
    # Written so that NaN fails.
    if not error.max_relative <= tolerance:
        raise ValueError(
            f"the merged model's outputs differ from the unmerged ones by {error.max_relative:.1e} "
            f"of their size; rounding in {dtype} explains {tolerance:.0e}. Nothing was "
            "written. Merge in more bits: `dtype`=float32 (--dtype float32)."
        )


def weigh_error(
    error: OutputError, effect: float, onto: MergeBase, is_other: bool, rounds_inputs: bool
) -> list[str]:
    """Return what the user should know of an error that is large against the adapter's effect.

    Args:
        error: Of the outputs, against the unmerged model's.
        effect: Largest absolute change of the outputs by the adapter.
        onto: Base that was merged onto.
        is_other: Whether the adapter was trained on another one, a quantised.
        rounds_inputs: Whether the layers it was trained on round activations too.
    """
    if effect == 0:
        return ["the adapter changes no output of the probe: it may be untrained."]
    if error.max_absolute > effect / 2 and onto == "nf4":
        return [
            f"rounding to few bits again ({error.max_absolute:.1e}) is not small against what the "
            f"adapter changes ({effect:.1e}); serve it unmerged or merge onto `dequantized`."
        ]
    if error.max_absolute > effect / 2 and is_other:
        return [
            f"the original weights change the outputs more ({error.max_absolute:.1e}) than the "
            f"adapter does ({effect:.1e}): they are not those that it was trained with. Compare "
            "the losses of this model and of one merged onto `dequantized`."
        ]
    if error.max_absolute > effect / 2 and rounds_inputs:
        return [
            f"the quantised layers round activations as well, which no merged model repeats: that "
            f"({error.max_absolute:.1e}) is not small against what the adapter changes "
            f"({effect:.1e})."
        ]
    if error.max_absolute > effect / 2:
        return [
            f"rounding ({error.max_absolute:.1e}) is not small against what the adapter changes "
            f"({effect:.1e}); `dtype`=float32 keeps it."
        ]
    return []
