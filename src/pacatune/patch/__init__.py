"""Patches: an adapter as an exact edit of a checkpoint, applied and taken back bit for bit.

    edit          the data: columns before and after; torch alone
    memory        apply and revert in a model's weights
    file          patch files
    base          whether a checkpoint is the one a patch is for
    folder        apply and revert in model folders, in place or not
    difference    what two checkpoints differ in
    adapter       from a PaCA adapter and back
    packed        from a PaCA adapter, as codes of a file of few bits

docs/serving.md says how to use them. A patch holds the bits that `ops.columns.adapted_columns`
gives, which are those of training, merging and serving.
"""

from typing import TYPE_CHECKING

from pacatune.grid.columns import WeightColumns
from pacatune.lazy import import_later
from pacatune.patch.difference import Difference, diff
from pacatune.patch.edit import Patch, stack
from pacatune.patch.file import is_patch, load, save
from pacatune.patch.folder import FolderResult, apply_in_place, apply_to_folder, recover
from pacatune.patch.memory import apply, revert

if TYPE_CHECKING:
    from pacatune.patch.adapter import make, to_adapter

__all__ = [
    "Difference",
    "FolderResult",
    "Patch",
    "WeightColumns",
    "apply",
    "apply_in_place",
    "apply_to_folder",
    "diff",
    "is_patch",
    "load",
    "make",
    "recover",
    "revert",
    "save",
    "stack",
    "to_adapter",
]

# It needs PEFT; a patch in memory or on a server does not wait for it.
__getattr__, __dir__ = import_later(__name__, __all__, (".adapter",))
