import pytest

from pacatune.experiments.reproduce.verdicts import Column, same_column
from pacatune.paper.tables import Quantity, Row, Table


@pytest.fixture
def table():
    """Three methods on one model, and one on another."""
    memory = Quantity(key="memory", title="memory", unit="GB", kind="memory", margin=0.5)
    score = Quantity(key="average", title="average", unit="%", kind="score", margin=1.0)

    def row(model, method, memory, average):
        return Row(
            model=model, method=method, rank=8, values={"memory": memory, "average": average}
        )

    return Table(
        name="table9",
        title="A table",
        place="nowhere",
        reference="lora",
        quantities=(memory, score),
        rows=(
            Row(model="small", method="none", values={"average": 40.0}),
            row("small", "lora", 20.0, 50.0),
            row("small", "dora", 30.0, 50.5),
            row("small", "paca", 16.0, 53.0),
            row("large", "lora", 40.0, 60.0),
        ),
    )


@pytest.fixture
def same(table):
    """A column of the same quantity as the paper's."""
    paper = table.quantity("memory")
    return same_column(paper, "ours", "our memory", "How it is got.")


@pytest.fixture
def shares(table):
    """A column of another model's memory: shares count."""
    ours = Quantity(key="mb", title="measured memory", unit="MB", kind="memory", margin=0.02)
    return Column(
        quantity=ours,
        paper=table.quantity("memory"),
        model="Tiny",
        rank=lambda row: 4,
    )


@pytest.fixture
def scores(table):
    ours = Quantity(key="accuracy", title="accuracy", unit="%", kind="score", margin=1.0)
    return Column(quantity=ours, paper=table.quantity("average"), model="Tiny")
