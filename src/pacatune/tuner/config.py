"""The configuration of a PaCA adapter, written to and read from adapter_config.json."""

from dataclasses import dataclass, field
from typing import Any, Literal

from peft import PeftConfig
from peft.utils import PeftType

from pacatune.patterns import check_patterns
from pacatune.selection.strategies import FIXED, needs_of

__all__ = ["PacaConfig"]


@dataclass
class PacaConfig(PeftConfig):
    """Configure Partial Connection Adaptation: `r` columns of each target weight are trained.

    Effective columns: W[:, indices] + paca_alpha / r * delta. The keys up to `modules_to_save` are
    those of PEFT 0.22's own PaCA; the others are ours, and a reader that does not know them
    ignores them.

    Raises:
        ValueError: If a value is out of its range or contradicts another one.

    Source: PaCA, Sec. 3.1; `paca_alpha` is the alpha of Tables 9-11.
    """

    r: int = 8
    """Number of trained input columns per weight."""
    paca_alpha: float = 8
    """Scale of the update, as the factor paca_alpha / r; under Adam it scales the learning rate."""
    target_modules: list[str] | str | None = None
    """Names, a regular expression, or "all-linear". None: the architecture's default."""
    exclude_modules: list[str] | str | None = None
    """Names or a regular expression of modules to leave out."""
    layers_to_transform: list[int] | int | None = None
    """Number or numbers of the layers to adapt; the others are left alone."""
    layers_pattern: list[str] | str | None = None
    """Name of the list of layers that `layers_to_transform` counts in."""
    random_seed: int = 42
    """Chooses the columns, together with each module's name."""
    init_weights: bool = True
    """True starts at the pretrained weights. False starts at random deltas, for tests."""
    modules_to_save: list[str] | None = None
    """Modules trained in full and saved with the adapter, such as a new head."""
    selection: str | dict[str, list[int]] = "random"
    """Strategy that chooses the columns: random, weight_norm, weight_norm_smallest, gradient,
    activation, weight_activation, or a registered one. Or the columns themselves, by the module's
    name or pattern; they are kept in `columns`, and this is then "fixed"."""
    bias: Literal["none", "all", "paca_only"] = "none"
    """Which biases are trained: none, all, or those of the adapted modules."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Module name or regular expression -> its own `r`."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Module name or regular expression -> its own `paca_alpha`."""
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    """Token ids (or embedding's name -> ids) whose embeddings are trained and saved too."""
    columns_from: Literal["dequantized", "original"] = "dequantized"
    """What the columns of a quantised base start from: its own, rounded weights, or those of the
    checkpoint that it was quantised from."""
    base_quantization: dict[str, Any] | None = None
    """How the base was quantised; filled in when the adapter is made."""
    target_parameters: list[str] | None = None
    """Names of fused expert parameters (E, O, I) to adapt, such as "experts.down_proj"."""
    columns: dict[str, list[int]] | None = None
    """Module name or regular expression -> its columns; filled in when they are not random."""
    selection_options: dict[str, Any] | None = None
    """What the columns were chosen from, such as the number of batches; filled in."""

    def __post_init__(self) -> None:
        """Check every value that can be checked without the model."""
        super().__post_init__()
        self.peft_type = PeftType.PACA
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        _check_rank("r", self.r)
        _check_alpha("paca_alpha", self.paca_alpha)
        for option in ("rank_pattern", "alpha_pattern"):
            if not isinstance(value := getattr(self, option) or {}, dict):
                raise TypeError(
                    f"`{option}` ({value!r}) must be a dictionary of module names and numbers."
                )
        check_patterns(vars(self))
        for name, rank in (self.rank_pattern or {}).items():
            _check_rank(f"rank_pattern[{name!r}]", rank)
        for name, alpha in (self.alpha_pattern or {}).items():
            _check_alpha(f"alpha_pattern[{name!r}]", alpha)
        if type(self.random_seed) is not int or not 0 <= self.random_seed < 2**63:
            raise ValueError(
                f"`random_seed` ({self.random_seed!r}) must be an integer in [0, 2^63), so that "
                "every rank and every later run chooses the same columns."
            )
        self._settle_selection()
        if self.bias not in ("none", "all", "paca_only"):
            raise ValueError(f"`bias` ({self.bias!r}) must be 'none', 'all' or 'paca_only'.")
        if self.columns_from not in ("dequantized", "original"):
            raise ValueError(
                f"`columns_from` ({self.columns_from!r}) must be 'dequantized' or 'original'."
            )
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            self._refuse_with_regex("layers_to_transform")
            self._refuse_with_regex("layers_pattern")
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

    def _settle_selection(self) -> None:
        if isinstance(self.selection, dict):
            if self.columns is not None:
                raise ValueError(
                    "`selection` is a dictionary of columns, and `columns` is set too; give one."
                )
            self.columns = self.selection
            self.selection = FIXED
        if self.columns is not None:
            self.columns = _sorted_columns(self.columns)
        elif self.selection == FIXED:
            raise ValueError(
                f"`selection` ({FIXED!r}) needs columns; give them as `selection` themselves, a "
                "dictionary of module names and columns."
            )
        else:
            needs_of(self.selection)  # columns that are there may be of a strategy that is not

    def _refuse_with_regex(self, name: str) -> None:
        if getattr(self, name) is not None:
            raise ValueError(
                f"`{name}` ({getattr(self, name)!r}) cannot be used when `target_modules` is a str "
                f"({self.target_modules!r}): give `target_modules` as a list of names, or put the "
                "layers into the regular expression."
            )


def _sorted_columns(columns: Any) -> dict[str, list[int]]:
    """Return columns by module, each in increasing order.

    Raises:
        ValueError: If they are anything but distinct column numbers.
    """
    if not isinstance(columns, dict) or not columns:
        raise ValueError(
            f"`columns` ({str(columns)[:80]}) must be a dictionary of module names and columns."
        )
    result = {}
    for name, given in columns.items():
        values = given.tolist() if hasattr(given, "tolist") else given
        is_list = isinstance(values, list | tuple) and len(values) > 0
        if not is_list or any(type(value) is not int or value < 0 for value in values):
            raise ValueError(
                f"`columns[{name!r}]` ({str(given)[:80]}) must be a list of column numbers from 0 "
                "on."
            )
        if len(set(values)) < len(values):
            raise ValueError(f"`columns[{name!r}]` ({str(given)[:80]}) repeats a column.")
        result[str(name)] = sorted(values)
    return result


def _check_rank(name: str, value: Any) -> None:
    if type(value) is not int or value < 1:
        raise ValueError(f"`{name}` ({value!r}) must be an integer of at least 1.")


def _check_alpha(name: str, value: Any) -> None:
    if type(value) not in (int, float) or not 0 < value < float("inf"):
        raise ValueError(f"`{name}` ({value!r}) must be a finite number above 0.")
