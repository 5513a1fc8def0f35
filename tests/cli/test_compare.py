"""`pacatune compare`: the plan, the table, the exit status."""

import json
import re

import pytest
import yaml

from pacatune.cli import main
from tests.study.conftest import *  # noqa: F403  (its fixtures)


@pytest.fixture
def study(class_options, tmp_path):
    """Write a study; options override what it says."""

    def write(**values):
        content = {
            "command": "classify",
            "options": class_options,
            "arms": {"columns": {"rank": 2}, "factors": {"method": "lora"}},
            "seeds": [0, 1],
            "learning_rates": {"paca": [1e-3], "lora": [1e-3, 2e-3]},
        }
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(content | values))
        return [
            "compare",
            "--config",
            str(tmp_path / "study.yaml"),
            "--output",
            str(tmp_path / "o"),
        ]

    return write


def test_plan(study, tmp_path, capsys):
    assert main([*study(), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"factors +lora", shown)
    assert "5 runs: 3 choose the rates with 1 of 2 seeds (3 of them to do), 2 more at the" in shown
    assert not (tmp_path / "o").exists()


def test_study(study, tmp_path, capsys):
    assert main(study()) == 0
    shown = capsys.readouterr().out
    assert "5/5  factors, rate " in shown
    assert "warning: factors: the best rate" in shown
    assert f"report and plots are in {tmp_path / 'o'}" in shown
    result = json.loads((tmp_path / "o" / "study.json").read_text())
    assert result["arms"]["factors"]["comparison"]["num_seeds"] == 2
    assert main([*study(), "--dry-run"]) == 0
    assert "(0 of them to do)" in capsys.readouterr().out


def test_part_of_a_study(study, tmp_path, capsys):
    assert main([*study(), "--arms", "columns"]) == 3
    shown = capsys.readouterr().out
    assert "paused with 2 of 5 runs done" in shown
    assert "the same command continues" in shown
    assert main([*study(), "--max-hours", "-1"]) == 2
    assert "`max_hours` (-1.0) must be above 0" in capsys.readouterr().err


def test_failed_runs_and_wrong_studies(study, capsys, monkeypatch):
    from pacatune.study.tasks import StudyTask

    def fail(self, config):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(StudyTask, "run", fail)
    assert main(study()) == 1
    assert "columns, rate 0.001, seed 0: failed: RuntimeError: out of memory" in (
        capsys.readouterr().out
    )
    assert main(study(task="minilm-question")) == 2
    assert "`python -m examples.packaged minilm-question` prepares" in capsys.readouterr().err
    assert main(study(arms={"a": {"rank": 2, "selection": "best"}})) == 2
    assert "arm 'a': `paca.selection` ('best') is no strategy" in capsys.readouterr().err
