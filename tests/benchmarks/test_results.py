"""The committed results: each run of the studies, and pages that are made of them."""

import json
from pathlib import Path

import pytest

from benchmarks import collect, pages
from benchmarks.results import RESULTS


def test_every_run_of_the_studies_is_a_line():
    studies = json.loads((RESULTS / "selection.json").read_text())
    runs = list(collect.read_runs("selection"))
    assert {(row["study"], row["arm"]) for row in runs} == {
        (name, arm) for name, study in studies.items() for arm in study["arms"]
    }
    for name, study in studies.items():
        for arm, found in study["arms"].items():
            own = [row for row in runs if (row["study"], row["arm"]) == (name, arm)]
            at_best = [row for row in own if float(row["learning rate"]) == found["learning_rate"]]
            values = {row["seed"]: float(row[f"test {study['metric']}"]) for row in at_best}
            assert values == found["values"]
            tried = {f"{float(row['learning rate']):g}" for row in own}
            assert tried == {f"{float(rate):g}" for rate in found["rates"]}


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
    assert list(json.loads((results / "selection.json").read_text())) == names
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
    with pytest.raises(ValueError, match=message):
        collect.collect_studies([write_study(tmp_path / name, **values)], tmp_path)
    assert not list(tmp_path.glob("*.json"))


def test_pages_are_made_of_the_results(tmp_path, monkeypatch):
    results, report = tmp_path / "results", tmp_path / "report"
    results.mkdir()
    study = "selection-smollm2-r8"
    studies = json.loads((RESULTS / "selection.json").read_text())
    (results / "selection.json").write_text(json.dumps({study: studies[study]}))
    (results / "quality.json").write_text("{}")
    monkeypatch.setattr(pages, "RESULTS", results)
    made = {path.relative_to(report).with_suffix("") for path in pages.make_pages(report)}
    names = [*(f"table{number}" for number in range(1, 8)), "fig2", "fig3"]
    study = f"studies/{study}"
    assert made == {*map(Path, [*(f"reproduce/{name}" for name in names), f"{study}/report"])}
    assert not (report / "reproduce" / "results.json").exists()  # each would write over the last
    drawn = {path.relative_to(report).with_suffix("") for path in report.rglob("*.png")}
    assert drawn >= made - {Path(f"{study}/report")} | {Path(f"{study}/metric")}
