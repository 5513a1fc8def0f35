"""`pacatune estimate`: output, questions, and errors in one line."""

import json

import pytest

from pacatune.cli import main
from pacatune.measure.presets import PRESETS
from tests.measure.real_step import LLAMA, write_config


@pytest.fixture
def config(tmp_path):
    return write_config(tmp_path, LLAMA)


def run_json(capsys, *words):
    assert main(["estimate", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def error_of(capsys, *words):
    assert main(["estimate", *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def test_a_real_model_by_name(capsys):
    """The paper reports 23 GB of this setting; docs/memory.md has its other numbers."""
    words = ["--rank", "8", "--batch-size", "2", "--seq-len", "512", "--lean", "off"]
    result = run_json(capsys, "llama3-8b", "--method", "paca", *words)
    assert result["peak_bytes"] == pytest.approx(23e9, rel=0.1)
    assert sum(result["by_category"].values()) == result["peak_bytes"]
    assert result["by_category"]["weights"] == pytest.approx(2 * 8_030_261_248, rel=0.001)
    # Per token and layer: gated MLP 21, norms 8, attention 5 of the hidden size; and the loss.
    saved = result["saved_by_module"]
    unit = 1024 * 32 * 4096
    assert (saved["LlamaMLP"] + saved["SiLUActivation"]) / unit == pytest.approx(21, rel=0.01)
    assert saved["LlamaRMSNorm"] / unit == pytest.approx(8, rel=0.01)
    assert saved["LlamaAttention"] / unit == pytest.approx(5, rel=0.02)


def test_a_long_sequence_at_lean_level_2(capsys):
    words = "llama3-8b --method paca --rank 8 --batch-size 1 --gpu a100-80g --seq-len 40000"
    result = run_json(capsys, *words.split(), "--lean-level", "2")
    assert result["fits"] == "yes"
    # Per token and layer, 9 units of the hidden size; a copy of the last hidden states; columns.
    unit = 40_000 * 32 * 4096
    assert result["saved_bytes"] / unit <= 9.15


def test_methods_side_by_side_and_a_plot(capsys, config, tmp_path):
    methods = "paca,lora,dora,moslora,full,qpaca"
    plot = tmp_path / "out.png"
    words = [config, "--methods", methods, "--dropout", "0.1", "--gpu", "4090"]
    result = run_json(capsys, *words, "--plot", str(plot))["methods"]
    assert list(result) == methods.split(",")
    assert result["lora"]["setting"]["dropout"] == 0.1
    assert result["paca"]["setting"]["dropout"] == 0.0
    assert result["paca"]["saved_bytes"] < result["lora"]["saved_bytes"]
    assert result["lora"]["peak_bytes"] < result["dora"]["peak_bytes"]
    mixers = 14 * 8 * 8 * 4
    more = result["moslora"]["by_category"]["adapter"] - result["lora"]["by_category"]["adapter"]
    assert more == mixers
    assert result["qpaca"]["by_category"]["weights"] < result["paca"]["by_category"]["weights"]
    assert {one["fits"] for one in result.values()} == {"yes"}
    assert plot.stat().st_size > 1000


def test_largest_length(capsys, config):
    words = (config, "--memory", "1GiB", "--max", "seq-len", "--lean", "off")
    result = run_json(capsys, *words)
    longest = result["max_seq_len"]
    assert result["setting"]["seq_len"] == longest
    assert result["fits"] == "yes"
    assert result["device_bytes"]["high"] <= 2**30 == result["available_bytes"]
    over = run_json(capsys, config, "--seq-len", str(longest + 1), "--lean", "off")
    assert over["device_bytes"]["high"] > 2**30


def test_nothing_fits(capsys, config):
    result = run_json(capsys, config, "--memory", "1MiB", "--max", "batch")
    assert result == {"max_batch_size": 0, "notes": [], "available_bytes": 2**20, "fits": "no"}
    assert main(["estimate", config, "--memory", "1MiB", "--max", "batch"]) == 0
    assert "no" in capsys.readouterr().out


def test_table_shows_parts_spread_and_notes(capsys, config):
    words = ["--methods", "paca,lora", "--memory", "3GiB", "--seq-len", "128", "--lean", "off"]
    assert main(["estimate", config, *words]) == 0
    captured = capsys.readouterr()
    for words in (
        "weights",
        "activations",
        "peak",
        "a device needs",
        "paca: batch 1 x 128 tokens, weights in bfloat16, rank 8 in float32, AdamW, logits loss",
        "fits in 3.00 GiB: yes",
        "keeps for backward, GiB: ",
    ):
        assert words in captured.out
    assert "gathered" not in captured.out
    assert captured.err == "note: the model was made for 64 tokens, not 128.\n"


def test_sharding(capsys, config):
    words = (config, "--method", "full", "--sharding", "fsdp2", "--num-gpus", "2")
    assert run_json(capsys, *words)["by_category"]["gathered"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lama3-8b"], "unknown model 'lama3-8b'; did you mean 'llama3-8b'?"),
        (["llama3-8b", "--method", "pacca"], "`method` ('pacca') must be one of paca, "),
        (["llama3-8b", "--methods", "paca,ful"], "full; did you mean 'full'?"),
        (["llama3-8b", "--gpu", "a100-80"], "unknown GPU 'a100-80'; did you mean 'a100-80g'?"),
        (["llama3-8b", "--memory", "lots"], "`memory` ('lots') is no amount of memory"),
        (["llama3-8b", "--rank", "0"], "`rank` (0) must be a whole number of at least 1"),
        (["llama3-8b", "--batch-size", "-1"], "`batch_size` (-1) must be a whole number"),
        (["llama3-8b", "--dropout", "0.1"], "`dropout` (0.1) with `method` ('paca')"),
        (["llama3-8b", "--method", "full", "--quantization", "nf4"], "cannot be trained"),
        (["llama3-8b", "--plot", "out.txt"], "must end in one of .png"),
        (["llama3-8b", "--rank", "5000"], "`r` (5000) must be in [1, in_features=4096]"),
        (["llama3-8b", "--target-modules", "query"], "query"),
        (["llama3.2-1b", "--method", "shira"], "`method` ('shira') looks at values when its"),
        (["llama3-8b", "--sharding", "zero4"], "`sharding` ('zero4') must be one of none, zero1"),
    ],
)
def test_errors_are_one_line_that_says_what_to_do(words, message, capsys):
    assert message in error_of(capsys, *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "h100", "--memory", "1GiB"], "give only one of --gpu, --memory"),
        (["--max", "rank"], "--max needs --gpu or --memory"),
        (["--method", "lora", "--methods", "paca,full"], "give only one of --method, --methods"),
        (
            ["--max", "layers", "--gpu", "h100"],
            "`max` ('layers') must be one of seq-len, batch, rank",
        ),
    ],
)
def test_words_that_contradict_each_other(words, message, capsys):
    assert main(["estimate", "llama3-8b", *words]) == 2
    assert message in capsys.readouterr().err


def test_help_names_the_models_that_ship(capsys):
    assert main(["estimate", "--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in PRESETS)


def test_the_time_of_a_step(capsys, config):
    words = [config, "--methods", "paca,lora", "--gpu", "h100", "--time"]
    result = run_json(capsys, *words)["methods"]
    times = {name: one["time"] for name, one in result.items()}
    assert 0 < times["paca"]["step_ms"] < times["lora"]["step_ms"]
    assert sum(times["paca"]["by_kind_ms"].values()) == pytest.approx(times["paca"]["step_ms"])
    assert {one["origin"] for one in times.values()} == {"roofline"}
    assert main(["estimate", *words]) == 0
    printed = capsys.readouterr()
    assert "estimated time of a step on h100, not measured" in printed.out
    assert "kernels; paca's share is 0." in printed.out
    assert "have not been checked on a GPU" in printed.err
    assert "time" not in run_json(capsys, config, "--gpu", "h100")


def test_times_need_a_gpu_whose_rates_are_known(capsys, config):
    assert "--time needs --gpu" in error_of(capsys, config, "--time", "--memory", "24GiB")
    assert "rates of GPU '4090' are not known" in error_of(
        capsys, config, "--time", "--gpu", "4090"
    )
