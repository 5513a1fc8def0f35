"""What an evaluation writes: its numbers, and what made them."""

import json
from dataclasses import replace

import pytest

from pacatune.adapters.loading import load_language_model
from pacatune.evaluation.harness import Score
from pacatune.evaluation.output import Report, describe, percent, write_report
from tests.adapters.fixtures import adapter_dir, lora_dir
from tests.conftest import build_model

__all__ = ["adapter_dir", "lora_dir"]

SCORE = Score(value=0.4149, stderr=0.021, num_questions=9)
REPORT = Report(
    title="things",
    headings=["", "a"],
    rows=[["accuracy", percent(SCORE)], ["all", percent(replace(SCORE, stderr=None))]],
    result={"a": 0.5},
    notes=["A note."],
    questions=[{"number": 0, "acc": 1.0}],
)


def test_files_say_what_made_them(tmp_path, tiny_model_dir, adapter_dir):
    loaded = load_language_model(str(tiny_model_dir), adapter_dir)
    head = describe(loaded, "pacatune evaluate things", {"limit": 3, "chat": None})
    write_report(tmp_path, head, REPORT, finished=True)
    values = json.loads((tmp_path / "evaluation.json").read_text())
    assert (values["finished"], values["result"]) == (True, {"a": 0.5})
    assert values["command"] == "pacatune evaluate things"
    assert values["settings"] == {"limit": 3, "chat": None}
    assert values["model"]["name"] == str(tiny_model_dir)
    assert values["model"]["adapter"] == str(adapter_dir)
    assert {"pacatune", "lm-eval", "torch", "python"} <= values["versions"].keys()
    page = (tmp_path / "evaluation.md").read_text()
    table = "| | a |\n|---|--:|\n| accuracy | 41.5 ± 2.1 |\n| all | 41.5 |"
    assert f"# things\n\n{table}\n\n- A note." in page
    assert "| limit | 3 |" in page
    assert "chat" not in page
    assert json.loads((tmp_path / "questions.jsonl").read_text()) == {"number": 0, "acc": 1.0}
    names = {"evaluation.json", "evaluation.md", "questions.jsonl"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_base_has_one_fingerprint(tiny_model_dir, adapter_dir, lora_dir, tmp_path):
    """R2: whatever is adapted, and used."""
    heads = []
    for adapter in (None, adapter_dir, lora_dir):
        loaded = load_language_model(str(tiny_model_dir), adapter)
        loaded.model(loaded.tokenizer("x", return_tensors="pt")["input_ids"])
        heads.append(describe(loaded, "", {})["model"])
    bases = [head["base"] for head in heads]
    assert bases[0]["weights_sha256"] is not None
    assert bases[0] == bases[1] == bases[2]
    files = [head["adapter_sha256"] for head in heads]
    assert files[0] is None
    assert files[1] != files[2]
    build_model(bases[0]["vocab_size"], seed=1).save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    changed = describe(load_language_model(str(tmp_path)), "", {})["model"]["base"]
    assert changed["weights_sha256"] != bases[0]["weights_sha256"]


@pytest.mark.parametrize("kind", ["nf4", "int8", None])
def test_result_says_how_the_base_is_held(tiny_model_dir, kind):
    pytest.importorskip("bitsandbytes", reason="not installed")
    head = describe(load_language_model(str(tiny_model_dir), quantization=kind), "", {})
    assert head["model"]["quantization"] == kind
    assert (f"| base held as | {kind} |" in REPORT.markdown(head)) is (kind is not None)
