"""PaCA as a PEFT method. Importing this package registers it."""

import peft  # noqa: F401 (its first import runs our hook, which needs `registration` whole)

from pacatune.tuner.registration import ensure_peft_type, register

ensure_peft_type()

from pacatune.tuner.config import PacaConfig  # noqa: E402 (the config needs the enum member)
from pacatune.tuner.layer import PacaLayer  # noqa: E402
from pacatune.tuner.linear import Linear  # noqa: E402
from pacatune.tuner.model import PacaModel  # noqa: E402

register(PacaConfig, PacaModel)

__all__ = ["Linear", "PacaConfig", "PacaLayer", "PacaModel"]
