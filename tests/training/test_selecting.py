"""Columns chosen from the training data: which data, by how many processes, and when resumed."""

from types import SimpleNamespace
from unittest.mock import patch

import pytest
from transformers import AutoModelForCausalLM

from pacatune import PacaConfig
from pacatune.selection import choose_columns, collect_statistics, load_columns
from pacatune.training import train
from pacatune.training.language import Task
from pacatune.training.selecting import share_of_batches
from tests.training.runs import CHECKPOINTING, QUIET, read_json

GRADIENT = {"selection": "gradient", "selection_batches": 2}


def share(num_batches=100, **options):
    training = {"seed": 7, "per_device_train_batch_size": 4, "process_index": 0, "world_size": 1}
    return [*share_of_batches(23, num_batches, SimpleNamespace(**training | options), tuple)]


def test_processes_share_the_batches_of_one():
    one = share()
    assert sorted(place for batch in one for place in batch) == list(range(23))
    assert [len(batch) for batch in one] == [4, 4, 4, 4, 4, 3]
    shares = [share(process_index=rank, world_size=2) for rank in range(2)]
    assert shares == [one[0::2], one[1::2]]
    assert share(2) == one[:2]
    assert share(seed=8) != one


@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_run_chooses_as_is_done_by_hand(
    make_config, tiny_model_dir, tmp_path, console, checkpointing
):
    section = {"r": 4, "target_modules": ["q_proj", "down_proj"], **GRADIENT}
    config = make_config(paca=section, training={"max_steps": 2, CHECKPOINTING: checkpointing})
    assert train(config, console=console).columns == "gradient, num_batches 2"
    assert "columns chosen by gradient from 2 batches (" in console.file.getvalue()
    saved = read_json(tmp_path / "out/adapter_config.json")
    task = Task(config)
    data = task.train
    batches = share_of_batches(len(data), 2, task.arguments, lambda at: task.collate(data, at))
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    options = PacaConfig(**{k: section[k] for k in section if k != "selection_batches"})
    expected = choose_columns(base, options, collect_statistics(base, batches, options))
    assert expected.columns == load_columns(tmp_path / "out")
    assert saved["selection_options"] == {"num_batches": 2}


def test_another_run_takes_columns(make_config, tmp_path):
    """And has the same losses: choosing changes nothing else."""
    training = {"max_steps": 3, "lr_scheduler_type": "constant"}
    first = train(make_config(paca={"r": 4, **GRADIENT}, training=training), console=QUIET)
    section = {"r": 4, **GRADIENT, "selection": str(tmp_path / "out")}
    training["output_dir"] = str(tmp_path / "given")
    second = train(make_config(paca=section, training=training), console=QUIET)
    assert first.train_losses == second.train_losses
    assert second.columns.startswith("fixed")
    one, two = (read_json(tmp_path / name / "adapter_config.json") for name in ("out", "given"))
    assert one["columns"] == two["columns"]


@pytest.mark.parametrize("options", [GRADIENT, {"selection": "weight_norm", "use_rslora": True}])
def test_a_resumed_run_keeps_its_columns(make_config, tmp_path, assert_resumes, options):
    section = {"r": 4, "rank_pattern": {"q_proj": 2}, **options}
    training = {"max_steps": 4, "save_total_limit": 9}
    with patch("pacatune.selection.collect_statistics", wraps=collect_statistics) as collect:
        assert_resumes(2, make_config, paca=section, training=training)
    assert collect.call_count == 2 * ("selection_batches" in options)  # not when it is resumed
    one, two = (read_json(tmp_path / name / "adapter_config.json") for name in ("whole", "cut"))
    assert one == two


@pytest.mark.parametrize("task", ["dpo", "kto", "reward", "grpo"])
def test_columns_for_other_tasks(make_task_config, rewards_module, task):
    training = {"max_steps": 1, "eval_strategy": "no"}
    report = train(make_task_config(task, paca=GRADIENT, training=training), console=QUIET)
    assert report.columns == "gradient, num_batches 2"
