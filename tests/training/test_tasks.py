"""What tasks have in common: TRL's losses, previews, and how a new one is made."""

import io
import shutil
from contextlib import redirect_stdout

import pytest
import transformers
import trl
from datasets import Dataset, load_dataset
from peft import LoraConfig
from transformers import AutoTokenizer, pipeline

from pacatune.adapters.merge import merge
from pacatune.cli import main
from pacatune.data import PreparedData
from pacatune.data.config import PreferenceDataConfig, TextClassConfig
from pacatune.training import TASKS, TaskSpec, preview, train
from pacatune.training.classifier import sort_labels, split_texts
from pacatune.training.language import LanguageTask
from pacatune.training.task import TaskData, task_of
from pacatune.tuner.defaults import default_targets
from tests.adapters.fixtures import edit_json
from tests.training.runs import CHECKPOINTING, QUIET, read_json, write_rows

ORPO = TaskSpec(
    run="tests.training.test_tasks.orpo",
    arguments="trl.experimental.orpo.ORPOConfig",
    data=PreferenceDataConfig,
    loss_per="pair",
    metrics={"rewards/accuracies": "held-out accuracy"},
)


def prepare_orpo(config, tokenizer):
    rows = load_dataset("json", data_files=config.data.path, split="train")
    rows = rows.add_column("row", list(range(len(rows))))
    parts = rows.train_test_split(config.data.eval_fraction, seed=config.data.seed)
    examples = PreparedData(parts["train"], parts["test"], 0, [])
    return TaskData(examples=examples, tokenizer=tokenizer, kind=ORPO.kind, columns=("row",))


def orpo(config):
    from trl.experimental.orpo import ORPOTrainer

    return LanguageTask(config, trainer=ORPOTrainer, prepare=prepare_orpo, tags=("orpo", "trl"))


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


def test_whose_split_is_fixed(make_task_config, rewards_module):
    reasons = {
        name: task_of(make_task_config(name)).prepared.fixed_split
        for name in ("dpo", "kto", "reward", "grpo", "rloo")
    }
    assert {name for name, reason in reasons.items() if reason} == {"kto", "grpo", "rloo"}


def test_other_answers_are_other_data(make_task_config, pairs_path, tmp_path):
    """A run is not resumed on them, even if prompts and preferred answers are the same."""
    changed = tmp_path / "changed.jsonl"
    changed.write_text(pairs_path.read_text().replace("No idea.", "None."))
    for task in ("dpo", "kto", "reward"):
        configs = [make_task_config(task, data={"path": str(p)}) for p in (pairs_path, changed)]
        one, two = (task_of(config).prepare().fingerprint for config in configs)
        assert one != two


def test_split_of_a_classifier(tmp_path):
    rows = [{"text": f"t{i}", "label": "aab"[i % 3]} for i in range(10)]
    path = str(write_rows(tmp_path / "rows.jsonl", rows))
    texts, held_out = split_texts(TextClassConfig(path=path, eval_fraction=0.2))
    assert (len(texts), len(held_out)) == (8, 2)
    assert {*texts["label"]} == {"a", "b"}
    again, _ = split_texts(TextClassConfig(path=path, eval_fraction=0.2, num_train=6))
    assert again["text"][:] == texts["text"][:6]
    with pytest.raises(ValueError, match=r"`data.num_train` \(9\) must be at most 8"):
        split_texts(TextClassConfig(path=path, eval_fraction=0.2, num_train=9))
    for row, message in (
        (
            {"sentence": "a", "label": 1},
            r"row 1: field 'text' is missing \(columns \['label', 'sent",
        ),
        ({"text": "", "label": 1}, "row 1: has text '' and label 1; a classifier needs both"),
    ):
        wrong = str(write_rows(tmp_path / "wrong.jsonl", [row]))
        with pytest.raises(ValueError, match=message):
            split_texts(TextClassConfig(path=wrong))
    texts, held_out = split_texts(TextClassConfig(path=path, eval_path=path))
    assert (len(texts), len(held_out)) == (10, 10)


@pytest.mark.parametrize("method", ["paca", "head"])
def test_a_classifier(make_task_config, tiny_model_dir, tmp_path, console, monkeypatch, method):
    words = ("red", "green", "blue")
    rows = [{"text": f"It is {words[i % 3]} {i}.", "label": words[i % 3]} for i in range(60)]
    data = {"path": str(write_rows(tmp_path / "rows.jsonl", rows))}
    training = {"max_steps": 30, "eval_steps": 30, "save_steps": 30, "learning_rate": 1e-2}
    config = make_task_config("classifier", method, data=data, training=training)
    report = train(config, console=console)
    assert report.eval_metrics_after["accuracy"] > (0.9 if method == "paca" else 0.3)
    card = (tmp_path / "out/README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace("FOLDER", str(tmp_path / "out"))
    monkeypatch.chdir(tiny_model_dir.parent)  # the card has the folder's name alone
    exec(code, names := {})
    assert names["model"].config.num_labels == 3
    assert names["model"].config.id2label == {0: "blue", 1: "green", 2: "red"}
    before = console.file.getvalue().count("It is ")
    preview(config, 2, console=console)
    assert console.file.getvalue().count("It is ") == before + 2


@pytest.mark.parametrize("method", ["paca", "lora", "full"])
def test_a_classifier_knows_its_classes(
    make_task_config, tiny_model_dir, tmp_path, monkeypatch, method
):
    """As the card loads it and merged, in padded batches, it answers with the user's labels."""
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    if method == "lora":  # as Llama's, which does not pad
        edit_json(folder / "tokenizer_config.json", pad_token=None)
    rows = [
        {"text": f"{'It is ' * (i % 4)}{'abcdefghijk'[i % 11] * 3}.", "label": i % 11}
        for i in range(55)
    ]
    path = str(write_rows(tmp_path / "rows.jsonl", rows))
    data = {"path": path, "eval_path": path}
    training = {"max_steps": 60, "eval_steps": 60, "save_steps": 60, "learning_rate": 1e-2}
    out = tmp_path / "out"
    options = {"data": data, "model": {"path": str(folder)}, "training": training}
    config = make_task_config("classifier", method, **options)
    expected = train(config, console=QUIET).eval_metrics_after["accuracy"]
    assert expected > 0.3
    saved = read_json(out / ("config.json" if method == "full" else "pacatune.json"))
    saved = saved if method == "full" else saved["head"]
    assert saved["id2label"] == {str(number): str(number) for number in range(11)}
    assert saved["label2id"] == {str(number): number for number in range(11)}
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert saved["pad_token_id"] == tokenizer.pad_token_id

    code = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    exec(code.replace("FOLDER", str(out)), names := {})
    models = [names["model"]]
    if method != "full":
        merge(None, out, tmp_path / "merged")
        models.append(str(tmp_path / "merged"))
    for model in models:
        classify = pipeline("text-classification", model=model, tokenizer=tokenizer)
        answers = classify([row["text"] for row in rows], batch_size=8)
        right = [
            answer["label"] == str(row["label"]) for answer, row in zip(answers, rows, strict=True)
        ]
        assert sum(right) / len(rows) == pytest.approx(expected)


def test_labels_are_sorted_as_what_they_are():
    assert sort_labels(["10", "9", "-1", "2", "10"]) == ["-1", "2", "9", "10"]
    assert sort_labels(["b", "10", "9"]) == ["10", "9", "b"]
