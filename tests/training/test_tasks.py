"""What tasks have in common: TRL's losses, previews, and how a new one is made."""

import io
from contextlib import redirect_stdout

import pytest
import transformers
import trl
from datasets import Dataset, load_dataset
from peft import LoraConfig

from pacatune.cli import main
from pacatune.data.config import PreferenceDataConfig
from pacatune.data.prepare import PreparedData
from pacatune.training import TASKS, TaskSpec, preview, train
from pacatune.training.language import Task
from pacatune.training.task import TaskData
from pacatune.training.trainer import RunTrainer
from pacatune.tuner.defaults import default_targets
from tests.training.runs import CHECKPOINTING, QUIET, write_rows

ORPO = TaskSpec(
    trainer="tests.training.test_tasks.OrpoTrainer",
    arguments="trl.experimental.orpo.ORPOConfig",
    data=PreferenceDataConfig,
    loss_per="pair",
    metrics={"rewards/accuracies": "held-out accuracy"},
)


def prepare_orpo(task):
    config = task.config
    rows = load_dataset("json", data_files=config.data.path, split="train")
    rows = rows.add_column("row", list(range(len(rows))))
    parts = rows.train_test_split(config.data.eval_fraction, seed=config.data.seed)
    examples = PreparedData(parts["train"], parts["test"], 0, [])
    return TaskData(examples=examples, columns=("row",))


def __getattr__(name):
    """Import TRL's experimental trainer, which warns, only where it is asked for."""
    if name != "OrpoTrainer":
        raise AttributeError(name)

    from trl.experimental.orpo import ORPOTrainer

    class OrpoTrainer(RunTrainer, ORPOTrainer):
        """As `TextTrainer` and others are made."""

        prepare = staticmethod(prepare_orpo)

    return OrpoTrainer


@pytest.mark.parametrize(
    ("task", "name", "auto_class", "kind", "options"),
    [
        ("sft", "SFT", "AutoModelForCausalLM", "CAUSAL_LM", {}),
        ("dpo", "DPO", "AutoModelForCausalLM", "CAUSAL_LM", {}),
        ("reward", "Reward", "AutoModelForSequenceClassification", "SEQ_CLS", {"num_labels": 1}),
    ],
)
def test_same_losses_as_plain_trl(
    make_task_config, tiny_model_dir, tmp_path, task, name, auto_class, kind, options
):
    """The recipe adds nothing to what TRL's trainers compute."""
    answers = ("completion",) if task == "sft" else ("chosen", "rejected")
    rows = [
        {"prompt": f"{i}?", **dict(zip(answers, (f" {7 * i % 10}", " no"), strict=False))}
        for i in range(32)
    ]
    data = {"path": str(write_rows(tmp_path / "texts.jsonl", rows)), "eval_fraction": 0}
    settings = {"max_steps": 6, "per_device_train_batch_size": 4, "lr_scheduler_type": "linear"}
    settings["gradient_accumulation_steps"] = 2
    lean = "auto" if task == "sft" else "off"
    ours = make_task_config(task, "lora", data=data, training=settings, lean=lean)
    report = train(ours, console=QUIET)

    transformers.set_seed(42)
    model = getattr(transformers, auto_class).from_pretrained(tiny_model_dir, **options)
    targets = default_targets(model)
    trainer = getattr(trl, f"{name}Trainer")(
        model,
        args=getattr(trl, f"{name}Config")(
            str(tmp_path / "plain"),
            **settings,
            learning_rate=5e-3,
            logging_steps=1,
            report_to="none",
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            **{CHECKPOINTING: False},
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(tiny_model_dir),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type=kind),
    )
    trainer.train()
    losses = {e["step"]: e["loss"] for e in trainer.state.log_history if "loss" in e}
    assert len(losses) == 6
    exactly = 0 if task == "sft" else 1e-5
    assert losses == pytest.approx(dict(report.train_losses), rel=exactly, abs=0)


@pytest.mark.filterwarnings("ignore")  # TRL's experimental parts use what transformers deprecates
def test_one_row_is_a_task(make_task_config, tmp_path, console, monkeypatch):
    """It is trained, shown, and known to the command."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    monkeypatch.setitem(TASKS, "orpo", ORPO)
    pair = {"chosen": "It is so.", "rejected": "No idea."}
    rows = [{"prompt": f"What is {i}? ", **pair} for i in range(40)]
    data = {"path": str(write_rows(tmp_path / "pairs.jsonl", rows))}
    config = make_task_config("orpo", data=data, training={"learning_rate": 1e-2})
    report = train(config, console=console)
    assert report.eval_loss_after < report.eval_loss_before
    assert "held-out accuracy after" in dict(report.table())
    preview(config, 1, console=console)
    assert "rejected: No idea." in console.file.getvalue()
    with redirect_stdout(io.StringIO()) as shown:
        assert main(["train", "--task", "orpo", "--help", "all"]) == 0
    assert "--training.disable_dropout" in shown.getvalue()


@pytest.mark.parametrize(
    ("task", "shown"),
    [
        ("dpo", ["chosen (7 tokens): It is 0.</s>", "rejected (9 tokens):", "What is 0?"]),
        ("grpo", ["prompts.jsonl, row 1\nprompt (", ": <s>Count 0", "number: 0"]),
    ],
)
def test_preview(make_task_config, rewards_module, console, task, shown):
    preview(make_task_config(task), 2, console=console)
    out = console.file.getvalue()
    assert all(text in out for text in shown), out


@pytest.mark.parametrize("task", ["dpo", "kto", "grpo"])
def test_data_that_is_trained_on_and_held_out(make_task_config, rewards_module, task):
    path = make_task_config(task).data.path
    (said,) = (
        warning
        for warning in Task(make_task_config(task, data={"eval_path": path})).warnings
        if "are also in the training data" in warning
    )
    number = 80 if task == "kto" else 40
    assert said.startswith(f"{number} of {number} evaluation examples are also in the")
    assert "row 1" in said


def test_whose_split_is_fixed(make_task_config, rewards_module):
    names = ("dpo", "kto", "reward", "grpo", "rloo")
    fixed = {name for name in names if Task(make_task_config(name)).data.is_split_fixed}
    assert fixed == {"kto", "grpo", "rloo"}


def test_other_answers_are_other_data(make_task_config, pairs_path, tmp_path):
    """A run is not resumed on them, even if prompts and preferred answers are the same."""
    changed = tmp_path / "changed.jsonl"
    changed.write_text(pairs_path.read_text().replace("No idea.", "None."))
    for task in ("dpo", "kto", "reward"):
        configs = [make_task_config(task, data={"path": str(p)}) for p in (pairs_path, changed)]
        one, two = (Task(config).trained_on.fingerprint for config in configs)
        assert one != two
