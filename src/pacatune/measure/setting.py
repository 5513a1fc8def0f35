"""What `pacatune bench` measures and `pacatune estimate` simulates, checked at the start.

The command line declares its options by these classes, so this imports nothing heavy by itself.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from pacatune import methods, precision
from pacatune.installation import install_command
from pacatune.methods import TEXT_METHODS, Method, method_of
from pacatune.names import check_choices, choose
from pacatune.precision import torch_dtype
from pacatune.reports.provenance import num_cores

if TYPE_CHECKING:
    import torch

Dtype = Literal["float32", "bfloat16", "float16", "fp32", "bf16", "fp16"]

_FORMS = {
    "paca-transient": "PaCA, weight never written: one thin product more per layer",
    "paca-lean": "PaCA, with lean activations",
}
_FROZEN = "forward and input gradients of the frozen model: no adapter, no optimizer"
METHODS = {
    "frozen": Method(name="frozen", title="Frozen", summary=_FROZEN),
    **{name: methods.METHODS[name] for name in TEXT_METHODS},
    **{
        name: dataclasses.replace(methods.METHODS["paca"], name=name, summary=summary)
        for name, summary in _FORMS.items()
    },
}
"""Name -> method: those for language models, and what only a measurement has."""

_PLAIN = [name for name in TEXT_METHODS if not methods.METHODS[name].quantization]
_USUAL_METHODS = ("frozen", *_PLAIN)
_WITH_DROPOUT = [name for name in TEXT_METHODS if methods.METHODS[name].has_dropout]
_EAGER_ONLY = ("paca-transient",)


def _check_methods(names: Sequence[str]) -> tuple[str, ...]:
    """Return names as `METHODS` has them, each once; refuse those that cannot be measured here."""
    chosen = tuple(dict.fromkeys(choose(name, METHODS, option="methods") for name in names))
    if not chosen:
        raise ValueError(f"`methods` is empty; choose from {', '.join(METHODS)}.")
    for method in chosen:
        if METHODS[method].quantization is not None and find_spec("bitsandbytes") is None:
            raise ValueError(
                f"method {method!r} needs bitsandbytes; {install_command('quant')}, or leave it "
                "out."
            )
    return chosen


def check_sizes(sizes: Mapping[str, Any]) -> None:
    """Refuse a size that is not a whole number of at least 1; None is fine."""
    for name, value in sizes.items():
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"`{name}` ({value!r}) must be a whole number of at least 1.")


def check_lean_level(level: int, *, least: int = 1, lean: str = "auto") -> None:
    """Refuse a level of lean activations that does not exist, or that `lean` makes void."""
    if type(level) is not int or not least <= level <= 3:
        known = ", ".join(map(str, range(least, 3)))
        raise ValueError(f"`lean_level` ({level!r}) must be {known} or 3.")
    if lean == "off" and level > 1:
        raise ValueError(
            f"`lean_level` ({level}) with `lean` ('off'): nothing is lean then; drop one of them."
        )


def _check_fields(config: Any, *sizes: str) -> None:
    """Check what both commands ask for: choices, sizes and a dropout."""
    check_choices(config)
    check_sizes({name: getattr(config, name) for name in sizes})
    if not 0 <= config.dropout < 1:
        raise ValueError(f"`dropout` ({config.dropout!r}) must be in [0, 1).")


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Size of one micro-batch, which is what the settings of a comparison differ in."""

    num_rows: int
    num_tokens: int
    """Tokens of each row."""

    @property
    def label(self) -> str:
        """What tables call it."""
        return f"{self.num_rows} x {self.num_tokens} tokens"


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """One run of `pacatune bench`."""

    values: dict[str, Any] = field(hash=False)
    """Configuration of the model, `model_type` among them."""
    title: str
    """What tables call the model."""
    methods: tuple[str, ...] = _USUAL_METHODS
    """Methods to compare; docs/benchmarks.md lists them."""
    tokens: tuple[int, ...] = (16, 512, 2048)
    """Tokens per micro-batch; a sweep does not use them."""
    seq_len: int = 512
    """Longest row; more tokens are split into more rows."""
    dtype: precision.Dtype = "auto"
    """Number format of the weights; auto is bfloat16 where it is fast, else float32."""
    adapter_dtype: Literal["same", "float32", "fp32"] = "same"
    """Number format of what adapters train: that of the weights (same) or float32, which runs under
    autocast beside 16-bit weights."""
    device: str = "auto"
    """cpu, cuda, xpu, hpu, mps; auto is the accelerator, if there is one."""
    rank: int = 8
    """Columns or rank of every adapter."""
    dropout: float = 0.1
    """Dropout of the method lora_dropout."""
    lean_level: int = 0
    """Lean activations of every method: none (0), or `pacatune.lean` at level 1, 2 or 3."""
    gradient_checkpointing: bool = False
    """Keep the inputs of each block only; recompute the rest in backward."""
    compiled: bool = False
    """Compile models by torch.compile."""
    seconds: float = 10.0
    """Seconds for each setting and pair of methods, warm-up excluded."""
    min_rounds: int = 5
    """Minimum number of rounds, however long they take."""
    warmup: int = 2
    """Warm-up rounds, not counted."""
    threads: int | None = None
    """Threads of torch on a CPU (default: all cores)."""
    seed: int = 0
    """Seed of weights, tokens, columns and intervals."""
    sweep: Literal["batch", "seq-len"] | None = None
    """Instead of the comparison: batch tries ever more rows of `seq_len` tokens, seq-len one row of
    ever more tokens, until memory ends."""
    sweep_max: int | None = None
    """Largest batch or length that a sweep tries; by default it goes on until memory ends."""
    memory_limit: int | None = None
    """Memory that each process may take, such as 4GiB; by default, in a sweep on a CPU, 0.8 of what
    is free."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "methods", _check_methods(self.methods))
        _check_fields(self, "seq_len", "rank", "min_rounds", "threads", "sweep_max", "memory_limit")
        for name in ("seconds", "warmup"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` ({getattr(self, name)}) must not be negative.")
        check_lean_level(self.lean_level, least=0)
        if self.compiled and (self.lean_level or {*_EAGER_ONLY} & {*self.methods}):
            raise ValueError(
                f"`compiled` with `lean_level` ({self.lean_level}) or one of "
                f"{', '.join(_EAGER_ONLY)}: a compiled graph decides by itself; drop one of them."
            )
        if not self.tokens:
            raise ValueError("`tokens` is empty; give at least one number.")
        for number in self.tokens if self.sweep is None else ():
            if number < 1 or (number > self.seq_len and number % self.seq_len):
                raise ValueError(
                    f"`tokens` ({number}) must be at least 1, and above `seq_len` ({self.seq_len}) "
                    "a multiple of it; round it."
                )
        if self.sweep is None and self.sweep_max is not None:
            raise ValueError(
                f"`sweep_max` ({self.sweep_max}) is for a sweep; choose one or leave it out."
            )
        device = self.torch_device
        if self.dtype == "auto":
            is_fast = precision.bfloat16_is_fast(use_cpu=device.type == "cpu")
            object.__setattr__(self, "dtype", "bfloat16" if is_fast else "float32")
        object.__setattr__(self, "threads", self.threads or num_cores())

    @property
    def settings(self) -> list[MicroBatch]:
        """Settings of the comparison, in the order given."""
        sizes = [(max(1, number // self.seq_len), number) for number in self.tokens]
        return [MicroBatch(num_rows=rows, num_tokens=number // rows) for rows, number in sizes]

    @property
    def pairs(self) -> list[tuple[str, ...]]:
        """Methods that alternate: ours, or the first, with each other one on an equal base."""
        pairs: list[tuple[str, ...]] = []
        for is_quantized in (False, True):
            group = [m for m in self.methods if bool(METHODS[m].quantization) == is_quantized]
            first = next((m for m in group if METHODS[m].is_paca), group[0] if group else "")
            pairs += [(first, method) for method in group if method != first]
            if len(group) == 1:
                pairs.append((first,))
        return pairs

    @cached_property
    def torch_device(self) -> "torch.device":
        """The device; an error if it is not there."""
        return precision.choose_device(self.device)


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
    quantization: Literal["nf4", "fp4"] | None = None
    """Format of frozen 4-bit weights, nf4 or fp4, by bitsandbytes."""
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
        given = method_of(self.method, TEXT_METHODS)
        object.__setattr__(self, "method", given.variant_of or given.name)
        object.__setattr__(self, "quantization", self.quantization or given.quantization)
        object.__setattr__(self, "dropout", self.dropout or given.dropout or 0.0)
        sizes = ("rank", "batch_size", "seq_len", "gradient_accumulation", "num_gpus")
        _check_fields(self, *sizes)
        if self.seq_len < 2:
            raise ValueError(
                f"`seq_len` ({self.seq_len}) must be at least 2: each token learns the next one."
            )
        check_lean_level(self.lean_level, lean=self.lean)
        self._check_combinations()

    def _check_combinations(self) -> None:
        said = f"with `method` ({self.method!r})"
        if self.dropout and not self.row.has_dropout:
            raise ValueError(
                f"`dropout` ({self.dropout}) {said}: it has none; drop the option, or choose one "
                f"of {', '.join(_WITH_DROPOUT)}."
            )
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
        parts = {
            f"batch {self.batch_size} x {self.seq_len:,} tokens": True,
            f"weights in {self.quantization or self.dtype}": True,
            f"rank {self.rank} in {self.adapter_dtype}": self.row.has_adapter,
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
