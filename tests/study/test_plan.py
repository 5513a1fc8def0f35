"""From a study to its runs: options, ranks, grids, and the keys that tell runs apart."""

import shutil
from pathlib import Path

import pytest
import yaml

from pacatune.study import Arm, StudyConfig
from pacatune.study.plan import key_of as plan_key
from pacatune.study.plan import make_plan
from pacatune.study.tasks import merged


def plan_of(options, arms=None, **values):
    arms = arms or {"paca": Arm(rank=4), "lora": Arm(method="lora")}
    return make_plan(StudyConfig(options=options, arms=arms, **values))


def run_of(options, name, arms=None):
    return plan_of(options, arms).make_run(name, 1e-3, 0, Path("x"))


def test_sections_are_merged_and_values_replaced():
    base = {"paca": {"r": 1, "rank_pattern": {"a": 1}}, "method": "paca"}
    over = {"paca": {"rank_pattern": {"b": 2}}, "lean": "off"}
    paca = {"r": 1, "rank_pattern": {"b": 2}}
    assert merged(base, over) == {"paca": paca, "method": "paca", "lean": "off"}
    assert base["paca"]["rank_pattern"] == {"a": 1}


def test_runs_have_what_the_arm_says(text_options, tmp_path):
    arms = {
        "paca": Arm(rank=4, selection="weight_norm", options={"paca": {"bias": "all"}}),
        "lora": Arm(method="lora", dropout=0.1, alpha=8, options={"lean": "off"}),
        "full": Arm(method="full"),
    }
    plan = plan_of(text_options, arms)
    run = plan.make_run("paca", 2e-3, 5, tmp_path)
    assert (run.method, run.paca.r, run.paca.paca_alpha) == ("paca", 4, 4)
    assert (run.paca.selection, run.paca.bias) == ("weight_norm", "all")
    assert (run.training.learning_rate, run.training.seed, run.paca.random_seed) == (2e-3, 5, 5)
    assert (run.data.eval_path, run.data.eval_fraction) == (None, 0.1)
    run = plan.make_run("lora", 1e-3, 5, tmp_path)
    assert (run.lora.r, run.lora.lora_alpha, run.lora.lora_dropout) == (4, 8, 0.1)
    assert run.lean == "off"
    assert plan.make_run("full", 1e-5, 0, tmp_path).method == "full"
    full, adapters = plan.arms["full"], plan.arms["lora"]
    assert full.rank is None
    # A third, once and three times the command's default.
    assert full.learning_rates == [3.3e-6, 1e-5, 3e-5]
    assert adapters.learning_rates == [6.7e-5, 2e-4, 6e-4]
    arms = {"a": Arm(rank=2, learning_rates=[3e-3, 1e-3]), "b": Arm(), "c": Arm(method="lora")}
    plan = plan_of(text_options, arms, learning_rates={"paca": [5e-3]}, seeds=[0, 1, 2, 3])
    assert plan.arms["a"].learning_rates == [1e-3, 3e-3]
    assert plan.arms["b"].learning_rates == [5e-3]
    assert plan.num_runs == (2 + 3) + (1 + 3) + (3 + 3)


def test_equal_parameters(text_options):
    """The reference's own number is met as nearly as one more column allows."""
    arms = {"lora": Arm(method="lora", rank=4), "paca": Arm(), "dora": Arm(method="dora")}
    plan = plan_of(text_options, arms, match="parameters")
    wanted, paca = plan.arms["lora"].num_trainable_parameters, plan.arms["paca"]
    assert paca.rank > 4
    num, per_column = paca.num_trainable_parameters, paca.num_trainable_parameters / paca.rank
    assert abs(num - wanted) <= per_column / 2
    assert plan.arms["dora"].rank == 4  # or it would train a fifth fewer
    same_rank = plan_of(text_options, arms)
    assert {arm.rank for arm in same_rank.arms.values()} == {4}


def test_keys(text_options, tmp_path):
    def key_of(options, **values):
        plan = plan_of(options, **values)
        return plan_key(plan.inputs(plan.make_run("paca", 1e-3, 0, Path("x"))))

    base = key_of(text_options)
    path, moved = tmp_path / "run.yaml", tmp_path / "moved"
    path.write_text(yaml.safe_dump(text_options))
    assert key_of({}, task=str(path)) == base
    shutil.copytree(Path(text_options["data"]["path"]).parent, moved)
    shutil.copytree(text_options["model"]["path"], tmp_path / "model")
    data = {"path": str(moved / "train.jsonl"), "eval_path": str(moved / "test.jsonl")}
    model = {"path": str(tmp_path / "model"), "dtype": "float32"}
    elsewhere = {**text_options, "data": data, "model": model}
    assert key_of(elsewhere) == base
    assert key_of(text_options, seeds=[0, 9], learning_rates={"lora": [1.0]}) == base
    longer = {**text_options, "training": {**text_options["training"], "max_steps": 3}}
    assert key_of(longer) != base
    assert key_of(text_options, validation_fraction=0.2) != base
    assert key_of(text_options, forgetting_tokens=512) != base
    lines = (moved / "test.jsonl").read_text().splitlines(keepends=True)
    (moved / "test.jsonl").write_text("".join(lines[1:]))
    assert key_of(elsewhere) != base


WITH_LORA = {"lora": {"use_rslora": True}}
SELECTING = {"a": Arm(method="lora", rank=2, selection="gradient")}
LARGE = {"lora": Arm(method="lora", rank=60), "paca": Arm()}


@pytest.mark.parametrize(
    ("change", "arms", "message"),
    [
        ({"metric": "accuracy"}, None, r"`metric` \('accuracy'\) is not measured by train"),
        ({}, {"head": Arm(method="head")}, r"arm 'head': `method` \('head'\) must be one of paca"),
        ({}, {"a": Arm(rank=0)}, r"arm 'a': .*`r` \(0\) must be"),
        ({}, {"a": Arm(rank=2, alpha=0)}, r"arm 'a': .*alpha"),
        ({}, {"a": Arm(rank=2, dropout=0.1)}, r"arm 'a': `lora.lora_dropout` \(0.1\) is an option"),
        ({}, SELECTING, r"arm 'a': `paca.selection` \('gradient'\) is an option of paca"),
        ({}, {"a": Arm(rank=2, options={"paca": {"rang": 1}})}, "arm 'a': .*unknown key 'paca.ran"),
        ({}, {"a": Arm(rank=2, options={"training": {"max_steps": "x"}})}, "arm 'a': .*max_steps"),
        ({}, {"a": Arm(rank=2, selection="best")}, r"arm 'a': .* \('best'\) is no strategy"),
        ({}, {"full": Arm(method="full"), "paca": Arm()}, r"arm 'paca': it has no `rank`"),
        ({"match": "parameters"}, LARGE, r"arm 'paca': no rank trains about as many parameters"),
        ({}, {"a": Arm(rank=4, options=WITH_LORA)}, r"arm 'a': `lora.use_rslora` \(True\) is an o"),
        ({"options": WITH_LORA}, {"a": Arm(rank=4)}, r"has the section 'lora', which only lora"),
        ({"options": {"early_stopping_patience": 2}}, None, r"patience` is set, but a study trai"),
        ({"options": {"data": {}}}, None, r"the task has no `data.eval_path`"),
        ({"task": "nowhere.yaml"}, None, r"`task` \('nowhere.yaml'\) is no file; name a"),
    ],
)
def test_what_does_not_fit_the_task(text_options, change, arms, message):
    options = {**text_options, **change.get("options", {})}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        plan_of(arms=arms, **{**change, "options": options})


def test_options_of_other_methods(text_options):
    """Options of all runs are for the arms that read them; an arm's must be its own."""
    options = {**text_options, "paca": {"bias": "all"}, **WITH_LORA}
    assert run_of(options, "paca").lora.use_rslora is False
    assert run_of(options, "lora").lora.use_rslora is True
    arms = {"a": Arm(method="paca", rank=4, options={"paca": {"random_seed": 2}})}
    run = run_of(text_options, "a", {**arms, "paca": Arm(rank=4)})
    assert run.paca.random_seed == run.adapter_options()["random_seed"] == 2
