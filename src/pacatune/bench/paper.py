"""What the paper says in text and tables about cost; nothing is read off its bars.

PaCA: Partial Connection Adaptation for Efficient Fine-Tuning (Woo et al., ICLR 2025). Its model is
LLaMA3-8B on one NVIDIA A100 (80 GB) unless said otherwise, rank 8 on all seven linear layers.
"""

from dataclasses import dataclass

__all__ = ["LENGTHS", "RATIOS", "THROUGHPUT", "PaperRatio"]


@dataclass(frozen=True, kw_only=True)
class PaperRatio:
    """One method's share of another's, as the paper states it."""

    quantity: str
    """A key of `paper_quantities` in report.py."""
    method: str
    reference: str
    ratio: float
    source: str


_FIG_2 = "2 x 512 tokens, 16 bits (Fig. 2, Table 8)"
RATIOS = (
    PaperRatio(
        quantity="flops",
        method="lora",
        reference="full",
        ratio=0.67,
        source=f"'approximately 33% lower', section 2; {_FIG_2}",
    ),
    PaperRatio(
        quantity="step",
        method="lora",
        reference="full",
        ratio=0.994,
        source=f"'only 0.6%', section 2; {_FIG_2}",
    ),
    PaperRatio(
        quantity="forward",
        method="lora",
        reference="full",
        ratio=1.33,
        source=f"'increased by 33%', section 2; {_FIG_2}",
    ),
    PaperRatio(
        quantity="step",
        method="paca",
        reference="lora",
        ratio=0.81,
        source=f"'19% reduction in total training time', section 3.1; {_FIG_2}",
    ),
    PaperRatio(
        quantity="forward",
        method="paca",
        reference="lora",
        ratio=0.82,
        source=f"'by 18%', section 3.1; {_FIG_2}",
    ),
    PaperRatio(
        quantity="backward",
        method="paca",
        reference="lora",
        ratio=0.80,
        source=f"'by 20%', section 3.1; {_FIG_2}",
    ),
    PaperRatio(
        quantity="step",
        method="paca",
        reference="lora-dropout",
        ratio=3.5 / 4.4,
        source="3.5 h and 4.4 h on MMLU, Table 1; 2 x 512 tokens, LoRA with dropout 0.1",
    ),
    PaperRatio(
        quantity="step",
        method="paca",
        reference="dora",
        ratio=3.5 / 9.4,
        source="3.5 h and 9.4 h on MMLU, Table 1; 2 x 512 tokens, DoRA with dropout 0.1",
    ),
    PaperRatio(
        quantity="step",
        method="paca",
        reference="moslora",
        ratio=3.5 / 4.6,
        source="3.5 h and 4.6 h on MMLU, Table 1; 2 x 512 tokens, MosLoRA with dropout 0.1",
    ),
    PaperRatio(
        quantity="peak",
        method="paca",
        reference="lora-dropout",
        ratio=23 / 27,
        source="23G and 27G on MMLU, Table 1; 2 x 512 tokens, LoRA with dropout 0.1",
    ),
    PaperRatio(
        quantity="peak",
        method="paca",
        reference="dora",
        ratio=23 / 33,
        source="23G and 33G on MMLU, Table 1; 2 x 512 tokens, DoRA with dropout 0.1",
    ),
    PaperRatio(
        quantity="step",
        method="qpaca",
        reference="qlora",
        ratio=37 / 42,
        source="37 min and 42 min on Oasst1, Table 3; 768 tokens, rank 64",
    ),
    PaperRatio(
        quantity="peak",
        method="qpaca",
        reference="qlora",
        ratio=16 / 18,
        source="16G and 18G on Oasst1, Table 3; 768 tokens, rank 64",
    ),
)

# Method -> longest sequence in thousands of tokens, batch 1, 16-bit mixed precision.
LENGTHS = {"lora": 8.0, "dora": 4.7, "moslora": 8.0, "paca": 9.8}
LENGTHS_SOURCE = "Table 4: LLaMA3-8B, one A100, batch 1, rank 8 (Table 12)"

# Device -> PaCA's highest rate, its and its batch's ratio to LoRA's.
THROUGHPUT = {
    "A100": {"sentences_per_second": 10.36, "rate_ratio": 1.16, "batch_ratio": 1.33},
    "Gaudi2": {"sentences_per_second": 15.5, "rate_ratio": 1.16, "batch_ratio": 1.21},
}
THROUGHPUT_SOURCE = "section 4.4 and Fig. 3: LLaMA3-8B, 512 tokens, rank 8, 16 bits (Table 13)"
