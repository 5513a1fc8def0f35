"""The committed results: few files, each run of the studies, and pages that are made of them."""

import json
import subprocess
from pathlib import Path

import pytest

from benchmarks import collect, pages
from benchmarks.results import RESULTS

ROOT = Path(__file__).parents[2]


def committed():
    listed = ["git", "ls-files", "--", "benchmarks/results"]
    found = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip("not a checkout")
    return [ROOT / line for line in found.stdout.splitlines()]


def test_results_are_numbers_in_few_files():
    files = committed()
    assert {path.suffix for path in files} <= {".json", ".csv"}
    assert len(files) <= 24
    assert sum(path.stat().st_size for path in files) < 10**6


def test_every_run_of_the_studies_is_a_line():
    studies = json.loads((RESULTS / "selection.json").read_text())
    runs = list(collect.read_runs("selection"))
    assert len(runs) == 487
    assert len({row["key"] for row in runs}) > 400
    for name, study in studies.items():
        metric = study["metric"]
        for arm, found in study["arms"].items():
            own = [row for row in runs if (row["study"], row["arm"]) == (name, arm)]
            at_best = [row for row in own if float(row["learning rate"]) == found["learning_rate"]]
            values = {row["seed"]: float(row[f"test {metric}"]) for row in at_best}
            assert values == found["values"]
            assert {f"{float(row['learning rate']):g}" for row in own} == {
                f"{float(rate):g}" for rate in found["rates"]
            }


VERSIONS = {"python": "3.11", "torch": "2"}


def write_study(folder, test=0.5, versions=VERSIONS, finished=True):
    """What `pacatune compare` leaves of a study of one run."""
    numbers = {
        "validation loss": 0.75,
        "test loss": test,
        "general loss before": 1.0,
        "general loss after": 1.5,
        "trained parameters": 10,
        "kept for backward": 3,
    }
    units = {"kept for backward": "bytes"}
    job = {
        "key": "0" * 24,
        "inputs": {"run": {"training": {"learning_rate": 1e-3, "seed": 0}}},
        "rows": [
            {"what": w, "method": "paca", "value": v, **({"unit": units[w]} if w in units else {})}
            for w, v in numbers.items()
        ],
        "provenance": {"seconds": 1.5, "versions": versions},
    }
    (folder / "jobs").mkdir(parents=True)
    (folder / "jobs" / "key.json").write_text(json.dumps(job))
    study = {"finished": finished, "arms": {"paca": {}}, "versions": VERSIONS}
    (folder / "study.json").write_text(json.dumps(study))
    return folder


def test_studies_are_collected_and_collected_again(tmp_path):
    results = tmp_path / "results"
    names = ["selection-first", "selection-other"]
    collect.collect_studies([write_study(tmp_path / name) for name in names], results)
    rows = list(collect.read_runs("selection", results))
    assert [row["study"] for row in rows] == names
    assert rows[0] == {
        "study": names[0],
        "arm": "paca",
        "learning rate": "0.001",
        "seed": "0",
        "validation loss": "0.75",
        "test loss": "0.5",
        "general loss before": "1.0",
        "general loss after": "1.5",
        "trained parameters": "10",
        "kept for backward, bytes": "3",
        "seconds": "1.5",
        "key": "0" * 24,
    }
    assert list(json.loads((results / "selection.json").read_text())) == names
    collect.collect_studies([write_study(tmp_path / "again" / names[0], test=0.25)], results)
    assert {row["study"]: row["test loss"] for row in collect.read_runs("selection", results)} == {
        names[0]: "0.25",
        names[1]: "0.5",
    }


def test_a_folder_that_no_study_has_the_name_of_is_refused(tmp_path):
    folder = write_study(tmp_path / "qualities-minilm")
    with pytest.raises(ValueError, match="must begin with quality or selection"):
        collect.collect_studies([folder], tmp_path)
    assert not list(tmp_path.glob("*.json"))


def test_what_is_not_collected(tmp_path):
    unlike = write_study(tmp_path / "quality-unlike", versions=VERSIONS | {"torch": "1"})
    with pytest.raises(ValueError, match=r"unlike.* ran with other versions than the study"):
        collect.collect_studies([unlike], tmp_path)
    half = write_study(tmp_path / "quality-half", finished=False)
    with pytest.raises(ValueError, match=r"half holds no finished study"):
        collect.collect_studies([half], tmp_path)


def test_pages_are_made_of_the_results(tmp_path, monkeypatch):
    results = tmp_path / "results"
    results.mkdir()
    studies = json.loads((RESULTS / "selection.json").read_text())
    one = {"selection-smollm2-r8": studies["selection-smollm2-r8"]}
    (results / "selection.json").write_text(json.dumps(one))
    (results / "quality.json").write_text("{}")
    monkeypatch.setattr(pages, "RESULTS", results)
    (results / "bench-here.json").write_bytes((RESULTS / "bench-epyc-zen5.json").read_bytes())
    made = [
        path.relative_to(tmp_path / "report").as_posix()
        for path in pages.make_pages(tmp_path / "report")
    ]
    names = ("table1", "table2", "table3", "table4", "table5", "table6", "table7", "fig2", "fig3")
    assert made == [
        *(f"reproduce/{name}.md" for name in names),
        "bench-here/bench.md",
        "studies/selection-smollm2-r8/report.md",
    ]
    report = tmp_path / "report"
    assert not (report / "reproduce" / "results.json").exists()  # each would write over the last
    assert all((report / "reproduce" / f"{name}.png").is_file() for name in names)
    assert (report / "bench-here" / "bench.png").is_file()
    assert (report / "studies" / "selection-smollm2-r8" / "metric.png").is_file()
