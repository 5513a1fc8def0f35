"""A task of TRL becomes one of ours by a row of the table and what prepares its data."""

import io
import json
from contextlib import redirect_stdout

import pytest
from datasets import load_dataset
from rich.console import Console
from safetensors.torch import load_file

from pacatune.cli import main
from pacatune.data import PreparedData
from pacatune.training import TASKS, RunConfig, TaskSpec, preview, train

ORPO = TaskSpec(
    arguments="trl.experimental.orpo.ORPOConfig",
    trainer="trl.experimental.orpo.ORPOTrainer",
    data="pacatune.data.PreferenceDataConfig",
    prepare="tests.training.test_tasks.prepare_orpo",
    tags=("orpo", "trl"),
    columns=("row",),
    loss_per="pair",
    metrics={"rewards/accuracies": "held-out accuracy"},
)


def prepare_orpo(task):
    rows = load_dataset("json", data_files=task.config.data.path, split="train")
    rows = rows.add_column("row", list(range(len(rows))))
    parts = rows.train_test_split(task.config.data.eval_fraction, seed=task.config.data.seed)
    return PreparedData(parts["train"], parts["test"], 0, [])


@pytest.fixture
def run(monkeypatch, tmp_path, tiny_model_dir):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    monkeypatch.setitem(TASKS, "orpo", ORPO)
    rows = [
        {"prompt": f"What is {i}? ", "chosen": f"It is {7 * i % 10}.", "rejected": "No idea."}
        for i in range(40)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "task": "orpo",
        "model": {"path": str(tiny_model_dir)},
        "data": {"path": str(path), "eval_fraction": 0.2},
        "training": {
            "output_dir": str(tmp_path / "out"),
            "max_steps": 6,
            "save_steps": 3,
            "learning_rate": 1e-2,
            "report_to": "none",
            "use_cpu": True,
            "bf16": False,
        },
    }


@pytest.mark.filterwarnings("ignore")  # TRL's experimental parts use what transformers deprecates
def test_one_row_is_a_task(run, tmp_path):
    report = train(RunConfig(**run), console=Console(file=io.StringIO()))
    assert report.eval_loss_after < report.eval_loss_before
    assert report.eval_metrics["rewards/accuracies"]
    assert "held-out accuracy after" in dict(report.table())
    tensors = load_file(tmp_path / "out/adapter_model.safetensors")
    assert any(values.any() for values in tensors.values())
    saved = json.loads((tmp_path / "out/report.json").read_text())
    assert saved["num_steps"] == 6
    assert "orpo" in (tmp_path / "out/README.md").read_text()
    preview(RunConfig(**run), 1, console=(console := Console(file=io.StringIO())))
    assert "rejected: No idea." in console.file.getvalue()


def test_the_command_has_it_too(run):
    with redirect_stdout(io.StringIO()) as shown:
        assert main(["train", "--task", "orpo", "--help"]) == 0
    assert "--training.disable_dropout" in shown.getvalue()
