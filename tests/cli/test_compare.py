"""`pacatune compare`: the plan, the table, the exit status."""

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
        path, output = tmp_path / "study.yaml", tmp_path / "o"
        path.write_text(yaml.safe_dump(content | values))
        return ["compare", "--config", str(path), "--output", str(output)]

    return write


def test_study(study, tmp_path, shown):
    out = shown(*study(), "--dry-run")
    assert "5 runs: 3 choose the rates with 1 of 2 seeds (3 of them to do), 2 more at the" in out
    assert not (tmp_path / "o").exists()
    out = shown(*study())
    assert "warning: factors: the best rate" in out
    assert (tmp_path / "o" / "study.json").exists()
    assert "(0 of them to do)" in shown(*study(), "--dry-run")


def test_part_of_a_study(study, capsys, refused):
    assert main([*study(), "--arms", "columns"]) == 3
    assert "paused with 2 of 5 runs done" in capsys.readouterr().out
    assert "`max_hours` (-1.0) must be above 0" in refused(*study(), "--max_hours", "-1")


def test_failed_runs_and_wrong_studies(study, capsys, refused, monkeypatch):
    from pacatune.study.tasks import StudyTask

    def fail(self, config):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(StudyTask, "run", fail)
    assert main(study()) == 1
    said = "columns, rate 0.001, seed 0: failed: RuntimeError: out of memory"
    assert said in capsys.readouterr().out
    said = refused(*study(task="minilm-question"))
    assert "`python -m examples.packaged minilm-question` prepares" in said
