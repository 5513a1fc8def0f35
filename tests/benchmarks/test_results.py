"""Studies leave a line for each run."""

import json

import pytest

from benchmarks import collect

VERSIONS = {"python": "3.11", "torch": "2"}


def write_study(folder, test=0.5, versions=VERSIONS, finished=True):
    """What `pacatune compare` leaves of a study of one run."""
    rows = [{"what": "test loss", "method": "paca", "value": test}]
    job = {"key": "0" * 24, "inputs": {"run": {"training": {"learning_rate": 1e-3, "seed": 0}}}}
    job |= {"rows": rows, "provenance": {"seconds": 1.5, "versions": versions}}
    (folder / "jobs").mkdir(parents=True)
    (folder / "jobs" / "key.json").write_text(json.dumps(job))
    study = {"finished": finished, "arms": {"paca": {}}, "versions": VERSIONS}
    (folder / "study.json").write_text(json.dumps(study))
    return folder


def test_studies_are_collected_and_collected_again(tmp_path):
    """What is in a line is shown by tests/study/test_runner.py."""
    results, names = tmp_path / "results", ["selection-first", "selection-other"]

    def losses():
        return {row["study"]: row["test loss"] for row in collect.read_runs("selection", results)}

    collect.collect_studies([write_study(tmp_path / name) for name in names], results)
    assert losses() == dict.fromkeys(names, "0.5")
    collect.collect_studies([write_study(tmp_path / "again" / names[0], test=0.25)], results)
    assert losses() == dict(zip(names, ("0.25", "0.5"), strict=True))


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("qualities-minilm", {}, "must begin with quality or selection"),
        ("quality-a", {"versions": {"torch": "1"}}, "a.* ran with other versions than the study"),
        ("quality-half", {"finished": False}, r"half holds no finished study"),
    ],
)
def test_what_is_not_collected(name, values, message, tmp_path):
    folder = write_study(tmp_path / name, **values)
    with pytest.raises(ValueError, match=message):
        collect.collect_studies([folder], tmp_path)
    with pytest.raises(SystemExit, match=f"^collect: .*{message}"):
        collect.main([str(folder)])
    assert not list(tmp_path.glob("*.csv"))
