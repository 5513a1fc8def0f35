"""What `pacatune bench` measures, checked before any model is built.

Child processes get it whole. The command line reads it too, so it imports nothing heavy by itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from pacatune import methods
from pacatune.installation import install_command
from pacatune.names import check_choices, choose
from pacatune.precision import torch_dtype

if TYPE_CHECKING:
    import torch

__all__ = [
    "METHODS",
    "BenchConfig",
    "MicroBatch",
    "Setting",
    "check_methods",
    "is_ours",
    "quantization_of",
    "row_of",
]

Dtype = Literal["float32", "bfloat16", "float16"]
AdapterDtype = Literal["same", "float32"]
Sweep = Literal["batch", "seq-len"]

_FORMS = {
    "paca-resident": "PaCA, columns always written into the weight",
    "paca-transient": "PaCA, weight never written: one thin product more per layer",
    "paca-lean": "PaCA, with lean activations",
}
METHODS = {
    "frozen": "forward and input gradients of the frozen model: no adapter, no optimizer",
    **{name: methods.METHODS[name].summary for name in methods.TEXT_METHODS},
    **_FORMS,
}
"""Name -> description: the methods for language models, and what only a measurement has."""

_PLAIN = [name for name in methods.TEXT_METHODS if not methods.METHODS[name].quantization]
_USUAL_METHODS = ("frozen", *(name for name in _PLAIN if name != "moslora"))
# Compiled graphs decide by themselves how to run.
_EAGER_ONLY = ("paca-resident", "paca-transient")


def is_ours(method: str) -> bool:
    """Whether a method is PaCA in one of its forms."""
    row = row_of(method)
    return row is not None and row.is_paca


def quantization_of(method: str) -> str | None:
    """Return how the base of a method is quantised."""
    row = row_of(method)
    return None if row is None else row.quantization


def row_of(method: str) -> methods.Method | None:
    """Return what the table of all methods says of a measured one; None of the frozen model."""
    return methods.METHODS.get("paca" if method in _FORMS else method)


def check_methods(names: Sequence[str], *, compiled: bool) -> tuple[str, ...]:
    """Return names as `METHODS` has them; refuse those that cannot be measured here.

    Args:
        names: As the user wrote them.
        compiled: Whether models are compiled.

    Raises:
        ValueError: If there is none, one is unknown or named twice, cannot be compiled, or needs a
            package that is not installed.
    """
    if not names:
        raise ValueError(f"`methods` is empty; choose from {', '.join(METHODS)}.")
    chosen = [choose(name, METHODS, option="methods") for name in names]
    for method in chosen:
        if chosen.count(method) > 1:
            raise ValueError(f"method {method!r} is named twice; name it once.")
        if compiled and method in _EAGER_ONLY:
            raise ValueError(
                f"method {method!r} with compiled models: a compiled graph decides by itself how "
                "PaCA runs; choose paca."
            )
        if quantization_of(method) is not None and find_spec("bitsandbytes") is None:
            raise ValueError(
                f"method {method!r} needs bitsandbytes; {install_command('quant')}, or leave it "
                "out."
            )
    return tuple(chosen)


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Size of one micro-batch, which is what the settings of a comparison differ in."""

    num_rows: int
    """Rows, all of one length."""
    num_tokens: int
    """Tokens of each row."""

    @property
    def label(self) -> str:
        """What tables call it."""
        return f"{self.num_rows} x {self.num_tokens} tokens"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, and the label as `setting`."""
        return {"setting": self.label, "num_rows": self.num_rows, "num_tokens": self.num_tokens}


Setting = MicroBatch
"""Its name in `pacatune bench`."""


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """One run of `pacatune bench`."""

    values: dict[str, Any] = field(hash=False)
    """Configuration of the model, `model_type` among them."""
    title: str
    """What tables call the model."""
    methods: tuple[str, ...] = _USUAL_METHODS
    """Methods to compare; docs/bench.md lists them."""
    tokens: tuple[int, ...] = (16, 512, 2048)
    """Tokens of each micro-batch; a sweep does not look at them."""
    seq_len: int = 512
    """Longest row; more tokens make more rows."""
    dtype: Dtype = "float32"
    """Number format of the weights: float32, bfloat16 or float16."""
    adapter_dtype: AdapterDtype = "same"
    """Number format of what adapters train: that of the weights (same) or float32, which runs under
    autocast beside 16-bit weights."""
    device: str = "auto"
    """cpu, cuda, xpu, hpu, mps; auto is the accelerator, if there is one."""
    rank: int = 8
    """Columns or rank of every adapter."""
    dropout: float = 0.1
    """Dropout of the method lora_dropout."""
    compiled: bool = False
    """Compile models by torch.compile."""
    seconds: float = 10.0
    """Time for each setting and pair of methods, warm-up excluded."""
    min_rounds: int = 5
    """Rounds at the least, however long they take."""
    warmup: int = 2
    """Rounds before, not counted."""
    threads: int = 1
    """Threads of torch on a CPU."""
    seed: int = 0
    """Seed of weights, tokens, columns and intervals."""
    sweep: Sweep | None = None
    """Instead of the comparison: batch tries ever more rows of `seq_len` tokens, seq-len one row of
    ever more tokens, until memory ends."""
    sweep_max: int | None = None
    """Largest batch or length that a sweep tries; by default it goes on until memory ends."""
    memory_limit: int | None = None
    """Memory that each process may take, such as 4GiB; by default, in a sweep on a CPU, 0.8 of what
    is free."""

    def __post_init__(self) -> None:
        from pacatune.measure.device import choose_device

        names = check_methods(self.methods, compiled=self.compiled)
        object.__setattr__(self, "methods", names)
        self._check_numbers()
        check_choices(self)
        if self.sweep is None and self.sweep_max is not None:
            raise ValueError(
                f"`sweep_max` ({self.sweep_max}) is for a sweep; choose one or leave it out."
            )
        choose_device(self.device)

    def _check_numbers(self) -> None:
        for name in ("seq_len", "rank", "min_rounds", "threads", "sweep_max", "memory_limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` ({value}) must be at least 1.")
        for name in ("seconds", "warmup"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` ({getattr(self, name)}) must not be negative.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` ({self.dropout}) must be at least 0 and below 1.")
        if not self.tokens:
            raise ValueError("`tokens` is empty; give at least one number.")
        for number in self.tokens if self.sweep is None else ():
            if number < 1 or (number > self.seq_len and number % self.seq_len):
                raise ValueError(
                    f"`tokens` ({number}) must be at least 1, and above `seq_len` ({self.seq_len}) "
                    "a multiple of it; round it."
                )
        hidden = self.values.get("hidden_size", self.rank)
        if self.rank > hidden and any(is_ours(method) for method in self.methods):
            raise ValueError(f"`rank` ({self.rank}) must be at most `hidden_size` ({hidden}).")

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
            group = [m for m in self.methods if (quantization_of(m) is not None) == is_quantized]
            first = next((m for m in group if is_ours(m)), group[0] if group else "")
            pairs += [(first, method) for method in group if method != first]
            if len(group) == 1:
                pairs.append((first,))
        return pairs

    @cached_property
    def torch_device(self) -> "torch.device":
        """The device."""
        from pacatune.measure.device import choose_device

        return choose_device(self.device)

    @property
    def weight_dtype(self) -> "torch.dtype":
        """The dtype of the weights."""
        return torch_dtype(self.dtype)

    @property
    def trained_dtype(self) -> "torch.dtype":
        """The dtype of what adapters train."""
        return torch_dtype(self.dtype if self.adapter_dtype == "same" else self.adapter_dtype)

    @property
    def needs_autocast(self) -> bool:
        """Whether products need it, because adapters are finer than weights."""
        return self.trained_dtype != self.weight_dtype
