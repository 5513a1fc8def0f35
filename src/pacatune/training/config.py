"""One run, declared once: the command line, YAML files and Python build the same object."""

import copy
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from trl import SFTConfig

from pacatune.data import DataConfig
from pacatune.format.patterns import check_patterns
from pacatune.methods import TEXT_METHODS
from pacatune.precision import Dtype
from pacatune.selection import strategies
from pacatune.training.any_run import settle
from pacatune.training.arguments import SharedDefaults
from pacatune.training.option_checks import refuse_foreign_options


@dataclass(kw_only=True)
class ModelConfig:
    """The pretrained model. Code that comes with a model is never executed.

    Raises:
        ValueError: If `path` is missing.
    """

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

    attn_implementation: str | None = None
    """Attention: eager, sdpa, flash_attention_2, ...; the model's own choice where null."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError(
                f"`model.path` is {self.path!r}; give a hub id or the folder of a model."
            )


@dataclass(kw_only=True)
class PacaSection:
    """Options of the methods `paca` and `qpaca`; see `pacatune.PacaConfig`, which checks them."""

    r: int = 16
    """Number of trained input columns of each weight."""

    paca_alpha: float = 16
    """Scale of the update: it is multiplied by paca_alpha / r."""

    target_modules: list[str] | str | None = None
    """Names of modules, a regular expression, or `all-linear` (every linear layer but the output
    head). Where null, the linear layers of the repeated blocks."""

    target_parameters: list[str] | None = None
    """Names of parameters without a layer of their own, such as the fused weights of experts:
    `[experts.gate_up_proj, experts.down_proj]`. Adapted beside `target_modules`."""

    exclude_modules: list[str] | str | None = None
    """Names or a regular expression of modules to leave out."""

    selection: str | dict[str, list[int]] = "random"
    """Strategy that chooses the columns: random, weight_norm, weight_norm_smallest, gradient,
    activation, weight_activation, gradient_activation, activation_qr, activation_leverage. Or the
    columns themselves, by the module's name or pattern; or the folder or .safetensors file of a
    PaCA adapter, whose columns are taken."""

    selection_batches: int = 100
    """How many batches of the training data strategies with gradients or activations look at, over
    all processes."""

    share_columns: bool = False
    """Choose the same columns for layers with the same input: query, key and value; gate and up."""

    budget: Literal["equal", "gradient"] = "equal"
    """Ranks of the layers: all `r`, or by each layer's gradient over `selection_batches` batches,
    with as many parameters in all."""

    random_seed: int = 42
    """Seed of the choice of the columns."""

    layers_to_transform: list[int] | int | None = None
    """Numbers of the layers to adapt; all where null."""

    layers_pattern: list[str] | str | None = None
    """Name of the list of layers, where it is not a usual one."""

    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Ranks of modules that differ from `r`: name or regular expression to rank."""

    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Alphas of modules that differ from `paca_alpha`: name or regular expression to alpha."""

    modules_to_save: list[str] | None = None
    """Modules trained in full and saved with the adapter."""

    bias: Literal["none", "all", "paca_only"] = "none"
    """Biases that are trained."""

    columns_from: Literal["dequantized", "original"] = "dequantized"
    """On a quantised base: whether columns start from its rounded weights or the checkpoint's."""

    def __post_init__(self) -> None:
        check_patterns(vars(self), "paca.")
        if self.selection_batches < 1:
            raise ValueError(
                f"`paca.selection_batches` ({self.selection_batches}) must be at least 1."
            )
        if 0 in (self.paca_alpha, *self.alpha_pattern.values()):
            raise ValueError(
                f"`paca.paca_alpha` ({self.paca_alpha}) and `paca.alpha_pattern` "
                f"({self.alpha_pattern}) must not be 0: nothing would be trained."
            )
        if self.budget not in ("equal", "gradient"):
            raise ValueError(f"`paca.budget` ({self.budget!r}) must be 'equal' or 'gradient'.")
        if self._names_a_file():
            # Absolute, so that the run can be repeated from elsewhere.
            self.selection = str(Path(str(self.selection)).expanduser().resolve())

    def _names_a_file(self) -> bool:
        name = self.selection
        if not isinstance(name, str) or name in strategies():
            return False
        return name.endswith(".safetensors") or "/" in name or Path(name).is_dir()

    def adapter_options(self) -> dict[str, Any]:
        """Return the options as PacaConfig takes them, with columns that a file gives.

        Raises:
            FileNotFoundError: If `selection` looks like a file and is none.
            ValueError: If the file holds no columns.
        """
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in ("selection_batches", "share_columns", "budget"):
            del values[name]
        if self._names_a_file():
            from pacatune.selection import load_columns

            values["selection"] = load_columns(str(self.selection))
        return copy.deepcopy(values)


@dataclass(kw_only=True)
class LoraSection:
    """Options of the methods that begin with LoRA; `peft.LoraConfig` checks them."""

    r: int = 8
    """Rank."""

    lora_alpha: int = 16
    """Scale of the update: it is multiplied by lora_alpha / r."""

    lora_dropout: float = 0.0
    """Dropout on the input of A."""

    target_modules: list[str] | str | None = None
    """As `paca.target_modules`."""

    target_parameters: list[str] | None = None
    """As `paca.target_parameters`."""

    exclude_modules: list[str] | str | None = None
    """As `paca.exclude_modules`."""

    layers_to_transform: list[int] | int | None = None
    """As `paca.layers_to_transform`."""

    layers_pattern: list[str] | str | None = None
    """As `paca.layers_pattern`."""

    rank_pattern: dict[str, int] = field(default_factory=dict)
    """As `paca.rank_pattern`."""

    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """As `paca.alpha_pattern`."""

    modules_to_save: list[str] | None = None
    """As `paca.modules_to_save`."""

    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead."""

    def __post_init__(self) -> None:
        check_patterns(vars(self), "lora.")
        for name in ("r", "lora_alpha"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"`lora.{name}` ({getattr(self, name)}) must be above 0; raise it."
                )
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"`lora.lora_dropout` ({self.lora_dropout}) must be in [0, 1).")


@dataclass(kw_only=True)
class MosLoraSection:
    """Options of the method `moslora` beside those of `lora`; `pacatune.MosLoraConfig` checks."""

    mixer_init: Literal["kaiming", "orthogonal"] = "kaiming"
    """How the r x r mixer between A and B starts."""


@dataclass
class TrainingConfig(SharedDefaults, SFTConfig):  # type: ignore[misc]
    """Every option of TRL's SFTConfig, with these defaults.

    Raises:
        ValueError: If an option is set that this recipe decides elsewhere or does not offer.
    """

    learning_rate: float | None = None
    """Peak learning rate; where null, that of the method: 5e-4 paca and qpaca, 1e-5 full,
    2e-4 the others."""

    def check_options(self) -> None:
        """Refuse options that this recipe decides elsewhere, and numbers that train nothing."""
        super().check_options()
        refuse_foreign_options(self)


@dataclass(kw_only=True)
class RunConfig:
    """One fine-tuning run.

    Raises:
        ValueError: If the sections contradict each other.
        TypeError: If `training` is not a TrainingConfig.
    """

    command: ClassVar[str] = "train"
    methods: ClassVar[tuple[str, ...]] = TEXT_METHODS

    method: str = "paca"
    """How to fine-tune: `paca`, `qpaca` (PaCA on a quantised base, nf4 unless `model.quantization`
    says otherwise), `lora`, `lora_dropout`, `dora`, `moslora` (LoRA with a trained mixer), `qlora`
    (LoRA on a quantised base), or `full` (every weight)."""

    model: ModelConfig
    """The pretrained model."""

    data: DataConfig
    """Training and evaluation data."""

    paca: PacaSection = field(default_factory=PacaSection)
    """Options of the methods paca and qpaca."""

    lora: LoraSection = field(default_factory=LoraSection)
    """Options of the methods lora, lora_dropout, dora, moslora and qlora."""

    moslora: MosLoraSection = field(default_factory=MosLoraSection)
    """Options of the method moslora."""

    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Every option of TRL's SFTConfig."""

    lean: Literal["auto", "off", "require"] = "auto"
    """Keep less for backward, exactly: gated MLPs, norms, attention and loss as `pacatune.lean`
    makes them. `auto`: what can be; `require`: refuse a model that keeps more than it must."""

    early_stopping_patience: int | None = None
    """Stop after this many evaluations without a lower eval_loss, and keep the best adapter."""

    def __post_init__(self) -> None:
        settle(self, TrainingConfig)
