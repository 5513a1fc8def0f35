"""lm-eval scores what merge and export write, by the lines of the page about serving."""

import json
import re
import shlex
from pathlib import Path

import pytest

from pacatune.adapters.export import export_lora
from pacatune.adapters.merge import merge
from tests.adapters.fixtures import log_likelihood, save_adapter
from tests.data.conftest import write_lines
from tests.docs.blocks import ROOT, run
from tests.releases import needs

QUESTION, CHOICES = "What is 1 and 1?", ["2", "3", "11"]
TASK = """
task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: sums.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
"""
PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^lm_eval .*", PAGE, re.MULTILINE)


@pytest.fixture
def folder(tmp_path):
    write_lines(tmp_path / "sums.jsonl", [{"question": QUESTION, "choices": CHOICES, "answer": 0}])
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "sums.yaml").write_text(TASK)
    return tmp_path


@needs("lm_eval")
@pytest.mark.slow
def test_the_commands_of_the_page_score_the_adapted_model(folder, tiny_model_dir, tokenizer):
    adapted = save_adapter(tiny_model_dir, folder / "my-run")
    (folder / "my-model").symlink_to(tiny_model_dir)
    merge(str(tiny_model_dir), folder / "my-run", folder / "my-merged")
    export_lora(str(tiny_model_dir), folder / "my-run", folder / "my-lora")
    expected = [log_likelihood(adapted, tokenizer, QUESTION, f" {text}") for text in CHOICES]
    assert len(COMMANDS) == 2
    for number, command in enumerate(COMMANDS):
        words = shlex.split(command.replace("--tasks mmlu", "--tasks sums"))
        more = ["--include_path", "tasks", "--device", "cpu", "--output_path", str(number)]
        result = run([*words, *more, "--num_fewshot", "0", "--log_samples"], folder)
        assert result.returncode == 0, result.stderr
        (path,) = Path(folder, str(number)).rglob("samples_sums_*.jsonl")
        (sample,) = map(json.loads, path.read_text().splitlines())
        scores = [float(reply[0]) for reply in sample["filtered_resps"]]
        assert scores == pytest.approx(expected, abs=1e-4)
