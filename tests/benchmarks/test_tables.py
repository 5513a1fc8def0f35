"""The tables of the documents: what they show of a result, and where it comes from."""

import pytest

from benchmarks import studies, tables
from benchmarks.results import RESULTS, read


@pytest.mark.parametrize("name", tables.VIEWS)
def test_every_table_has_its_committed_numbers(name):
    text = tables.block(name)
    assert len([line for line in text.splitlines() if line.startswith("| ")]) >= 2
    # Variants are explained as settings, and as quantities.
    assert ("wrote `benchmarks/results/" in text) == tables.VIEWS[name].is_first
    if name == "lean-units":
        assert "`level 2`: gate and up from the norm's input;" in text
    if name == "sync-drift":  # but not where a word of one is a part of another
        assert "`elements`" not in text
    if name == "kernels":
        rows = {(r.what, r.method): r.value for r in read(name).rows if r.setting == "eager"}
        floor = rows["forward", "frozen"]
        assert f"\n| frozen | {floor} |" in text
        assert f"\n| paca | {rows['forward', 'paca'] - floor} |" in text


def arm(*values):
    sizes = {"num_trainable_parameters": 100, "saved_activation_bytes": 2**20}
    rates = {"learning_rate": 0.01, "at_edge": False, "rates": {"0.01": 0.5, "0.1": None}}
    found = {"mean": sum(values) / 2, "values": {str(s): value for s, value in enumerate(values)}}
    return {**found, **sizes, **rates, "forgetting": None}


def test_studies_are_compared_seed_by_seed():
    arms = {"paca": arm(0.6, 0.8), "groups": arm(0.7, 0.9)}
    study = {"metric": "accuracy", "reference": "paca", "arms": arms}
    rows = list(studies.rows_of("small", study))
    (found,) = studies.differences(rows, {"small": "paca"})
    assert (found.method, found.model) == ("groups", "small")
    # The same for both seeds.
    assert (found.value, found.low, found.high) == pytest.approx((10.0, 10.0, 10.0))
    assert {row.what for row in rows} == {
        "test accuracy",
        "validation",
        "kept for backward",
        "best rate",
    }


def test_tables_of_studies_and_those_that_there_are_not(tmp_path):
    assert "| groups16 |" in studies.block("quality", "differences", RESULTS)
    assert studies.block("quality", "scores", RESULTS).startswith("| method | ")
    with pytest.raises(ValueError, match="no table 'other' of the study quality"):
        studies.block("quality", "other", RESULTS)
    with pytest.raises(ValueError, match="no table 'steps'; there are step, "):
        tables.block("steps")
    with pytest.raises(FileNotFoundError, match=r"`python -m benchmarks\.step` writes it"):
        tables.block("step", tmp_path)
