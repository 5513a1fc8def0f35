"""Whether a weight is whole and here: the one answer for whatever reads weights."""

from typing import Any


def is_shared_out(weight: Any) -> bool:
    """Whether each process has a part: a DTensor (FSDP2), or of ZeRO-3."""
    return hasattr(weight, "placements") or hasattr(weight, "ds_id")


def is_whole(weight: Any, num_dims: int) -> bool:
    """Whether all values of a weight of so many dimensions are here.

    They are not if it is on the meta device, a DTensor, or has another form: of FSDP1, which shows
    a view of a flat tensor, and ZeRO-3, which leaves nothing there until it is gathered.
    """
    is_here = not weight.is_meta and weight.dim() == num_dims
    return is_here and not hasattr(weight, "placements")


def whole_shape(weight: Any) -> tuple[int, ...]:
    """Return the shape of the whole, of which ZeRO-3 may have taken the values away."""
    return tuple(getattr(weight, "ds_shape", weight.shape))
