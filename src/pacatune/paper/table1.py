"""Table 1: fine-tuning on MMLU; memory, time and 5-shot accuracy."""

from pacatune.paper.table import Quantity, Table, rows_of

__all__ = ["TABLE"]

# Gigabytes are printed whole. Section 4.1 calls differences of up to 0.9 points a drop, and the
# methods of Table 1 "comparable" all the same.
_QUANTITIES = (
    Quantity(key="params", title="trained parameters", unit="M", kind="size"),
    Quantity(key="memory", title="memory", unit="GB", kind="memory", margin=0.5),
    Quantity(key="time", title="training time", unit="h", kind="time", margin=0.05),
    Quantity(key="humanities", title="humanities", unit="%", kind="score", margin=1.0),
    Quantity(key="stem", title="STEM", unit="%", kind="score", margin=1.0),
    Quantity(key="social", title="social sciences", unit="%", kind="score", margin=1.0),
    Quantity(key="other", title="other", unit="%", kind="score", margin=1.0),
    Quantity(key="average", title="average", unit="%", kind="score", margin=1.0),
)

TABLE = Table(
    name="table1",
    title="Fine-tuning on MMLU: memory, training time and 5-shot accuracy",
    place="Table 1, section 4.1; settings in Table 9",
    reference="lora",
    quantities=_QUANTITIES,
    rows=(
        *rows_of(
            _QUANTITIES,
            "llama2-7b",
            ("none", None, (None, None, None, 44.0, 37.0, 51.5, 53.1, 45.9)),
            ("lora", 8, (20, 23, 4.1, 48.5, 41.2, 57.3, 56.5, 50.6)),
            ("dora", 8, (21, 29, 8.7, 48.7, 42.3, 58.3, 57.6, 51.3)),
            ("moslora", 8, (20, 23, 4.3, 46.6, 42.2, 60.8, 57.4, 51.1)),
            ("paca", 8, (11, 20, 3.2, 46.8, 41.1, 58.4, 57.3, 50.4)),
            ("paca", 16, (22, 20, 3.2, 48.7, 41.7, 58.7, 57.6, 51.2)),
        ),
        *rows_of(
            _QUANTITIES,
            "llama2-13b",
            ("none", None, (None, None, None, 53.1, 44.2, 62.8, 60.8, 54.9)),
            ("lora", 8, (31, 40, 6.3, 53.9, 46.2, 66.8, 62.9, 57.0)),
            ("dora", 8, (33, 49, 14.7, 55.6, 46.8, 66.7, 64.8, 58.1)),
            ("moslora", 8, (31, 40, 6.5, 56.5, 47.3, 66.1, 62.8, 57.9)),
            ("paca", 8, (17, 35, 5.2, 52.7, 46.2, 67.1, 63.4, 56.8)),
            ("paca", 16, (34, 35, 5.2, 56.0, 46.7, 66.3, 64.0, 58.0)),
        ),
        *rows_of(
            _QUANTITIES,
            "llama3-8b",
            ("none", None, (None, None, None, 59.3, 55.3, 75.7, 72.7, 64.9)),
            ("lora", 8, (21, 27, 4.4, 59.4, 56.3, 75.4, 71.9, 65.0)),
            ("dora", 8, (22, 33, 9.4, 59.4, 56.3, 75.7, 72.2, 65.2)),
            ("moslora", 8, (21, 27, 4.6, 59.8, 55.9, 75.7, 72.0, 65.1)),
            ("paca", 8, (11, 23, 3.5, 59.7, 55.7, 76.0, 72.3, 65.2)),
            ("paca", 16, (22, 23, 3.5, 60.2, 55.9, 75.8, 72.6, 65.4)),
        ),
    ),
)
