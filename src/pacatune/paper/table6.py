"""Table 6: ViT-B/16 on four data sets, LoRA and PaCA."""

from pacatune.paper.table import Quantity, Table, rows_of

__all__ = ["TABLE"]

# LoRA and PaCA are called comparable; they differ by up to 0.3 points.
_QUANTITIES = (
    Quantity(key="memory", title="memory", unit="GB", kind="memory", margin=0.05),
    Quantity(key="time", title="training time", unit="min", kind="time", margin=0.5),
    Quantity(key="cifar10", title="CIFAR-10", unit="%", kind="score", margin=0.5),
    Quantity(key="cifar100", title="CIFAR-100", unit="%", kind="score", margin=0.5),
    Quantity(key="pets", title="Oxford-IIIT Pets", unit="%", kind="score", margin=0.5),
    Quantity(key="flowers102", title="Oxford-Flowers 102", unit="%", kind="score", margin=0.5),
    Quantity(key="average", title="average", unit="%", kind="score", margin=0.5),
)

TABLE = Table(
    name="table6",
    title="ViT-B/16 on images: memory, training time and accuracy",
    place="Table 6, appendix B; the paper gives no settings",
    reference="lora",
    quantities=_QUANTITIES,
    rows=rows_of(
        _QUANTITIES,
        "vit-b16",
        ("lora", None, (11.0, 45, 98.9, 92.5, 93.6, 99.2, 96.1)),
        ("paca", None, (6.7, 32, 98.9, 92.8, 93.9, 99.1, 96.2)),
    ),
)
