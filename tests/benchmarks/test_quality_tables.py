"""Tables of the quality study."""

import json

import pytest

from benchmarks.quality_tables import table
from tests.benchmarks.test_quality_verdict import BAD, GOOD, LIKE, study


@pytest.fixture
def results(tmp_path):
    one = study({"lora": LIKE, "groups4": GOOD, "output": BAD})
    for number, arm in enumerate(one["arms"].values(), 1):
        arm["forgetting"] = 0.1 * number
    rates = {"0.002": 0.5, "0.004": 0.75}
    transfer = {
        "arms": {
            "r4": {"learning_rate": 0.004, "rates": rates},
            "r16": {"learning_rate": 0.001, "rates": {"0.001": 0.8, "0.002": None}},
        }
    }
    found = {"quality-smollm2": one, "quality-transfer": transfer}
    (tmp_path / "quality.json").write_text(json.dumps(found))
    return tmp_path


def test_tables(results):
    scores = table("scores", results).splitlines()
    assert scores[0] == "| | `smollm2` |"
    assert scores[3:] == [
        "| `paca` | 51.0 ± 1.0 |",
        "| `lora` | 51.0 ± 0.5 |",
        "| `groups4` | **61.0 ± 1.0** |",
        "| `output` | *41.0 ± 1.0* |",
    ]
    assert "| `output` | +0.4000 |" in table("forgetting", results)
    assert table("transfer", results).splitlines() == [
        "| rate | 0.001 | 0.002 | 0.004 |",
        "|---|--:|--:|--:|",
        "| `r4` |  | 50.0 | **75.0** |",
        "| `r16` | **80.0** |  |  |",
    ]


def test_tables_of_nothing(tmp_path):
    assert table("scores", tmp_path) == table("transfer", tmp_path) == "None yet."
