"""`pacatune bench` from the command line, at a tiny size."""

import json

import pytest

from pacatune.cli import main
from tests.forks import server

QUICK = ["--seconds", "0", "--min-rounds", "2", "--warmup", "1", "--threads", "1"]
TINY = ["--shape", "32x2", "--vocab-size", "64", "--device", "cpu", *QUICK]


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    server()
    monkeypatch.setenv("COLUMNS", "200")


def test_methods_are_compared_and_the_result_is_written(tmp_path, capsys):
    folder = tmp_path / "out"
    methods = ["frozen", "paca", "lora"]
    words = ["bench", *TINY, "--methods", ",".join(methods), "--tokens", "16", "--seq-len", "8"]
    assert main([*words, "--output", str(folder)]) == 0
    result = json.loads((folder / "bench.json").read_text())
    assert result["finished"]
    assert result["command"].startswith("pacatune bench --shape 32x2 ")
    assert {"commit", "is_modified", "date", "cpu", "versions"} <= set(result)
    assert result["device"].endswith("1 thread")
    assert result["config"]["values"]["hidden_size"] == 32
    assert [(row["setting"], row["method"]) for row in result["rows"]] == [
        ("2 x 8 tokens", method) for method in methods
    ]
    for row in result["rows"]:
        assert row["status"] == "measured"
        assert row["num_rounds"] == (4 if row["method"] == "paca" else 2)
        assert row["step_ms_quartile_1"] <= row["step_ms"] <= row["step_ms_quartile_3"]
        assert row["tokens_per_second"] == pytest.approx(
            row["num_rows"] * row["num_tokens"] * 1e3 / row["step_ms"]
        )
        assert row["peak_bytes"] > 0
        # One for each pair; the processes of the benchmark itself are no others.
        assert len(row["noise"]) == (2 if row["method"] == "paca" else 1)
        assert min(row["forward_flops"], row["backward_flops"]) > 0
    pairs = [(ratio["method"], ratio["reference"]) for ratio in result["ratios"]]
    assert pairs == [("paca", method) for method in methods if method != "paca"]
    for ratio in result["ratios"]:
        for part in (ratio, ratio["forward"], ratio["backward"]):
            assert part["low"] <= part["ratio"] <= part["high"]
    page = (folder / "bench.md").read_text()
    for name in ("operations.png", "times.png", "memory.png"):
        assert (folder / name).stat().st_size > 1000
        assert f"![{name}]({name})" in page
    out = capsys.readouterr().out
    assert "Beside the paper" in out
    assert "wrote bench.json, bench.md, operations.png, times.png, memory.png in" in out


@pytest.mark.usefixtures("blank_pictures", "measured_here")
def test_all_methods_are_as_lean(tmp_path):
    results = []
    for level in ("0", "2", "3"):
        folder = tmp_path / level
        words = [*TINY, "--methods", "paca,lora", "--tokens", "16", "--lean-level", level]
        assert main(["bench", *words, "--output", str(folder)]) == 0
        results.append(json.loads((folder / "bench.json").read_text()))
    saved = [[row["saved_bytes"] for row in result["rows"]] for result in results]
    for plain, two, three in zip(*saved, strict=True):
        assert three < two < 0.7 * plain
    assert results[1]["model"].endswith(", lean level 2")
    folder = tmp_path / "checkpointed"
    words = [*TINY, "--methods", "paca", "--tokens", "16", "--gradient-checkpointing"]
    assert main(["bench", *words, "--output", str(folder)]) == 0
    result = json.loads((folder / "bench.json").read_text())
    assert result["model"].endswith(", checkpointed blocks")
    assert result["rows"][0]["saved_bytes"] < saved[0][0]


def test_a_sweep_is_written(tmp_path, capsys):
    words = ["--sweep", "batch", "--seq-len", "7", "--sweep-max", "2"]
    limit = ["--memory-limit", "1GiB"]
    assert (
        main(["bench", *TINY, *words, *limit, "--methods", "paca", "--output", str(tmp_path)]) == 0
    )
    result = json.loads((tmp_path / "bench.json").read_text())
    assert result["config"]["memory_limit"] == 2**30
    assert [point["num_rows"] for point in result["points"]] == [1, 2]
    assert result["limits"][0]["limit"] == 2
    assert not result["limits"][0]["is_memory_the_limit"]
    assert (tmp_path / "throughput.png").stat().st_size > 1000
    assert "2 x 7 tokens: measured" in capsys.readouterr().out


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


@pytest.mark.usefixtures("blank_pictures")
def test_a_model_folder_gives_its_sizes(tmp_path, tiny_model_dir):
    words = ["--model", str(tiny_model_dir), "--methods", "paca", "--tokens", "4", *QUICK]
    assert main(["bench", *words, "--device", "cpu", "--output", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "bench.json").read_text())
    assert result["config"]["values"]["num_key_value_heads"] == 2
    assert [row["method"] for row in result["rows"]] == ["paca"]
    assert result["ratios"] == []


def test_a_folder_in_use_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.txt").touch()
    assert main(["bench", *TINY, "--output", str(tmp_path)]) == 2
    assert "did not write, or that were changed since (thesis.txt)" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
