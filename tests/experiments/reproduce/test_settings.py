"""Every run builds and is checked; what differs from the paper says why."""

import pytest

from pacatune.experiments.reproduce import EXPERIMENTS
from pacatune.experiments.reproduce.settings import (
    SettingsBeside,
    beside_table,
    differences,
    settings_text,
)
from pacatune.paper.settings import MODULES, Settings

ALL = [(name, scale) for name in EXPERIMENTS for scale in ("small", "full")]


@pytest.mark.parametrize(("name", "scale"), ALL)
def test_each_difference_has_its_reason(name, scale):
    found = EXPERIMENTS[name].settings(scale)
    assert found
    for beside in found:
        for field, (paper, ours) in differences(beside).items():
            assert beside.why.get(field), f"{beside.title}: {field} {paper} -> {ours}"


@pytest.mark.parametrize("name", ["table1", "table2", "table3", "table5"])
def test_the_full_scale_has_the_papers_settings(name):
    """Read back from the checked configurations of the runs, so nothing is lost on the way."""
    for beside in EXPERIMENTS[name].settings("full"):
        assert set(differences(beside)) == {"model"}
        assert beside.ours.model.startswith("meta-llama/")
        assert any(command.startswith("pacatune train --config") for command in beside.commands)
        scorers = ("pacatune evaluate mmlu", "python -m experiments.mt_bench")
        assert any(command.startswith(scorers) for command in beside.commands)


@pytest.mark.parametrize("name", ["fig2", "fig3", "table4"])
def test_full_measurements_are_of_the_papers_model_and_sizes(name):
    for beside in EXPERIMENTS[name].settings("full"):
        assert set(differences(beside)) <= {"optimizer", "precision"}
        assert beside.ours.model == "llama3-8b"


@pytest.mark.parametrize("name", ["table6", "table7"])
def test_full_runs_on_images_are_the_presets(name):
    for beside in EXPERIMENTS[name].settings("full"):
        assert all(line.startswith("pacatune train-image --preset") for line in beside.commands)
        assert beside.ours.model.partition("/")[0] in ("google", "timm")


def test_settings_side_by_side():
    beside = SettingsBeside(
        title="A line",
        paper=Settings(rank=8, learning_rates=(1e-4, 1e-3), target_modules=MODULES, alpha=32),
        ours=Settings(rank=4, learning_rates=(1e-4, 1e-3), target_modules=MODULES[::-1], steps=3),
        why={"rank": "less time", "steps": "less data"},
    )
    assert set(differences(beside)) == {"rank", "alpha", "steps"}
    rows = {row[0]: row[1:] for row in beside_table(beside).rows}
    assert rows["rank"] == ["8", "4", "less time"]
    assert rows["learning rates"] == ["0.0001, 0.001", "0.0001, 0.001", "same"]
    assert rows["alpha"] == ["32", "not said", ""]
    assert rows["steps"] == ["not said", "3", "less data"]
    assert "epochs" not in rows


def test_text_shows_commands():
    text = settings_text(EXPERIMENTS["table1"], "full")
    assert "pacatune evaluate mmlu --model meta-llama/Meta-Llama-3-8B --adapter RUN" in text
    assert "| scheduler | cosine | cosine | same |" in text
