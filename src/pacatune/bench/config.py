"""What is measured: everything a child process has to know, checked before any model is built."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch

from pacatune.bench.device import choose_device
from pacatune.bench.methods import check_methods, is_ours, quantization_of

__all__ = ["DTYPES", "BenchConfig", "Setting"]

DTYPES = ("float32", "bfloat16", "float16")
Sweep = Literal["batch", "seq-len"]
SWEEPS = ("batch", "seq-len")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Size of one micro-batch."""

    num_rows: int
    num_tokens: int
    """Of each row."""

    @property
    def label(self) -> str:
        """What tables call it."""
        return f"{self.num_rows} x {self.num_tokens} tokens"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, and the label as `setting`."""
        return {"setting": self.label, "num_rows": self.num_rows, "num_tokens": self.num_tokens}


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """One run of `pacatune bench`."""

    values: dict[str, Any] = field(hash=False)
    """Configuration of the model, `model_type` among them."""
    title: str
    """What tables call the model."""
    methods: tuple[str, ...]
    """Names from `pacatune.bench.methods.METHODS`."""
    tokens: tuple[int, ...] = (16, 512, 2048)
    """Tokens of each micro-batch; a sweep does not look at them."""
    seq_len: int = 512
    """Longest row; more tokens make more rows."""
    dtype: str = "float32"
    """Of the weights."""
    adapter_dtype: Literal["same", "float32"] = "same"
    """Of what adapters train. float32 beside weights of 16 bits runs under autocast."""
    device: str = "auto"
    """cpu, cuda, xpu, hpu, mps; auto is the accelerator, if there is one."""
    rank: int = 8
    """Of every adapter."""
    dropout: float = 0.1
    """Of the method lora_dropout."""
    compiled: bool = False
    """Whether models are compiled by torch.compile."""
    seconds: float = 10.0
    """For each setting and pair of methods, warm-up excluded."""
    min_rounds: int = 5
    """Rounds at the least, however long they take."""
    warmup: int = 2
    """Rounds before, not counted."""
    threads: int = 1
    """torch's, on the CPU."""
    seed: int = 0
    """Of weights, tokens, columns and intervals."""
    sweep: Sweep | None = None
    """Instead of settings: batches or lengths until memory ends."""
    sweep_max: int | None = None
    """Largest batch or length that is tried; None: until memory ends."""
    memory_limit: int | None = None
    """Bytes that a process may take."""

    def __post_init__(self) -> None:
        methods = check_methods(self.methods, compiled=self.compiled)
        object.__setattr__(self, "methods", methods)
        self._check_numbers()
        if self.dtype not in DTYPES:
            raise ValueError(f"`dtype` ({self.dtype!r}) must be one of {', '.join(DTYPES)}.")
        if self.adapter_dtype not in ("same", "float32"):
            raise ValueError(f"`adapter_dtype` ({self.adapter_dtype!r}) must be same or float32.")
        if self.sweep is not None and self.sweep not in SWEEPS:
            raise ValueError(f"`sweep` ({self.sweep!r}) must be one of {', '.join(SWEEPS)}.")
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
    def settings(self) -> list[Setting]:
        """Settings of the comparison, in the order given."""
        sizes = [(max(1, number // self.seq_len), number) for number in self.tokens]
        return [Setting(num_rows=rows, num_tokens=number // rows) for rows, number in sizes]

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
    def torch_device(self) -> torch.device:
        """The device."""
        return choose_device(self.device)

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def trained_dtype(self) -> torch.dtype:
        """The dtype of what adapters train."""
        return torch.float32 if self.adapter_dtype == "float32" else self.weight_dtype

    @property
    def needs_autocast(self) -> bool:
        """Whether products need it, because adapters are finer than weights."""
        return self.trained_dtype != self.weight_dtype
