"""The sections of a run that say what adapter is trained: `paca`, `lora` and `moslora`."""

import copy
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from pacatune.format.options import Columns, check_sizes
from pacatune.format.patterns import check_patterns
from pacatune.names import choose

# Sections that only some methods read.
ADAPTER_SECTIONS = ("paca", "lora", "moslora")

# Options of `paca` that say how to train an adapter, not what it is.
OF_THE_RUN = ("selection_batches", "share_columns", "budget", "reselect_every", "active_columns")


Budget = Literal["equal", "gradient", "attention", "mlp", "output"]


@dataclass(kw_only=True)
class PacaSection:
    """Options of the methods `paca` and `qpaca`; see `pacatune.PacaConfig`, which checks them."""

    r: int = 16
    """Number of trained input columns of each weight."""

    paca_alpha: float = 16
    """Scale of the update: it is multiplied by paca_alpha / r."""

    use_rslora: bool = False
    """Scale by paca_alpha / sqrt(r) instead."""

    target_modules: list[str] | str | None = None
    """Names of modules, a regular expression, or `all-linear` (every linear layer but the output
    head). Where null, the linear layers of the repeated blocks."""

    target_parameters: list[str] | None = None
    """Names of parameters without a layer of their own, such as the fused weights of experts:
    `[experts.gate_up_proj, experts.down_proj]`. Adapted beside `target_modules`."""

    exclude_modules: list[str] | str | None = None
    """Names or a regular expression of modules to leave out."""

    groups: int = 1
    """Number of equal parts of each weight's rows (outputs) that train `r` columns of their own:
    the same number of parameters, an update of rank up to `groups` times `r`."""

    selection: str | Columns = "random"
    """Strategy that chooses the columns: random, weight_norm, weight_norm_smallest, gradient,
    activation, weight_activation, gradient_activation, activation_qr, activation_leverage. Or the
    columns themselves, by the module's name or pattern; or the folder or .safetensors file of a
    PaCA adapter, whose columns are taken."""

    selection_batches: int = 100
    """How many batches of the training data are looked at where columns are chosen by gradients or
    activations, or normalised by their inputs; over all processes."""

    normalize: Literal["none", "input", "weight"] = "none"
    """Normalise the optimizer's steps by column, with rates that are fixed before training.
    `input`: smaller steps where a column's inputs are large, so that each changes the output by as
    much. `weight`: steps in proportion to the column's norm."""

    share_columns: bool = False
    """Choose the same columns for layers with the same input: query, key and value; gate and up."""

    budget: Budget = "equal"
    """Where the columns are, with as many parameters in all: `r` in each layer; ranks by each
    layer's gradient over `selection_batches` batches; or in the layers of attention, of MLPs, or
    in the output projections of both alone."""

    reselect_every: int | None = None
    """Optimizer steps after which `active_columns` other columns of each layer are trained; what
    the others have learned stays. Null: all `r` are trained in every step."""

    active_columns: int | None = None
    """Columns trained at a time, below `r`; with `reselect_every`."""

    random_seed: int = 42
    """Seed for choosing the columns."""

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
        check_sizes(self)
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
        choose(self.budget, get_args(Budget), option="paca.budget")
        if self.groups > 1 and self.share_columns:
            raise ValueError(
                f"`paca.groups` ({self.groups}) have columns of their own in each layer, and "
                "`paca.share_columns` would give layers the same; set one of them."
            )
        if (self.reselect_every is None) != (self.active_columns is None):
            raise ValueError(
                f"`paca.reselect_every` ({self.reselect_every}) and `paca.active_columns` "
                f"({self.active_columns}) need each other; set both, or none."
            )
        if self.reselect_every is not None and self.reselect_every < 1:
            raise ValueError(f"`paca.reselect_every` ({self.reselect_every}) must be at least 1.")
        if self.active_columns is not None and not 0 < self.active_columns < self.r:
            raise ValueError(
                f"`paca.active_columns` ({self.active_columns}) must be at least 1 and below "
                f"`paca.r` ({self.r}), the columns that take turns."
            )
        if self._names_a_file():
            # Absolute, so that the run can be repeated from elsewhere.
            self.selection = str(Path(str(self.selection)).expanduser().resolve())

    def _names_a_file(self) -> bool:
        name = self.selection
        if not isinstance(name, str):
            return False
        if not (name.endswith(".safetensors") or "/" in name or Path(name).is_dir()):
            return False
        from pacatune.strategies import strategies

        return name not in strategies()

    def adapter_options(self) -> dict[str, Any]:
        """Return the options as PacaConfig takes them, with columns that a file gives."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in OF_THE_RUN:
            del values[name]
        if self._names_a_file():
            from pacatune.selection import load_columns

            values["selection"] = load_columns(str(self.selection))
            if self.normalize != "none":
                values["column_rates"] = _rates_in(Path(str(self.selection)), self.normalize)
        return copy.deepcopy(values)


def _rates_in(path: Path, normalize: str) -> dict[str, list[Any]] | None:
    """Return the rates of an adapter whose steps were normalised in the same way, or None."""
    from pacatune.adapters.folder import CONFIG_NAME, read_config
    from pacatune.files.plain import find_file

    if not (path / CONFIG_NAME).is_file():
        return None
    saved = read_config(find_file(path, CONFIG_NAME))
    return saved.column_rates if saved.normalize == normalize else None


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
