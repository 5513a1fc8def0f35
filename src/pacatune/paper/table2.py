"""Table 2: instruction tuning of LLaMA3-8B on Oasst1, scored by MT-Bench."""

from pacatune.paper.mt_bench import LLAMA3_8B, SCORES
from pacatune.paper.table import Quantity, Table, rows_of

__all__ = ["TABLE"]

_QUANTITIES = (
    Quantity(key="memory", title="memory", unit="GB", kind="memory", margin=0.5),
    Quantity(key="time", title="training time", unit="min", kind="time", margin=0.5),
    *SCORES,
)

TABLE = Table(
    name="table2",
    title="Instruction tuning on Oasst1: memory, training time and MT-Bench",
    place="Table 2, section 4.2; settings in Table 10",
    reference="lora",
    quantities=_QUANTITIES,
    rows=rows_of(
        _QUANTITIES,
        "llama3-8b",
        ("none", None, (None, None, *LLAMA3_8B)),
        ("lora", 64, (56, 26, 7.00, 6.40, 5.70, 5.80, 5.30, 4.55, 3.25, 2.95, 5.12)),
        ("dora", 64, (65, 50, 6.95, 6.00, 5.90, 5.80, 6.20, 4.50, 3.50, 3.40, 5.28)),
        ("moslora", 64, (56, 27, 6.90, 6.50, 5.80, 5.70, 5.55, 4.90, 3.10, 2.75, 5.15)),
        ("paca", 64, (47, 21, 6.50, 6.30, 5.90, 5.95, 5.65, 4.80, 3.70, 3.05, 5.23)),
        ("paca", 128, (51, 21, 6.80, 6.15, 6.05, 5.95, 5.85, 4.65, 3.45, 3.15, 5.26)),
    ),
)
