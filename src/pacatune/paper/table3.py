"""Table 3: QLoRA and QPaCA on Oasst1, scored by MT-Bench."""

from pacatune.paper.mt_bench import LLAMA3_8B, SCORES
from pacatune.paper.table import Quantity, Table, rows_of

__all__ = ["TABLE"]

_QUANTITIES = (
    Quantity(key="memory", title="memory", unit="GB", kind="memory", margin=0.5),
    Quantity(key="time", title="training time", unit="min", kind="time", margin=0.5),
    *SCORES,
)

TABLE = Table(
    name="table3",
    title="Instruction tuning on 4-bit bases: QLoRA and QPaCA",
    place="Table 3, section 4.3; settings in Table 11",
    reference="qlora",
    quantities=_QUANTITIES,
    rows=(
        *rows_of(
            _QUANTITIES,
            "llama3-8b",
            ("none", None, (None, None, *LLAMA3_8B)),
            (
                "quantized",
                None,
                (None, None, 4.70, 4.80, 4.60, 5.00, 4.65, 4.05, 3.60, 1.85, 4.16),
            ),
            ("qlora", 64, (18, 42, 6.85, 5.75, 5.85, 6.00, 5.15, 4.70, 3.35, 2.35, 5.00)),
            ("qpaca", 64, (16, 37, 6.85, 5.95, 5.65, 5.60, 5.15, 4.05, 3.65, 3.25, 5.02)),
        ),
        *rows_of(
            _QUANTITIES,
            "llama3.1-70b",
            (
                "quantized",
                None,
                (None, None, 7.40, 7.05, 5.85, 6.50, 6.85, 5.30, 4.60, 3.80, 5.92),
            ),
            # 5.1 h and 4.7 h
            ("qlora", 64, (80, 306, 7.40, 6.85, 6.55, 7.20, 6.55, 5.65, 4.75, 3.80, 6.09)),
            ("qpaca", 64, (69, 282, 7.70, 7.40, 6.40, 6.80, 6.50, 5.40, 4.75, 3.70, 6.08)),
        ),
    ),
)
