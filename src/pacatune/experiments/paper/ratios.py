"""Every cost of one method as a share of another's that the paper states, in text or tables.

The model is LLaMA3-8B on one NVIDIA A100 (80 GB), adapters on all seven linear layers.
"""

from dataclasses import dataclass

from pacatune.experiments.paper import fig2, tables
from pacatune.experiments.paper.tables import Table

__all__ = ["LENGTHS", "LENGTHS_SOURCE", "RATIOS", "THROUGHPUT_SOURCE", "PaperRatio"]


@dataclass(frozen=True, kw_only=True)
class PaperRatio:
    """One method's share of another's, as the paper states it."""

    quantity: str
    """flops, step, forward, backward or peak."""
    method: str
    """Name of a method of `pacatune bench`."""
    reference: str
    ratio: float
    source: str


def _of_figure_2() -> list[PaperRatio]:
    return [
        PaperRatio(
            quantity="flops" if claim.quantity == "operations" else claim.phase,
            method=claim.method,
            reference=claim.of_method,
            ratio=claim.ratio,
            source=f"'{claim.quote}', section {claim.section}; 2 x 512 tokens, 16 bits (Fig. 2, "
            "Table 8)",
        )
        for claim in fig2.CLAIMS
        if claim.method != claim.of_method and (claim.quantity == "time" or claim.phase == "step")
    ]


def _of_table(
    table: Table, keys: tuple[str, str], names: tuple[str, str], setting: str
) -> list[PaperRatio]:
    """Return the ratios of time and memory of two lines."""
    ours, other = (table.row(key).values for key in keys)
    method, reference = names
    return [
        PaperRatio(
            quantity=quantity,
            method=method,
            reference=reference,
            ratio=ours[key] / other[key],
            source=f"{ours[key]:g} and {other[key]:g} {table.quantity(key).unit}, "
            f"{table.label}; {setting}",
        )
        for quantity, key in (("step", "time"), ("peak", "memory"))
    ]


_MMLU = "MMLU, 2 x 512 tokens, dropout 0.1 but for PaCA"
RATIOS: tuple[PaperRatio, ...] = (
    *_of_figure_2(),
    *(
        ratio
        for row, name in (("lora", "lora_dropout"), ("dora", "dora"), ("moslora", "moslora"))
        for ratio in _of_table(
            tables.TABLE_1,
            ("llama3-8b-paca-r8", f"llama3-8b-{row}-r8"),
            ("paca", name),
            _MMLU,
        )
    ),
    *_of_table(
        tables.TABLE_3,
        ("llama3-8b-qpaca-r64", "llama3-8b-qlora-r64"),
        ("qpaca", "qlora"),
        "Oasst1, at most 768 tokens, rank 64",
    ),
)

# Method -> longest sequence in tokens, batch 1, 16-bit mixed precision.
LENGTHS = {row.method: row.values["length"] for row in tables.TABLE_4.rows}
LENGTHS_SOURCE = "Table 4: LLaMA3-8B, one A100, batch 1, rank 8 (Table 12)"
THROUGHPUT_SOURCE = "section 4.4 and Fig. 3: LLaMA3-8B, 512 tokens, rank 8, 16 bits (Table 13)"
