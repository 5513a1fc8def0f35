"""What the configuration of a PaCA adapter says, and the rules it keeps; PEFT is not needed.

`PacaConfig` is the same as one of PEFT's configurations. Files are read with this one, so that
looking into an adapter does not wait for PEFT.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from pacatune.format.patterns import check_patterns
from pacatune.names import choices_of, choose

NEEDS_US = "PACATUNE"
FILE_TYPES = ("PACA", NEEDS_US)
"""`peft_type` in adapter_config.json: of adapters that PEFT's own PaCA reads too, and of those that
only ours does. There PEFT without pacatune stops, where it would give wrong outputs otherwise."""

# Options that PEFT's own PaCA does not have, and that change what an adapter computes.
_OWN_OPTIONS = (
    "channels",
    "rank_pattern",
    "alpha_pattern",
    "trainable_token_indices",
    "target_parameters",
)
RANDOM = "random"
IN_TENSORS: Literal["paca_indices"] = "paca_indices"
"""`columns` of a configuration whose adapter has not been loaded yet: its file of tensors has them,
by this name."""
Columns = dict[str, list[int]]
"""Module name -> its columns."""
_MAX_DEPTH = 8
# The largest float32, in which updates are scaled; beyond it torch raises an error of its own.
_MOST = (2 - 2**-23) * 2.0**127


@dataclass
class TargetOptions:
    """What of a model an adapter is for; PaCA and LoRA have these options in common."""

    target_modules: list[str] | str | None = None
    """Names, a regular expression, or `all-linear` (every linear layer but the output head). Where
    null, the architecture's default: the linear layers of the repeated blocks."""
    exclude_modules: list[str] | str | None = None
    """Names or a regular expression of modules to leave out."""
    target_parameters: list[str] | None = None
    """Names of parameters without a layer of their own, such as the fused weights of experts:
    `[experts.gate_up_proj, experts.down_proj]`. Adapted beside `target_modules`."""
    layers_to_transform: list[int] | int | None = None
    """Number or numbers of the layers to adapt; all where null."""
    layers_pattern: list[str] | str | None = None
    """Name of the list of layers that `layers_to_transform` counts in, where it is not a usual
    one."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Ranks of modules that differ from `r`: name or regular expression to rank."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Alphas of modules that differ: name or regular expression to alpha."""
    modules_to_save: list[str] | None = None
    """Modules trained in full and saved with the adapter, such as a new head."""
    use_rslora: bool = False
    """Scale the update by alpha / sqrt(r) instead of alpha / r."""


PACA_RANK = 16
"""Columns of each weight that a run of PaCA trains by default."""


@dataclass
class PacaChoices(TargetOptions):
    """The options of a PaCA adapter that are chosen, and not filled in when it is made."""

    r: int = 8
    """Number of trained input columns of each weight. Costs 16 bytes of delta, gradient and Adam's
    moments per column and output, and one kept channel per column and token; 8 to 64."""
    channels: int | float | None = None
    """Number of trained columns of each weight, or their share, 1.0 of all, whose update then has
    rank `r`: a product of (O, r) and (r, channels), as LoRA's. Null: `r` columns, each with an
    update of its own. Weights with fewer columns train all of them, and none fewer than `r`."""
    paca_alpha: float = 8
    """Scale of the update, as the factor paca_alpha / r; under Adam it scales the learning rate.
    With 16 the best rates of r from 8 to 64 lay within a factor of two in our study."""
    selection: str | Columns = RANDOM
    """Strategy that chooses the columns: random, weight_norm, weight_norm_smallest, gradient, or a
    registered one. Or the columns themselves, by the module's name or pattern. No strategy was
    better than random in our studies; gradient costs a pass over data before training."""
    random_seed: int | None = 42
    """Chooses the columns, together with each module's name. Null: drawn from torch's global
    generator when the adapter is made, and recorded; processes that train together must agree."""
    bias: Literal["none", "all", "paca_only"] = "none"
    """Which biases are trained: none, all, or those of the adapted modules. Patches and syncs
    refuse trained ones."""
    columns_from: Literal["dequantized", "original"] = "dequantized"
    """What the columns of a quantised base start from: its own, rounded weights, or those of the
    checkpoint that it was quantised from, which start exact but fit one rounding of the base."""


@dataclass
class PacaOptions(PacaChoices):
    """The keys of a PaCA adapter's adapter_config.json; see `PacaConfig`.

    Columns that are given as `selection` are kept in `columns`, and `selection` is then "fixed".
    With `use_rslora`, `paca_alpha` and `alpha_pattern` hold, once the adapter is made, what gives
    this scale as alpha / r, so that every reader is right.

    Raises:
        ValueError: If a value is out of its range or contradicts another one.
    """

    task_type: str | None = None
    """What the model does, such as CAUSAL_LM: decides which of PEFT's classes wraps it."""
    peft_type: str | None = None
    """The method, filled in."""
    auto_mapping: dict[str, Any] | None = None
    """Class and module of a base without a task type, filled in by PEFT."""
    peft_version: str | None = None
    """The PEFT that made it, filled in."""
    base_model_name_or_path: str | None = None
    """The base model, filled in when the adapter is made."""
    revision: str | None = None
    """Branch, tag or commit of the base on the hub."""
    inference_mode: bool = False
    """Whether the adapter is only used: its weights then ask for no gradients."""
    init_weights: bool = True
    """True starts at the pretrained weights. False starts at random deltas, for tests."""
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    """Token ids (or embedding's name -> ids) whose embeddings are trained and saved too."""
    base_quantization: dict[str, Any] | None = None
    """How the base was quantised; filled in when the adapter is made."""
    columns: Columns | Literal["paca_indices"] | None = None
    """Module name or regular expression -> its columns; filled in when they are not
    random. In a file "paca_indices", the tensors that hold them."""
    selection_options: dict[str, Any] | None = None
    """What the columns were chosen from, such as the number of batches; filled in."""
    needs_pacatune_for: list[str] | None = None
    """Kinds of adapted modules that PEFT's own PaCA does not adapt, or wrongly; filled in when the
    adapter is saved."""

    def __post_init__(self) -> None:
        """Check every value that can be checked without the model."""
        self._check_kinds()
        check_sizes(self)
        if self.random_seed is not None and type(self.random_seed) is not int:
            raise ValueError(
                f"`random_seed` ({self.random_seed!r}) must be an integer, so that every later run "
                "chooses the same columns, or None to draw one."
            )
        self._settle_selection()
        for option in fields(PacaChoices):
            if choices := choices_of(option.type):
                chosen = choose(getattr(self, option.name), choices, option=option.name)
                setattr(self, option.name, chosen)
        if type(self.use_rslora) is not bool:
            raise ValueError(f"`use_rslora` ({self.use_rslora!r}) must be true or false.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"`layers_pattern` ({self.layers_pattern!r}) says where to count layers, so it "
                "needs `layers_to_transform`; set that too or drop `layers_pattern`."
            )
        if isinstance(self.target_parameters, str):
            raise TypeError(
                f"`target_parameters` ({self.target_parameters!r}) must be a list of names, such "
                "as ['experts.down_proj']."
            )
        check_patterns(vars(self))

    def needs_pacatune(self) -> list[str]:
        """Return what PEFT's own PaCA cannot read of this adapter, for messages; empty: nothing.

        Which kinds of modules are adapted is known once the adapter is saved.
        """
        options = [f"`{key}`" for key in _OWN_OPTIONS if getattr(self, key)]
        options += ["`bias`"] if self.bias != "none" else []
        options += ["`columns_from`"] if self.columns_from != "dequantized" else []
        return options + (self.needs_pacatune_for or [])

    def trains(self, name: str) -> bool:
        """Whether a tensor beside the columns is trained, by its name in the base model."""
        module = name.rpartition(".")[0]
        parents = [module[: end.start()] for end in re.finditer(r"\.|$", module)]
        return (
            any(part.endswith(saved) for part in parents for saved in self.modules_to_save or [])
            or (self.bias != "none" and name.rpartition(".")[2] == "bias")
            or (self.trainable_token_indices is not None and ".token_adapter." in name)
        )

    def needs_gradients(self) -> bool:
        """Whether columns are to be chosen by gradients, and so from data."""
        from pacatune.strategies import needs_of

        return self.columns is None and "gradient" in needs_of(str(self.selection))

    def _check_kinds(self) -> None:
        for name, value in vars(self).items():
            _check_depth(name, value)
        for name in ("rank_pattern", "alpha_pattern", "base_quantization", "selection_options"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, dict):
                raise ValueError(
                    f"`{name}` ({_short(value)}) must be a dictionary of names and values."
                )
        if self.base_quantization is not None and "method" not in self.base_quantization:
            raise ValueError(
                f"`base_quantization` ({_short(self.base_quantization)}) must name the `method`; "
                "it is filled in when the adapter is made, so leave it out."
            )
        if not isinstance(self.selection, (str, dict)):
            raise ValueError(
                f"`selection` ({_short(self.selection)}) must be the name of a strategy, or a "
                "dictionary of module names and columns."
            )
        for name in ("target_modules", "exclude_modules", "modules_to_save", "needs_pacatune_for"):
            value = getattr(self, name)
            is_text = isinstance(value, str) and name in ("target_modules", "exclude_modules")
            if value is not None and not is_text and not _is_names(value):
                raise ValueError(f"`{name}` ({_short(value)}) must be a list of names.")
        layers = self.layers_to_transform
        numbers = layers if isinstance(layers, list | tuple | range) else [layers]
        if layers is not None and any(type(number) is not int for number in numbers):
            raise ValueError(
                f"`layers_to_transform` ({_short(layers)}) must be the number of a layer, or "
                "a list of numbers."
            )

    def _settle_selection(self) -> None:
        from pacatune.strategies import FIXED, needs_of

        if isinstance(self.selection, dict):
            if self.columns is not None:
                raise ValueError(
                    "`selection` is a dictionary of columns, and `columns` is set too; give one."
                )
            self.columns = self.selection
            self.selection = FIXED
        if self.columns == IN_TENSORS:
            pass  # known once the adapter is loaded
        elif self.columns is not None:
            self.columns = _sorted_columns(self.columns)
        elif self.selection == FIXED:
            raise ValueError(
                f"`selection` ({FIXED!r}) needs columns; give them as `selection` themselves, a "
                "dictionary of module names and columns."
            )
        else:
            needs_of(self.selection)  # columns that are there may be of a strategy that is not


def count_columns(num_columns: int, rank: int, channels: int | float | None) -> int:
    """Return how many of a weight's columns are trained."""
    if channels is None:
        return rank
    wanted = channels if isinstance(channels, int) else round(channels * num_columns)
    return max(rank, min(wanted, num_columns))


def check_sizes(options: Any) -> None:
    """Refuse ranks and alphas, those of single modules too, that nothing can have."""
    _check_rank("r", options.r)
    check_channels(getattr(options, "channels", None), options.r)
    _check_alpha("paca_alpha", options.paca_alpha)
    for name, rank in (options.rank_pattern or {}).items():
        _check_rank(f"rank_pattern[{name!r}]", rank)
    for name, alpha in (options.alpha_pattern or {}).items():
        _check_alpha(f"alpha_pattern[{name!r}]", alpha)


def check_channels(channels: Any, rank: int) -> None:
    """Refuse what is neither a number of columns nor a share of them."""
    is_number = type(channels) is int and channels >= rank
    is_share = type(channels) is float and 0 < channels <= 1
    if not (channels is None or is_number or is_share):
        raise ValueError(
            f"`channels` ({channels!r}) must be a number of columns, at least `r` ({rank}), or a "
            "share of them above 0.0 and up to 1.0; null trains `r` columns."
        )


def format_quantization(quantization: Mapping[str, Any]) -> str:
    """Return a description such as `bitsandbytes nf4, block_size 64, double`."""
    names = [str(quantization[key]) for key in ("method", "type") if quantization.get(key)]
    options = [
        key if value is True else f"{key} {value}"
        for key, value in sorted(quantization.items())
        if value and key not in ("method", "type")
    ]
    return ", ".join([" ".join(names), *options])


def idle_layers(config: Any) -> str:
    """Return the option that a regular expression of targets makes idle, for messages; or ""."""
    targets: Any = getattr(config, "target_modules", None)
    if isinstance(targets, str) and targets != "all-linear":
        for name in ("layers_to_transform", "layers_pattern"):
            value = getattr(config, name, None)
            if value is not None and value != []:
                return f"`{name}` ({value!r})"
    return ""


def _short(value: Any) -> str:
    return repr(value)[:80]


def _is_names(value: Any) -> bool:
    is_list = isinstance(value, list | set | tuple | frozenset)
    return is_list and all(isinstance(name, str) for name in value)


def _check_depth(name: str, value: Any) -> None:
    """Refuse what cannot be printed, copied or saved: each of them recurses once per level."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        parts = [part for part in level if isinstance(part, dict | list | tuple)]
        level = [x for part in parts for x in (part.values() if isinstance(part, dict) else part)]
    if any(isinstance(part, dict | list | tuple) for part in level):
        raise ValueError(
            f"`{name}` is nested deeper than {_MAX_DEPTH} levels; no value needs that."
        )


def _sorted_columns(columns: Any) -> Columns:
    """Return columns by module, in increasing order.

    Raises:
        ValueError: If they are anything but distinct column numbers.
    """
    if not isinstance(columns, dict) or not columns:
        raise ValueError(
            f"`columns` ({str(columns)[:80]}) must be a dictionary of module names and columns."
        )
    result: Columns = {}
    for name, values in columns.items():
        values = values.tolist() if hasattr(values, "tolist") else values
        result[str(name)] = _sorted_list(str(name), values)
    return result


def _sorted_list(name: str, values: Any) -> list[int]:
    is_list = isinstance(values, list | tuple) and len(values) > 0
    if not is_list or any(type(value) is not int or value < 0 for value in values):
        raise ValueError(
            f"`columns[{name!r}]` ({str(values)[:80]}) must be a list of column numbers from 0 on."
        )
    if len(set(values)) < len(values):
        raise ValueError(f"`columns[{name!r}]` ({str(values)[:80]}) repeats a column.")
    return sorted(values)


def _check_rank(name: str, value: Any) -> None:
    if type(value) is not int or value < 1:
        raise ValueError(f"`{name}` ({value!r}) must be an integer of at least 1.")


def _check_alpha(name: str, value: Any) -> None:
    if type(value) not in (int, float) or not abs(value) <= _MOST:
        raise ValueError(f"`{name}` ({value!r}) must be a finite number that float32 holds.")
