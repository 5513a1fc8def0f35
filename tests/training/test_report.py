"""What a run says of itself: while it trains, in its report, and on its card."""

import json

import pytest
import yaml
from PIL import Image

from pacatune.reports.provenance import versions
from pacatune.training.language import Task
from pacatune.training.report import Report, curve_of, train_curve, write_card, write_report
from tests.training.runs import read_json

pytestmark = pytest.mark.usefixtures("drawn")


def make_report(**changes):
    values = {
        **{"task": "sft", "method": "paca", "model": "owner/model", "versions": versions("trl")},
        **{"eval_loss_before": 2.5, "eval_loss_after": 1.25, "train_loss": 1.5, "step_ms": 12.34},
        **{"num_trainable_parameters": 1000, "num_parameters": 100_000, "num_steps": 3},
        **{"num_train_examples": 20, "num_eval_examples": 2, "seed": 42, "learning_rate": 5e-4},
        **{"peak_memory_bytes": 2**30, "peak_memory_kind": "process_peak_resident"},
        **{"tokens_per_second": 5000.0, "saved_activation_bytes": 2**20, "device": "cpu"},
        **{"targets": ["layers.0.q_proj", "layers.1.q_proj"], "dtype": "float32"},
        "compute_dtype": "float32",
        **{"train_losses": [(1, 2.0), (3, 1.25)], "eval_losses": [(0, 2.5), (3, 1.25)]},
    }
    return Report(**{**values, **changes})


def test_files(tmp_path):
    report = make_report(warnings=["a warning"])
    write_report(report, tmp_path)
    saved = read_json(tmp_path / "report.json")
    assert saved == json.loads(json.dumps(report.to_dict()))
    text = (tmp_path / "report.md").read_text()
    assert "| trained parameters | 1,000 (1.000%) |" in text
    assert "- a warning" in text
    with Image.open(tmp_path / "loss.png") as image:
        assert image.size == (840, 480)


def test_train_loss_is_the_mean_over_steps():
    log = [
        {"step": 0, "eval_loss": 9.0},
        {"step": 1, "loss": 4.0},
        {"step": 4, "loss": 2.0},
        {"step": 4, "eval_loss": 3.0},
        {"step": 4, "train_runtime": 1.0},
    ]
    assert train_curve(log) == ([(1, 4.0), (4, 2.0)], (4.0 + 3 * 2.0) / 4)
    assert curve_of(log, "eval_loss") == [(0, 9.0), (4, 3.0)]
    assert train_curve([]) == ([], None)


@pytest.mark.parametrize(
    ("held_out", "losses", "said"),
    [
        ((2.0, 2.03), [], "held-out loss rose from 2.0000 to 2.03"),
        ((2.0, 2.01), [], None),  # as rounding and few rows do
        # What is held out decides, where there is any.
        ((2.5, 1.25), [4.5, 37.6, 29.2, 19.5], None),
        ((None, None), [4.5, 37.6, 29.2, 19.5], "training loss rose from 4.5000 to 19.5000"),
        # Means of a tenth, which is two steps here.
        ((None, None), [3.0, 5.0, *[9.0] * 17, 7.0], "training loss rose from 4.0000 to 8.0000"),
        ((None, None), [3.0, 5.0, *[9.0] * 16, 5.5, 5.5], None),
        ((None, None), [2.0], None),
        ((None, None), [], None),
    ],
)
def test_a_loss_that_ends_above_its_start(held_out, losses, said):
    before, after = held_out
    curve = list(enumerate(losses, start=1))
    report = make_report(eval_loss_before=before, eval_loss_after=after, train_losses=curve)
    lines = report.risen()
    assert len(lines) == (said is not None)
    if said is not None:
        assert lines[0].startswith(f"the {said}")
        assert lines[0].endswith("lower `training.learning_rate` (0.0005).")
    rewarded = make_report(**{**vars(report), "task": "grpo"})
    assert rewarded.risen() == []  # its loss is about 0, and says nothing


@pytest.mark.parametrize(
    ("method", "library", "contains"),
    [
        ("paca", "peft", ["import pacatune  # makes PaCA known", "pacatune merge", "--to lora"]),
        ("lora", "peft", ["# LoRA fine"]),
        ("full", "transformers", ["AutoModelForCausalLM.from_pretrained"]),
    ],
)
def test_card(make_config, tmp_path, method, library, contains):
    task, report = Task(make_config(method)), make_report(method=method, warnings=["Look out."])
    assert task.kind.pipeline_tag == "text-generation"  # looks at the model
    task.config.model.path = report.model
    write_card(task, report, tmp_path)
    _, front, body = (tmp_path / "README.md").read_text().split("---\n", 2)
    front = yaml.safe_load(front)
    assert (front["base_model"], front["library_name"]) == ("owner/model", library)
    assert front["tags"] == sorted({method, "pacatune", "sft", "trl"})
    assert all(text in body for text in [*contains, "Warnings:\n\n- Look out.\n"])
    assert ("import pacatune" in body) == (method == "paca")
