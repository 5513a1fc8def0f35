"""Table 5: strategies that choose PaCA's columns, scored by MT-Bench."""

from pacatune.paper.mt_bench import LLAMA3_8B, SCORES
from pacatune.paper.table import Row, Table

__all__ = ["TABLE"]

_LINES = {
    "random-1": (6.50, 6.30, 5.90, 5.95, 5.65, 4.80, 3.70, 3.05, 5.23),
    "random-2": (6.50, 6.00, 6.30, 5.90, 5.70, 4.90, 3.80, 3.00, 5.26),
    "weight_norm": (7.00, 5.70, 6.05, 5.80, 5.70, 4.55, 3.90, 2.70, 5.18),
    "gradient": (6.95, 6.40, 6.25, 5.35, 5.95, 4.55, 3.80, 2.70, 5.24),
}
_KEYS = [quantity.key for quantity in SCORES]

TABLE = Table(
    name="table5",
    title="Strategies that choose the columns of PaCA",
    place="Table 5, section 5; settings in Table 10, 100 batches for gradients",
    reference="paca",
    quantities=SCORES,
    rows=(
        Row(model="llama3-8b", method="none", values=dict(zip(_KEYS, LLAMA3_8B, strict=True))),
        *(
            Row(
                model="llama3-8b",
                method="paca",
                rank=64,
                variant=variant,
                values=dict(zip(_KEYS, scores, strict=True)),
            )
            for variant, scores in _LINES.items()
        ),
    ),
)
