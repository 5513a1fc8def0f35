"""`pacatune bench` from the command line, at a tiny size."""

import json

import pytest

from pacatune.reports.rows import Row
from tests.forks import server

QUICK = ["--seconds", "0", "--min-rounds", "2", "--warmup", "1", "--threads", "1"]
QUICK += ["--device", "cpu"]
TINY = ["--shape", "32x2", "--vocab-size", "64", *QUICK]


@pytest.fixture
def bench(tmp_path, shown):
    """Measure; return the result, its rows, what is printed and the page."""
    server()

    def run(*words, output=tmp_path / "out"):
        out = shown("bench", *words, "--output", output)
        result = json.loads((output / "bench.json").read_text())
        rows = [Row(**row) for row in result["rows"]]
        return result, rows, out, (output / "bench.md").read_text()

    return run


def test_methods_are_compared_and_the_result_is_written(bench, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")  # numbers stay whole
    methods = ["frozen", "paca", "lora"]
    words = [*TINY, "--methods", ",".join(methods), "--tokens", "16", "--seq-len", "8"]
    result, rows, out, page = bench(*words)
    assert result["command"].startswith("pacatune bench --shape 32x2 ")
    assert not result["errors"]
    for job in result["jobs"].values():
        assert {"commit", "is_modified", "date", "machine", "versions"} <= set(job)
    assert {row.setting for row in rows} == {"2 x 8 tokens"}
    found = {row.method for row in rows if row.what == "step" and row.unit != "ratio"}
    assert found == set(methods)
    assert {row.method for row in rows if row.unit == "ratio"} == {"paca / frozen", "paca / lora"}
    assert (tmp_path / "out" / "bench.png").stat().st_size > 1000
    step = next(row for row in rows if row.what == "step")
    assert step.text() in out
    assert step.text() in page
    _, again, out, _ = bench(*words)
    assert "counting" not in out
    assert again == rows


@pytest.mark.usefixtures("blank_pictures", "measured_here")
def test_all_methods_are_as_lean(bench, tmp_path):
    def kept(name, methods, *more):
        words = [*TINY, "--methods", methods, "--tokens", "16", *more]
        _, rows, _, page = bench(*words, output=tmp_path / name)
        return page.splitlines()[0], [row.value for row in rows if row.what == "kept for backward"]

    found = [kept(level, "paca,lora", "--lean-level", level) for level in ("0", "2", "3")]
    for plain, two, three in zip(*(numbers for _, numbers in found), strict=True):
        assert three < two < 0.7 * plain
    assert found[1][0].endswith(", lean level 2")
    title, (number,) = kept("checkpointed", "paca", "--gradient-checkpointing")
    assert title.endswith(", checkpointed blocks")
    assert number < found[0][1][0]


def test_a_sweep_is_written(bench, tmp_path):
    words = ["--sweep", "batch", "--seq-len", "7", "--sweep-max", "2", "--methods", "paca"]
    _, (found, *points), out, _ = bench(*TINY, *words, "--memory-limit", "1GiB")
    assert (found.what, found.value) == ("largest batch", 2)
    assert list(dict.fromkeys(row.setting for row in points)) == ["1 x 7 tokens", "2 x 7 tokens"]
    assert "`paca`: 2 is the largest tried." in out
    assert (tmp_path / "out" / "bench.png").stat().st_size > 1000


@pytest.mark.usefixtures("blank_pictures", "measured_here")
def test_a_model_folder_gives_its_sizes(bench, tiny_model_dir):
    words = ["--model", tiny_model_dir, "--methods", "paca", "--tokens", "4", *QUICK]
    result, rows, _, _ = bench(*words)
    assert result["config"]["values"]["num_key_value_heads"] == 2
    assert {row.method for row in rows} == {"paca"}
