"""What to estimate, declared once for the command line, Python and the tables."""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pacatune.methods import METHODS, TEXT_METHODS, Method, method_of
from pacatune.names import check_choices
from pacatune.precision import torch_dtype

if TYPE_CHECKING:
    import torch

__all__ = ["Setting"]

Quantization = Literal["nf4", "fp4"]
Dtype = Literal["bfloat16", "float16", "float32"]
Lean = Literal["off", "auto", "require"]
Loss = Literal["auto", "logits", "chunked"]
Sharding = Literal["none", "zero1", "zero2", "zero3", "fsdp2"]

_WITH_DROPOUT = [name for name in TEXT_METHODS if METHODS[name].has_dropout]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One training step whose memory is estimated.

    Raises:
        ValueError: If an option is out of range or contradicts another.
    """

    model: str
    """Name of a model, a config.json, a model folder, or a hub id."""

    method: str = "paca"
    """paca, lora, dora, moslora, full; qpaca and qlora set the quantisation nf4, lora_dropout a
    dropout."""

    rank: int = 8
    """Columns or rank of the adapter."""

    dropout: float = 0.0
    """Dropout on the input of lora, dora and moslora."""

    batch_size: int = 1
    """Sequences per micro-batch, on each device."""

    seq_len: int = 512
    """Tokens per sequence, none of them padding."""

    dtype: Dtype = "bfloat16"
    """Number format of the weights; products are in bfloat16 unless this is float16."""

    adapter_dtype: Dtype = "float32"
    """Number format of the adapter, its gradient and its optimiser state; full training has that of
    the weights."""

    quantization: Quantization | None = None
    """Format of frozen 4-bit weights, nf4 or fp4, by bitsandbytes."""

    gradient_checkpointing: bool = False
    """Keep the inputs of each block only; recompute the rest in backward."""

    lean: Lean = "auto"
    """Exact, memory-lean norms, MLPs and attention: off, where the model has them (auto), or
    everywhere, else refused (require)."""

    loss: Loss = "auto"
    """logits: all of them, by the model's own loss; chunked: never all, as `pacatune train`; auto:
    logits where lean is off."""

    gradient_accumulation: int = 1
    """Micro-batches per optimiser step; from the second on, gradients are there from the start."""

    sharding: Sharding = "none"
    """What several devices divide: the optimiser state (zero1), gradients too (zero2), weights too
    (zero3, fsdp2)."""

    num_gpus: int = 1
    """Number of devices that divide it."""

    target_modules: tuple[str, ...] = ()
    """Names of the adapted modules; by default the linear layers of the blocks."""

    def __post_init__(self) -> None:
        given = method_of(self.method, TEXT_METHODS)
        object.__setattr__(self, "method", given.variant_of or given.name)
        object.__setattr__(self, "quantization", self.quantization or given.quantization)
        object.__setattr__(self, "dropout", self.dropout or given.dropout or 0.0)
        check_choices(self)
        for name in ("rank", "batch_size", "seq_len", "gradient_accumulation", "num_gpus"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"`{name}` ({value!r}) must be a whole number of at least 1.")
        if self.seq_len < 2:
            raise ValueError(
                f"`seq_len` ({self.seq_len}) must be at least 2: each token learns the next one."
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` ({self.dropout!r}) must be in [0, 1).")
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.dropout and not self.row.has_dropout:
            raise ValueError(
                f"`dropout` ({self.dropout}) with `method` ({self.method!r}): it has none; drop "
                f"the option, or choose one of {', '.join(_WITH_DROPOUT)}."
            )
        if self.quantization is not None and self.method not in ("paca", "lora", "moslora"):
            reasons = {
                "full": "quantised weights cannot be trained",
                "dora": "DoRA on 4-bit layers reads their values before training, and cannot be "
                "estimated without",
            }
            raise ValueError(
                f"`quantization` ({self.quantization!r}) with `method` ({self.method!r}): "
                f"{reasons[self.method]}; choose paca, lora or moslora, or drop the option."
            )
        if self.sharding == "none" and self.num_gpus > 1:
            raise ValueError(
                f"`num_gpus` ({self.num_gpus}) with `sharding` ('none'): each device then holds "
                "everything, as one alone; choose zero1, zero2, zero3 or fsdp2."
            )
        if self.sharding != "none" and self.num_gpus == 1:
            raise ValueError(
                f"`sharding` ({self.sharding!r}) with `num_gpus` (1): there is nobody to share "
                "with; set `num_gpus`."
            )

    @property
    def row(self) -> Method:
        """The method."""
        return METHODS[self.method]

    @property
    def weight_dtype(self) -> "torch.dtype":
        """Type of the weights."""
        return torch_dtype(self.dtype)

    @property
    def compute_dtype(self) -> "torch.dtype":
        """Type of the products, by autocast."""
        return torch_dtype("float16" if self.dtype == "float16" else "bfloat16")

    @property
    def trained_dtype(self) -> "torch.dtype":
        """Type of what is trained."""
        return torch_dtype(self.adapter_dtype if self.row.has_adapter else self.dtype)

    @property
    def loss_kind(self) -> Literal["logits", "chunked"]:
        """The loss, `auto` resolved."""
        if self.loss == "auto":
            return "logits" if self.lean == "off" else "chunked"
        return self.loss

    def but(self, **changes: Any) -> "Setting":
        """Return the same with some options changed, checked again."""
        return dataclasses.replace(self, **changes)
