"""Table 7: EfficientNetV2-L on two data sets, full fine-tuning and PaCA."""

from pacatune.paper.table import Quantity, Table, rows_of

__all__ = ["TABLE"]

# "Comparable accuracy": 0.6 points apart on average, 0.8 on CIFAR-100.
_QUANTITIES = (
    Quantity(key="memory", title="memory", unit="GB", kind="memory", margin=0.05),
    Quantity(key="time", title="training time", unit="min", kind="time", margin=0.5),
    Quantity(key="cifar10", title="CIFAR-10", unit="%", kind="score", margin=1.0),
    Quantity(key="cifar100", title="CIFAR-100", unit="%", kind="score", margin=1.0),
    Quantity(key="average", title="average", unit="%", kind="score", margin=1.0),
)

TABLE = Table(
    name="table7",
    title="EfficientNetV2-L on images: memory, training time and accuracy",
    place="Table 7, appendix B; the paper gives no settings",
    reference="full",
    quantities=_QUANTITIES,
    rows=rows_of(
        _QUANTITIES,
        "efficientnetv2-l",
        ("full", None, (18.3, 70, 98.5, 90.1, 94.3)),
        ("paca", None, (13.2, 59, 98.0, 89.3, 93.7)),
    ),
)
