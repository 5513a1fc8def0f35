"""Tables 9 to 12: the hyper-parameters of Tables 1 to 5, as printed.

Where a table leaves something out it is None here, and what a run takes instead is ours to say.
The same in all of them: 16-bit mixed precision; Q, K, V, O, Up, Down and Gate are adapted.
"""

from dataclasses import dataclass, replace

from experiments.paper.tables import Line

# What the authors' scripts (github.com/WooSunghyeon/paca, commit be9a806) have otherwise, by table.
SCRIPTS = {
    "table1": "The authors' scripts for MMLU: linear schedule, no warm-up, micro-batches of 2.",
    "table2": "The authors' scripts for Oasst1: cosine schedule, LoRA at 5e-4 and PaCA at 5e-3.",
    "table3": "The authors' scripts for 70B: seed 526, QLoRA at 5e-4 and QPaCA at 5e-3.",
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of one method, of the paper or of a run of ours; None is not said."""

    rank: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    learning_rates: tuple[float, ...] | None = None
    """Several are a grid, of which the best counts."""
    scheduler: str | None = None
    batch_size: int | None = None
    """Examples in an optimizer step, over all micro-batches."""
    micro_batches: int | None = None
    """Gradient accumulation steps."""
    seq_len: int | None = None
    """The longest; shorter texts stay shorter where nothing pads them."""
    warmup: float | None = None
    """Steps; below 1, a share of all."""
    epochs: float | None = None
    steps: int | None = None


_MMLU = Settings(
    scheduler="cosine",
    batch_size=8,
    micro_batches=4,
    seq_len=512,
    warmup=100,
    epochs=1,
)
# Model -> method -> learning rate on MMLU; paca16: PaCA at rank 16.
_MMLU_RATES = {
    "llama2-7b": {"lora": 3e-4, "dora": 3e-4, "moslora": 3e-4, "paca": 3e-4, "paca16": 1e-4},
    "llama2-13b": {"lora": 2e-4, "dora": 1e-4, "moslora": 1e-4, "paca": 1e-4, "paca16": 1e-4},
    "llama3-8b": {"lora": 1e-5, "dora": 5e-6, "moslora": 5e-6, "paca": 5e-6, "paca16": 5e-6},
}
_OASST1 = Settings(
    alpha=1,
    learning_rates=(5e-4, 1e-3, 5e-3),
    scheduler="linear",
    batch_size=16,
    micro_batches=4,
    seq_len=768,
    warmup=0.1,
    epochs=1,
)


def table_9(model: str, method: str, rank: int) -> Settings:
    """Return the settings of a line of Table 1 (MMLU)."""
    rate = _MMLU_RATES[model].get("paca16" if (method, rank) == ("paca", 16) else method)
    return replace(
        _MMLU,
        rank=rank,
        alpha=64 if rank == 16 else 32,
        dropout=None if method == "paca" else 0.1,
        learning_rates=None if rate is None else (rate,),  # None: it is not trained
    )


def table_10(rank: int) -> Settings:
    """Return the settings of Tables 2 and 5 (Oasst1), which are the same for all methods."""
    return replace(_OASST1, rank=rank)


def table_11(model: str) -> Settings:
    """Return the settings of Table 3 (Oasst1 on 4-bit bases)."""
    return replace(_OASST1, rank=64, micro_batches=4 if model == "llama3-8b" else 2)


def table_12() -> Settings:
    """Return the settings of Table 4 (longest sequence)."""
    return Settings(rank=8, batch_size=1)


def of_line(table: str, line: Line) -> Settings:
    """Return the settings of a line of Tables 1 to 5."""
    if table == "table1":
        return table_9(line.model, line.method, line.rank or 8)
    if table in ("table2", "table5"):
        return table_10(line.rank or 64)
    return table_11(line.model) if table == "table3" else table_12()
