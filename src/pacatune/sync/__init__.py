"""Columns from a trainer to whoever serves the model: r/I of the weights after each step.

    message       where the columns are, and what is in them
    source        the trainer's side, whose processes may each have a part of the weights
    adapted       what is trained
    placement     where a server that joins and splits tensors has them
    receiver      the server's side
    transport     in process, files
    delta_folder  versions of a checkpoint, for SkyRL, modelexpress and others
    steps         training on the codes of a file that is served
    elements      elements at flat places, for vLLM's own loader and verl's

docs/rl.md says how to use them.
"""

from typing import TYPE_CHECKING

from pacatune.lazy import import_later
from pacatune.sync.delta_folder import DeltaFolder, SkyrlDeltaFolder
from pacatune.sync.elements import ElementPatch, element_patches
from pacatune.sync.message import Columns, ColumnSet, Positions
from pacatune.sync.receiver import ColumnReceiver
from pacatune.sync.transport import File, InProcess, Transport

if TYPE_CHECKING:
    from pacatune.sync.source import ColumnSource
    from pacatune.sync.steps import GridSteps

__all__ = [
    "ColumnReceiver",
    "ColumnSet",
    "ColumnSource",
    "Columns",
    "DeltaFolder",
    "ElementPatch",
    "File",
    "GridSteps",
    "InProcess",
    "Positions",
    "SkyrlDeltaFolder",
    "Transport",
    "element_patches",
]

# It needs PEFT; a server does not wait for that.
__getattr__, __dir__ = import_later(__name__, __all__, (".source", ".steps"))
