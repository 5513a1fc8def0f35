"""Fine-tune a few columns of each pretrained weight in place: PaCA as a first-class PEFT method.

`import pacatune` costs nothing but makes PaCA and MosLoRA known to PEFT, whether PEFT was imported
before or will be after.
"""

from typing import Any

from pacatune._moved import find_moved_modules
from pacatune._peft_hook import register_with_peft

__version__ = "0.1.0"

__all__ = [
    "MosLoraConfig",
    "PacaConfig",
    "PacaModel",
    "__version__",
    "residency_report",
    "resident",
]

register_with_peft()
find_moved_modules()


def __getattr__(name: str) -> Any:
    if name in __all__:
        # PEFT first, as in every other thread: two that begin at both ends wait for each other.
        import peft  # noqa: F401
    if name in ("PacaConfig", "PacaModel"):
        from pacatune import tuner

        return getattr(tuner, name)
    if name == "resident":
        from pacatune.residency import resident

        return resident
    if name == "residency_report":
        from pacatune.tuner.residency_report import residency_report

        return residency_report
    if name == "MosLoraConfig":
        from pacatune.tuner.moslora import MosLoraConfig

        return MosLoraConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
