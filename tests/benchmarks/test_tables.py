"""The tables of the documents: what they show of a result, and where it comes from."""

import pytest

from benchmarks import findings, tables
from benchmarks.results import read
from pacatune.reports.rows import Row
from pacatune.training.config import default_rate
from pacatune.training.tasks import TASKS


@pytest.mark.parametrize("name", tables.VIEWS)
def test_every_table_has_its_committed_numbers(name):
    text = tables.block(name)
    assert len([line for line in text.splitlines() if line.startswith("| ")]) >= 2
    # Variants are explained as settings, and as quantities.
    assert ("wrote `benchmarks/results/" in text) == tables.VIEWS[name].is_first
    if name == "lean-units":
        assert "`level 2`: gate and up from the norm's input;" in text
    if name == "kernels":
        rows = {(r.what, r.method): r.value for r in read(name).rows if r.setting == "eager"}
        floor = rows["forward", "frozen"]
        assert f"\n| frozen | {floor} |" in text
        assert f"\n| paca | {rows['forward', 'paca'] - floor} |" in text


@pytest.mark.parametrize("name", findings.names())
def test_every_finding_has_a_table_or_a_sentence(name):
    text = tables.block(f"found-{name}")
    assert text.startswith("| ") == (name != "kept")
    assert name != "defaults" or "\n| `grpo` | 1e-3 | 1e-3 | 1e-6 |" in text


def test_a_rate_that_learned_is_the_default_of_grpo():
    """Rewards rise over a run at the default, and at a tenth of it by far less."""
    rows = {(r.what, r.method): r.value for r in read("rl_run").rows}
    first, last = "reward, steps 1 to 50", "reward, steps 151 to 200"
    assert f"rate {default_rate(TASKS['grpo'], 'paca'):g} " in read("rl_run").provenance["how"]
    rises = {m: rows[last, m] - rows[first, m] for m in ("paca", "paca, 1e-4", "lora-adapter")}
    assert min(rises["paca"], rises["lora-adapter"]) > 4 * rises["paca, 1e-4"]


def test_a_word_in_a_name_is_no_name():
    rows = [Row(what="changed elements of the base", method="paca / lora, float32", value=1.0)]
    words = tables._words(rows)
    assert {"paca", "lora"} <= words
    assert "elements" not in words


def test_tables_that_there_are_not(tmp_path):
    with pytest.raises(ValueError, match="no table 'steps'; there are step, "):
        tables.block("steps")
    with pytest.raises(FileNotFoundError, match=r"`python -m benchmarks\.step` writes it"):
        tables.block("step", tmp_path)
