"""A study: what it may say, what runs when, what is read back, what is measured and compared."""

import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from rich.console import Console

from examples.packaged.table import TASKS as PACKAGED_TASKS
from experiments.study.__main__ import main
from experiments.study.config import Arm, StudyConfig, read_study
from experiments.study.runner import run_study
from experiments.study.statistics import best_rate, compared, holm, rate_beyond, read_runs
from experiments.study.tasks import StudyTask, exact_match
from pacatune.training import train
from pacatune.training.sft import TextTrainer
from tests.conftest import build_model

ROOT = Path(__file__).parents[2]
ARMS = {"paca": Arm(rank=4), "lora": Arm(method="lora", rank=4)}
RATES = {name: [1e-3] for name in ("paca", "lora", "full")}


def study_of(options, arms=ARMS, **values):
    base = {"options": options, "arms": arms, "seeds": [0], "forgetting_tokens": 0}
    return StudyConfig(**{**base, "learning_rates": RATES, **values})


STUDY = {"task": "smollm2-chat", "arms": ARMS, "learning_rates": RATES}


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (Arm, {"method": "paka"}, r"`method` \('paka'\) must be one of paca"),
        (Arm, {"method": "full", "rank": 4}, r"`rank` \(4\): 'full' has none"),
        (Arm, {"method": "lora"}, r"`rank` \(None\): 'lora' needs a rank"),
        (Arm, {"method": "shira", "rank": 4, "alpha": 4}, r"`alpha` \(4\): 'shira' has none"),
        (StudyConfig, {"task": ""}, "`task` is ''; name a configuration's path"),
        (StudyConfig, {"arms": {}}, "`arms` is empty; name at least one"),
        (StudyConfig, {"seeds": [1, 1]}, r"`seeds` \(\[1, 1\]\) must be different"),
        (StudyConfig, {"tuning_seeds": 4}, r"at least `tuning_seeds` \(4\) of them"),
        (StudyConfig, {"metric": "speed"}, r"`metric` \('speed'\) must be one of auto"),
        (StudyConfig, {"learning_rates": {"sgd": [1e-3]}}, r"`learning_rates` \('sgd'\) must be"),
        (StudyConfig, {"learning_rates": {}}, r"arm 'paca': `learning_rates` \(\[\]\) must be"),
        (StudyConfig, {"rewind": [0.5, 1.0]}, r"shares of `rewind` \(\[0.5, 1.0\]\) must be above"),
        (StudyConfig, {"validation_fraction": 0.0}, r"`validation_fraction` \(0.0\)"),
    ],
)
def test_wrong_arms_and_studies(kind, values, message):
    with pytest.raises(ValueError, match=message):
        kind(**(STUDY if kind is StudyConfig else {}) | values)


def test_a_study_is_read(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(
        "task: run.yaml\nlearning_rates: {full: [1e-5]}\nseeds: [3, 4]\n"
        "arms: {paca: {rank: 4, learning_rates: [2e-3, 1e-3]}, full: {method: full}}\n"
    )
    study = read_study(path)
    assert study.arms["paca"] == Arm(rank=4, learning_rates=[2e-3, 1e-3])
    assert study.arms["full"] == Arm(method="full")
    assert (study.rates_of("paca"), study.rates_of("full")) == ([1e-3, 2e-3], [1e-5])
    path.write_text("arms: {paca: {rang: 4}}")
    with pytest.raises(ValueError, match=r"arm 'paca': unknown key 'rang'; did you mean 'rank'"):
        read_study(path)
    path.write_text("arm: {}")
    with pytest.raises(ValueError, match=r"unknown key 'arm'; did you mean 'arms'"):
        read_study(path)


@pytest.mark.parametrize("name", ["minilm", "smollm2-words", "smollm2-sort"])
def test_the_committed_studies_name_packaged_tasks_and_options_that_there_are(name, tmp_path):
    study = read_study(ROOT / "experiments" / "study" / f"{name}.yaml")
    packaged = PACKAGED_TASKS[Path(study.task).stem].options
    data = {"path": "train.jsonl", "eval_path": "test.jsonl", **packaged.get("data", {})}
    study.task, study.options = "", {"model": {"path": "m"}, **study.options, "data": data}
    task = StudyTask(study)
    for arm in study.arms.values():
        assert task.make_run(arm, 1e-3, 0, tmp_path).method == arm.method


def test_runs_have_what_the_arm_says(text_options, tmp_path):
    """Options of all runs are for the arms that read them."""
    rslora = {"lora": {"use_rslora": True}}
    task = StudyTask(study_of(text_options | {"paca": {"bias": "all"}} | rslora))
    run = task.make_run(
        Arm(rank=4, options={"paca": {"selection": "weight_norm"}}), 2e-3, 5, tmp_path
    )
    assert (run.method, run.paca.r, run.paca.paca_alpha) == ("paca", 4, 4)
    assert (run.paca.selection, run.paca.bias, run.lora.use_rslora) == ("weight_norm", "all", False)
    assert (run.training.learning_rate, run.training.seed, run.paca.random_seed) == (2e-3, 5, 5)
    assert (run.data.eval_path, run.data.eval_fraction) == (None, 0.1)
    run = task.make_run(
        Arm(method="lora", rank=4, alpha=8, options={"lean": "off"}), 1e-3, 5, tmp_path
    )
    assert (run.lora.r, run.lora.lora_alpha, run.lora.use_rslora, run.lean) == (4, 8, True, "off")
    assert task.make_run(Arm(method="full"), 1e-5, 0, tmp_path).method == "full"
    del text_options["data"]["eval_path"]
    with pytest.raises(ValueError, match=r"the task has no `data.eval_path`"):
        StudyTask(study_of(text_options))


def scripted_run(task, config):
    """Validation is best at a rate of 1e-3, test at 4e-3; LoRA is worse by 0.5."""
    rate, seed = config.training.learning_rate, config.training.seed
    base = seed * 0.01 + (0.5 + 0.002 * seed**2 if config.method == "lora" else 0)
    scripted_run.runs.append((config.method, rate, seed))
    if scripted_run.fails(config):
        raise ValueError("out of luck")
    return {"validation loss": base + abs(rate - 1e-3), "test loss": base + 1 + abs(rate - 4e-3)}


@pytest.fixture
def scripted(monkeypatch):
    """Let studies run by a formula; returns what has run, which grows."""
    scripted_run.runs, scripted_run.fails = [], lambda config: False
    monkeypatch.setattr(StudyTask, "run", scripted_run)
    return scripted_run.runs


GRIDS = {"paca": [5e-4, 1e-3, 4e-3], "lora": [1e-3, 4e-3]}


def test_rates_are_chosen_on_validation_data_and_reported_on_test_data(
    scripted, text_options, tmp_path
):
    config = study_of(text_options, seeds=[0, 1, 2], learning_rates=GRIDS)
    out, lines = tmp_path / "first", []
    results = run_study(config, out, lines.append)
    rates = [("paca", 5e-4), ("lora", 1e-3), ("paca", 1e-3), ("lora", 4e-3), ("paca", 4e-3)]
    # Then the other seeds at the best rate: 4e-3 would be best on test data.
    rest = [(arm, 1e-3, seed) for seed in (1, 2) for arm in ("paca", "lora")]
    assert scripted == [(*pair, 0) for pair in rates] + rest
    paca, lora = results["paca"], results["lora"]
    assert paca.learning_rate == lora.learning_rate == 1e-3
    assert paca.values == pytest.approx({0: 1.003, 1: 1.013, 2: 1.023})
    assert paca.mean == pytest.approx(1.013)
    assert lines[0] == "paca-0.0005-0: validation loss 0.0005"
    report = (out / "report.md").read_text()
    assert "| lora | 0.001 | 3 | 1.5163 ± 0.0349 | +0.5033 ± 0.0103 | worse |" in report
    assert len(read_runs(out / "runs.csv")["first"]["paca"]) == 5
    # Finished runs are read back; a study with one more seed has just that to do.
    assert run_study(config, out, lines.append) == results
    assert len(scripted) == 9
    run_study(study_of(text_options, seeds=[0, 1, 2, 3], learning_rates=GRIDS), out, lines.append)
    assert scripted[9:] == [("paca", 1e-3, 3), ("lora", 1e-3, 3)]
    # What a table has of the study is not done again either.
    known = read_runs(out / "runs.csv")["first"]
    seeds = study_of(text_options, seeds=[0, 1, 2, 3, 4], learning_rates=GRIDS)
    assert run_study(seeds, tmp_path / "other", lines.append, known)["paca"].runs[2]["seed"] == 2
    assert scripted[11:] == [("paca", 1e-3, 4), ("lora", 1e-3, 4)]
    assert len(read_runs(tmp_path / "other" / "runs.csv")["other"]["paca"]) == 7
    # Other options are other runs.
    longer = text_options | {"training": {**text_options["training"], "max_steps": 3}}
    run_study(study_of(longer, learning_rates=GRIDS), out, lines.append)
    assert len(scripted) == 13 + 5


def test_grids_are_extended_at_their_edges(scripted, text_options, tmp_path):
    config = study_of(text_options, learning_rates={"paca": [4e-3, 8e-3], "lora": [1e-3]})
    config.extend_grids = 3
    results = run_study(config, tmp_path / "out", lambda line: None)
    tried = [rate for method, rate, _ in scripted if method == "paca"]
    assert tried == [4e-3, 8e-3, 2e-3, 1e-3, 5e-4]
    assert results["paca"].learning_rate == 1e-3


def test_what_fails_is_said_and_done_again(scripted, text_options, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scripted_run, "fails", lambda config: config.method == "lora")
    path = tmp_path / "study.yaml"
    arms = {"paca": {"rank": 4}, "lora": {"method": "lora", "rank": 4}}
    values = {"options": text_options, "arms": arms, "learning_rates": RATES, "seeds": [0]}
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    words = [str(path), "--output", str(tmp_path / "out")]
    assert main(words) == 1
    printed = capsys.readouterr().out
    assert "Failed: lora-0.001-0: ValueError: out of luck" in printed
    assert printed.splitlines()[-1].startswith("wrote ")
    monkeypatch.setattr(scripted_run, "fails", lambda config: False)
    assert main(words) == 0
    assert scripted == [("paca", 1e-3, 0), ("lora", 1e-3, 0), ("lora", 1e-3, 0)]
    path.write_text("arms: {}\ntask: x")
    assert main(words) == 2
    assert capsys.readouterr().err.startswith("error: `arms` is empty")


def runs(losses, rate=1e-3, validation=1.0):
    return [
        {"learning rate": rate, "seed": seed, "validation loss": validation, "test loss": loss}
        for seed, loss in enumerate(losses)
    ]


def test_the_rate_is_chosen_by_validation_over_the_seeds_that_three_rates_have():
    near = [0.50, 0.54, 0.46, 0.52, 0.48]
    rates = [runs(near[:3], 1e-3, 0.5), runs(near, 2e-3, 0.4), runs(near[:3], 4e-3, 0.6)]
    # Their third seed failed; those beyond it left after the first stage.
    others = [runs(near[:2], rate, 0.1) for rate in (8e-3, 16e-3)]
    assert best_rate([run for some in (*rates, *others) for run in some]) == 2e-3
    # Where one of three has failed, the others have what chooses.
    assert best_rate([*runs(near[:1], 1e-3, 0.5), *runs(near[:1], 2e-3, 0.4)]) == 2e-3
    assert best_rate([]) is None
    grid = [1e-3, 3e-3, 9e-3]
    assert [rate_beyond(rate, grid) for rate in (*grid, None)] == [3.33e-4, None, 2.7e-2, None]
    assert rate_beyond(1e-3, [1e-3]) is None


def test_better_worse_and_no_significant_difference():
    losses = {"a": [0.5, 0.54, 0.46], "b": [0.4, 0.441, 0.359], "c": [0.55, 0.5, 0.5], "d": [0.5]}
    arms = {name: dict(enumerate(runs(some))) for name, some in losses.items()}
    differences = compared(arms, [("a", "b"), ("b", "a"), ("a", "c"), ("a", "d"), ("a", "a")])
    said = {pair: difference.said for pair, difference in differences.items()}
    same = dict.fromkeys([("a", "c"), ("a", "a")], "no significant difference")
    assert said == {("a", "b"): "worse", ("b", "a"): "better", **same}
    assert differences["a", "b"].mean == pytest.approx(0.1)
    assert 0 < differences["a", "b"].half_interval < 0.01
    (scores,) = compared(arms, [("a", "b")], less_is_better=False).values()
    assert scores.said == "better"
    # 3, 2 and 1 times; rising.
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx(
        {"a": 0.03, "c": 0.06, "b": 0.06}
    )


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
    batches = [
        {"input_ids": ids[r], "labels": labels[r], "attention_mask": torch.ones_like(ids[r])}
        for r in rows
    ]
    accelerator = SimpleNamespace(autocast=nullcontext, unwrap_model=lambda model: model)
    trainer = SimpleNamespace(model=model, accelerator=accelerator, get_eval_dataloader=list)
    assert exact_match(trainer, batches) == 0.5


def test_measures_are_those_of_the_recipe(text_options, tmp_path):
    """The same run by `pacatune train`, by TRL's loss, evaluating on what is held out here."""
    task = StudyTask(study_of(text_options, metric="exact_match"))
    measured = task.run(task.make_run(ARMS["paca"], 1e-2, 0, tmp_path))
    assert 0 <= measured["test exact_match"] <= 1
    assert measured["step, ms"] > 0
    assert measured["kept for backward, bytes"] > 0
    config = task.make_run(ARMS["paca"], 1e-2, 0, tmp_path / "a")
    report = train(config, console=Console(quiet=True))
    assert measured["validation loss"] == pytest.approx(report.eval_loss_after, rel=1e-5)
    assert measured["trained parameters"] == report.num_trainable_parameters
    assert measured["train loss"] == pytest.approx(report.train_loss, rel=1e-5)
    assert measured["test loss"] != measured["validation loss"]


def test_what_is_forgotten_and_an_update_that_is_rewound(text_options, chats, tmp_path):
    shares = [1e-9, 0.5, 1 - 1e-9]
    more = {"unrelated": str(chats / "test.jsonl"), "rewind": shares, "forgetting_tokens": 256}
    task = StudyTask(study_of(text_options, **more))
    # GraLoRA's layers cannot be told to scale; MiSS has no scale.
    others = {name: Arm(method=name, rank=rank) for name, rank in (("gralora", 4), ("miss", 1))}
    for name, arm in {"paca": ARMS["paca"], **others}.items():
        numbers = task.run(task.make_run(arm, 3e-2, 0, tmp_path))
        if name == "miss":
            assert not any("at" in what.split() for what in numbers)
            continue
        for what in ("general loss", "unrelated loss"):
            none, half, whole = (numbers[f"{what} at {share:g}"] for share in shares)
            assert none == pytest.approx(numbers[f"{what} before"], abs=1e-6)
            assert whole == pytest.approx(numbers[f"{what} after"], abs=1e-6)
            assert half not in (none, whole)
        assert numbers["test loss at 1"] == pytest.approx(numbers["test loss"], abs=1e-6)


def test_all_arms_see_the_same_batches(text_options, tmp_path, monkeypatch):
    """Which is what pairs their results by seed."""
    step, seen = TextTrainer.training_step, []

    def remember(self, model, inputs, *args, **kwargs):
        seen[-1].append(inputs["input_ids"].tolist())
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(TextTrainer, "training_step", remember)
    lora = Arm(method="lora", rank=2, options={"lora": {"lora_dropout": 0.5}})
    task, full = StudyTask(study_of(text_options)), Arm(method="full")
    for arm, seed in ((Arm(rank=2), 0), (lora, 0), (full, 0), (Arm(rank=2), 1)):
        seen.append([])
        task.run(task.make_run(arm, 1e-3, seed, tmp_path))
    assert len(seen[0]) == 2
    assert seen[0] == seen[1] == seen[2] != seen[3]


def test_classes(class_options, tmp_path):
    """Words tell the classes apart, which three methods are given the steps to learn."""
    longer = {"training": {"max_steps": 60}}
    arms = {"paca": Arm(rank=32, options=longer), "full": Arm(method="full", options=longer)}
    arms |= {"lora": Arm(method="lora", rank=32, options=longer), "head": Arm(method="head")}
    arms["diverging"] = Arm(rank=4, learning_rates=[1e38])
    rates = {name: [1e-2] for name in ("paca", "full", "lora", "head")}
    more = {"command": "classify", "forgetting_tokens": 100_000, "learning_rates": rates}
    results = run_study(study_of(class_options, arms, **more), tmp_path / "out", lambda line: None)
    (failure,) = results.pop("diverging").failures
    assert "TrainingDiverged: training diverged: the loss of step 2" in failure
    for name, result in results.items():
        (run,) = result.runs.values()
        assert result.failures == []
        assert result.mean == run["test accuracy"] >= (0.9 if name != "head" else 0)
        rise = run["general loss after"] - run["general loss before"]
        assert math.isfinite(rise)
        assert (rise == 0) == (name == "head")
