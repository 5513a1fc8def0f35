"""Why columns must not be written into a weight: the one place that decides it.

Where they must not, the layer adds their product instead, and `residency_report` says why.
"""

import sys
import threading
from typing import Any

from torch import nn

from pacatune.ops.columns import Update
from pacatune.residency.watching import WeightParameter, num_tensors_on, owns_its_memory

PLAIN = (nn.Parameter, WeightParameter)
NUM_OWN_REFERENCES = 3
"""To a weight: the guarded dictionary's, Residency.weight, and getrefcount's argument."""


def flaw_of(weight: Any) -> str | None:
    """Return why columns can never be in what stands there, frozen or not."""
    if type(weight) not in PLAIN:
        return "its weight is no plain parameter"
    if weight.is_meta:
        return "its weight has no values yet"
    if weight.is_inference():
        return "its weight was made in inference mode"
    return None if owns_its_memory(weight) else "its weight is a view into a larger buffer"


def why_not_written(state: Any, update: Update) -> str | None:
    """Return why the columns must not be written into W now; None if they may.

    Args:
        state: The `Residency` of the weight.
        update: Its every change will have to be noticed.

    Raises:
        RuntimeError: If somebody changed the weight in place while columns were in it.
    """
    if state.forbidden is not None:
        return state.forbidden
    weight = state.find_weight()
    if weight is None:
        flaw = state.flaw(dict.get(state.parameters or {}, "weight"))
        return "its weight is trained itself" if flaw is None else flaw or None
    if state.is_merged:
        return "an adapter is merged into its weight"
    if update.delta.device != weight.device:
        return f"its weight is on {weight.device}, its update on {update.delta.device}"
    if weight.is_cpu and weight.untyped_storage().is_shared():
        return "its weight is in memory that processes share"
    if state.kept is not None and not state.is_unchanged():
        state.refuse_changed()
        state.kept = None
    if weight._use_count() > 1:
        return "an autograd graph holds its weight"
    num_others = num_tensors_on(weight) - (1 if state.kept is None else 2)
    if num_others > state.num_sharing:
        return "somebody holds a tensor in the memory of its weight"
    if state.looker not in (None, threading.get_ident()):
        del weight
        if sys.getrefcount(state.weight) > NUM_OWN_REFERENCES:
            return "another thread holds its weight"
        state.looker = None
    is_tracked = state.tracks(update.delta) and (update.mix is None or state.tracks(update.mix))
    if not is_tracked:
        return "somebody holds the `.data` of its update, or that is no plain parameter"
    return None
