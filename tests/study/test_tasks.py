"""Real runs on tiny models: texts, classes, images; what is measured, and fairness."""

import io
import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from pacatune.study import Arm, StudyConfig, run_study
from pacatune.study.plan import key_of, make_plan
from pacatune.study.tasks import exact_match
from tests.conftest import build_model
from tests.image_models import save_vit, write_images

QUIET = Console(quiet=True)


def study_of(options, arms, **values):
    base = {"options": options, "arms": arms, "seeds": [0, 1], "forgetting_tokens": 0}
    return StudyConfig(**{**base, **values})


def test_texts(text_options, tmp_path):
    """Columns, columns chosen by gradient, factors, every weight."""
    arms = {
        "paca": Arm(rank=4, learning_rates=[1e-2]),
        "gradient": Arm(
            selection="gradient",
            learning_rates=[1e-2],
            options={"paca": {"selection_batches": 2}},
        ),
        "moslora": Arm(method="moslora", learning_rates=[1e-2]),
        "full": Arm(method="full", learning_rates=[1e-3]),
    }
    config = study_of(text_options, arms, seeds=[0], forgetting_tokens=512)
    result = run_study(config, tmp_path / "out", console=QUIET)
    assert result.metric == "loss"
    assert [arm.failures for arm in result.arms.values()] == [[]] * len(arms)
    for arm in result.arms.values():
        assert all(math.isfinite(value) for value in arm.values.values())
        assert arm.forgetting is not None
        assert arm.forgetting != 0


def test_bases_of_few_bits(text_options, tmp_path):
    pytest.importorskip("bitsandbytes")
    arms = {"qpaca": Arm(method="qpaca", rank=4), "qlora": Arm(method="qlora")}
    plan = make_plan(study_of(text_options, arms))
    for name in arms:
        run = plan.make_run(name, 1e-3, 0, tmp_path)
        assert run.model.quantization == "nf4"
        measured = plan.task.run(run)
        assert math.isfinite(measured["test loss"])
        assert measured["trained parameters"] == plan.arms[name].num_trainable_parameters


def test_exact_matches_are_those_of_greedy_decoding():
    """Answers that the model itself has generated match; changed in one token, they do not."""
    model = build_model(40, eos_token_id=None).train()
    rows = []
    for length in (3, 5, 6, 4):
        prompt = torch.randint(3, 40, (1, length), generator=torch.Generator().manual_seed(length))
        ids = model.generate(prompt, max_new_tokens=4, do_sample=False)
        rows.append((ids[0].tolist(), length))
    rows[1][0][5] = (rows[1][0][5] + 1) % 40  # its first answer token
    rows[2][0][-1] = (rows[2][0][-1] + 1) % 40
    batches = []
    for some in (rows[:3], rows[3:]):
        width = max(len(ids) for ids, _ in some)
        batch = {"input_ids": torch.zeros(len(some), width, dtype=torch.int64)}
        batch["attention_mask"] = torch.zeros_like(batch["input_ids"])
        batch["labels"] = torch.full_like(batch["input_ids"], -100)
        for row, (ids, length) in enumerate(some):
            batch["input_ids"][row, : len(ids)] = torch.tensor(ids)
            batch["attention_mask"][row, : len(ids)] = 1
            batch["labels"][row, length : len(ids)] = torch.tensor(ids[length:])
        batches.append(batch)
    trainer = SimpleNamespace(
        model=model,
        accelerator=SimpleNamespace(autocast=nullcontext),
        get_eval_dataloader=lambda data: data,
    )
    assert exact_match(trainer, batches) == 0.5


def test_exact_answers_are_a_metric(text_options, tmp_path):
    config = study_of(text_options, {"paca": Arm(rank=4)}, metric="exact_match")
    plan = make_plan(config)
    assert plan.higher_is_better
    run = plan.make_run("paca", 1e-2, 0, tmp_path)
    measured = plan.task.run(run)
    assert 0 <= measured["test exact_match"] <= 1
    assert measured["step"] > 0
    assert measured["kept for backward"] > 0
    # A run that did not measure it is another one; the loss is the same.
    by_loss = make_plan(study_of(text_options, {"paca": Arm(rank=4)}))
    assert key_of(plan.inputs(run)) != key_of(by_loss.inputs(run))
    same = by_loss.task.run(by_loss.make_run("paca", 1e-2, 0, tmp_path))
    assert same["test loss"] == measured["test loss"]
    assert "test exact_match" not in same


def test_test_loss_is_that_of_the_recipe(text_options, tmp_path):
    """The same run by `pacatune train`, evaluating on what is test data here."""
    from pacatune.training import train

    plan = make_plan(study_of(text_options, {"paca": Arm(rank=4)}))
    run = plan.make_run("paca", 1e-2, 0, tmp_path / "scratch")
    measured = plan.task.run(run)
    held_out = plan.task.run(plan.make_run("paca", 1e-2, 0, tmp_path / "scratch"))
    assert held_out | {"step": 0} == measured | {"step": 0}
    again = plan.make_run("paca", 1e-2, 0, tmp_path / "recipe")
    report = train(again, console=QUIET)
    assert measured["validation loss"] == pytest.approx(report.eval_loss_after, rel=1e-5)
    assert measured["trained parameters"] == report.num_trainable_parameters
    assert measured["train loss"] == pytest.approx(report.train_loss, rel=1e-5)
    assert measured["test loss"] != measured["validation loss"]


def test_all_arms_see_the_same_batches(text_options, tmp_path, monkeypatch):
    from pacatune.training.sft import TextTrainer

    step, seen = TextTrainer.training_step, []

    def remember(self, model, inputs, *args, **kwargs):
        seen[-1].append(inputs["input_ids"].tolist())
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(TextTrainer, "training_step", remember)
    arms = {
        "paca": Arm(rank=2),
        "lora": Arm(method="lora", dropout=0.5),
        "full": Arm(method="full"),
    }
    plan = make_plan(study_of(text_options, arms))
    for name, seed in (("paca", 0), ("lora", 0), ("full", 0), ("paca", 1)):
        seen.append([])
        plan.task.run(plan.make_run(name, 1e-3, seed, tmp_path))
    assert len(seen[0]) == 2
    assert seen[0] == seen[1] == seen[2]
    assert seen[3] != seen[0]


def test_classes(class_options, tmp_path):
    """Words tell the classes apart, which three methods are given the steps to learn."""
    longer = {"training": {"max_steps": 60}}
    arms = {
        "paca": Arm(rank=32, learning_rates=[1e-2], options=longer),
        "lora": Arm(method="lora", learning_rates=[1e-2], options=longer),
        "full": Arm(method="full", learning_rates=[1e-2], options=longer),
        "dora": Arm(method="dora", learning_rates=[1e-2]),
        "moslora": Arm(method="moslora", learning_rates=[1e-2]),
        "head": Arm(method="head", learning_rates=[1e-2]),
    }
    config = study_of(class_options, arms, command="classify", seeds=[0])
    result = run_study(config, tmp_path / "out", console=QUIET)
    assert result.metric == "accuracy"
    assert [arm.failures for arm in result.arms.values()] == [[]] * len(arms)
    for name in ("paca", "lora", "full"):
        assert result.arms[name].mean >= 0.9, name
    assert result.arms["head"].num_trainable_parameters == 2 * 32 + 2
    text = (tmp_path / "out" / "report.md").read_text()
    assert f"{100 * result.arms['paca'].mean:.2f}" in text


def test_diverged_run_is_a_failure(class_options, tmp_path):
    arms = {"paca": Arm(rank=4, learning_rates=[1e-2, 1e38])}
    config = study_of(class_options, arms, command="classify", seeds=[0])
    failures = run_study(config, tmp_path / "out", console=QUIET).arms["paca"].failures
    assert len(failures) == 1
    assert "TrainingDiverged: training diverged: the evaluation loss after step" in str(failures)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": ""}, r"`data.path` is ''; give a file, a folder or"),
        ({"num_train": 55}, r"`data.num_train` \(55\) must be at most 54"),
        ({"num_train": 0}, r"`data.num_train` \(0\) must be at least 1"),
        ({"max_length": 0}, r"`data.max_length` \(0\) must be at least 1"),
    ],
)
def test_classes_from_bad_data(class_options, change, message):
    options = {**class_options, "data": {**class_options["data"], **change}}
    with pytest.raises(ValueError, match=message):
        make_plan(study_of(options, {"paca": Arm(rank=2)}, command="classify"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"text": "apple"}', r"row 1 has text 'apple' and label None; a classifier needs both"),
        ('{"text": " ", "label": "a"}', r"row 1 has text ' ' and label 'a'"),
        ('{"text": "apple", "label": "a"}\n' * 20, r"has the labels \['a'\]; a classifier needs"),
    ],
)
def test_classes_from_bad_rows(class_options, row, message, tmp_path):
    (tmp_path / "rows.jsonl").write_text(row)
    data = {**class_options["data"], "path": str(tmp_path / "rows.jsonl")}
    with pytest.raises(ValueError, match=message):
        make_plan(study_of({**class_options, "data": data}, {"a": Arm(rank=2)}, command="classify"))


def test_classes_unknown_labels(class_options, tmp_path):
    (tmp_path / "test.jsonl").write_text('{"text": "apple", "label": "tree"}\n')
    data = {**class_options["data"], "eval_path": str(tmp_path / "test.jsonl")}
    plan = make_plan(
        study_of({**class_options, "data": data}, {"a": Arm(rank=2)}, command="classify")
    )
    with pytest.raises(ValueError, match=r"the labels \['tree'\] are not among those"):
        plan.task.run(plan.make_run("a", 1e-3, 0, tmp_path))


def test_images(tmp_path):
    save_vit(tmp_path / "vit")
    write_images(tmp_path / "images" / "train", 12)
    write_images(tmp_path / "images" / "test", 6, seed=1)
    options = {
        "model": {"path": str(tmp_path / "vit")},
        "data": {"path": str(tmp_path / "images"), "eval_per_class": 6},
        "training": {"max_steps": 6, "bf16": False, "use_cpu": True},
    }
    arms = {
        "paca": Arm(rank=8, learning_rates=[1e-2]),
        "lora": Arm(method="lora", learning_rates=[1e-2]),
        "head": Arm(method="head", learning_rates=[1e-2]),
    }
    config = study_of(options, arms, command="train-image", seeds=[0])
    result = run_study(config, tmp_path / "out", console=QUIET)
    assert [arm.failures for arm in result.arms.values()] == [[]] * 3
    assert result.metric == "accuracy"
    assert all(value * 18 == pytest.approx(round(value * 18)) for value in _values(result))
    plan = make_plan(config)
    key = key_of(plan.inputs(plan.make_run("paca", 1e-2, 0, tmp_path)))
    (tmp_path / "images").rename(tmp_path / "moved")
    options["data"]["path"] = str(tmp_path / "moved")
    config = study_of(options, arms, command="train-image", seeds=[0])
    plan = make_plan(config)
    assert key_of(plan.inputs(plan.make_run("paca", 1e-2, 0, tmp_path))) == key
    broken = next((tmp_path / "moved" / "test").rglob("*.png"))
    broken.write_bytes(b"no image")
    with pytest.raises(ValueError, match="images cannot be used"):
        run_study(config, tmp_path / "other", console=QUIET)
    without = {**options, "data": {"path": str(tmp_path / "moved" / "train")}}
    with pytest.raises(ValueError, match="a folder `test` beside `train`"):
        make_plan(study_of(without, arms, command="train-image"))


OVERLAP = "{} are also in the training data"


def warned_of(options, command, tmp_path, what):
    """Run one arm; its warning of `what` must be printed before any run, and in the report."""
    console = Console(file=io.StringIO(), width=300)
    arms = {"only": Arm(rank=2, learning_rates=[1e-3])}
    config = study_of(options, arms, command=command, seeds=[0])
    result = run_study(config, tmp_path / "out", console=console)
    expected = OVERLAP.format(what)
    (warning,) = [text for text in result.warnings if expected in text]
    printed = console.file.getvalue()
    assert printed.index(f"warning: {warning}") < printed.index("1/1  only")
    assert f"- {warning}\n" in (tmp_path / "out" / "report.md").read_text()
    again = run_study(config, tmp_path / "out", console=QUIET)
    assert warning in again.warnings


def test_texts_of_both_parts_are_a_warning(text_options, tmp_path, chats):
    rows = (chats / "train.jsonl").read_text().splitlines(keepends=True)
    test = tmp_path / "test.jsonl"
    test.write_text("".join(rows[:10]) + (chats / "test.jsonl").read_text())
    text_options["data"]["eval_path"] = str(test)
    warned_of(text_options, "train", tmp_path, "10 of 22 test examples")


def test_labelled_texts_of_both_parts_are_a_warning(class_options, tmp_path, labelled):
    class_options["data"]["eval_path"] = class_options["data"]["path"]
    warned_of(class_options, "classify", tmp_path, "60 of 60 test examples")


def test_images_of_both_parts_are_a_warning(tmp_path):
    save_vit(tmp_path / "vit")
    write_images(tmp_path / "images", 12)
    options = {
        "model": {"path": str(tmp_path / "vit")},
        "data": {"path": str(tmp_path / "images"), "eval_path": str(tmp_path / "images")},
        "training": {"max_steps": 1, "bf16": False, "use_cpu": True},
    }
    warned_of(options, "train-image", tmp_path, "36 of 36 test examples")


def test_parts_that_share_nothing_are_no_warning(text_options, tmp_path):
    arms = {"only": Arm(rank=2, learning_rates=[1e-3])}
    plan = make_plan(study_of(text_options, arms))
    plan.inputs(plan.make_run("only", 1e-3, 0, tmp_path))
    assert plan.task.warnings == []


def _values(result):
    return [value for arm in result.arms.values() for value in arm.values.values()]
