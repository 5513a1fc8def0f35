"""The paper's numbers: what must hold among them, and what other modules read of them."""

import pytest

from experiments.paper import METHOD_TITLES, TABLES, fig2, fig3, settings
from pacatune.measure.presets import PRESETS


@pytest.mark.parametrize("name", TABLES)
def test_keys_are_unique_and_averages_are_those_of_the_printed_scores(name):
    """A slip would show; Table 1 weighs its categories by their questions."""
    table = TABLES[name]
    keys = [line.key for line in table.lines]
    assert len(set(keys)) == len(keys)
    known = {quantity.key for quantity in table.quantities}
    scores = [q.key for q in table.quantities if q.is_score and q.key != "average"]
    for line in table.lines:
        assert line.method in METHOD_TITLES
        assert set(line.values) <= known
        if "average" not in known:
            assert name == "table4"
            continue
        found = [line.values[key] for key in scores]
        if name == "table1":
            assert min(found) < line.values["average"] < max(found)
        else:
            mean = sum(found) / len(found)
            assert line.values["average"] == pytest.approx(mean, abs=0.0551), line.key
    assert table.reference in {line.method for line in table.lines}
    rows = list(table.rows())
    assert len({(row.what, row.method, row.model) for row in rows}) == len(rows)
    assert {row.origin for row in rows} == {"paper"}


def test_trained_parameters_of_table_1_are_those_of_the_ranks():
    """PaCA trains r values per output, LoRA r per output and input, in millions."""
    for row in TABLES["table1"].lines:
        if row.method not in ("lora", "paca"):
            continue
        sizes = PRESETS[row.model].values
        hidden, mlp = sizes["hidden_size"], sizes["intermediate_size"]
        kv = sizes["num_key_value_heads"] * sizes["head_dim"]
        outputs = 2 * hidden + 2 * kv + 2 * mlp + hidden
        inputs = 4 * hidden + 2 * hidden + mlp
        number = outputs if row.method == "paca" else outputs + inputs
        millions = number * row.rank * sizes["num_hidden_layers"] / 1e6
        assert row.values["params"] == pytest.approx(millions, abs=0.51), row.key


def test_claims_of_the_figures_are_about_different_things():
    for claims in (fig2.CLAIMS, fig3.CLAIMS):
        assert len({(row.what, row.method) for row in claims}) == len(claims)
    for row in fig2.CLAIMS:
        assert set(row.method.split(" / ")) <= {METHOD_TITLES[one] for one in fig2.METHODS}


def test_settings_follow_the_line():
    assert settings.table_9("llama2-7b", "paca", 16).learning_rates == (1e-4,)
    assert settings.table_9("llama2-7b", "paca", 8).learning_rates == (3e-4,)
    assert settings.table_9("llama3-8b", "dora", 8).dropout == 0.1
    assert settings.table_9("llama3-8b", "paca", 16).alpha == 64
    assert settings.table_9("llama3-8b", "paca", 16).dropout is None
    assert settings.table_11("llama3-8b").micro_batches == 4
    assert settings.table_11("llama3.1-70b").micro_batches == 2
    assert settings.of_line("table4", TABLES["table4"].lines[0]).batch_size == 1
