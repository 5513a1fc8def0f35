"""What to estimate, declared once for the command line, Python and the tables."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from pacatune.methods import METHODS, TEXT_METHODS, Method, method_of
from pacatune.names import choose

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
    """Name of a preset, a config.json, a model folder, or a hub id."""

    method: str = "paca"
    """A method for language models, by its name in `METHODS`. One that is another with quantisation
    or dropout (qpaca, qlora, lora_dropout) becomes that one, with the option set."""

    rank: int = 8
    """Columns or rank of the adapter."""

    dropout: float = 0.0
    """Dropout on the input of LoRA's A; also of dora and moslora."""

    batch_size: int = 1
    """Sequences per micro-batch, on each device."""

    seq_len: int = 512
    """Tokens per sequence, none of them padding."""

    dtype: Dtype = "bfloat16"
    """Type of the weights. Products are in bfloat16 (mixed precision) unless this is float16."""

    adapter_dtype: Dtype = "float32"
    """Type of the adapter, its gradient and its optimiser state; full training has that of the
    weights."""

    quantization: Quantization | None = None
    """Hold the frozen weights in 4 bits by bitsandbytes."""

    gradient_checkpointing: bool = False
    """Keep the inputs of each block only, and recompute the rest in backward."""

    lean: Lean = "auto"
    """Exact, memory-lean norms, MLPs and attention: off, where they are there, or required."""

    loss: Loss = "auto"
    """logits: all of them, by the model's own loss. chunked: never all, as TRL's trainer. auto:
    logits where lean is off."""

    gradient_accumulation: int = 1
    """Micro-batches per optimiser step; from the second on, gradients are there from the start."""

    sharding: Sharding = "none"
    """What several devices share out: the optimiser state (zero1), gradients too (zero2), weights
    too (zero3, fsdp2)."""

    num_gpus: int = 1
    """Devices to share it among."""

    target_modules: tuple[str, ...] = ()
    """Names of the adapted modules; the linear layers of the blocks where empty."""

    def __post_init__(self) -> None:
        given = method_of(self.method, TEXT_METHODS)
        object.__setattr__(self, "method", given.variant_of or given.name)
        object.__setattr__(self, "quantization", self.quantization or given.quantization)
        object.__setattr__(self, "dropout", self.dropout or given.dropout or 0.0)
        self._check_choices()
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

    def _check_choices(self) -> None:
        for field in dataclasses.fields(self):
            value, choices = getattr(self, field.name), _choices(field.name)
            if choices and not (field.name == "quantization" and value is None):
                choose(value, choices, option=field.name)

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
    def weight_dtype(self) -> torch.dtype:
        """Type of the weights."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def compute_dtype(self) -> torch.dtype:
        """Type of the products, by autocast."""
        return torch.float16 if self.dtype == "float16" else torch.bfloat16

    @property
    def trained_dtype(self) -> torch.dtype:
        """Type of what is trained."""
        dtype: torch.dtype = getattr(torch, self.adapter_dtype)
        return dtype if self.row.has_adapter else self.weight_dtype

    @property
    def loss_kind(self) -> Literal["logits", "chunked"]:
        """The loss, `auto` resolved."""
        if self.loss == "auto":
            return "logits" if self.lean == "off" else "chunked"
        return self.loss

    def label(self) -> str:
        """Return the method as people call it."""
        return ("q" if self.quantization else "") + self.method

    def but(self, **changes: Any) -> "Setting":
        """Return the same with some options changed, checked again."""
        return dataclasses.replace(self, **changes)


def _choices(name: str) -> tuple[Any, ...]:
    kinds: dict[str, Any] = {
        "dtype": Dtype,
        "adapter_dtype": Dtype,
        "lean": Lean,
        "loss": Loss,
        "sharding": Sharding,
    }
    if name == "quantization":
        return get_args(Quantization)
    return get_args(kinds[name]) if name in kinds else ()
