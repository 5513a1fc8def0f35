"""What the elements of a quantised weight can be, and the files that hold them as codes."""

from pathlib import Path
from typing import Any

from pacatune.files.journal import is_gguf
from pacatune.files.json_file import read_json_object

DEQUANTISED = ("fp8", "compressed-tensors")
"""transformers' names of quantisations in safetensors whose codes can be trained: such a model is
dequantised as it is loaded."""


def is_packed(model: str | Path) -> bool:
    """Whether a local model's weights are codes that can be trained: a GGUF, or such a folder."""
    path = Path(model) / "config.json"
    if not path.is_file():
        return is_gguf(model)
    section: Any = read_json_object(path).get("quantization_config")
    return isinstance(section, dict) and section.get("quant_method") in DEQUANTISED
