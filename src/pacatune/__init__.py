"""Fine-tune a few columns of each pretrained weight in place: PaCA as a first-class PEFT method.

`import pacatune` costs nothing but makes PaCA known to PEFT, whether PEFT was imported before or
will be after.
"""

from typing import Any

from pacatune._peft_hook import register_with_peft
from pacatune.lazy import import_later

__version__ = "0.1.0"

__all__ = [
    "PacaConfig",
    "PacaModel",
    "__version__",
    "residency_report",
    "resident",
]

register_with_peft()

_find, __dir__ = import_later(
    __name__, __all__, (".residency", ".tuner", ".tuner.residency_report")
)


def __getattr__(name: str) -> Any:
    if name in __all__:
        # PEFT first, as in every other thread: two that begin at both ends wait for each other.
        import peft  # noqa: F401
    return _find(name)
