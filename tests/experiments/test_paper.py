"""The paper's numbers: what must hold among them, and what other modules read of them."""

import pytest

from experiments.paper import METHOD_TITLES, PAPER
from pacatune.measure.presets import PRESETS


@pytest.mark.parametrize("name", [f"table{number}" for number in range(1, 8)])
def test_keys_are_unique_and_averages_are_those_of_the_printed_scores(name):
    """A slip would show; Table 1 weighs its categories by their questions."""
    table = PAPER[name]
    keys = [line.key for line in table.lines]
    assert len(set(keys)) == len(keys)
    scores = table.scores - {"average"}
    for line in table.lines:
        assert line.method in METHOD_TITLES
        if not scores:
            assert name == "table4"
            continue
        found = [line.values[key] for key in scores]
        if name == "table1":
            assert min(found) < line.values["average"] < max(found)
        else:
            mean = sum(found) / len(found)
            assert line.values["average"] == pytest.approx(mean, abs=0.0551), line.key
    assert any(line.title.startswith(table.reference) for line in table.lines)
    rows = table.rows
    assert len({(row.what, row.method, row.model) for row in rows}) == len(rows)
    assert {row.origin for row in rows} == {"paper"}


def test_trained_parameters_of_table_1_are_those_of_the_ranks():
    """PaCA trains r values per output, LoRA r per output and input, in millions."""
    for row in PAPER["table1"].lines:
        if row.method not in ("lora", "paca"):
            continue
        sizes = PRESETS[row.model].values
        hidden, mlp = sizes["hidden_size"], sizes["intermediate_size"]
        kv = sizes["num_key_value_heads"] * sizes["head_dim"]
        outputs = 2 * hidden + 2 * kv + 2 * mlp + hidden
        inputs = 4 * hidden + 2 * hidden + mlp
        number = outputs if row.method == "paca" else outputs + inputs
        millions = number * row.rank * sizes["num_hidden_layers"] / 1e6
        assert row.values["trained parameters"] == pytest.approx(millions, abs=0.51), row.key
