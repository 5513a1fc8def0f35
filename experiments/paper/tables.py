"""The tables of the paper: what each line says, as data."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pacatune.methods import METHODS
from pacatune.reports.rows import Row

METHOD_TITLES = {
    "none": "No tuning",
    "quantized": "Quantized, no tuning",
    **{name: method.title for name, method in METHODS.items()},
    "moslora": "MosLoRA",
    "full": "Full-FT",
}
"""Methods of the paper's tables -> what they are called."""


@dataclass(frozen=True)
class Quantity:
    """A column of numbers."""

    key: str
    title: str
    unit: str
    is_score: bool = False
    """Whether more is better, and differences are points; otherwise shares are compared."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One method on one model, with what the paper reports of it."""

    model: str
    """A preset of `pacatune.measure.presets`, or the paper's name of an image model."""
    method: str
    """A key of `METHOD_TITLES`."""
    rank: int | None = None
    variant: str = ""
    """What distinguishes lines of one method."""
    values: Mapping[str, float]
    """Key of a quantity -> number, as printed; what is not printed is not there."""

    @property
    def key(self) -> str:
        """A name that is unique in the table and fit for files."""
        rank = "" if self.rank is None else f"r{self.rank}"
        return "-".join(part for part in (self.model, self.method, rank, self.variant) if part)

    @property
    def is_trained(self) -> bool:
        """Whether the line is of a fine-tuned model."""
        return self.method in METHODS

    @property
    def title(self) -> str:
        """What tells the line from others of its model, as the paper names it."""
        rank = "" if self.rank is None else f"r = {self.rank}"
        parts = (METHOD_TITLES[self.method], rank, self.variant.replace("-", " "))
        return ", ".join(filter(None, parts))


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table of the paper."""

    name: str
    """As on the command line: table1."""
    title: str
    place: str
    """Where in the paper, and which table holds its settings."""
    reference: str
    """Method that the others of the same model are compared with."""
    quantities: tuple[Quantity, ...]
    lines: tuple[Line, ...]

    def quantity(self, key: str) -> Quantity:
        """Return a column by its key."""
        return next(quantity for quantity in self.quantities if quantity.key == key)

    @property
    def trained(self) -> list[Line]:
        """The lines that are fine-tuned."""
        return [line for line in self.lines if line.is_trained]

    def rows(self) -> Iterator[Row]:
        """Yield the numbers that are printed."""
        for line in self.lines:
            for one in self.quantities:
                if one.key in line.values:
                    yield Row(
                        what=one.title,
                        method=line.title,
                        value=float(line.values[one.key]),
                        unit=one.unit,
                        model=line.model,
                        origin="paper",
                    )


_Printed = tuple[str, int | None, tuple[float | None, ...]]
# Method (and variant), rank, numbers.


def _table(
    quantities: tuple[Quantity, ...], lines: dict[str, tuple[_Printed, ...]], **about: str
) -> Table:
    """Return a table of lines by model, with a number for each quantity; None is a printed dash."""
    keys = [quantity.key for quantity in quantities]
    found = tuple(
        Line(
            model=model,
            method=method.partition(" ")[0],
            variant=method.partition(" ")[2],
            rank=rank,
            values={k: v for k, v in zip(keys, numbers, strict=True) if v is not None},
        )
        for model, of_model in lines.items()
        for method, rank, numbers in of_model
    )
    return Table(quantities=quantities, lines=found, **about)


def _costs(unit: str) -> tuple[Quantity, Quantity]:
    """Return memory and time, in the unit; Tables 1 to 3 print whole gigabytes."""
    return (Quantity("memory", "memory", "GB"), Quantity("time", "training time", unit))


def _scores(unit: str, **titles: str) -> tuple[Quantity, ...]:
    return tuple(Quantity(key, title, unit, is_score=True) for key, title in titles.items())


# Scores of MT-Bench, of Tables 2, 3 and 5: points of 10 by GPT4o-mini. The text calls 5.12 to 5.28
# comparable (section 4.2).
SCORES = _scores(
    "points",
    humanities="humanities",
    stem="STEM",
    roleplay="roleplay",
    extraction="extraction",
    writing="writing",
    reasoning="reasoning",
    coding="coding",
    math="math",
    average="average",
)
# "No tuning" of LLaMA3-8B: the same line in all three tables.
_LLAMA3_8B = (6.25, 5.70, 5.45, 4.85, 5.20, 4.40, 3.20, 1.95, 4.62)

TABLE_1 = _table(
    (
        Quantity("params", "trained parameters", "M"),
        *_costs("h"),
        *_scores(
            "%",
            humanities="humanities",
            stem="STEM",
            social="social sciences",
            other="other",
            average="average",
        ),
    ),
    {
        "llama2-7b": (
            ("none", None, (None, None, None, 44.0, 37.0, 51.5, 53.1, 45.9)),
            ("lora", 8, (20, 23, 4.1, 48.5, 41.2, 57.3, 56.5, 50.6)),
            ("dora", 8, (21, 29, 8.7, 48.7, 42.3, 58.3, 57.6, 51.3)),
            ("moslora", 8, (20, 23, 4.3, 46.6, 42.2, 60.8, 57.4, 51.1)),
            ("paca", 8, (11, 20, 3.2, 46.8, 41.1, 58.4, 57.3, 50.4)),
            ("paca", 16, (22, 20, 3.2, 48.7, 41.7, 58.7, 57.6, 51.2)),
        ),
        "llama2-13b": (
            ("none", None, (None, None, None, 53.1, 44.2, 62.8, 60.8, 54.9)),
            ("lora", 8, (31, 40, 6.3, 53.9, 46.2, 66.8, 62.9, 57.0)),
            ("dora", 8, (33, 49, 14.7, 55.6, 46.8, 66.7, 64.8, 58.1)),
            ("moslora", 8, (31, 40, 6.5, 56.5, 47.3, 66.1, 62.8, 57.9)),
            ("paca", 8, (17, 35, 5.2, 52.7, 46.2, 67.1, 63.4, 56.8)),
            ("paca", 16, (34, 35, 5.2, 56.0, 46.7, 66.3, 64.0, 58.0)),
        ),
        "llama3-8b": (
            ("none", None, (None, None, None, 59.3, 55.3, 75.7, 72.7, 64.9)),
            ("lora", 8, (21, 27, 4.4, 59.4, 56.3, 75.4, 71.9, 65.0)),
            ("dora", 8, (22, 33, 9.4, 59.4, 56.3, 75.7, 72.2, 65.2)),
            ("moslora", 8, (21, 27, 4.6, 59.8, 55.9, 75.7, 72.0, 65.1)),
            ("paca", 8, (11, 23, 3.5, 59.7, 55.7, 76.0, 72.3, 65.2)),
            ("paca", 16, (22, 23, 3.5, 60.2, 55.9, 75.8, 72.6, 65.4)),
        ),
    },
    name="table1",
    title="Fine-tuning on MMLU: memory, training time and 5-shot accuracy",
    place="Table 1, section 4.1; settings in Table 9",
    reference="lora",
)

TABLE_2 = _table(
    (*_costs("min"), *SCORES),
    {
        "llama3-8b": (
            ("none", None, (None, None, *_LLAMA3_8B)),
            ("lora", 64, (56, 26, 7.00, 6.40, 5.70, 5.80, 5.30, 4.55, 3.25, 2.95, 5.12)),
            ("dora", 64, (65, 50, 6.95, 6.00, 5.90, 5.80, 6.20, 4.50, 3.50, 3.40, 5.28)),
            ("moslora", 64, (56, 27, 6.90, 6.50, 5.80, 5.70, 5.55, 4.90, 3.10, 2.75, 5.15)),
            ("paca", 64, (47, 21, 6.50, 6.30, 5.90, 5.95, 5.65, 4.80, 3.70, 3.05, 5.23)),
            ("paca", 128, (51, 21, 6.80, 6.15, 6.05, 5.95, 5.85, 4.65, 3.45, 3.15, 5.26)),
        ),
    },
    name="table2",
    title="Instruction tuning on Oasst1: memory, training time and MT-Bench",
    place="Table 2, section 4.2; settings in Table 10",
    reference="lora",
)

_QUANTIZED_8B = (4.70, 4.80, 4.60, 5.00, 4.65, 4.05, 3.60, 1.85, 4.16)
_QUANTIZED_70B = (7.40, 7.05, 5.85, 6.50, 6.85, 5.30, 4.60, 3.80, 5.92)
TABLE_3 = _table(
    (*_costs("min"), *SCORES),
    {
        "llama3-8b": (
            ("none", None, (None, None, *_LLAMA3_8B)),
            ("quantized", None, (None, None, *_QUANTIZED_8B)),
            ("qlora", 64, (18, 42, 6.85, 5.75, 5.85, 6.00, 5.15, 4.70, 3.35, 2.35, 5.00)),
            ("qpaca", 64, (16, 37, 6.85, 5.95, 5.65, 5.60, 5.15, 4.05, 3.65, 3.25, 5.02)),
        ),
        "llama3.1-70b": (
            ("quantized", None, (None, None, *_QUANTIZED_70B)),
            # 5.1 h and 4.7 h
            ("qlora", 64, (80, 306, 7.40, 6.85, 6.55, 7.20, 6.55, 5.65, 4.75, 3.80, 6.09)),
            ("qpaca", 64, (69, 282, 7.70, 7.40, 6.40, 6.80, 6.50, 5.40, 4.75, 3.70, 6.08)),
        ),
    },
    name="table3",
    title="Instruction tuning on 4-bit bases: QLoRA and QPaCA",
    place="Table 3, section 4.3; settings in Table 11",
    reference="qlora",
)

GPU = "a100-80g"
TABLE_4 = _table(
    (Quantity("length", "longest sequence", "tokens"),),
    {
        # Printed in thousands: 8.0K.
        "llama3-8b": (
            ("lora", 8, (8000,)),
            ("dora", 8, (4700,)),
            ("moslora", 8, (8000,)),
            ("paca", 8, (9800,)),
        ),
    },
    name="table4",
    title="The longest sequence on one A100 (80 GB)",
    place="Table 4, section 4.4; settings in Table 12",
    reference="lora",
)

TABLE_5 = _table(
    SCORES,
    {
        "llama3-8b": (
            ("none", None, _LLAMA3_8B),
            # With the strategy that chooses the columns.
            ("paca random-1", 64, (6.50, 6.30, 5.90, 5.95, 5.65, 4.80, 3.70, 3.05, 5.23)),
            ("paca random-2", 64, (6.50, 6.00, 6.30, 5.90, 5.70, 4.90, 3.80, 3.00, 5.26)),
            ("paca weight_norm", 64, (7.00, 5.70, 6.05, 5.80, 5.70, 4.55, 3.90, 2.70, 5.18)),
            ("paca gradient", 64, (6.95, 6.40, 6.25, 5.35, 5.95, 4.55, 3.80, 2.70, 5.24)),
        ),
    },
    name="table5",
    title="Strategies that choose the columns of PaCA",
    place="Table 5, section 5; settings in Table 10, 100 batches for gradients",
    reference="paca",
)

_IMAGES = {
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "pets": "Oxford-IIIT Pets",
    "flowers102": "Oxford-Flowers 102",
    "average": "average",
}
TABLE_6 = _table(
    (*_costs("min"), *_scores("%", **_IMAGES)),
    {
        "vit-b16": (
            ("lora", None, (11.0, 45, 98.9, 92.5, 93.6, 99.2, 96.1)),
            ("paca", None, (6.7, 32, 98.9, 92.8, 93.9, 99.1, 96.2)),
        ),
    },
    name="table6",
    title="ViT-B/16 on images: memory, training time and accuracy",
    place="Table 6, appendix B; the paper gives no settings",
    reference="lora",
)

TABLE_7 = _table(
    (
        *_costs("min"),
        *_scores("%", cifar10="CIFAR-10", cifar100="CIFAR-100", average="average"),
    ),
    {
        "efficientnetv2-l": (
            ("full", None, (18.3, 70, 98.5, 90.1, 94.3)),
            ("paca", None, (13.2, 59, 98.0, 89.3, 93.7)),
        ),
    },
    name="table7",
    title="EfficientNetV2-L on images: memory, training time and accuracy",
    place="Table 7, appendix B; the paper gives no settings",
    reference="full",
)

ALL = (TABLE_1, TABLE_2, TABLE_3, TABLE_4, TABLE_5, TABLE_6, TABLE_7)
