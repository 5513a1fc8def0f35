"""Every cost of one method as a share of another's that the paper states, in text or tables.

The model is LLaMA3-8B on one NVIDIA A100 (80 GB), adapters on all seven linear layers.
"""

from dataclasses import dataclass

from pacatune.paper import fig2, tables
from pacatune.paper.tables import Table


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
            quantity="flops" if claim.quantity == "operations" else claim.what[1],
            method=claim.what[0],
            reference=claim.of[0],
            ratio=claim.ratio,
            source=f"'{claim.quote}', section {claim.section}; 2 x 512 tokens, 16 bits (Fig. 2, "
            "Table 8)",
        )
        for claim in fig2.CLAIMS
        if claim.what[0] != claim.of[0] and (claim.quantity == "time" or claim.what[1] == "step")
    ]


def _of_table(
    table: Table, setting: str, ours: str, line: str, reference: str = ""
) -> list[PaperRatio]:
    """Return time and memory of LLaMA3-8B by method-rank `ours` as shares of those by `line`."""
    here, there = (table.row(f"llama3-8b-{key}").values for key in (ours, line))
    return [
        PaperRatio(
            quantity=quantity,
            method=ours.partition("-")[0],
            reference=reference or line.partition("-")[0],
            ratio=here[key] / there[key],
            source=f"{here[key]:g} and {there[key]:g} {table.quantity(key).unit}, "
            f"{table.label}; {setting}",
        )
        for quantity, key in (("step", "time"), ("peak", "memory"))
    ]


_MMLU = (tables.TABLE_1, "MMLU, 2 x 512 tokens, dropout 0.1 but for PaCA", "paca-r8")
_OASST1 = (tables.TABLE_3, "Oasst1, at most 768 tokens, rank 64", "qpaca-r64")
RATIOS: tuple[PaperRatio, ...] = (
    *_of_figure_2(),
    *_of_table(*_MMLU, "lora-r8", "lora_dropout"),
    *_of_table(*_MMLU, "dora-r8"),
    *_of_table(*_MMLU, "moslora-r8"),
    *_of_table(*_OASST1, "qlora-r64"),
)

# Method -> longest sequence in tokens, batch 1, 16-bit mixed precision.
LENGTHS = {row.method: row.values["length"] for row in tables.TABLE_4.rows}
LENGTHS_SOURCE = "Table 4: LLaMA3-8B, one A100, batch 1, rank 8 (Table 12)"
THROUGHPUT_SOURCE = "section 4.4 and Fig. 3: LLaMA3-8B, 512 tokens, rank 8, 16 bits (Table 13)"
