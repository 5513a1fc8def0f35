"""What `pacatune estimate` simulates, checked at the start.

The command line declares its options by these classes, so this imports nothing heavy by itself.
"""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pacatune import methods
from pacatune.format.options import check_channels
from pacatune.methods import TEXT_METHODS, Method, method_of
from pacatune.names import check_choices
from pacatune.precision import torch_dtype

if TYPE_CHECKING:
    import torch

Dtype = Literal["float32", "bfloat16", "float16", "fp32", "bf16", "fp16"]

_SIZES = ("rank", "batch_size", "seq_len", "gradient_accumulation", "num_gpus")
_WITH_DROPOUT = [name for name in TEXT_METHODS if methods.METHODS[name].has_dropout]


def check_lean_level(level: int, lean: str) -> None:
    """Refuse a level of lean activations that does not exist, or that `lean` makes void."""
    if type(level) is not int or not 1 <= level <= 3:
        raise ValueError(f"`lean_level` ({level!r}) must be 1, 2 or 3.")
    if lean == "off" and level > 1:
        raise ValueError(
            f"`lean_level` ({level}) with `lean` ('off'): nothing is lean then; drop one of them."
        )


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One training step whose memory is estimated.

    Raises:
        ValueError: If an option is out of range or contradicts another.
    """

    model: str
    """Name of a model, a config.json, a model folder, or a hub id."""
    method: str = "paca"
    """One of `methods.METHODS`; qpaca and qlora set the quantisation nf4, lora_dropout a
    dropout."""
    rank: int = 8
    """Columns or rank of the adapter."""
    channels: int | float | None = None
    """Trained columns of paca, or their share, whose update has that rank; as `paca.channels`."""
    dropout: float = 0.0
    """Dropout on the input of lora and dora."""
    batch_size: int = 1
    """Sequences per micro-batch, on each device."""
    seq_len: int = 512
    """Tokens per sequence, none of them padding."""
    dtype: Dtype = "bfloat16"
    """Number format of the weights; products are in bfloat16 unless this is float16."""
    adapter_dtype: Dtype = "float32"
    """Number format of the adapter, its gradient and its optimiser state; full training has that of
    the weights."""
    quantization: Literal["nf4", "fp4", "q4_0", "q4_1", "q8_0", "q4_k_m"] | None = None
    """Format of frozen weights: nf4 or fp4 by bitsandbytes, or what a GGUF file of that kind has,
    embedding and head included."""
    gradient_checkpointing: bool = False
    """Keep the inputs of each block only; recompute the rest in backward."""
    lean: Literal["off", "auto", "require"] = "auto"
    """Exact, memory-lean norms, MLPs and attention: off, where the model has them (auto), or
    everywhere, else refused (require)."""
    lean_level: int = 1
    """How lean they are: 2 recomputes gate and up of MLPs from the norm's input, 3 also query, key
    and value."""
    activation_offloading: bool = False
    """Hold what is kept for backward in the CPU's memory, as the trainer's option of that name."""
    loss: Literal["auto", "logits", "chunked"] = "auto"
    """logits: all of them, by the model's own loss; chunked: never all, as `pacatune train`; auto:
    logits where lean is off."""
    gradient_accumulation: int = 1
    """Micro-batches per optimizer step; with two or more, gradients exist from the start."""
    sharding: Literal["none", "zero1", "zero2", "zero3", "fsdp2"] = "none"
    """What is sharded across devices: the optimizer state (zero1), gradients too (zero2), weights
    too (zero3, fsdp2)."""
    num_gpus: int = 1
    """Number of devices to shard across."""
    target_modules: tuple[str, ...] = ()
    """Names of the adapted modules; by default the linear layers of the blocks."""

    def __post_init__(self) -> None:
        method = method_of(self.method, TEXT_METHODS)
        object.__setattr__(self, "method", method.variant_of or method.name)
        object.__setattr__(self, "quantization", self.quantization or method.quantization)
        object.__setattr__(self, "dropout", self.dropout or method.dropout or 0.0)
        check_choices(self)
        for name in _SIZES:
            size = getattr(self, name)
            if type(size) is not int or size < 1:
                raise ValueError(f"`{name}` ({size!r}) must be a whole number of at least 1.")
        check_channels(self.channels, self.rank)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` ({self.dropout!r}) must be in [0, 1).")
        if self.seq_len < 2:
            raise ValueError(
                f"`seq_len` ({self.seq_len}) must be at least 2: each token learns the next one."
            )
        check_lean_level(self.lean_level, self.lean)
        self._check_combinations()

    def _check_combinations(self) -> None:
        said = f"with `method` ({self.method!r})"
        if self.dropout and not self.row.has_dropout:
            raise ValueError(
                f"`dropout` ({self.dropout}) {said}: it has none; drop the option, or choose one "
                f"of {', '.join(_WITH_DROPOUT)}."
            )
        if self.channels is not None and not self.row.is_paca:
            raise ValueError(f"`channels` ({self.channels}) {said}: it has none; drop the option.")
        if self.quantization is not None and self.method in ("full", "dora"):
            raise ValueError(
                f"`quantization` ({self.quantization!r}) {said}: such weights cannot be trained, "
                "and dora reads their values; choose paca or lora, or drop the option."
            )
        if (self.sharding == "none") != (self.num_gpus == 1):
            raise ValueError(
                f"`sharding` ({self.sharding!r}) and `num_gpus` ({self.num_gpus}) say together "
                "what several devices share; set both, or none."
            )

    def about(self) -> str:
        """Return what an answer is about: batch, length, dtypes, rank, optimizer, and the rest."""
        kept = "the file's formats" if self.is_packed else self.dtype
        parts = {
            f"batch {self.batch_size} x {self.seq_len:,} tokens": True,
            f"weights in {self.quantization or kept}": True,
            f"rank {self.rank} in {self.adapter_dtype}": self.row.has_adapter,
            f"channels {self.channels}": self.channels is not None,
            f"dropout {self.dropout}": self.dropout,
            "AdamW": True,
            f"lean level {self.lean_level}": self.lean != "off",
            f"{self.loss_kind} loss": True,
            "checkpointed blocks": self.gradient_checkpointing,
            "offloaded activations": self.activation_offloading,
            f"{self.gradient_accumulation} micro-batches": self.gradient_accumulation > 1,
            f"{self.sharding} on {self.num_gpus} devices": self.num_gpus > 1,
        }
        return ", ".join(part for part, is_said in parts.items() if is_said)

    @property
    def is_packed(self) -> bool:
        """Whether weights stay in the blocks of a GGUF file."""
        return self.model.endswith(".gguf") or (self.quantization or "").startswith("q")

    @property
    def row(self) -> Method:
        """The method."""
        return methods.METHODS[self.method]

    @property
    def weight_dtype(self) -> "torch.dtype":
        """The dtype of the weights."""
        return torch_dtype(self.dtype)

    @property
    def compute_dtype(self) -> "torch.dtype":
        """The dtype of the products, by autocast."""
        return torch_dtype("float16" if self.dtype == "float16" else "bfloat16")

    @property
    def trained_dtype(self) -> "torch.dtype":
        """The dtype of what is trained."""
        return torch_dtype(self.adapter_dtype if self.row.has_adapter else self.dtype)

    @property
    def loss_kind(self) -> Literal["logits", "chunked"]:
        """The loss, `auto` resolved."""
        if self.loss == "auto":
            return "logits" if self.lean == "off" else "chunked"
        return self.loss

    @property
    def shares_weights(self) -> bool:
        """Whether several devices divide the weights."""
        return self.sharding in ("zero3", "fsdp2")

    def but(self, **changes: Any) -> "Setting":
        """Return the same with some options changed, checked again."""
        return dataclasses.replace(self, **changes)
