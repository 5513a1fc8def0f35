"""The tables of the documents: what they show of a result, and where it comes from."""

import pytest

from benchmarks import studies, tables
from benchmarks.results import RESULTS, read, write_json
from pacatune.reports.rows import Row

PROVENANCE = {
    "how": "A model; medians",
    "command": "python -m benchmarks.step",
    "device": "a CPU, 2 cores",
    "versions": {"torch": "2.13.0"},
    "commit": "0123456789abcdef",
    "is_modified": False,
}


def write(folder, name="step", **changes):
    names = {"what": "step", "model": "a model"}
    rows = [
        Row(method="paca", value=10.0, unit="ms", setting="16 tokens", **names),
        Row(method="lora", value=12.5, unit="ms", setting="16 tokens", **names),
        Row(
            method="paca / lora",
            value=0.8,
            low=0.75,
            high=0.9,
            unit="ratio",
            setting="16 tokens",
            **names,
        ),
    ]
    methods = {"paca": "ours", "lora": "PEFT's LoRA", "dora": "not there"}
    values = {**PROVENANCE, "methods": methods, "rows": [row.to_dict() for row in rows], **changes}
    write_json(values, folder / f"{name}.json")


def test_a_table_shows_times_shares_and_where_they_come_from(tmp_path):
    write(tmp_path)
    assert tables.block("step", tmp_path).splitlines() == [
        "| setting | paca, ms | paca / lora |",
        "|---|--:|--:|",
        "| 16 tokens | 10 | 0.800 (0.750 to 0.900) |",
        "",
        "`paca`: ours; `lora`: PEFT's LoRA.",
        "",
        "A model; medians, on a CPU, 2 cores (torch 2.13.0). `python -m benchmarks.step` at commit "
        "012345678 wrote `benchmarks/results/step.json`.",
    ]


def test_variants_are_explained_wherever_they_stand():
    """As settings, and as quantities; not where a word of one is a part of another."""
    for name in ("lean-units", "lean-times"):
        text = tables.block(name)
        assert "`level 2`: gate and up from the norm's input;" in text
        assert "`checkpointed, level 2`: level 2, and torch's checkpointing of blocks." in text
    assert "`elements`" not in tables.block("sync-drift")


def test_uncommitted_changes_are_told(tmp_path):
    write(tmp_path, is_modified=True)
    assert "012345678, with changes that were not committed, wrote" in tables.block(
        "step", tmp_path
    )


def test_missing_results_and_tables_say_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"`python -m benchmarks\.step` writes it"):
        tables.block("step", tmp_path)
    with pytest.raises(ValueError, match="no table 'steps'; there are step, "):
        tables.block("steps", tmp_path)


@pytest.mark.parametrize("name", tables.VIEWS)
def test_every_table_has_its_committed_numbers(name):
    lines = tables.block(name).splitlines()
    assert len([line for line in lines if line.startswith("| ")]) >= 2


def test_kernels_are_shown_beyond_frozen():
    lines = tables.block("kernels").splitlines()
    rows = {(r.what, r.method): r.value for r in read("kernels").rows if r.setting == "eager"}
    floor = rows["forward", "frozen"]
    beyond = rows["forward", "paca"] - floor
    assert any(line.startswith(f"| frozen | {floor} |") for line in lines)
    assert any(line.startswith(f"| paca | {beyond} |") for line in lines)


STUDY = {
    "metric": "accuracy",
    "reference": "paca",
    "arms": {
        name: {
            "mean": sum(values) / 2,
            "values": {"0": values[0], "1": values[1]},
            "learning_rate": 0.01,
            "at_edge": name == "groups",
            "num_trainable_parameters": 100,
            "forgetting": None,
            "saved_activation_bytes": 2**20,
            "rates": {"0.01": 0.5, "0.1": None},
        }
        for name, values in (("paca", (0.6, 0.8)), ("groups", (0.7, 0.9)))
    },
}


def test_studies_are_compared_seed_by_seed():
    rows = list(studies.rows_of("small", STUDY))
    (found,) = studies.differences(rows, {"small": "paca"})
    assert (found.method, found.model) == ("groups", "small")
    assert found.value == pytest.approx(10.0)
    assert (found.low, found.high) == pytest.approx((10.0, 10.0))  # the same for both seeds
    assert {row.what for row in rows} == {"test accuracy", "validation"}


def test_tables_of_studies():
    assert "| groups16 |" in studies.block("quality", "differences", RESULTS)
    assert studies.block("quality", "scores", RESULTS).startswith("| method | ")
    with pytest.raises(ValueError, match="no table 'other' of the study quality"):
        studies.block("quality", "other", RESULTS)
