"""tools/gpu_check.py rehearses on a CPU: the tests of a GPU run, and one JSON has what they say."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tools import gpu_check

SCRIPT = Path(gpu_check.__file__)


def test_a_rehearsal(tmp_path):
    output = tmp_path / "out.json"
    command = [sys.executable, SCRIPT, "--device", "cpu", "--output", output]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    result = json.loads(output.read_text())
    assert {"torch", "transformers", "peft"} <= result["versions"].keys()
    tests = result["tests"]
    assert {test["outcome"] for test in tests.values()} == {"passed", "skipped"}
    for name in ("test_steps_of_all_methods[torch.float32]", "test_steps_of_compiled_models"):
        assert {"paca / frozen", "paca / lora"} <= {row["method"] for row in tests[name]["rows"]}


def test_a_test_that_fails_is_noted_at_once(tmp_path):
    recorder = gpu_check.Recorder(torch.device("cpu"), tmp_path / "out.json")
    names = {"nodeid": "tests/gpu/test_x.py::test_a", "duration": 0.0, "user_properties": []}
    crash = SimpleNamespace(reprcrash="test_x.py:2: assert 1 == 2")
    report = SimpleNamespace(when="call", passed=False, outcome="failed", longrepr=crash, **names)
    recorder.pytest_runtest_logreport(report)
    failed = json.loads((tmp_path / "out.json").read_text())["tests"]["test_a"]
    assert failed == {"outcome": "failed", "seconds": 0.0, "message": crash.reprcrash}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--device", "cpu", "--output", "no/folder/out.json"], "does not exist; make it"),
        pytest.param(
            [],
            "there is no CUDA device; --device cpu rehearses",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_wrong_options(tmp_path, capsys, options, message):
    with pytest.raises(SystemExit, match="2"):
        gpu_check.main(["--output", str(tmp_path / "out.json"), *options])
    assert message in capsys.readouterr().err
