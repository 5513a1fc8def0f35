"""Real runs on tiny models: texts, classes, images; what is measured, and fairness."""

import math
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from pacatune.study import Arm, StudyConfig
from pacatune.study.plan import key_of, make_plan
from pacatune.study.tasks import exact_match
from pacatune.training import train
from pacatune.training.sft import TextTrainer
from tests.conftest import build_model
from tests.study.conftest import TWO_STEPS, run

RSLORA = {"lora": {"use_rslora": True}}


def study_of(options, arms, **values):
    base = {"options": options, "arms": arms, "seeds": [0], "forgetting_tokens": 0}
    return StudyConfig(**{**base, **values})


def at_rate(rate, **methods):
    """Arms by name that try one rate."""
    return {name: Arm(learning_rates=[rate], **values) for name, values in methods.items()}


def test_texts(text_options, tmp_path):
    """Columns, columns chosen by gradient, factors, every weight."""
    gradient = {"selection": "gradient", "options": {"paca": {"selection_batches": 2}}}
    methods = {"paca": {"rank": 4}, "gradient": gradient, "dora": {"method": "dora"}}
    arms = at_rate(1e-2, **methods) | at_rate(1e-3, full={"method": "full"})
    result, _ = run(study_of(text_options, arms, forgetting_tokens=512), tmp_path / "out")
    assert result.metric == "loss"
    for arm in result.arms.values():
        assert not arm.failures
        assert all(math.isfinite(value) for value in arm.values.values())
        assert arm.forgetting not in (None, 0)


def test_bases_of_few_bits(text_options, tmp_path):
    pytest.importorskip("bitsandbytes")
    arms = {"qpaca": Arm(method="qpaca", rank=4), "qlora": Arm(method="qlora")}
    plan = make_plan(study_of(text_options, arms))
    for name in arms:
        config = plan.make_run(name, 1e-3, 0, tmp_path)
        assert config.settled().model.quantization == "nf4"
        measured = plan.task.run(config)
        assert math.isfinite(measured["test loss"])
        assert measured["trained parameters"] == plan.arms[name].num_trainable_parameters


def test_exact_matches_are_those_of_greedy_decoding():
    """Answers that the model itself has generated match; changed in one token, they do not."""
    model = build_model(40, eos_token_id=None).train()
    prompts = torch.randint(3, 40, (4, 5), generator=torch.Generator().manual_seed(0))
    ids = model.generate(prompts, max_new_tokens=4, do_sample=False)
    ids[1, 5] = (ids[1, 5] + 1) % 40  # the first token of its answer
    ids[2, -1] = (ids[2, -1] + 1) % 40
    ids[3, -1] = (ids[3, -1] + 1) % 40  # is not learned
    labels = ids.where(torch.arange(9) >= 5, -100)
    labels[3, -1] = -100
    rows = slice(3), slice(3, None)
    batches = [{"input_ids": ids[some], "labels": labels[some]} for some in rows]
    accelerator = SimpleNamespace(autocast=nullcontext)
    trainer = SimpleNamespace(model=model, accelerator=accelerator, get_eval_dataloader=list)
    assert exact_match(trainer, batches) == 0.5


def test_measures_are_those_of_the_recipe(text_options, tmp_path):
    """The same run by `pacatune train`, evaluating on what is held out here."""
    plan = make_plan(study_of(text_options, {"paca": Arm(rank=4)}, metric="exact_match"))
    assert plan.higher_is_better
    config = plan.make_run("paca", 1e-2, 0, tmp_path)
    measured = plan.task.run(config)
    assert 0 <= measured["test exact_match"] <= 1
    assert measured["step"] > 0
    assert measured["kept for backward"] > 0
    # A run that did not measure it is another one; the rest is the same.
    by_loss = make_plan(study_of(text_options, {"paca": Arm(rank=4)}))
    assert key_of(plan.inputs(config)) != key_of(by_loss.inputs(config))
    same = by_loss.task.run(by_loss.make_run("paca", 1e-2, 0, tmp_path))
    rest = {k: v for k, v in measured.items() if "exact" not in k and k != "step"}
    assert {k: v for k, v in same.items() if k != "step"} == rest
    (warning,) = by_loss.task.warnings  # the parts share nothing
    assert "are texts that are trained without the chat template" in warning
    report = train(plan.make_run("paca", 1e-2, 0, tmp_path / "a"), console=Console(quiet=True))
    assert measured["validation loss"] == pytest.approx(report.eval_loss_after, rel=1e-5)
    assert measured["trained parameters"] == report.num_trainable_parameters
    assert measured["train loss"] == pytest.approx(report.train_loss, rel=1e-5)
    assert measured["test loss"] != measured["validation loss"]


def test_what_is_forgotten_and_an_update_that_is_rewound(text_options, chats, tmp_path):
    unrelated, shares = str(chats / "both.jsonl"), [1e-9, 0.5, 1 - 1e-9]
    arms = {"paca": Arm(rank=4), "rslora": Arm(method="lora", rank=4, options=RSLORA)}
    arms["gralora"] = Arm(method="gralora", rank=4)  # whose layers cannot be told to scale
    arms["miss"] = Arm(method="miss", rank=1)
    more = {"unrelated": unrelated, "rewind": shares, "forgetting_tokens": 256}
    plan = make_plan(study_of(text_options, arms, metric="exact_match", choose_by="loss", **more))
    for name in arms:
        run = plan.make_run(name, 3e-2, 0, tmp_path)
        found = plan.task.run(run)
        assert "test exact_match" in found
        assert "validation exact_match" not in found  # nothing asks for it
        if name == "miss":
            assert not any("at" in what.split() for what in found)
            continue
        for what in ("general loss", "unrelated loss"):
            none, half, whole = (found[f"{what} at {share:g}"] for share in shares)
            assert none == pytest.approx(found[f"{what} before"], abs=1e-6)
            assert whole == pytest.approx(found[f"{what} after"], abs=1e-6)
            assert half not in (none, whole)
        assert found["test loss at 1"] == pytest.approx(found["test loss"], abs=1e-6)
    with pytest.raises(FileNotFoundError, match=r"`unrelated` \('none.jsonl'\) is no file; name"):
        make_plan(study_of(text_options, arms, unrelated="none.jsonl"))
    plain = make_plan(study_of(text_options, arms, metric="exact_match"))
    keys = {key_of(one.inputs(one.make_run("paca", 3e-2, 0, tmp_path))) for one in (plan, plain)}
    assert len(keys) == 2


def test_what_no_run_has_changed_is_measured_once_for_each_method(text_options, chats, tmp_path):
    arms = {"paca": Arm(rank=4), "more": Arm(rank=8), "lora": Arm(method="lora", rank=4)}
    more = {"unrelated": str(chats / "both.jsonl"), "forgetting_tokens": 256}
    plan, found = make_plan(study_of(text_options, arms, **more)), {}
    ask, asked = plan.task._others, []
    plan.task._others = lambda *given: asked.append(given[-1]) or ask(*given)
    for name, seed in (("paca", 0), ("paca", 1), ("more", 0), ("lora", 0)):
        found[name, seed] = plan.task.run(plan.make_run(name, 3e-2, seed, tmp_path))
    assert asked == ["before", "after", "after", "after", "before", "after"]
    for what in ("general loss before", "unrelated loss before"):
        (value,) = {round(numbers[what], 6) for numbers in found.values()}
        alone = make_plan(study_of(text_options, arms, **more)).task
        own = alone.run(plan.make_run("more", 3e-2, 1, tmp_path))[what]
        assert own == pytest.approx(value, abs=1e-6)


def test_all_arms_see_the_same_batches(text_options, tmp_path, monkeypatch):
    step, seen = TextTrainer.training_step, []

    def remember(self, model, inputs, *args, **kwargs):
        seen[-1].append(inputs["input_ids"].tolist())
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(TextTrainer, "training_step", remember)
    lora = Arm(method="lora", dropout=0.5)
    arms = {"paca": Arm(rank=2), "lora": lora, "full": Arm(method="full")}
    plan = make_plan(study_of(text_options, arms, seeds=[0, 1]))
    for name, seed in (("paca", 0), ("lora", 0), ("full", 0), ("paca", 1)):
        seen.append([])
        plan.task.run(plan.make_run(name, 1e-3, seed, tmp_path))
    assert len(seen[0]) == 2
    assert seen[0] == seen[1] == seen[2] != seen[3]


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # of PEFT's SHiRA
def test_classes(class_options, tmp_path):
    """Words tell the classes apart, which three methods are given the steps to learn."""
    longer = {"options": {"training": {"max_steps": 60}}}
    learning = {"paca": {"rank": 32}, "lora": {"method": "lora"}, "full": {"method": "full"}}
    names = ("dora", "shira", "gralora", "miss", "oft", "head")
    others = {name: {"method": name} for name in names}
    others["shira"]["rank"] = 8  # has as many parameters as LoRA, no more than a weight
    arms = at_rate(1e-2, **{name: one | longer for name, one in learning.items()}, **others)
    arms["diverging"] = Arm(rank=4, learning_rates=[1e38])
    config = study_of(class_options, arms, command="classify", forgetting_tokens=100_000)
    result, _ = run(config, tmp_path / "out")
    assert result.metric == "accuracy"
    (failure,) = result.arms.pop("diverging").failures
    assert "TrainingDiverged: training diverged: the loss of step 2" in failure
    assert [arm.failures for arm in result.arms.values()] == [[]] * 10
    for name in learning:
        assert result.arms[name].mean >= 0.9, name
    assert result.arms["head"].num_trainable_parameters == 2 * 32 + 2
    assert result.arms["head"].forgetting == 0
    assert result.arms["full"].forgetting != 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert f"{100 * result.arms['paca'].mean:.2f}" in text


@pytest.fixture
def image_options(vit_dir, images_dir, tmp_path):
    data = {"path": str(shutil.copytree(images_dir, tmp_path / "images")), "eval_per_class": 6}
    training = {**TWO_STEPS, "max_steps": 6}
    return {"model": {"path": str(vit_dir)}, "data": data, "training": training}


def test_images(image_options, tmp_path):
    others = {name: {"method": name} for name in ("lora", "head")}
    arms = at_rate(1e-2, paca={"rank": 8}, **others)

    def key(path):
        image_options["data"]["path"] = str(path)
        plan = make_plan(study_of(image_options, arms, command="train-image"))
        return key_of(plan.inputs(plan.make_run("paca", 1e-2, 0, tmp_path)))

    config = study_of(image_options, arms, command="train-image")
    result, _ = run(config, tmp_path / "out")
    assert [arm.failures for arm in result.arms.values()] == [[]] * 3
    assert result.metric == "accuracy"
    means = [18 * arm.mean for arm in result.arms.values()]
    assert means == pytest.approx([round(mean) for mean in means])  # of 18 test images
    before = key(tmp_path / "images")
    (tmp_path / "images").rename(tmp_path / "moved")
    assert key(tmp_path / "moved") == before
    broken = next((tmp_path / "moved" / "test").rglob("*.png"))
    broken.write_bytes(b"no image")
    with pytest.raises(ValueError, match="images cannot be used"):
        key(tmp_path / "moved")
    del image_options["data"]["eval_per_class"]
    with pytest.raises(ValueError, match="a folder `test` beside `train`"):
        key(tmp_path / "moved" / "train")


OVERLAPS = {"text": ("train", "10 of 22"), "class": ("classify", "60 of 60")}
OVERLAPS |= {"image": ("train-image", "18 of 18")}


@pytest.mark.parametrize("kind", OVERLAPS)
def test_examples_of_both_parts_are_a_warning(kind, request, tmp_path, chats):
    """It is printed before any run, and in the report."""
    command, overlap = OVERLAPS[kind]
    options = request.getfixturevalue(f"{kind}_options")
    part = options["data"]["path"] + ("/train" if kind == "image" else "")
    other = str(chats / "both.jsonl") if kind == "text" else part
    options["data"] |= {"path": part, "eval_path": other}
    config = study_of(options, at_rate(1e-3, only={"rank": 2}), command=command)
    result, printed = run(config, tmp_path / "out")
    expected = f"{overlap} test examples are also in the training data"
    (warning,) = [text for text in result.warnings if expected in text]
    printed = printed.getvalue()
    assert printed.index(f"warning: {warning}") < printed.index("1/1  only")
    assert f"- {warning}\n" in (tmp_path / "out" / "report.md").read_text()
    assert warning in run(config, tmp_path / "out")[0].warnings
