"""Every section of tools/gpu_check.py, in small sizes on the CPU."""

import json

import pytest
import torch

from benchmarks import gpu_times
from tools import gpu_check

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]
WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
SECTIONS = gpu_check.make_sections(torch.device("cpu"))


def test_what_the_result_says(tmp_path):
    output = tmp_path / "out.json"
    assert gpu_check.main(["--device", "cpu", "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert {n: result["sections"][n]["status"] for n in SECTIONS} == dict.fromkeys(
        SECTIONS, "passed"
    )
    assert result["finished"]
    assert result["times_by"] == "the clock of the host"
    assert {"torch", "transformers", "peft"} <= result["versions"].keys()
    sections = result["sections"]
    ratios = [row for row in sections["steps"]["rows"] if row.get("unit") == "ratio"]
    assert {row["setting"].rpartition(", ")[2] for row in ratios} == {
        *("bfloat16 adapters", "float32 adapters"),
    }
    assert {f"{ours} / {other}" for ours, other in gpu_times.PAIRS} == {r["method"] for r in ratios}
    assert {row["method"] for row in sections["memory"]["rows"]} == {"paca", "lora"}
    rows = sections["lean"]["rows"]
    saved = {row["method"]: row["value"] for row in rows if row["what"] == "kept for backward"}
    assert saved["paca lean"] < saved["paca"]
    assert saved["lora lean"] < saved["lora"]


def test_a_section_that_fails_stops_no_other(monkeypatch, tmp_path, capsys):
    def fail():
        raise RuntimeError("no such kernel")

    sections = {"first": lambda: {"a": 1}, "second": fail, "third": lambda: {"b": 2}}
    monkeypatch.setattr(gpu_check, "make_sections", lambda device: sections)
    written = []
    monkeypatch.setattr(gpu_check, "write_json", lambda found, path: written.append(str(found)))
    output = tmp_path / "out.json"
    assert gpu_check.main(["--device", "cpu", "--output", str(output)]) == 1
    assert len(written) == 4  # after each, and at the end
    assert "'message': 'RuntimeError: no such kernel', 'at': 'test_gpu_check.py:" in written[-1]
    assert "'third': {'status': 'passed', 'b': 2" in written[-1]
    assert "failed: second" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "tpu"], "`--device` ('tpu') must be 'cuda' or 'cpu'."),
        (["--device", "cpu", "--sections", "stesp"], "did you mean 'steps'?"),
        (["--device", "cpu", "--output", "."], "`--output` (.) is a folder; name a file."),
        (["--device", "cpu", "--output", "no/folder/out.json"], "does not exist"),
        pytest.param([], "there is no CUDA device; give `--device cpu`.", marks=WITHOUT_GPU),
    ],
)
def test_wrong_options(tmp_path, capsys, options, message):
    assert gpu_check.main(["--output", str(tmp_path / "out.json"), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert error.startswith("gpu_check: ")
