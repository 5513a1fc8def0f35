"""`pacatune bench` from the command line, at a tiny size."""

import json

import pytest

from pacatune.cli import main
from pacatune.reports.rows import Row
from tests.forks import server

QUICK = ["--seconds", "0", "--min-rounds", "2", "--warmup", "1", "--threads", "1"]
TINY = ["--shape", "32x2", "--vocab-size", "64", "--device", "cpu", *QUICK]


@pytest.fixture(autouse=True)
def _forks():
    server()


def rows_of(folder):
    return [Row(**row) for row in json.loads((folder / "bench.json").read_text())["rows"]]


def test_methods_are_compared_and_the_result_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")  # numbers stay whole
    folder = tmp_path / "out"
    methods = ["frozen", "paca", "lora"]
    words = ["bench", *TINY, "--methods", ",".join(methods), "--tokens", "16", "--seq-len", "8"]
    words += ["--output", str(folder)]
    assert main(words) == 0
    result = json.loads((folder / "bench.json").read_text())
    assert result["command"].startswith("pacatune bench --shape 32x2 ")
    assert result["device"].endswith("1 thread")
    assert result["config"]["values"]["hidden_size"] == 32
    assert not result["errors"]
    for job in result["jobs"].values():
        assert {"commit", "is_modified", "date", "machine", "versions", "noise"} <= set(job)
    rows = rows_of(folder)
    assert {row.setting for row in rows} == {"2 x 8 tokens"}
    for what in ("forward", "backward", "optimizer", "step", "throughput"):
        found = {
            r.method: r for r in rows if (r.what, r.unit) != (what, "ratio") and r.what == what
        }
        assert set(found) == set(methods)
        assert all(row.low <= row.value <= row.high for row in found.values())
    for what in ("trained parameters", "forward operations", "kept for backward", "peak"):
        assert [row.method for row in rows if row.what == what] == methods
    ratios = {(row.method, row.what) for row in rows if row.unit == "ratio"}
    pairs = ("paca / frozen", "paca / lora")
    assert ratios == {(pair, what) for pair in pairs for what in ("step", "forward", "backward")}
    out = capsys.readouterr().out
    assert "wrote bench.json, bench.md, bench.png in" in out
    assert (folder / "bench.png").stat().st_size > 1000
    page = (folder / "bench.md").read_text()
    step = next(row for row in rows if row.what == "step")
    assert step.text() in out
    assert step.text() in page
    assert "![bench.png](bench.png)" in page
    assert main(words) == 0
    assert "counting" not in capsys.readouterr().out
    assert rows_of(folder) == rows


@pytest.mark.usefixtures("blank_pictures", "measured_here")
def test_all_methods_are_as_lean(tmp_path):
    def kept(name, methods, *more):
        folder = tmp_path / name
        words = [*TINY, "--methods", methods, "--tokens", "16", *more]
        assert main(["bench", *words, "--output", str(folder)]) == 0
        title = (folder / "bench.md").read_text().splitlines()[0]
        return title, [row.value for row in rows_of(folder) if row.what == "kept for backward"]

    found = [kept(level, "paca,lora", "--lean-level", level) for level in ("0", "2", "3")]
    for plain, two, three in zip(*(numbers for _, numbers in found), strict=True):
        assert three < two < 0.7 * plain
    assert found[1][0].endswith(", lean level 2")
    title, (number,) = kept("checkpointed", "paca", "--gradient-checkpointing")
    assert title.endswith(", checkpointed blocks")
    assert number < found[0][1][0]


def test_a_sweep_is_written(tmp_path, capsys):
    words = ["--sweep", "batch", "--seq-len", "7", "--sweep-max", "2"]
    limit = ["--memory-limit", "1GiB"]
    assert (
        main(["bench", *TINY, *words, *limit, "--methods", "paca", "--output", str(tmp_path)]) == 0
    )
    found, *points = rows_of(tmp_path)
    assert (found.what, found.value) == ("largest batch", 2)
    assert list(dict.fromkeys(row.setting for row in points)) == ["1 x 7 tokens", "2 x 7 tokens"]
    assert "`paca`: 2 is the largest tried." in capsys.readouterr().out
    assert (tmp_path / "bench.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "lorra"], "did you mean 'lora'?"),
        (["--shape", "512"], "`shape` ('512') must be HIDDENxLAYERS"),
        (["--shape=-512x8"], "`shape` ('-512x8') must be HIDDENxLAYERS"),
        (["--shape", "64x2", "--heads", "7"], "`num_heads` (7) must divide"),
        (["--dtype", "fp4"], "`dtype` ('fp4') must be one of auto, float32"),
        (["--device", "gpu"], "`device` ('gpu') is unknown to torch"),
        (["--tokens", "16,x"], "`tokens` ('16,x') must be whole numbers with commas between"),
        (["--tokens=-16"], "`tokens` (-16) must be at least 1"),
        (["--rank", "0"], "`rank` (0) must be a whole number of at least 1"),
        (["--memory-limit", "4 lots"], "`memory_limit` ('4 lots') is no amount of memory"),
        (["--model", "no/such/folder/at-all"], "does not exist"),
        (["--adapter-dtype", "int8"], "`adapter_dtype` ('int8') must be one of same, float32"),
        (["--sweep", "rank"], "`sweep` ('rank') must be one of batch, seq-len"),
        (["--sweep", "batch", "--sweep-max", "0"], "`sweep_max` (0) must be a whole number of at"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(tmp_path, capsys, words, message):
    folder = tmp_path / "out"
    assert main(["bench", *words, "--output", str(folder)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not folder.exists()


def test_sizes_of_a_given_model_are_its_own(tmp_path, tiny_model_dir, capsys):
    words = ["--model", str(tiny_model_dir), "--heads", "2", "--output", str(tmp_path / "out")]
    assert main(["bench", *words]) == 2
    assert "`num_heads` is for --shape" in capsys.readouterr().err


@pytest.mark.usefixtures("blank_pictures", "measured_here")
def test_a_model_folder_gives_its_sizes(tmp_path, tiny_model_dir):
    words = ["--model", str(tiny_model_dir), "--methods", "paca", "--tokens", "4", *QUICK]
    assert main(["bench", *words, "--device", "cpu", "--output", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "bench.json").read_text())
    assert result["config"]["values"]["num_key_value_heads"] == 2
    assert {row.method for row in rows_of(tmp_path)} == {"paca"}


def test_a_folder_in_use_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.txt").touch()
    assert main(["bench", *TINY, "--output", str(tmp_path)]) == 2
    assert "did not write, or that were changed since (thesis.txt)" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
