"""The sections of a run that say what is trained: the model, and its adapter."""

import copy
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from pacatune.format.options import PACA_RANK, PacaChoices, PacaOptions, TargetOptions
from pacatune.format.patterns import check_patterns
from pacatune.names import check_choices, suggest
from pacatune.precision import Dtype

# Sections that only some methods read.
ADAPTER_SECTIONS = ("paca", "lora")


@dataclass(kw_only=True)
class ModelConfig:
    """The pretrained model. Code that comes with a model is never executed."""

    path: str = ""
    """Hub id or local folder of a causal language model. Required."""

    revision: str | None = None
    """Branch, tag or commit of a hub model."""

    dtype: Dtype = "auto"
    """Type of the weights. `auto`: the checkpoint's, but float32 for full fine-tuning and where
    the device computes in the checkpoint's type slowly."""

    quantization: Literal["nf4", "fp4", "int8"] | None = None
    """Hold the frozen weights in 4 bits (nf4, fp4) or 8 (int8), by bitsandbytes; null: as they
    are. The method paca is then QPaCA."""

    double_quantization: bool = True
    """With 4 bits, quantise the scales of the weights too."""

    packed: bool | None = None
    """Keep the matrices of a GGUF file, or of a folder in FP8 or INT4, as they are there; each is
    decoded for its products. That takes the memory of the file in place of 16 bits, and the result
    is the same, bit for bit. Null: on a GPU, where the run can."""

    attn_implementation: str | None = None
    """Attention: eager, sdpa, flash_attention_2, ...; the model's own choice where null."""

    def __post_init__(self) -> None:
        check_choices(self, "model.")
        if not self.path:
            raise ValueError(
                f"`model.path` is {self.path!r}; give a hub id or the folder of a model."
            )


@dataclass(kw_only=True)
class PacaSection(PacaChoices):
    """Options of the methods `paca` and `qpaca`: those of `pacatune.PacaConfig`, and of the run.

    Here `r` and `paca_alpha` are 16, where `PacaConfig` has 8. As `selection`, the folder or
    .safetensors file of a PaCA adapter, whose columns are taken, may be given too.
    """

    r: int = PACA_RANK
    """Number of trained input columns of each weight. Costs 16 bytes per column and output, and one
    kept channel per column and token; 8 to 64. All, of a weight that has fewer."""

    paca_alpha: float = 16
    """Scale of the update, as the factor paca_alpha / r; under Adam it scales the learning rate.
    Leave it at 16 whatever `r` is."""

    selection_batches: int = 100
    """How many batches of the training data, over all processes, are looked at where columns are
    chosen by gradients."""

    def __post_init__(self) -> None:
        try:
            # As an adapter has them; which file gives columns is seen when it is read.
            PacaOptions(**self._choices() | ({"selection": "random"} if self.from_file else {}))
        except (TypeError, ValueError) as error:
            raise ValueError(f"section `paca`: {error}") from error
        if self.selection_batches < 1:
            raise ValueError(
                f"`paca.selection_batches` ({self.selection_batches}) must be at least 1."
            )
        if 0 in (self.paca_alpha, *self.alpha_pattern.values()):
            raise ValueError(
                f"`paca.paca_alpha` ({self.paca_alpha}) and `paca.alpha_pattern` "
                f"({self.alpha_pattern}) must not be 0: nothing would be trained."
            )

    @property
    def from_file(self) -> bool:
        """Whether `selection` is no strategy, and so an adapter's folder or file."""
        from pacatune.strategies import FIXED, strategies

        name = self.selection
        return isinstance(name, str) and name not in (FIXED, *strategies())

    def _choices(self) -> dict[str, Any]:
        return {option.name: getattr(self, option.name) for option in fields(PacaChoices)}

    def adapter_options(self) -> dict[str, Any]:
        """Return the options as PacaConfig takes them, with columns that a file gives."""
        values = self._choices()
        if self.from_file:
            from pacatune.selection import load_columns
            from pacatune.strategies import strategies

            path = Path(str(self.selection)).expanduser()
            if not path.exists():
                raise ValueError(
                    f"`paca.selection` ({self.selection!r}) is no strategy, and no file or folder "
                    f"of this name exists; {suggest(str(self.selection), strategies())}"
                )
            values["selection"] = load_columns(path)
        return copy.deepcopy(values)


@dataclass(kw_only=True)
class LoraSection(TargetOptions):
    """Options of the methods that begin with LoRA: those of `peft.LoraConfig`, which checks them.

    Here `lora_alpha` is 16, where `LoraConfig` has 8.
    """

    r: int = 8
    """Rank."""

    lora_alpha: int = 16
    """Scale of the update: it is multiplied by lora_alpha / r."""

    lora_dropout: float = 0.0
    """Dropout on the input of A."""

    def __post_init__(self) -> None:
        check_patterns(vars(self), "lora.")
