"""Table 4: the longest sequence that one A100 trains."""

from pacatune.paper.table import Quantity, Table, rows_of

__all__ = ["GPU", "TABLE"]

GPU = "a100-80g"
_QUANTITIES = (
    Quantity(key="length", title="longest sequence", unit="tokens", kind="length", margin=50),
)

TABLE = Table(
    name="table4",
    title="The longest sequence on one A100 (80 GB)",
    place="Table 4, section 4.4; settings in Table 12",
    reference="lora",
    quantities=_QUANTITIES,
    # Printed in thousands: 8.0K.
    rows=rows_of(
        _QUANTITIES,
        "llama3-8b",
        ("lora", 8, (8000,)),
        ("dora", 8, (4700,)),
        ("moslora", 8, (8000,)),
        ("paca", 8, (9800,)),
    ),
)
